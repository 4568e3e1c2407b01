"""What every trial of steps rests on; `test_batch_size.py` and `test_memory_trials.py` try them as a whole."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepseek_mp import MixedPrecisionTrainer
from deepseek_mp.errors import ConfigError
from deepseek_mp.precision import PrecisionPlan
from deepseek_mp.trainer import trial_steps
from deepseek_mp.trainer.trial_steps import goes_through, on_what_fits, trials, unrecorded

CPU = torch.device("cpu")


def ran_out() -> None:
    raise torch.OutOfMemoryError("out of memory")


def test_a_call_goes_through_or_runs_out_of_memory_and_other_errors_are_the_callers() -> None:
    assert goes_through(lambda: None, CPU)
    assert not goes_through(ran_out, CPU)
    with pytest.raises(RuntimeError, match="mine"):
        goes_through(lambda: (_ for _ in ()).throw(RuntimeError("mine")), CPU)


def test_what_ran_out_of_memory_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "deepseek_mp.trials"):
        goes_through(ran_out, CPU)
    assert caplog.messages == ["memory ran out: OutOfMemoryError: out of memory"]


def test_memory_that_ran_out_is_found_below_what_a_library_makes_of_it() -> None:
    def wraps() -> None:
        try:
            ran_out()
        except torch.OutOfMemoryError as error:
            raise ValueError("the layer failed") from error

    assert not goes_through(wraps, CPU)


def test_what_pytorch_has_lost_in_a_backward_did_not_go_through() -> None:
    """A checkpointed part that runs out of memory ends so; another `SystemError` is the caller's."""
    lost = SystemError("<built-in method run_backward of ...> returned NULL without setting an exception")
    assert not goes_through(lambda: (_ for _ in ()).throw(lost), CPU)
    with pytest.raises(SystemError, match="bad argument"):
        goes_through(lambda: (_ for _ in ()).throw(SystemError("bad argument to internal function")), CPU)


@pytest.mark.parametrize(("counts", "ran_out"), [((3, 4), True), ((3, 3), False), ((None, None), True)])
def test_what_a_backward_has_lost_is_memory_only_if_that_ran_out_meanwhile(
    monkeypatch: pytest.MonkeyPatch, counts: tuple[int | None, int | None], ran_out: bool
) -> None:
    given = iter(counts)
    monkeypatch.setattr(trial_steps, "out_of_memory_count", lambda device: next(given))

    def call() -> None:
        raise SystemError("<built-in method run_backward of ...> returned NULL without setting an exception")

    if ran_out:
        assert not goes_through(call, CPU)
    else:
        with pytest.raises(SystemError, match="without setting an exception"):
            goes_through(call, CPU)


def test_a_batch_that_is_too_large_is_halved_until_the_call_goes_through() -> None:
    sizes: list[int] = []

    def call(batch: Tensor) -> PrecisionPlan:
        sizes.append(len(batch))
        if len(batch) > 5:
            ran_out()
        return PrecisionPlan.of("bf16")

    assert on_what_fits(call, torch.ones(40, 2), CPU).base.name == "bf16"
    assert sizes == [40, 20, 10, 5]
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        on_what_fits(lambda _: ran_out(), torch.ones(4, 2), CPU)  # type: ignore[arg-type,func-returns-value]


def test_what_is_decided_meanwhile_is_heard_and_not_recorded() -> None:
    kept: Any = SimpleNamespace(recorder=SimpleNamespace(decided=pytest.fail))
    recorder = kept.recorder
    with pytest.raises(ValueError, match="end"), unrecorded(kept) as heard:  # noqa: PT012
        kept.recorder.decided(["one", "two"])
        raise ValueError("end")
    assert heard == ["one", "two"]
    assert kept.recorder is recorder


def test_within_an_accumulation_window_nothing_is_tried() -> None:
    run = MixedPrecisionTrainer(nn.Linear(4, 2), "fp32", device="cpu", gradient_accumulation_steps=2)
    run.step((torch.randn(3, 4), torch.randn(3, 2)))
    with pytest.raises(ConfigError, match="this within an accumulation window"), trials(run, "this"):
        pass
