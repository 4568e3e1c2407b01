"""Calibration: the ranges of activations, observed over batches of data before training begins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from deepseek_mp.errors import BatchError, LoaderError, explain
from deepseek_mp.nn import call as calls
from deepseek_mp.qat.preparation import all_finite
from deepseek_mp.qat.simulated import SimulatedModel


def calibrate(simulated: SimulatedModel, batches: Iterable[Any]) -> int:
    """Run the batches, of the forms that a trainer takes, unrounded and as in evaluation; returns how many there were.

    Raises:
        LoaderError: there is none, or a tensor or mapping is passed, which is one batch.
        BatchError: one has values that are not finite, or another form.
    """
    if isinstance(batches, Tensor | Mapping):
        passed = f"calibration={type(batches).__name__}, which is one batch"
        raise LoaderError(explain(passed, "batches: a list of them, or a loader", "Pass it in a list"))
    count = 0
    with simulated.observing():
        for batch in batches:
            call = calls.parse_batch(batch)
            if not all_finite((call.args, call.kwargs)):
                passed = f"calibration with NaN or infinite values in batch {count}"
                raise BatchError(explain(passed, "finite inputs", "Clean the data, or leave the batch out"))
            calls.invoke(simulated, call)
            count += 1
    if not count:
        change = "Pass some batches, or None to use example_inputs"
        raise LoaderError(explain("calibration without a batch", "one batch or more", change))
    return count
