"""The output of a linear layer that is multiplied only if somebody reads it: what a loss in chunks needs.

A model that ends in a linear layer returns its output, and a loss that reads hidden and weight instead has no use for
it (`nn.chunked_loss`). Inside of `deferring(layer)` the layer therefore returns a `Deferred`: it has the shape and type
of the output, and knows the input. Whoever does anything else with it (a hook, a metric, the model itself) sees the
ordinary output with its graph, which is computed at that moment and kept.

It is PyTorch's Python functions that are seen here. What hands tensors past them, an `autograd.Function` that is given
the output or a full backward hook, finds values too, and the gradient that it gives is that of the output: the layer is
multiplied once more for it. Only to write to an output that was handed past them is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.nn.nested import map_leaves

_FORWARD = "forward"
_TENSOR: Any = Tensor
_LOOKS = frozenset({
    Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__,
    *(getattr(_TENSOR, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad")),
    *(getattr(_TENSOR, name).__get__ for name in ("is_cuda", "is_sparse", "is_nested", "is_quantized", "is_meta")),
})  # fmt: skip
"""What asks for no value."""


class LinearCall:
    """A call of a linear layer: with what, and in which autocast region."""

    def __init__(self, layer: nn.Linear, hidden: Tensor) -> None:
        kind = hidden.device.type
        self.layer = layer
        self.hidden = hidden
        """[..., K]: the input."""
        self.is_spent = False
        """Whether the loss was computed of it: the weights of later are others, which not all optimizers tell."""
        # What the layer had then: `torch.func.functional_call` lends others. A parametrised weight is none of them.
        self._parameters = dict(layer._parameters)  # noqa: SLF001 - named_parameters leaves out the None of a bias
        self._versions = self._versions_now()
        self._enabled, self._dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    @property
    def dtype(self) -> torch.dtype:
        """That of the output."""
        return self._dtype if self._enabled and self.hidden.dtype != torch.float64 else self.hidden.dtype

    @property
    def weight(self) -> Tensor:
        """[V, K]: that of the call."""
        found = self._parameters.get("weight")
        return self.layer.weight if found is None else found

    @property
    def bias(self) -> Tensor | None:
        """[V]: that of the call."""
        return self._parameters.get("bias", self.layer.bias)

    def product(self, hidden: Tensor) -> Tensor:
        """What the layer gives of this input, with the weights of the call; in whatever region this is called."""
        now = self.layer._parameters  # noqa: SLF001
        if all(now.get(name) is one for name, one in self._parameters.items()):
            return _forward_of(self.layer)(self.layer, hidden)  # type: ignore[no-any-return]
        return functional.linear(hidden, self.weight, self.bias)

    @property
    def is_unchanged(self) -> bool:
        """Whether nobody has written to the input, or to the layer's parameters, since."""
        return self._versions_now() == self._versions

    def _versions_now(self) -> list[int]:
        read = self.hidden, *self._parameters.values()
        return [one._version for one in read if one is not None]  # noqa: SLF001 - there is no public one

    @contextmanager
    def region(self) -> Iterator[None]:
        """The region that the call was made in, with gradients; `ConfigError` if what it read is not what it was."""
        if not self.is_unchanged:
            change = "Write to a copy, or train with fused_loss=False"
            passed = "the last layer's input or weight was changed in place after that layer"
            raise ConfigError(explain(passed, "none of them changed", change))
        kind = self.hidden.device.type
        with (
            torch.inference_mode(mode=False),
            torch.enable_grad(),
            torch.autocast(kind, dtype=self._dtype, enabled=self._enabled),
        ):
            yield


class Deferred(Tensor):
    """[..., V]: a linear layer's output, not computed yet; made by `deferring`."""

    call: LinearCall
    _computed: Tensor | None

    @classmethod
    def of(cls, call: LinearCall) -> Deferred:
        """The output of the call."""
        made: Deferred = _Unread.apply(call.hidden, call.weight, call.bias, call)  # type: ignore[no-untyped-call]
        made.call, made._computed = call, None
        return made

    @property
    def is_pending(self) -> bool:
        """Whether nobody has read it."""
        return self._computed is None

    def computed(self) -> Tensor:
        """The output, with its graph; `ConfigError` once the loss was computed without it."""
        if self._computed is None:
            if self.call.is_spent:
                passed = "the output of the model's last layer, read after a fused loss was computed"
                change = "Read it in the hook or forward that sees it, or train with fused_loss=False"
                raise ConfigError(explain(passed, "to read it before, which gives the ordinary loss", change))
            with self.call.region():
                self._computed = self.call.product(self.call.hidden)
        return self._computed

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LOOKS:
            with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - the documented way
                return func(*args, **kwargs)
        args, kwargs = map_leaves((args, kwargs), _values)
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._schema.is_mutable:  # noqa: SLF001 - there is no public one
            raise _written_to()
        args, kwargs = map_leaves((args, kwargs or {}), _numbers)
        return func(*args, **kwargs)


class _Unread(Function):
    """The node of a `Deferred` in the graph. What is computed of one has a graph of its own.

    So a gradient comes here only from what went past PyTorch's Python functions.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LinearCall) -> Tensor:
        ctx.call, ctx.operands = call, (hidden, weight, bias)
        return Tensor._make_wrapper_subclass(  # noqa: SLF001 - the documented way
            Deferred, (*hidden.shape[:-1], weight.shape[0]), dtype=call.dtype, device=hidden.device
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        needed = ctx.needs_input_grad[:3]
        operands: list[Any] = [
            None if operand is None else operand.detach().requires_grad_(needs)
            for operand, needs in zip(ctx.operands, needed, strict=True)
        ]
        with ctx.call.region():
            output = functional.linear(*operands)
        wanted = [operand for operand in operands if operand is not None and operand.requires_grad]
        found = iter(torch.autograd.grad(output, wanted, grad))
        return *(next(found) if needs else None for needs in needed), None


def _numbers(leaf: Any) -> Any:
    """The values of a `Deferred` without a graph, for operations whose own was recorded already."""
    if not isinstance(leaf, Deferred):
        return leaf
    if leaf._computed is not None:  # noqa: SLF001 - of this file
        return leaf._computed.detach()  # noqa: SLF001
    call = leaf.call
    read = call.hidden, call.weight, call.bias
    operands: list[Any] = [None if one is None else one.detach().to(call.dtype) for one in read]  # autocast may be past
    with call.region(), torch.no_grad():
        return functional.linear(*operands)


def _written_to() -> ConfigError:
    return ConfigError(
        explain(
            "the output of the model's last layer was written to inside of an autograd.Function",
            "with a fused loss, a last layer whose output is read",
            "Write to a copy, or train with fused_loss=False",
        )
    )


@contextmanager
def deferring(layer: nn.Linear) -> Iterator[None]:
    """Inside, what the layer gives while gradients are enabled is `Deferred`; not if its forward was replaced."""
    if _FORWARD in layer.__dict__:
        yield
        return

    def forward(hidden: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not isinstance(hidden, Deferred):
            return Deferred.of(LinearCall(layer, hidden))
        return _forward_of(layer)(layer, hidden)  # type: ignore[no-any-return]

    layer.__dict__[_FORWARD] = forward
    try:
        yield
    finally:
        layer.__dict__.pop(_FORWARD, None)


def is_pending(value: object) -> bool:
    """Whether to read this is to compute it."""
    return isinstance(value, Deferred) and value.is_pending


def _forward_of(layer: nn.Linear) -> Any:
    return type(layer).forward


def _values(leaf: Any) -> Any:
    return leaf.computed() if isinstance(leaf, Deferred) else leaf
