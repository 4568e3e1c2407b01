"""Whether a prepared model does in evaluation what the original does there, with the example inputs and other sizes.

Its graph was exported in training mode, and from the example inputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_mp.nn.nested import map_leaves, tensors
from deepseek_mp.qat.simulated import SimulatedModel

ALIKE = 0.01
"""Of the norm of an output: folded BatchNorms and other kernels differ by far less."""
NOISE = 1e-5
"""Of a value, where all are near zero."""


def observe_example(model: nn.Module, simulated: SimulatedModel) -> bool:
    """Observe the ranges of the example inputs; warns unless outputs and state are those of the model in evaluation.

    Returns whether they are.

    Args:
        model: that which was exported; it is put into evaluation, and what it writes to its state is put back.
        simulated: the model prepared from it.
    """
    found, failed = _outputs(simulated, simulated, simulated.example_copy()), ""
    try:
        expected = _outputs(model.eval(), simulated, simulated.example_copy())
    except Exception as error:  # noqa: BLE001 - code that was not exported may raise anything, and is not needed
        expected, failed = [], f" (it fails there with the example inputs: {type(error).__name__}: {error})"
    alike = not failed and _alike(found, expected)
    if not alike:
        warnings.warn(
            f"in evaluation and in INT8, {simulated.name} will not give what the model passed gives{failed}: where its "
            "code asks self.training it goes on as in training, such as in stochastic depth or with outputs of more "
            "heads. Pass a model whose forward does the same in both modes, but for dropout and norms",
            stacklevel=4,  # that which calls `prepare`, through its region
        )
    elif drifting := _written(simulated.graph, simulated, simulated) - _written(model, model, simulated):
        warnings.warn(
            f"in evaluation and in INT8, each call of {simulated.name} will change {', '.join(sorted(drifting))}, "
            "which the model passed changes in training only, so that outputs may differ from call to call. Pass a "
            "model whose state is the same in both modes; of a parametrization, such as spectral_norm, keep the weight "
            "that it gives: "
            "torch.nn.utils.parametrize.remove_parametrizations",
            stacklevel=4,
        )
        return False
    return alike


def does_the_same(model: nn.Module, simulated: SimulatedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the prepared model gives what the original gives in evaluation; not where one of them fails.

    Args:
        model: the original, in evaluation.
        simulated: unchanged, its state and its ranges too.
        args: of the call.
        kwargs: the others.
    """
    try:
        expected, found = (
            _outputs(called, simulated, _copies((args, kwargs)), observed=False)
            for called in (model, simulated.unchecked)
        )
    except Exception:  # noqa: BLE001 - the model's code may raise anything, and operations do for sizes
        return False
    return _alike(found, expected)


def _copies(call: Any) -> Any:
    return map_leaves(call, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)


def _outputs(
    called: Callable[..., Any], simulated: SimulatedModel, call: Any, *, observed: bool = True
) -> list[Tensor]:
    args, kwargs = call
    with simulated.unrounded(observed=observed), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # what draws in both modes draws the same; those of GPUs stay
        given = called(*args, **kwargs)
    return list(tensors(given))


def _written(module: nn.Module, called: Callable[..., Any], simulated: SimulatedModel) -> set[str]:
    """The names of the module's buffers that a call in evaluation changes, which is undone.

    Args:
        module: the simulated model's graph, or the original.
        called: what is called with the example inputs.
        simulated: whose region it is.
    """
    args, kwargs = simulated.example_copy()
    with simulated.unrounded(), torch.random.fork_rng(devices=[]):
        before = {name: buffer.clone() for name, buffer in module.named_buffers()}
        called(*args, **kwargs)
        after = dict(module.named_buffers())
        return {name for name, old in before.items() if name in after and not torch.equal(after[name], old)}


def _alike(found: list[Tensor], expected: list[Tensor]) -> bool:
    if [one.shape for one in found] != [one.shape for one in expected]:
        return False
    pairs = (pair for pair in zip(found, expected, strict=True) if all(one.is_floating_point() for one in pair))
    return all(_near(*pair) for pair in pairs)


def _near(found: Tensor, expected: Tensor) -> bool:
    """Of values that are not finite, nothing is said."""
    difference = (found.double() - expected.double()).norm()
    allowed = ALIKE * expected.double().norm() + NOISE * expected.numel() ** 0.5
    return bool(difference <= allowed) or not bool(torch.isfinite(difference))
