"""Calibration: the ranges of activations, observed over batches of data before training begins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from deepseek_mp.errors import BatchError, LoaderError, explain, first_line
from deepseek_mp.nn import call as calls
from deepseek_mp.precision.checks import shown
from deepseek_mp.qat.preparation import all_finite
from deepseek_mp.qat.simulated import SimulatedModel


def calibrate(simulated: SimulatedModel, batches: Iterable[Any]) -> int:
    """Run the batches, of the forms that a trainer takes, unrounded and as in evaluation; returns how many there were.

    Ranges become the means of those of the batches, in place of what was observed before, such as of an example whose
    values are of no account. Of many batches the last hundred or so count, and those without samples not at all. After
    an error they are as they were.

    Raises:
        LoaderError: there is none, a tensor or mapping is passed, which is one batch, or what is no iterable.
        BatchError: one has values that are not finite, or another form, or the model fails with it.
    """
    check_batches(batches)
    count = 0
    with _observed_anew(simulated) as quantisers, simulated.observing():
        for index, batch in enumerate(batches):
            call = calls.parse_batch(batch)
            if not calls.batch_size(call):
                continue
            if not all_finite((call.args, call.kwargs)):
                passed = f"calibration with NaN or infinite values in batch {index}"
                raise BatchError(explain(passed, "finite inputs", "Clean the data, or leave the batch out"))
            with _share_of(quantisers, count):
                _run(simulated, call, index)
            count += 1
        if not count:
            change = "Pass some batches, or None to use example_inputs"
            raise LoaderError(explain("calibration without a batch", "one batch or more", change))
    return count


def check_batches(batches: object) -> None:
    """`LoaderError` for what holds no batches."""
    name, allowed = type(batches).__name__, "batches: a list of them, or a loader"
    if isinstance(batches, Tensor | Mapping):
        raise LoaderError(explain(f"calibration={name}, which is one batch", allowed, "Pass it in a list"))
    if isinstance(batches, str | bytes) or not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")):
        raise LoaderError(explain(f"calibration={shown(batches)}", allowed, "Pass some batches of real data"))


def _run(simulated: SimulatedModel, call: calls.Call, index: int) -> None:
    try:
        calls.invoke(simulated, call)
    except BatchError:
        raise
    except Exception as error:  # operations raise whatever they like about dtypes and values
        passed = f"calibration with a batch {index} that the model does not take ({first_line(error)})"
        raise BatchError(
            explain(passed, "batches like those of training", "Pass batches like example_inputs")
        ) from error


@contextmanager
def _observed_anew(simulated: SimulatedModel) -> Iterator[list[Any]]:
    """The quantisers of activations, without their ranges; those come back after an error, or where none is found."""
    quantisers: list[Any] = [one for one in simulated.quantisers() if not getattr(one, "is_per_channel", False)]
    before = [[buffer.clone() for buffer in one.buffers()] for one in quantisers]
    for one in quantisers:
        one.activation_post_process.min_val.fill_(torch.inf)
        one.activation_post_process.max_val.fill_(-torch.inf)
    done = False
    try:
        yield quantisers
        done = True
    finally:
        for one, kept in zip(quantisers, before, strict=True):
            if not (done and torch.isfinite(one.activation_post_process.min_val)):
                for buffer, value in zip(one.buffers(), kept, strict=True):
                    buffer.copy_(value)


@contextmanager
def _share_of(quantisers: list[Any], count: int) -> Iterator[None]:
    """Inside, a batch after `count` others has its share of their mean; the first is taken as it is in any case."""
    own = [one.activation_post_process.averaging_constant for one in quantisers]
    for one, share in zip(quantisers, own, strict=True):
        one.activation_post_process.averaging_constant = max(share, 1 / (count + 1)) if count else share
    try:
        yield
    finally:
        for one, share in zip(quantisers, own, strict=True):
            one.activation_post_process.averaging_constant = share
