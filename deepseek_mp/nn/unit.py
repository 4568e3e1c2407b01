"""Units: modules that have a precision of their own, and the class that gives it to them.

A unit is a module of an exact type listed here, or taught by `register_unit`, whose own `forward` is
what computes with its parameters. Its class is converted once, to a subclass that puts `Unit` in
front of the original; the object stays, and with it parameters, names, hooks, ties and everything
that refers to them. From then on a precision switch replaces one small frozen value, never a class.

What a unit's forward does follows from its format and from the plan's base:

- the base format: exactly the original forward, in whatever region the model runs in; where the casts of that
  region are lent to it (`nn.lent_cast`), the same products of them;
- fp32, tf32, hf32, fp64: autocast is off, floating inputs are cast up to the format's storage type,
  and the output stays there. The backward then multiplies the same FP32 operands, also inside a BF16
  model. Whether FP32 products use TF32 or HF32 is a flag of the process, not of a unit;
- bf16, fp16: an autocast region of that format. Where the model around it has no region of its own
  (an FP32 base) the output is cast back, since the next module expects FP32;
- a linear layer in FP8: not the original forward but `functional.low_precision_linear`, which needs no
  region and gives BF16, cast as above; a 1x1 convolution likewise, by `conv1x1`;
- a layer in an emulated recipe: its operands rounded and multiplied by `nn.emulated`, which gives BF16 too.

The frozen value is interned: equal values are one object. Compiled code that once ran for a value is found
again when the value comes back.

The generated classes live in this module, not in `torch.nn`: for modules that call themselves part of
torch.nn, torch.compile does not watch attributes, and a compiled model would miss a switch.
"""

from __future__ import annotations

import copyreg
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self, SupportsIndex, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from deepseek_mp.backends import autocast
from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.nn.conv1x1 import check_settings, conv1x1
from deepseek_mp.nn.emulated import emulated_convolution, emulated_linear
from deepseek_mp.nn.functional import HeldWeight, Products, UnitScaling, low_precision_linear
from deepseek_mp.nn.lent_cast import LentCast
from deepseek_mp.nn.nested import first_tensor, map_leaves
from deepseek_mp.ops.dtypes import torch_dtype
from deepseek_mp.precision import Recipe

NARROW_FORMATS = ("bf16", "fp16")
_LENT = ("held_weight", "delayed_scaling", "lent_cast")
UNIT_FORMATS = ("fp64", "fp32", "tf32", "hf32", *NARROW_FORMATS)

CONVOLUTIONS: frozenset[type[nn.Module]] = frozenset(
    {nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d}
)
_MULTIPLYING: frozenset[type[nn.Module]] = CONVOLUTIONS | {
    nn.Linear, nn.Bilinear, nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell,
}  # fmt: skip
_OTHERS: frozenset[type[nn.Module]] = frozenset({
    nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
})  # fmt: skip
# Known by name, so that the package that defines them need not be installed.
_BY_NAME = frozenset({"transformers.pytorch_utils.Conv1D"})
_registered: set[type[nn.Module]] = set()
_unit_classes: dict[type[nn.Module], type[Unit]] = {}
_regions: dict[tuple[str, str], bool] = {}
_interned: dict[UnitPrecision, UnitPrecision] = {}

ModuleClass = TypeVar("ModuleClass", bound=type[nn.Module])


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitPrecision:
    """All that a switch changes in a unit: its recipe, and what its forward does about it."""

    recipe: Recipe
    region: str | None
    """Format of the autocast region around the forward; None: the original forward as it is."""
    products: Products | None = None
    """What the unit multiplies with instead of its original forward; None: that forward."""
    rounds: bool = False
    """Operands are rounded as the recipe says and multiplied by `nn.emulated`, instead of the original forward."""
    inputs: torch.dtype | None = None
    """Floating inputs are cast to this type first."""
    outputs: torch.dtype | None = None
    """Floating outputs are cast to this type."""
    original_strides: tuple[int, ...] | None = None
    """Strides the weight had before the first conversion, where a plan may change them."""

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        base: str,
        original_strides: tuple[int, ...] | None,
        products: Products | None = None,
        *,
        rounds: bool = False,
    ) -> UnitPrecision:
        """What a unit of `recipe` does inside a model whose region has the format `base`; one object per value."""
        region, inputs, outputs = _around(recipe.region, base)
        made = cls(
            recipe=recipe,
            region=region,
            products=products,
            rounds=rounds,
            inputs=inputs,
            outputs=outputs,
            original_strides=original_strides,
        )
        return interned(made)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Unpickled to the one object too, so that a copied model shares it."""
        return _rebuilt, ({f.name: getattr(self, f.name) for f in fields(self)},)


def interned(value: UnitPrecision) -> UnitPrecision:
    """The one object of this value."""
    return _interned.setdefault(value, value)


def _rebuilt(values: dict[str, Any]) -> UnitPrecision:
    return interned(UnitPrecision(**values))


def _around(format: str, base: str) -> tuple[str | None, torch.dtype | None, torch.dtype | None]:
    """Region, input type and output type of a unit of `format` in a model of the format `base`."""
    if format == base:
        return None, None, None
    around = torch.float64 if base == "fp64" else torch.float32
    own = torch.float64 if format == "fp64" else torch.float32
    if format in NARROW_FORMATS:
        # Autocast leaves fp64 inputs alone, and the parameters of a narrow unit are fp32.
        return format, torch.float32 if base == "fp64" else None, None if base in NARROW_FORMATS else around
    return format, own, None if own == around else around


class Unit(nn.Module):
    """Mixed in front of a module's class: its forward in the precision that `unit_precision` says."""

    original_class: ClassVar[type[nn.Module]]
    unit_precision: UnitPrecision
    held_weight: HeldWeight | None = None
    """The weight, quantised already; `nn.held` lends it for the time of a forward and backward."""
    delayed_scaling: UnitScaling | None = None
    """What delayed scaling keeps of the layer; `nn.delayed` lends it as long as the plan is in force."""
    lent_cast: LentCast | None = None
    """The weight and bias, cast already; `nn.weight_casts` lends it for the time of a forward and backward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        precision = self.unit_precision
        if precision.products is not None:
            return self._low_precision(precision, precision.products, *args, **kwargs)
        if precision.rounds:
            return self._emulated(precision, *args, **kwargs)
        if precision.region is None:
            if len(args) == 1 and not kwargs and not torch.compiler.is_compiling() and self.lent_cast is not None:
                return self._with_lent_cast(self.lent_cast, args[0])
            return super().forward(*args, **kwargs)
        return self._forward_in_region(precision, precision.region, args, kwargs)

    def _with_lent_cast(self, lent: LentCast, input: Tensor) -> Any:
        """The original forward of a linear layer or convolution, which reads what is lent."""
        operands = lent.operands(self._parameters, input)
        if operands is None:
            return super().forward(input)
        if self.original_class is nn.Linear:
            return F.linear(*operands)
        convolve: Any = self._conv_forward  # of the object: some models replace it for another padding
        return convolve(*operands)

    def _low_precision(self, precision: UnitPrecision, products: Products, input: Tensor) -> Tensor:
        """The forward of a linear layer or 1x1 convolution, whose argument is called `input` there too."""
        if precision.inputs is not None:
            input = input.to(precision.inputs)
        weight, bias = self.weight, self.bias
        held, scaling = self.held_weight, scaling_now(self)
        if self.original_class is nn.Linear:
            output = low_precision_linear(input, weight, bias, products, held, scaling)  # type: ignore[arg-type]
        else:
            check_settings(self)  # type: ignore[arg-type]
            output = conv1x1(input, weight, bias, products, held, scaling)  # type: ignore[arg-type]
        return output if precision.outputs is None else output.to(precision.outputs)

    def _emulated(self, precision: UnitPrecision, input: Tensor) -> Tensor:
        """The forward of a linear layer or convolution with rounded operands, of an input of any type."""
        if self.original_class is nn.Linear:
            output = emulated_linear(input, self.weight, self.bias, precision.recipe)  # type: ignore[arg-type]
        else:
            output = emulated_convolution(input, self, precision.recipe)  # type: ignore[arg-type]
        return output if precision.outputs is None else output.to(precision.outputs)

    def _forward_in_region(
        self, precision: UnitPrecision, region: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        tensor = first_tensor((args, kwargs))
        device = next(self.parameters()).device if tensor is None else tensor.device
        with _region(device, region):
            if precision.inputs is not None:
                args, kwargs = map_leaves((args, kwargs), _to(precision.inputs))
            output = super().forward(*args, **kwargs)
        return output if precision.outputs is None else map_leaves(output, _to(precision.outputs))

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        """As the original class would be pickled and copied, but rebuilt through `new_unit`.

        A generated class cannot be imported by name, which is how pickle stores classes. What is only lent is
        left out.
        """
        reduced = super().__reduce_ex__(max(2, protocol.__index__()))
        if isinstance(reduced, str) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        state = reduced[2]
        if isinstance(state, dict):
            state = {name: value for name, value in state.items() if name not in _LENT}
        return (new_unit, (self.original_class, *reduced[1][1:]), state, *reduced[3:])


def scaling_now(unit: Unit) -> UnitScaling | None:
    """Delayed scaling is for training: in eval mode tensors are scaled by their own maxima and leave no trace."""
    return unit.delayed_scaling if unit.training else None


def _region(device: torch.device, format: str) -> AbstractContextManager[Any]:
    """What `backends.autocast` gives, built so that torch.compile can trace it and cheap to enter often.

    The device is asked outside of compiled code only; `apply` has asked it before any of that runs.
    """
    if not torch.compiler.is_compiling() and not _has_autocast(device, format):
        return nullcontext()
    if format in NARROW_FORMATS:
        return torch.autocast(device.type, dtype=torch_dtype(format), cache_enabled=False)
    return torch.autocast(device.type, enabled=False, cache_enabled=False)


def _has_autocast(device: torch.device, format: str) -> bool:
    """Whether the region is one of torch's; raises where the device cannot run the format."""
    key = (device.type, format)
    if key not in _regions:
        _regions[key] = isinstance(autocast(device, format), torch.autocast)
    return _regions[key]


def _to(dtype: torch.dtype) -> Callable[[Any], Any]:
    def cast(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(dtype) if leaf.is_floating_point() else leaf
        return leaf.to(dtype) if isinstance(leaf, PackedSequence) else leaf

    return cast


def unit_class(original: type[nn.Module]) -> type[Unit]:
    """The one subclass of `original` that its units get; it has the original's name."""
    if original in _unit_classes:
        return _unit_classes[original]
    names = {
        "__module__": __name__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "original_class": original,
    }
    made: type[Unit] = types.new_class(original.__name__, (Unit, original), {}, lambda body: body.update(names))
    return _unit_classes.setdefault(original, made)


def new_unit(original: type[nn.Module], *args: Any) -> Unit:
    """An empty unit, to be filled by pickle or deepcopy."""
    made = unit_class(original)
    return made.__new__(made, *args)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class the module had before it was converted, if it was."""
    return module.original_class if isinstance(module, Unit) else type(module)


def is_known(kind: type[nn.Module]) -> bool:
    """Whether modules of exactly this class are units."""
    listed = kind in _MULTIPLYING or kind in _OTHERS or kind in _registered
    return listed or f"{kind.__module__}.{kind.__qualname__}" in _BY_NAME


def multiplies(kind: type[nn.Module]) -> bool:
    """Whether units of this class multiply matrices; a registered class is taken to."""
    return kind not in _OTHERS


def register_unit(kind: ModuleClass) -> ModuleClass:
    """Teach a new kind of unit: a module class whose `forward` computes with its own parameters.

    Works as a decorator or as a call. Modules of exactly this class, not of its subclasses, become
    units. `ConfigError` if it is not such a class.
    """
    problem = None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        problem = "not a module class"
    elif issubclass(kind, Unit | torch.jit.ScriptModule):
        problem = "already converted or scripted"
    elif kind.forward is nn.Module.forward:
        problem = "a class without a forward"
    if problem is not None:
        raise ConfigError(
            explain(
                f"register_unit({kind!r}), {problem}",
                "a subclass of torch.nn.Module with a forward of its own",
                "Pass the class, not an instance, of the modules that should have a precision of their own",
            )
        )
    _registered.add(kind)
    return kind
