"""An FP32 master and the parameter that is rounded from it: what was written into the parameter is taken over."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepseek_mp.errors import ConfigError, explain


@dataclass(eq=False)
class Pair:
    """A parameter and its master, which may be itself."""

    parameter: nn.Parameter
    master: nn.Parameter
    """fp32, in the shape of the parameter. Its `grad` is the accumulated gradient, or None."""
    group: int
    """Index of its group."""

    def __post_init__(self) -> None:
        self.born = (self.parameter.device, self.parameter.dtype)
        self._seen = (-1, -1)
        self._is_new = True

    def look(self) -> None:
        """Remember the parameter's values as those that the master stands for."""
        self._is_new = False
        self._seen = (self.parameter._version, self.parameter.data_ptr())

    def forget(self) -> None:
        """Take the parameter's values as written by others."""
        self._seen = (-1, -1)

    @property
    def written(self) -> bool:
        """Whether others have written into the parameter."""
        now = (self.parameter._version, self.parameter.data_ptr())
        return self.parameter is not self.master and now != self._seen

    @torch.no_grad()
    def adopt(self, base: Tensor | None = None) -> None:
        """Take over what others wrote into the parameter; where its values are those it was given, the master stays.

        Args:
            base: the master that the parameter was given values of, where it has gone on since.
        """
        if not self.written:
            return
        if self._is_new:  # nothing to compare with, which takes several passes
            self.master.copy_(self.parameter)
            self.look()
            return
        written = self.parameter.detach().to(self.master.device, torch.float32)
        given = self.master.detach() if base is None else base
        same = given.to(self.parameter.dtype).float() == written
        self.master.copy_(torch.where(same, self.master, written))
        self.look()

    def check_place(self) -> None:
        """`ConfigError` if the parameter is no longer what it was when the optimizer was made."""
        now = (self.parameter.device, self.parameter.dtype)
        if now != self.born:
            passed = f"a parameter that was moved from {self.born[0]} {self.born[1]} to {now[0]} {now[1]}"
            change = "Move or convert the model first, then make the optimizer, and load the old one's state_dict"
            raise ConfigError(explain(passed, "the device and dtype of the time when the optimizer was made", change))

    def check_gradient(self, gradient: Tensor) -> None:
        """`ConfigError` if the gradient cannot be sent or added."""
        self.check_place()
        if gradient.layout != torch.strided:
            passed = f"a gradient of layout {gradient.layout}"
            raise ConfigError(explain(passed, "dense gradients", "Build the embedding with sparse=False"))
