"""Quantisation-aware training of single layers: a copy that rounds them in training, and the model that stores them so.

The linear layers that are rounded are those that `inference.linear_layers` takes for the kind, by the same rounding.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.inference.arithmetic import arithmetic
from deepseek_mp.inference.form import LINEAR_KINDS, Form
from deepseek_mp.inference.no_casts import cast_with, check_no_cast
from deepseek_mp.inference.quantised_embedding import QuantisedEmbedding
from deepseek_mp.inference.quantised_linear import SMALLEST, QuantisedLinear, cast, linear_layers
from deepseek_mp.inference.serve import Served
from deepseek_mp.nn import revert
from deepseek_mp.nn.nested import map_leaves
from deepseek_mp.nn.places import owners, replaced
from deepseek_mp.ops.dtypes import format_of
from deepseek_mp.precision import Decision, PrecisionPlan, Reason
from deepseek_mp.qat.keep import kept_names
from deepseek_mp.qat.layers import KINDS, OTHERS, is_kept
from deepseek_mp.qat.preparation import all_finite, copied
from deepseek_mp.qat.rounded_layers import TABLES, rounded, rounded_layers

WEIGHTS = LINEAR_KINDS
"""Precisions that are kinds of linear layers: the model's code stays, and large layers are rounded by themselves."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Of activations beside weights in fewer bits."""
_WHY_TABLES: Mapping[str, str] = MappingProxyType(
    {
        "fp8": "rows of a table are looked up, not multiplied: stored in FP8",
        "int4_weights": "tables have no form in 4 bits here: stored in int8 by row",
    }
)


class WeightsModel(nn.Module):
    """Is called as the original is, without gradients; rounded weights are stored in 8 or 4 bits, the rest in `dtype`.

    Tensors of floating type go in as `dtype` and come out in FP32. Its state is `state_dict`, as of any module; files
    are those of served models.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, decisions: tuple[Decision, ...]) -> None:
        super().__init__()
        self.model, self.dtype, self.decisions = model.eval().requires_grad_(False), dtype, decisions
        super().train(False)

    @property
    def not_converted(self) -> tuple[Decision, ...]:
        """The layers whose weights are not in fewer bits, with the reason of each."""
        return tuple(decision for decision in self.decisions if decision.reason is not Reason.REQUESTED)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs, in FP32, whatever autocast the caller has on."""
        with torch.no_grad(), arithmetic(self._device()):
            args, kwargs = map_leaves((args, kwargs), lambda leaf: _cast(leaf, self.dtype))
            return map_leaves(self.model(*args, **kwargs), lambda leaf: _cast(leaf, torch.float32))

    def save(self, path: str | Path, example_inputs: Any, *, dynamic: Sequence[int] = (0,)) -> None:
        """Write it to a file that `inference.load` reads without the model's code; see `inference.Served.save`.

        Args:
            path: of the file, by custom with the ending .pt2; an older one there is replaced.
            example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
            dynamic: dimensions of the inputs that may change later, as far as the model bears it.

        Raises:
            ConfigError: the model cannot be exported, or the path cannot be written.
        """
        self._served().save(path, example_inputs, dynamic=dynamic)

    def export_onnx(
        self, path: str | Path, example_inputs: Any, *, dynamic: Sequence[int] = (0,), widen: bool = True
    ) -> None:
        """Write it to an ONNX file; see `inference.Served.export_onnx`, whose limits are its own.

        Args:
            path, example_inputs, dynamic: as those of `save`.
            widen: BF16 becomes FP32, since few runtimes multiply in BF16.

        Raises:
            ConfigError: onnx or onnxscript is missing, the path cannot be written, or an operation has no form in ONNX,
                as weights in 4 bits and products in FP8 have none.
        """
        self._served().export_onnx(path, example_inputs, dynamic=dynamic, widen=widen)

    def _served(self) -> Served:
        return Served(self.model, Form(format=str(format_of(self.dtype))), self._device())

    def _device(self) -> torch.device:
        return next(chain(self.model.buffers(), self.model.parameters())).device

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """What moves the weights; casts are refused, as by `Served`."""
        check_no_cast(args[0], cast_with(self.model, self.dtype), "a model with weights in fewer bits")
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> WeightsModel:
        """Refused: integers have no gradients."""
        if mode:
            passed = "train() of a model with weights in fewer bits"
            raise ConfigError(explain(passed, "inference", "Train on with the trainer, and convert again"))
        return self


def with_rounded_weights(
    model: nn.Module, precision: str, *, keep: Collection[str] | PrecisionPlan | Path | None, learn_step: bool
) -> tuple[nn.Module, tuple[Decision, ...]]:
    """A copy of the model whose large linear layers and embeddings are rounded, and a decision for each layer.

    Raises:
        ConfigError: the model cannot be copied, has no such layer, or weights that are not finite.
    """
    kept = kept_names(model, keep)
    copy = copied(model)
    revert(copy)
    if not all_finite(list(copy.parameters())):
        raise ConfigError(explain("a model with weights that are not finite", "finite weights", "Load other weights"))
    left = linear_layers(copy, precision)[1] | _embeddings_left(copy)
    decisions, made = [], {}
    for name, layer in copy.named_modules():
        if not isinstance(layer, KINDS + OTHERS):
            continue
        decisions.append(_decision(layer, name, precision, left, kept))
        if decisions[-1].reason is Reason.REQUESTED:
            assert isinstance(layer, nn.Linear | nn.Embedding)
            made[name] = rounded(layer, precision, learn_step=learn_step)
    copy = replaced(copy, made)
    if not rounded_layers(copy):
        reasons = (
            "; ".join(f"{decision.layer or 'the model'}: {decision.detail}" for decision in decisions[:5])
            or "it has none"
        )
        passed = f"a model with nothing to quantise ({reasons})"
        allowed = f"a Linear or an Embedding of {SMALLEST} weights or more"
        raise ConfigError(explain(passed, allowed, "Shorten keep, or use another precision"))
    return copy, tuple(decisions)


@torch.no_grad()
def deployed(model: nn.Module, decisions: tuple[Decision, ...], dtype: torch.dtype) -> WeightsModel:
    """A copy of the trained copy in which the rounded weights are stored in fewer bits, and all else in `dtype`.

    Raises:
        ConfigError: a dtype that the stored layers do not multiply.
    """
    if dtype not in DTYPES:
        allowed = ", ".join(map(str, DTYPES))
        raise ConfigError(explain(f"convert(dtype={dtype!r})", allowed, "Change dtype, or leave it out"))
    copy = deepcopy(model)
    revert(copy)
    kept = {name: (layer, layer.kept()) for name, layer in rounded_layers(copy).items()}
    copy = cast(copy, dtype)
    made: dict[str, nn.Module] = {}
    for name, (layer, parts) in kept.items():
        if isinstance(layer, nn.Linear):
            made[name] = QuantisedLinear(parts, layer.bias, layer.precision, dtype)
        else:
            made[name] = QuantisedEmbedding(parts["q"], parts["scale"], dtype)
    return WeightsModel(replaced(copy, made), dtype, decisions)


def _decision(layer: nn.Module, name: str, precision: str, left: Mapping[str, str], kept: Collection[str]) -> Decision:
    new, reason, detail = "fp32", Reason.NO_KERNEL, left.get(name, "")
    if is_kept(name, kept):
        reason, detail = Reason.PINNED, "named in keep"
    elif not isinstance(layer, nn.Linear | nn.Embedding):
        detail = f"{type(layer).__name__} has no form with weights in fewer bits here"
    elif not detail:
        table = isinstance(layer, nn.Embedding)
        new, reason = TABLES[precision] if table else precision, Reason.REQUESTED
        detail = _WHY_TABLES.get(precision, "") if table else ""
    return Decision(layer=name, old="fp32", new=new, reason=reason, detail=detail)


def _embeddings_left(model: nn.Module) -> dict[str, str]:
    """The embeddings whose tables stay as they are, by name, with the reason."""
    shared = owners(model)
    left = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding):
            continue
        if type(module) is not nn.Embedding:
            left[name] = f"a {type(module).__name__} may use its weight in a way of its own"
        elif module._forward_hooks or module._forward_pre_hooks:  # noqa: SLF001
            left[name] = "it has hooks, which would be lost"
        elif shared[id(module.weight)] != 1:
            left[name] = "its weight is shared"
        elif module.max_norm is not None:
            left[name] = "its max_norm changes the weight in the forward"
        elif module.weight.numel() < SMALLEST:
            left[name] = f"it has {module.weight.numel()} weights, fewer than {SMALLEST}"
    return left


def _cast(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
