"""How an FP8 layer hands its output to the next one: activations that are not computed until somebody reads them.

Between two FP8 layers stands an activation: `down(silu(gate(x)) * up(x))`. Computed step by step it is written
and read several times in BF16, and then read once more to be quantised. If the last layer knew that its input is
silu(a) * b, one kernel could compute and quantise it, and it would never be stored.

So an FP8 layer that is being trained returns a `Lazy`: a tensor like any other, with its values, except that an
activation of it is only noted down, as another Lazy. The next FP8 layer asks that one what it is `made_of` and lets
the cast compute it (`ops.sources`). The model does not change, and autograd works as ever, since all this happens
below it. The backward profits by the same rules: the gradient that such a layer returns is a Lazy, and what autograd
computes of it for the layers before, `silu_backward(gradient * b, a)`, is noted down for these to quantise.

**Everybody else** just uses the tensor. Any other operation runs on the values; what was only noted is computed
first, by the very operation that was called, and kept. So a second reader, a hook or a view sees what it always
did, and the price is what it always was.

**Writing in place.** What was noted must be computed of the values as they were. Only values that nobody can change
unseen are read later: those of a Lazy. Before an operation writes to one, everything noted about it is computed.
A view of it is an ordinary tensor, to which anyone can write; once there is one, nothing is put off any more.

**Where there is none.** Compiled code fuses by itself (`nn.joint_graph`), and code that is traced must see every
operation, so layers return ordinary tensors there. They do so without gradients too: what evaluation and prediction
return is plain.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch._guards import TracingContext

aten = torch.ops.aten

_ACTIVATIONS: Mapping[Any, str] = {aten.silu.default: "silu", aten.gelu.default: "gelu", aten.relu.default: "relu"}
_SLOPES: Mapping[Any, str] = {
    aten.silu_backward.default: "silu",
    aten.gelu_backward.default: "gelu",
    aten.threshold_backward.default: "relu",
}
_MULTIPLY = aten.mul.Tensor
_PUT_OFF = frozenset({_MULTIPLY, *_ACTIVATIONS, *_SLOPES})
"""Operations that are noted down: they read every element once, and give one of the same shape and type."""
_SAME = frozenset({aten.detach.default, aten.alias.default})
"""Operations whose result is the same tensor to everyone but autograd."""


class Made(NamedTuple):
    """A matrix that is not there, but what it is made of: see `ops.sources`."""

    source: str
    inputs: tuple[Tensor, ...]


class Promise:
    """The values of a Lazy and of its aliases, or the operation that will compute them."""

    __slots__ = ("__weakref__", "arguments", "followers", "operation", "options", "shared", "values")

    def __init__(
        self, values: Tensor | None, operation: Any = None, arguments: Sequence[Any] = (), options: Any = None
    ) -> None:
        self.values = values
        self.operation, self.arguments, self.options = operation, arguments, options
        """The arguments are those of the operation, with promises in place of tensors."""
        self.followers: list[ReferenceType[Promise]] = []
        """What is to be computed of this one."""
        self.shared = False
        """Whether an ordinary tensor shares the values, through which they can change unseen."""
        for argument in arguments:
            if isinstance(argument, Promise):
                argument.followed_by(self)

    def followed_by(self, follower: Promise) -> None:
        """Note what is to be computed of this one; what is gone is forgotten, so that the list stays short."""
        self.followers = [known for known in self.followers if known() is not None]
        self.followers.append(ref(follower))

    def keep(self) -> Tensor:
        """The values, as an ordinary tensor for reading; computed now if they were not."""
        if self.values is None:
            arguments = [part.keep() if isinstance(part, Promise) else part for part in self.arguments]
            with torch.inference_mode(mode=False):  # the reader may be in that mode, the next one not
                self.values = self.operation(*arguments, **self.options)
            self.operation, self.arguments = None, ()
        return self.values

    def peek(self) -> Tensor:
        """The values for reading once; what was put off is computed, and stays put off."""
        if self.values is not None:
            return self.values
        return self.operation(  # type: ignore[no-any-return]
            *[part.peek() if isinstance(part, Promise) else part for part in self.arguments], **self.options
        )

    def rows(self, every: int) -> Tensor:
        """[n, K]: one of so many rows of the values [..., K]; of what was put off, computed for these rows only."""
        if self.values is not None:
            return self.values.detach().flatten(0, -2)[::every]
        return self.operation(  # type: ignore[no-any-return]
            *[part.rows(every) if isinstance(part, Promise) else part for part in self.arguments], **self.options
        )

    def keep_followers(self) -> None:
        """Compute what reads the values as they are now."""
        followers, self.followers = self.followers, []
        for reference in followers:
            follower = reference()
            if follower is not None:
                follower.keep()

    def share(self) -> Tensor:
        """The values for someone who may write to them, now or later."""
        self.keep_followers()
        self.shared = True
        return self.keep()

    def activation(self) -> str | None:
        """The name in `ops.sources` of the activation that is to be computed, if it is one."""
        return _name(_ACTIVATIONS, self.operation, self.options)

    def made_of(self) -> Made | None:
        """How a cast computes the values, if these are still to be computed and it can."""
        found = self._made_of()
        return None if found is None else Made(found[0], tuple(part.keep() for part in found[1:]))

    def _made_of(self) -> tuple[Any, ...] | None:
        """The source, and the promises that it reads."""
        if (name := self.activation()) is not None:
            return name, self.arguments[0]
        if self.operation is _MULTIPLY:
            for gate, other in (self.arguments, self.arguments[::-1]):
                if (name := gate.activation()) is not None:
                    return f"{name}_gate", gate.arguments[0], other
        name = _name(_SLOPES, self.operation, self.options)
        if name is None or self.arguments[2:] not in ((), (0,)):  # a threshold, which is relu's if it is 0
            return None
        gradient, x = self.arguments[:2]
        if x.activation() == name == "relu":  # autograd passes the result, which has the sign of the argument
            x = x.arguments[0]
        if gradient.operation is _MULTIPLY:
            g, up = gradient.arguments
            return f"{name}_gate_grad", x, up, g
        return f"{name}_grad", x, gradient


def _name(names: Mapping[Any, str], operation: Any, options: Any) -> str | None:
    name = names.get(operation)
    return "gelu_tanh" if name == "gelu" and options.get("approximate") == "tanh" else name


_TENSOR: Any = Tensor
_SET_DATA = _TENSOR.data.__set__


class Lazy(Tensor):
    """A tensor whose values are perhaps not computed yet.

    One with values has them in its own storage; one without has none. What asks for a pointer through Python gets that
    of the values. What does not must not be given one: `other.data = lazy` and `torch.utils.dlpack.to_dlpack(lazy)`
    take over a storage without memory. Both are fine with `lazy.data`, which is an ordinary tensor.
    """

    promise: Promise
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # noqa: SLF001

    @classmethod
    def of(cls, promise: Promise, like: Tensor) -> Lazy:
        """A tensor with these values, of the shape and type of `like`."""
        if type(promise.values) is Tensor:
            made = Tensor._make_subclass(cls, promise.values)  # noqa: SLF001 - the documented ways to make one
        else:
            made = Tensor._make_wrapper_subclass(  # noqa: SLF001
                cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
            )
        made.promise = promise
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PUT_OFF:
            if (made := _put_off(func, args, kwargs)) is not None:
                return made
        elif func in _SAME:
            return cls.of(args[0].promise, args[0])
        effects = _effects(func)
        if effects is not None:
            for touched in _lazies((*args, *kwargs.values())):
                touched.promise.keep_followers()
                touched.promise.shared |= effects.views
                if effects.reshapes:  # aliases keep their shape
                    touched.promise = Promise(touched.plain().detach())
                    touched.promise.shared = True
        out = func(*_values(args), **{name: _values(value) for name, value in kwargs.items()})
        if effects is not None and effects.reshapes:
            with torch._C._DisableTorchDispatch():  # noqa: SLF001 - of the outer tensor
                func(*args, **kwargs)
        written = kwargs.get("out")
        if isinstance(written, Lazy) and written.shape != (shape := written.promise.keep().shape):
            with torch._C._DisableTorchDispatch():  # noqa: SLF001 - of the outer tensor
                written.resize_(shape)
        return out

    def plain(self) -> Tensor:
        """An ordinary tensor with the same values, in the same memory, that autograd knows nothing of."""
        return self.promise.share().detach().requires_grad_(self.requires_grad)

    @property
    def data(self) -> Tensor:
        """As of any tensor, and an ordinary one, which may be written to."""
        return self.plain().detach()

    @data.setter
    def data(self, values: Tensor) -> None:
        self.promise.keep_followers()
        self.promise = Promise(values.detach())
        self.promise.shared = True
        _SET_DATA(self, values)

    # Compiled code that is given one takes the values.

    @property
    def kept(self) -> Tensor:
        """The values, for reading."""
        return self.promise.keep()

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["kept"], None

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, Tensor], _context: None, _size: Any, _stride: Any) -> Lazy:
        return lazy(inner["kept"])

    def _stable_hash_for_caching(self) -> str:
        return "Lazy"

    # What Python offers beside the dispatcher.

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        shown = torch._tensor_str._str(self.promise.keep(), tensor_contents=tensor_contents)  # noqa: SLF001
        if self.grad_fn is not None:
            return f"{shown[:-1]}, grad_fn=<{self.grad_fn.name()}>)"
        return f"{shown[:-1]}, requires_grad=True)" if self.requires_grad else str(shown)

    def numpy(self, *, force: bool = False) -> Any:
        return self.plain().numpy(force=force)

    def tolist(self) -> Any:
        return self.plain().tolist()

    def data_ptr(self) -> int:
        return self.plain().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        if TracingContext.try_get() is not None:  # for the compiler only the parts have memory
            return torch.UntypedStorage(0, device=self.device)
        return self.plain().untyped_storage()

    def __dlpack__(self, **options: Any) -> Any:
        return self.plain().__dlpack__(**options)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        if not self.is_leaf:
            super().__deepcopy__(memo)  # type: ignore[no-untyped-call] # raises
        return copy.deepcopy(self.plain(), memo)


class _Effects(NamedTuple):
    """What an operation does beside giving a result."""

    views: bool
    """The result shares memory with an argument."""
    reshapes: bool
    """An argument has another shape afterwards."""


@cache
def _effects(func: Any) -> _Effects | None:
    """Those of operations that may write to an argument or give a view of one; None for others."""
    views = func.is_view or func is aten._unsafe_view.default  # noqa: SLF001 - what reshape calls
    writes = func._schema.is_mutable or func.namespace != "aten"  # noqa: SLF001 - collectives do not say that they write
    if views or writes:
        return _Effects(views, torch.Tag.inplace_view in func.tags)
    return None


def lazy(values: Tensor) -> Lazy:
    """The values, contiguous and nobody else's, as a tensor whose activations are put off."""
    return Lazy.of(Promise(values), values)


def peeked(tensor: Tensor) -> Tensor:
    """An ordinary tensor with the same values for reading once, without a trace in what the tensor is used for."""
    return tensor.promise.peek() if isinstance(tensor, Lazy) else tensor.detach()


def some_rows(tensor: Tensor, every: int) -> Tensor:
    """[n, K]: one of so many rows of a tensor [..., K] of two or more dimensions, without what autograd knows of it.

    What was put off stays put off.
    """
    return tensor.promise.rows(every) if isinstance(tensor, Lazy) else tensor.detach().flatten(0, -2)[::every]


def is_traced(values: Tensor) -> bool:
    """Whether the code that computed this tensor is being compiled, exported or traced rather than run."""
    return torch.compiler.is_compiling() or type(values) is not Tensor or torch._C._get_tracing_state() is not None  # noqa: SLF001


def _put_off(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Lazy | None:
    """The result, not computed, if it can be computed later and its arguments lie side by side as a cast reads them."""
    first, arguments = args[0], []
    if func is _MULTIPLY and not (isinstance(first, Lazy) and isinstance(args[1], Lazy)):
        return None  # by a number: no cast knows that
    for part in args:
        if isinstance(part, Lazy):
            if part.promise.shared:
                return None
            if part is not first and (part.shape, part.dtype, part.device) != (first.shape, first.dtype, first.device):
                return None
            arguments.append(part.promise)
        elif isinstance(part, Tensor):
            return None
        else:
            arguments.append(part)
    # The compiler's own runs of what it compiles are no compiling to all versions of PyTorch.
    if torch.compiler.is_compiling() or TracingContext.try_get() is not None:
        return None
    return Lazy.of(Promise(None, func, tuple(arguments), kwargs), first)


def _lazies(parts: Any) -> Iterator[Lazy]:
    """Those among the parts and in lists of them."""
    for part in parts:
        if isinstance(part, Lazy):
            yield part
        elif isinstance(part, list | tuple):
            yield from _lazies(part)


def _values(part: Any) -> Any:
    """The part with ordinary tensors in place of lazy ones, also in lists and tuples."""
    if isinstance(part, Lazy):
        return part.promise.keep()
    if isinstance(part, list | tuple):
        return type(part)([_values(item) for item in part])
    return part
