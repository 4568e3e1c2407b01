"""Trying candidates on a model: what a try starts from, what it leaves, and what rules a candidate out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepseek_mp.costs import whole_step
from deepseek_mp.costs.decide import Candidate, Failure, Trial
from deepseek_mp.costs.restore import preserved
from deepseek_mp.costs.timing import Timing
from deepseek_mp.costs.whole_step import FP16_LOSS_SCALE, MESSAGE_LENGTH, Stage
from deepseek_mp.errors import PlanError
from deepseek_mp.nn import current_plan, memory_format_of
from deepseek_mp.precision import Recipe

CPU = torch.device("cpu")
FP32, BF16, FP16 = Candidate(format="fp32"), Candidate(format="bf16"), Candidate(format="fp16")


class EveryFormat:
    """Capabilities of a device that multiplies in every format."""

    def require(self, format: str, *, emulate: bool) -> bool:
        return True


class Then(nn.Module):
    """A linear layer, then what the test says."""

    def __init__(self, then: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.linear, self.then = nn.Linear(4, 3), then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.linear(x))


@contextmanager
def staged(model: nn.Module, *shape: int, pins: dict[str, str | Recipe] | None = None) -> Iterator[Stage]:
    """A stage with inputs of the given shape, (2, 4) unless one is given."""
    capabilities: Any = EveryFormat()
    inputs = torch.randn(shape or (2, 4))
    with preserved(model, CPU) as snapshot:
        yield Stage(
            model=model,
            run=lambda: model(inputs).square().mean(),
            device=CPU,
            capabilities=capabilities,
            pins=pins or {},
            emulate=False,
            snapshot=snapshot,
        )


@pytest.fixture(autouse=True)
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step runs twice and takes a second, whatever it does."""

    def time_call(fn: Callable[[], object], device: torch.device, **_: Any) -> Timing:
        fn()
        fn()
        return Timing(median_ms=1000.0, low_ms=1000.0, high_ms=1000.0, runs=1)

    monkeypatch.setattr(whole_step, "time_call", time_call)


def tried(stage: Stage, candidate: Candidate, *, finite: bool | None = True, reference: Candidate = FP32) -> Trial:
    return stage.try_step(Trial(candidate=candidate), reference=reference, finite=finite, budget_s=0.0)


def test_every_try_starts_from_the_same_state_and_leaves_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    masks: list[Tensor] = []
    model[2].register_forward_hook(lambda _, args, output: masks.append(output == 0))
    with staged(model) as stage:
        for candidate in (FP32, BF16, FP32):
            assert tried(stage, candidate).step_ms == 1000.0
            assert all(parameter.grad is None for parameter in model.parameters())
            assert current_plan(model) is None
    firsts = masks[::2]
    assert len(firsts) == 3
    assert all(torch.equal(mask, firsts[0]) for mask in firsts)
    assert not torch.equal(masks[0], masks[1]), "within a try, random numbers go on"
    assert int(model[1].num_batches_tracked) == 0


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_step_runs_in_the_candidates_format_layout_and_pins(layout: Any) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    seen: list[tuple[torch.dtype, torch.dtype, bool]] = []
    gradients: list[Tensor | None] = []
    convolution, head = model[1], model[3]

    def look(_: nn.Module, args: Any, output: Tensor) -> None:
        last = convolution.weight.is_contiguous(memory_format=torch.channels_last)
        gradients.append(head.weight.grad)
        seen.append((args[0].dtype, output.dtype, last))

    head.register_forward_hook(look)
    with staged(model, 2, 1, 8, 8, pins={"3": "fp32"}) as stage:
        tried(stage, Candidate(format="bf16", memory_format=layout))
    assert set(seen) == {(torch.bfloat16, torch.float32, layout == "channels_last")}
    assert gradients == [None, None], "each step begins without gradients"
    assert convolution.weight.is_contiguous()


@pytest.mark.parametrize(("candidate", "scale"), [(FP32, 1.0), (BF16, 1.0), (FP16, FP16_LOSS_SCALE)], ids=str)
def test_only_an_fp16_loss_is_scaled(candidate: Candidate, scale: float) -> None:
    """The gradient of the last bias is exact enough in each format to tell the scale from it."""
    model = Then()
    gradients: list[Tensor] = []
    model.linear.bias.register_hook(lambda gradient: gradients.append(gradient.clone()))
    with staged(model) as stage:
        tried(stage, FP32)
        tried(stage, candidate)
    ratio = gradients[-1] / gradients[0]
    assert torch.allclose(ratio, torch.full_like(ratio, scale), rtol=0.05)


def test_an_error_in_a_lower_format_is_kept_cut_where_it_is_long() -> None:
    def refuse(x: Tensor) -> Tensor:
        if x.dtype is torch.bfloat16:
            raise TypeError("no " * MESSAGE_LENGTH)
        return x

    with staged(Then(refuse)) as stage:
        trial = tried(stage, BF16)
        assert (trial.failure, trial.step_ms) == (Failure.ERROR, None)
        assert trial.detail.startswith("TypeError: no no")
        assert len(trial.detail) <= MESSAGE_LENGTH + 3
        assert tried(stage, FP32).failure is None


def test_an_error_in_backward_counts_and_leaves_no_gradient() -> None:
    def refuse(gradient: Tensor) -> None:
        raise TypeError("no backward")

    def then(x: Tensor) -> Tensor:
        x.register_hook(refuse)
        return x

    model = Then(then)
    with staged(model) as stage:
        assert tried(stage, BF16).detail == "TypeError: no backward"
        assert all(parameter.grad is None for parameter in model.parameters())
        with pytest.raises(TypeError, match="no backward"):
            tried(stage, FP32)
        assert current_plan(model) is None


def test_out_of_memory_is_a_failure_in_every_format() -> None:
    def full(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("none left")

    with staged(Then(full)) as stage:
        assert tried(stage, FP32).failure is Failure.DOES_NOT_FIT
        assert tried(stage, BF16).failure is Failure.DOES_NOT_FIT
        recording = stage.record([FP32, BF16])
        assert (recording.calls, recording.finite) == ((), None)
        assert recording.failed["bf16"][0] is Failure.DOES_NOT_FIT


@pytest.mark.parametrize(
    ("candidate", "finite", "failure"),
    [
        (BF16, True, Failure.NOT_FINITE),
        (BF16, False, None),
        (BF16, None, None),
        (FP32, True, None),
    ],
)
def test_an_infinite_loss_counts_only_against_a_lower_format_and_where_fp32s_is_finite(
    candidate: Candidate, *, finite: bool | None, failure: Failure | None
) -> None:
    with staged(Then(lambda x: x * math.inf)) as stage:
        trial = tried(stage, candidate, finite=finite)
    assert trial.failure is failure
    assert (trial.step_ms is None) is (failure is not None)


def test_the_calls_are_those_of_the_first_16_bit_region_that_works() -> None:
    def only(x: Tensor) -> Tensor:
        if x.dtype is torch.bfloat16:
            raise TypeError("not in bf16")
        return x

    def narrow_inputs(then: Callable[[Tensor], Tensor]) -> tuple[list[bool], dict[str, Any]]:
        model = nn.Sequential(Then(then), nn.Linear(3, 3))
        with staged(model) as stage:
            recording = stage.record([FP32, BF16, FP16])
        assert recording.finite is True
        return [call.inputs[0].narrow for call in recording.calls if call.names == ("1",)], recording.failed

    assert narrow_inputs(lambda x: x) == ([True], {})
    assert narrow_inputs(only) == ([True], {"bf16": (Failure.ERROR, "TypeError: not in bf16")})
    assert narrow_inputs(lambda x: x * (1 if x.dtype is torch.float32 else math.inf)) == (
        [False],
        {"bf16": (Failure.NOT_FINITE, ""), "fp16": (Failure.NOT_FINITE, "")},
    )


def test_an_error_while_recording_the_reference_is_the_users() -> None:
    def fail(x: Tensor) -> Tensor:
        raise ZeroDivisionError("mine")

    model = Then(fail)
    with staged(model) as stage, pytest.raises(ZeroDivisionError, match="mine"):
        stage.record([FP32, BF16])
    assert current_plan(model) is None


def test_candidates_begin_with_the_memory_format_of_the_model() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3))
    with staged(model) as stage:
        found, refused = stage.candidates(["fp32", "bf16"])
    assert [candidate.key for candidate in found] == ["fp32", "bf16", "fp32_channels_last", "bf16_channels_last"]
    assert refused == {}
    model.to(memory_format=torch.channels_last)
    with staged(model) as stage:
        found, _ = stage.candidates(["fp32", "bf16"])
    assert [candidate.key for candidate in found] == ["fp32_channels_last", "bf16_channels_last", "fp32", "bf16"]
    assert memory_format_of(model) == "channels_last"


def test_a_format_that_the_model_or_its_pins_do_not_take_is_refused_with_the_reason() -> None:
    with staged(Then(), pins={"linear": "fp32"}) as stage:
        found, refused = stage.candidates(["fp32", "tf32", "bf16"])
    assert found == [FP32, BF16]
    assert "tf32 beside fp32" in refused["tf32"]
    model = Then()
    model.linear.requires_grad_(False).bfloat16()
    with staged(model) as stage:
        found, refused = stage.candidates(["fp32", "bf16"])
    assert found == [BF16]
    assert "stored in bf16" in refused["fp32"]


def test_a_model_that_takes_no_plan_raises_the_first_refusal() -> None:
    with staged(Then(), pins={"nowhere": "fp32"}) as stage, pytest.raises(PlanError, match="matches no layer"):
        stage.candidates(["fp32", "bf16"])
