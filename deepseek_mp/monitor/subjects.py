"""The layers that statistics are about, and their tensors as the matrices that a product reads."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor, nn

from deepseek_mp.nn import units
from deepseek_mp.nn.lazy import Lazy
from deepseek_mp.nn.unit import CONVOLUTIONS, original_class

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_INPUTS_FIRST = "transformers.pytorch_utils.Conv1D"
"""A linear layer whose weight is [inputs, outputs]."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A unit with a weight of two dimensions or more; vectors, as norms have them, stay in FP32 anyway."""

    index: int
    """Its place among all subjects."""
    name: str
    module: nn.Module
    parameter: str
    """The name of its weight among its own parameters."""

    @property
    def weight(self) -> Tensor:
        """As it is now: moving a model may replace its parameters, and `torch.func.functional_call` lends tensors."""
        found: Tensor = getattr(self.module, self.parameter)
        return found

    @property
    def kind(self) -> type[nn.Module]:
        return original_class(self.module)


def subjects_of(model: nn.Module) -> list[Subject]:
    """The subjects of a model in its order; the part of a name that `torch.compile` adds is left out."""
    found: list[Subject] = []
    for name, module in units(model).items():
        parameter = _main_weight(module)
        if parameter is not None:
            shown = ".".join(part for part in name.split(".") if part != "_orig_mod")
            found.append(Subject(index=len(found), name=shown, module=module, parameter=parameter))
    return found


def _main_weight(module: nn.Module) -> str | None:
    """`weight`, or the first parameter of its own that is a matrix."""
    own = [name for name, p in module.named_parameters(recurse=False) if p.dim() > 1 and p.is_floating_point()]
    return "weight" if "weight" in own else next(iter(own), None)


class Choice:
    """Which rows of the tensors of one step are looked at: every so-manieth from a random one on."""

    def __init__(self, rows: int, seed: int) -> None:
        self._rows = rows
        self._random = Random(seed)

    def of(self, count: int, *, run: int = 1) -> range:
        """Starts of runs of `run` rows, of `count`; at least one, and no more rows than are asked for beyond it.

        An odd stride meets all positions of sequences whose length is a power of two.
        """
        runs, wanted = max(1, count // run), max(1, self._rows // run)
        wanted = min(runs, wanted)
        stride = runs // wanted
        stride -= stride % 2 == 0
        start = self._random.randrange(runs - (wanted - 1) * stride)
        return range(start * run, start * run + wanted * stride * run, stride * run)


def is_plain(tensor: Tensor) -> bool:
    """Whether it is a dense tensor of this package's or PyTorch's own kind; others have operations of their own."""
    return tensor.layout == torch.strided and type(tensor) in (Tensor, nn.Parameter, Lazy)


def activation_rows(x: Tensor, subject: Subject, choice: Choice) -> Tensor:
    """Rows [n, channels] of the input of a layer, or of its output's gradient, whatever lies before the channels."""
    if subject.kind in CONVOLUTIONS:
        spatial = len(subject.module.kernel_size)  # type: ignore[arg-type]
        x = x.movedim(x.dim() - spatial - 1, -1)
    if x.dim() < 2:
        return x.reshape(1, -1)
    lead = x.shape[:-1]
    count = lead.numel()
    if not count:
        return x.reshape(0, x.shape[-1])
    rows = choice.of(count)
    if x.is_contiguous():
        return x.view(count, -1)[rows.start : rows.stop : rows.step]
    place = torch.arange(rows.start, rows.stop, rows.step, device=x.device)  # a copy of the whole would be large
    parts: list[Tensor] = []
    for size in reversed(lead):
        parts.append(place % size)
        place = place // size
    return x[tuple(reversed(parts))]


def weight_rows(weight: Tensor, subject: Subject, starts: range, run: int) -> Tensor:
    """Rows [n, inputs] of a weight, or of what has its shape; each row makes one output. A copy."""
    matrix = outputs_first(weight, subject)
    if run == 1:
        return matrix[starts.start : starts.stop : starts.step].flatten(1).clone()
    return torch.cat([matrix[start : start + run] for start in starts]).flatten(1)


def outputs_first(weight: Tensor, subject: Subject) -> Tensor:
    """The weight with the outputs along its first dimension."""
    kind = subject.kind
    if kind in _TRANSPOSED or f"{kind.__module__}.{kind.__qualname__}" == _INPUTS_FIRST:
        return weight.transpose(0, 1)
    return weight
