"""Whether a prepared model does in evaluation what the original does there, with the example inputs and other sizes.

Its graph was exported in training mode, and from the example inputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_mp.nn.nested import map_leaves, tensors
from deepseek_mp.qat.simulated import SimulatedModel, state_of

ALIKE = 0.01
"""Of the norm of an output: folded BatchNorms and other kernels differ by far less."""
NOISE = 1e-5
"""Of a value, where all are near zero."""
COUNT = "num_batches_tracked"
"""Of BatchNorms: nothing that they compute in evaluation depends on it."""
ZERO = 1e-3
"""The least largest value of a parameter that matters from the start."""


def observe_example(model: nn.Module, simulated: SimulatedModel) -> bool:
    """Observe the ranges of the example inputs; warns unless outputs and state are those of the model in evaluation.

    Returns whether they are.

    Args:
        model: that which was exported; it is put into evaluation, and what it writes to its state is put back.
        simulated: the model prepared from it.
    """
    (found, written), failed = _run(simulated, simulated.graph, simulated, simulated.example_copy()), ""
    try:
        expected, by_itself = _run(model.eval(), model, simulated, simulated.example_copy())
    except Exception as error:  # noqa: BLE001 - code that was not exported may raise anything, and is not needed
        expected, by_itself = [], written
        failed = f" (it fails there with the example inputs: {type(error).__name__}: {error})"
    alike = not failed and _alike(found, expected)
    if not alike:
        warnings.warn(
            f"in evaluation and in INT8, {simulated.name} will not give what the model passed gives{failed}: where its "
            "code asks self.training it goes on as in training, such as in stochastic depth or with outputs of more "
            "heads. Pass a model whose forward does the same in both modes, but for dropout and norms",
            stacklevel=4,  # that which calls `prepare`, through its region
        )
    elif drifting := written - by_itself:
        warnings.warn(
            f"in evaluation and in INT8, each call of {simulated.name} will change {', '.join(sorted(drifting))}, "
            "which the model passed changes in training only, so that outputs may differ from call to call. Pass a "
            "model whose state is the same in both modes; of a parametrization, such as spectral_norm, keep the weight "
            "that it gives: torch.nn.utils.parametrize.remove_parametrizations",
            stacklevel=4,
        )
        return False
    return alike


def does_the_same(
    model: nn.Module, simulated: SimulatedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool | None:
    """Whether the prepared model gives what the original gives in evaluation; None where both fail.

    Args:
        model: the original, in evaluation.
        simulated: its state comes back; ranges of its weights follow these (see `kept_ranges`).
        args: of the call.
        kwargs: the others.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the model and of operations, about sizes that nobody passed
        expected = _tried(model, model, simulated, (args, kwargs))
        found = _tried(simulated.unchecked, simulated.graph, simulated, (args, kwargs))
    if expected is None or found is None:
        return None if expected is found else False
    return _alike(found, expected, exactly=True)


def _tried(called: Callable[..., Any], module: nn.Module, simulated: SimulatedModel, call: Any) -> list[Tensor] | None:
    """The outputs, None where it fails."""
    try:
        return _run(called, module, simulated, _copies(call), observed=False)[0]
    except Exception:  # noqa: BLE001 - the model's code may raise anything, and operations do for sizes
        return None


@contextmanager
@torch.no_grad()
def nothing_is_zero(model: nn.Module) -> Iterator[None]:
    """Inside, parameters that are near zero are drawn: what they multiply makes no difference now, and will later.

    Such are those of a branch that begins as none, and of scales of layers. They come back.
    """
    zero = {one: one.clone() for one in model.parameters() if one.is_floating_point() and _is_zero(one)}
    generator = torch.Generator().manual_seed(0)
    for one in zero:
        one.normal_(0, (one.shape[0] / one.numel()) ** 0.5 if one.dim() else 1, generator=generator)
    try:
        yield
    finally:
        for one, own in zero.items():
            one.copy_(own)


def _is_zero(parameter: Tensor) -> bool:
    return parameter.numel() > 0 and float(parameter.abs().max()) < ZERO


def _copies(call: Any) -> Any:
    return map_leaves(call, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)


def _run(
    called: Callable[..., Any], module: nn.Module, simulated: SimulatedModel, call: Any, *, observed: bool = True
) -> tuple[list[Tensor], set[str]]:
    """The outputs of a call in evaluation, and the names of the module's buffers that it changed, which is undone.

    Args:
        called: what is called.
        module: what has the state that it may change, `called` itself or within it.
        simulated: whose region it is.
        call: arguments and keyword arguments.
        observed: whether ranges are.
    """
    args, kwargs = call
    with simulated.unrounded(observed=observed), torch.random.fork_rng(devices=[]):
        before = state_of(module)
        torch.default_generator.manual_seed(0)  # what draws in both modes draws the same; those of GPUs stay
        outputs = list(tensors(called(*args, **kwargs)))
        after = {name: value for name, value in module.named_buffers() if not name.endswith(COUNT)}
        return outputs, {name for name, old in before.items() if name in after and not torch.equal(after[name], old)}


def _alike(found: list[Tensor], expected: list[Tensor], *, exactly: bool = False) -> bool:
    """Of numbers that are not finite, and of others than real and complex ones, something is said only if `exactly`."""
    if [one.shape for one in found] != [one.shape for one in expected]:
        return False
    return all(_near(*pair, exactly=exactly) for pair in zip(found, expected, strict=True))


def _near(found: Tensor, expected: Tensor, *, exactly: bool) -> bool:
    if not all(one.is_floating_point() or one.is_complex() for one in (found, expected)):
        return not exactly or _few(found != expected)
    wide = torch.complex128 if found.is_complex() or expected.is_complex() else torch.float64
    finite = torch.isfinite(found) & torch.isfinite(expected)
    if not finite.all():
        if exactly:
            numbers = (torch.where(finite, 0, one).to(wide).nan_to_num() for one in (found, expected))
            if not _few(torch.ne(*numbers)):
                return False
        found, expected = found[finite], expected[finite]
    norm = torch.linalg.vector_norm(expected, dtype=wide)
    return bool(torch.dist(found.to(wide), expected.to(wide)) <= ALIKE * norm + NOISE * expected.numel() ** 0.5)


def _few(different: Tensor) -> bool:
    """Whether other kernels explain so many: of many values before a rounding, some are right beside its step."""
    return int(different.sum()) <= ALIKE * different.numel()
