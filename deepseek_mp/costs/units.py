"""The calls a model makes to its units, and the time of one such call in a format.

One forward records, for each unit that multiplies matrices, its configuration and what it was given.
Calls that would cost the same are one `UnitCall` with the names that make it: a decoder of 24 blocks
has half a dozen. Each is then timed alone, on a fresh copy with random inputs, forward and the
gradients that training would ask for.

Casts count. A unit is given its input in the format in which the model really hands it over, which a
recording inside the lower region shows: FP32 after a LayerNorm, the region's own after a ReLU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deepseek_mp.backends import autocast, capabilities, math_mode
from deepseek_mp.costs.timing import Timing, is_out_of_memory, time_call
from deepseek_mp.nn import units
from deepseek_mp.nn.assign import products_of, why_not
from deepseek_mp.nn.conv1x1 import conv1x1
from deepseek_mp.nn.functional import low_precision_linear
from deepseek_mp.nn.nested import first_tensor
from deepseek_mp.nn.unit import CONVOLUTIONS, multiplies, original_class
from deepseek_mp.ops.dtypes import torch_dtype
from deepseek_mp.precision import RECIPES
from deepseek_mp.precision.plan import MemoryFormat

NARROW = ("bf16", "fp16")
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """A tensor given to a unit. `narrow`: it came in the 16-bit format of the region, not in FP32."""

    shape: tuple[int, ...]
    narrow: bool
    needs_grad: bool

    def __str__(self) -> str:
        return f"{list(self.shape)}{' narrow' if self.narrow else ''}{' grad' if self.needs_grad else ''}"


@dataclass(frozen=True, kw_only=True)
class UnitCall:
    """Calls of equal cost: same kind of unit, configuration, parameters and inputs."""

    signature: str
    names: tuple[str, ...]
    """The unit of every call, in order; a unit called twice appears twice."""
    inputs: tuple[InputSpec, ...]
    macs: int
    """Multiply-adds of one call in all products that training computes, estimated from shapes."""
    has_layout: bool
    """A 2-D or 3-D convolution: its time depends on the memory format."""
    plain: bool
    """Called with tensors only, so that the call can be repeated on random ones."""
    module: nn.Module = field(compare=False, repr=False)
    """One of the units."""

    @property
    def total_macs(self) -> int:
        """Multiply-adds of all its calls."""
        return self.macs * len(self.names)


def record_units(model: nn.Module, run: Callable[[], object]) -> tuple[UnitCall, ...]:
    """One forward of `run()`: the calls to units that multiply matrices, the largest in total first.

    What the forward saves for backward is dropped at once, so memory is that of inference, while
    which tensors need gradients is still seen. A forward that itself differentiates (forces as the
    gradient of an energy) fails on that, so one that fails runs again with everything kept, and what
    it then raises propagates. The caller opens the region and sets the mode.
    """
    calls: dict[str, list[UnitCall]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            call = _describe(name, module, args, kwargs, output)
            if call is not None:
                calls.setdefault(call.signature, []).append(call)

        return hook

    watched = [
        unit.register_forward_hook(watch(name), with_kwargs=True)
        for name, unit in units(model).items()
        if multiplies(original_class(unit))
    ]
    try:
        try:
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_drop, _drop):
                run()
        except Exception as error:
            if is_out_of_memory(error):
                raise
            calls.clear()
            with torch.enable_grad():
                run()
    finally:
        for handle in watched:
            handle.remove()
    merged = [_merge(same) for same in calls.values()]
    return tuple(sorted(merged, key=lambda call: -call.total_macs))


def measure_unit(
    call: UnitCall,
    format: str,
    memory_format: MemoryFormat,
    device: torch.device,
    budget_s: float,
    *,
    kernels: str | None = None,
) -> Timing | None:
    """The time of one call, forward and backward, in `format` or a scaled recipe; None if memory is short.

    A linear layer or 1x1 convolution in a scaled recipe is timed with the ops that a plan gives it (`kernels` names
    them, where the user does), its casts included, and those copies that it makes in this memory format.
    Algorithms are taken by the library's heuristics, without a search. Errors of the unit's own
    kernels in this format propagate.
    """
    try:
        step = _forward_backward(call, format, memory_format, device, kernels)
        with math_mode(device, fp32=_fp32_mode(format), search=False):
            return time_call(step, device, budget_s=budget_s, host_ahead=True)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            return None
        raise


def takes(call: UnitCall, recipe: str) -> bool:
    """Whether the unit of the call can run in a scaled recipe at all."""
    return call.plain and why_not(RECIPES[recipe], call.module, is_output=False) is None


def _merge(same: list[UnitCall]) -> UnitCall:
    first = same[0]
    return UnitCall(
        signature=first.signature,
        names=tuple(name for call in same for name in call.names),
        inputs=first.inputs,
        macs=first.macs,
        has_layout=first.has_layout,
        plain=first.plain,
        module=first.module,
    )


def _describe(
    name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> UnitCall | None:
    """The one call a hook saw, or None if it has no tensors to speak of."""
    given, made = first_tensor((args, kwargs)), first_tensor(output)
    if given is None or made is None:
        return None
    plain = not kwargs and all(isinstance(arg, Tensor) and arg.is_floating_point() for arg in args)
    tensors = [arg for arg in args if isinstance(arg, Tensor)] if plain else [given]
    inputs = tuple(
        InputSpec(shape=tuple(t.shape), narrow=t.dtype in (torch.bfloat16, torch.float16), needs_grad=t.requires_grad)
        for t in tensors
    )
    parameters = {key: value for key, value in module._parameters.items() if value is not None}  # noqa: SLF001
    products = 1 + any(spec.needs_grad for spec in inputs) + any(p.requires_grad for p in parameters.values())
    matrices = sum(p.numel() for p in parameters.values() if p.dim() >= 2)
    words = [f"{key} {list(p.shape)}{' grad' if p.requires_grad else ''}" for key, p in parameters.items()]
    kind = original_class(module)
    return UnitCall(
        signature=f"{kind.__name__}({module.extra_repr()}) {', '.join(words)} <- {', '.join(map(str, inputs))}",
        names=(name,),
        inputs=inputs,
        macs=products * matrices * _positions(module, given, made),
        has_layout=kind in CONVOLUTIONS and given.dim() in _CHANNELS_LAST,
        plain=plain and not any(True for _ in module.children()),
        module=module,
    )


def _positions(module: nn.Module, given: Tensor, made: Tensor) -> int:
    """How often the weight is applied: rows of a linear layer, output pixels of a convolution."""
    kind = original_class(module)
    if kind in CONVOLUTIONS:
        assert isinstance(module.kernel_size, tuple)
        side = given if kind in _TRANSPOSED else made
        channels = side.shape[-1 - len(module.kernel_size)]
        return side.numel() // max(channels, 1)
    return given.numel() // max(given.shape[-1], 1) if given.dim() else 1


def _forward_backward(
    call: UnitCall, format: str, memory_format: MemoryFormat, device: torch.device, kernels: str | None
) -> Callable[[], None]:
    """One forward of a fresh copy of the unit and the gradients that training would compute."""
    generator = torch.Generator(device=device).manual_seed(0)
    unit, recipe = _fresh(call.module, device), RECIPES[format]
    narrow = torch_dtype(recipe.region) if recipe.region in NARROW else torch.float32
    inputs = []
    for spec in call.inputs:
        tensor = torch.randn(spec.shape, generator=generator, device=device)
        tensor = tensor.to(narrow if spec.narrow else torch.float32)
        inputs.append(_laid_out(tensor, memory_format, call.has_layout).requires_grad_(spec.needs_grad))
    for parameter in unit.parameters():
        parameter.data = _laid_out(parameter.data, memory_format, call.has_layout)
    wanted = [tensor for tensor in (*inputs, *unit.parameters()) if tensor.requires_grad]
    run: Callable[..., Any] = unit
    if not recipe.is_plain:
        products = products_of(recipe, capabilities(device), kernels)
        multiply = low_precision_linear if isinstance(unit, nn.Linear) else conv1x1
        run = partial(multiply, weight=unit.weight, bias=unit.bias, products=products)  # type: ignore[arg-type]

    def forward() -> Tensor:
        with torch.enable_grad(), autocast(device, recipe.region):
            output = first_tensor(run(*inputs))
        assert output is not None
        return output

    made = forward().detach()
    gradient = torch.empty_like(made).normal_(generator=generator)

    def step() -> None:
        output = forward()
        if wanted:
            torch.autograd.grad(output, wanted, gradient, allow_unused=True)

    return step


def _laid_out(tensor: Tensor, memory_format: MemoryFormat, has_layout: bool) -> Tensor:
    if not has_layout or tensor.dim() not in _CHANNELS_LAST:
        return tensor
    wanted = _CHANNELS_LAST[tensor.dim()] if memory_format == "channels_last" else torch.contiguous_format
    return tensor.contiguous(memory_format=wanted)


def _fresh(module: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a unit as its original class, with parameters of its own and without its hooks."""
    kind = original_class(module)
    copy = kind.__new__(kind)
    nn.Module.__init__(copy)
    own = {**vars(copy)}
    copy.__dict__.update({key: value for key, value in vars(module).items() if key not in own})
    copy.__dict__.pop("unit_precision", None)
    copy.train(module.training)
    for name, parameter in module._parameters.items():  # noqa: SLF001
        copy.register_parameter(name, None if parameter is None else _own(parameter, device))
    for name, buffer in module._buffers.items():  # noqa: SLF001
        copy.register_buffer(name, None if buffer is None else buffer.detach().to(device, copy=True))
    return copy


def _own(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to(device, copy=True), requires_grad=parameter.requires_grad)


def _fp32_mode(format: str) -> Literal["ieee", "tf32", "hf32"]:
    """How FP32 products are computed in a region of `format`: exactly, unless it says otherwise."""
    if format == "tf32":
        return "tf32"
    return "hf32" if format == "hf32" else "ieee"


def _drop(_tensor: object) -> Any:
    """Keeps nothing of a tensor saved for backward: no backward follows."""
    return None
