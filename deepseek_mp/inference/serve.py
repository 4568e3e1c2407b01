"""A model in one of its forms: a copy, whose inputs and outputs are those of the original."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from deepseek_mp.backends import math_mode
from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.inference.archive import save
from deepseek_mp.inference.card import Card
from deepseek_mp.inference.form import Form
from deepseek_mp.inference.onnx_export import export_onnx
from deepseek_mp.inference.quantised_linear import linear_layers, quantised
from deepseek_mp.nn.nested import map_leaves
from deepseek_mp.nn.own_code import with_own_code

NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Formats in which all is kept and multiplied."""
_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


class Served(nn.Module):
    """Calls the copy as the original is called, without gradients.

    Tensors of floating type go in as the form has them and come out in FP32, unless the original's are FP64.

    Raises:
        ConfigError: the model cannot be copied, its BatchNorms cannot be folded, or it has no linear layer for weights
            in 8 bits.
    """

    left_alone: dict[str, str]
    """Linear layers that a form with weights in 8 bits leaves as they are, by name, with the reason."""
    card: Card | None = None
    """What was measured of it, where `optimize_for_inference` made it."""
    example_inputs: Any = None
    """Those that it was measured with."""

    def __init__(self, model: nn.Module, form: Form, device: torch.device) -> None:
        super().__init__()
        self.form, self.device = form, device
        self.model = _formed(copied(model).eval(), form)
        self.name = type(model).__name__
        self.left_alone = linear_layers(self.model)[1] if form.weights else {}
        self._call: Any = self._compiled() if form.compiled else self._converted

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        fp32: Any = self.form.format if self.form.format in ("tf32", "hf32") else "ieee"
        with torch.no_grad(), math_mode(self.device, fp32=fp32, search=True):
            return self._call(args, kwargs)

    def train(self, mode: bool = True) -> Served:
        """Refused: BatchNorms and dropout are those of evaluation here."""
        if mode:
            passed = f"train() of a model served in {self.form.name}"
            raise ConfigError(explain(passed, "inference", "Train the original model, and serve it again"))
        super().train(False)
        return self

    def save(self, path: str | Path, example_inputs: Any = None, *, dynamic: Sequence[int] = (0,)) -> None:
        """Write it to a file that `inference.load` reads without the model's code; see `archive.save`."""
        save(self, path, example_inputs, dynamic=dynamic)

    def export_onnx(
        self, path: str | Path, example_inputs: Any = None, *, dynamic: Sequence[int] = (0,), widen: bool = True
    ) -> None:
        """Write it to an ONNX file; see `onnx_export.export_onnx`."""
        export_onnx(self, path, example_inputs, dynamic=dynamic, widen=widen)

    def converted(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The outputs as the form's operations give them: not compiled, and in the modes of the caller."""
        return map_leaves(self._converted(args, kwargs), self._result)

    def _compiled(self) -> Any:
        def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._converted(args, kwargs)

        return torch.compile(with_own_code(run))

    def _converted(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = map_leaves((args, kwargs), self._given)
        return map_leaves(self.model(*args, **kwargs), self._result)

    def _given(self, leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
            return leaf
        layout = _LAYOUTS.get(leaf.dim()) if self.form.channels_last else None
        return leaf.to(NARROW.get(self.form.format), memory_format=layout or torch.preserve_format)

    @staticmethod
    def _result(leaf: Any) -> Any:
        return leaf.float() if isinstance(leaf, Tensor) and leaf.dtype in NARROW.values() else leaf


def copied(model: nn.Module) -> nn.Module:
    """A copy that shares nothing with the model; `ConfigError` where Python cannot make one."""
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        passed = f"a {type(model).__name__} that cannot be copied ({error})"
        raise ConfigError(explain(passed, "a model that copy.deepcopy copies", "Drop what hangs on it")) from error


def has_images(model: nn.Module) -> bool:
    """Whether layers of the model care where in memory the channels are."""
    return any(isinstance(module, _CONVOLUTIONS) for module in model.modules())


def has_norms(model: nn.Module) -> bool:
    """Whether there are BatchNorms, with the statistics that inference needs."""
    norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))  # noqa: SLF001
    return any(norm.running_mean is not None for norm in norms)


def _formed(model: nn.Module, form: Form) -> nn.Module:
    if form.folded:
        model = _folded(model)
    if form.weights is not None:
        model = quantised(model, form.weights, NARROW[form.format])
    elif form.format in NARROW:
        model = model.to(NARROW[form.format])
    for module in model.modules() if form.channels_last else ():
        if isinstance(module, _CONVOLUTIONS):
            module.weight.data = module.weight.data.contiguous(memory_format=_LAYOUTS[module.weight.dim()])
    return model


def _folded(model: nn.Module) -> nn.Module:
    """BatchNorm folded into convolutions by PyTorch's own pass, which traces the model symbolically."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Imported when it is needed, since that compiles TorchScript and warns.
            folded: nn.Module = import_module("torch.fx.experimental.optimization").fuse(model, inplace=True)
            return folded
    except (fx.proxy.TraceError, TypeError, AttributeError, NotImplementedError, ValueError) as error:
        passed = f"a {type(model).__name__} that cannot be traced to fold its BatchNorms ({error})"
        raise ConfigError(explain(passed, "a forward without decisions by values", "Leave them unfolded")) from error
