"""What was confirmed says what it covers, and an error of memory says what is known and what to change."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from deepseek_mp import MixedPrecisionTrainer
from deepseek_mp.trainer.confirmed_batch import ConfirmedBatch, explained

KNOWN = ConfirmedBatch(samples=6, measures=("states=8bit",), peak_bytes=3 << 30)


def batch(size: int) -> Any:
    return torch.randn(size, 4), torch.zeros(size, 3)


def test_smaller_batches_are_covered() -> None:
    assert KNOWN.covers(batch(6))
    assert KNOWN.covers({"x": torch.ones(2, 9)})
    assert not KNOWN.covers(batch(7))
    assert str(KNOWN) == "find_batch_size saw steps of 6 samples go through with states=8bit, holding 3 GiB"


@pytest.mark.parametrize(
    ("known", "size", "said"),
    [
        (None, 6, "step of 6 samples ran out of memory. find_batch_size finds the largest batch that fits"),
        (KNOWN, 7, "step of 7 samples ran out of memory. find_batch_size saw steps of 6 .* give no more than that"),
        (KNOWN, 6, "saw steps of 6 samples go through with .*samples are larger .* or something else holds memory"),
    ],
)
def test_a_step_that_runs_out_of_memory_says_what_is_known(known: ConfirmedBatch | None, size: int, said: str) -> None:
    class Full(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    run = MixedPrecisionTrainer(Full(4, 3), "fp32", device="cpu")
    run.confirmed = known
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory") as caught:
        run.step(batch(size))
    (note,) = caught.value.__notes__
    assert re.search(said, note)


def test_another_error_is_left_as_it_is() -> None:
    trainer: Any = SimpleNamespace(confirmed=KNOWN)
    with pytest.raises(RuntimeError, match="a mistake") as caught, explained(trainer, batch(2)):
        raise RuntimeError("a mistake")
    assert not hasattr(caught.value, "__notes__")
