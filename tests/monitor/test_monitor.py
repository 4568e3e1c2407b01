"""Reports: what they cover, what is logged, and what the monitor refuses."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as global_hooks
from torch.optim import optimizer as optimizers

from deepseek_mp.backends import autocast
from deepseek_mp.errors import ConfigError
from deepseek_mp.monitor import PrecisionMonitor, Sampling
from deepseek_mp.monitor.counts import Count
from deepseek_mp.nn import apply
from deepseek_mp.precision import PrecisionPlan, Reason


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Every test ends with PyTorch as it was: no mode, no global hook, no optimizer hook."""
    torch.manual_seed(0)
    yield
    assert torch._C._len_torch_dispatch_stack() == 0
    assert not global_hooks._global_forward_hooks
    assert not global_hooks._global_forward_pre_hooks
    assert not optimizers._global_optimizer_pre_hooks
    assert not optimizers._global_optimizer_post_hooks


class ConvNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(32, 5)
        )


def conv_net() -> tuple[nn.Module, Tensor, Tensor]:
    return ConvNet(), torch.randn(2, 3, 8, 8), torch.randint(5, (2,))


def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)), torch.randn(3, 6), torch.randint(4, (3,))


def step(model: nn.Module, inputs: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs), target)


def test_an_example_of_a_users_loop(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs, target = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu")
    caplog.set_level(logging.INFO, logger="deepseek_mp")

    monitor = PrecisionMonitor(model, sample_every=3)
    for epoch in range(2):
        model.train()
        for _ in range(7):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = step(model, inputs, target)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        model.eval()
        with torch.no_grad():
            for _ in range(2):
                model(inputs)
        usage = monitor.log_precision_usage()

        assert (usage.steps, usage.sampled_steps) == (7, 3)
        assert (usage.eval_steps, usage.sampled_eval_steps) == (2, 1)
        convolutions = usage.ops["convolution"]
        assert convolutions["fp16"].forward == 3 * 2  # two layers
        assert convolutions["fp32"].forward == 1 * 2  # the evaluation had no autocast
        assert usage.ops["convolution_backward"]["fp16"].backward == 3 * 2
        ops = set(usage.ops)
        assert not ops & {
            "_amp_foreach_non_finite_check_and_unscale_",
            "_foreach_add_",
            "_foreach_norm",
            "linalg_vector_norm",
        }
        assert "3 of 7 steps sampled" in caplog.messages[epoch]
        json.dumps(usage.to_json())
    monitor.close()


def fp8_model() -> nn.Module:
    return nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))


@pytest.mark.parametrize("shape", [(256, 128), (3, 33, 128)])
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
def test_fp8_products_are_counted_in_fp8_and_are_no_fallbacks(shape: tuple[int, ...], input_dtype: torch.dtype) -> None:
    model = fp8_model()
    plan = apply(model, "block", emulate=True)
    inputs = torch.randn(shape, dtype=input_dtype, requires_grad=True)
    with PrecisionMonitor(model) as monitor:
        with autocast(torch.device("cpu"), plan.base.region):
            output = model(inputs)
        output.float().pow(2).mean().backward()
        usage = monitor.log_precision_usage()
    assert usage.ops["deepseek_mp::product"] == {"fp8_e4m3": Count(2, 4)}
    assert "deepseek_mp::quantise" not in usage.ops
    casts = usage.ops["cast"]
    first = "fp32" if input_dtype is torch.float32 else "bf16"
    # Weights are fp32. In the forward each tensor is quantised in one call or in two, as the recipe wants it.
    assert casts["fp8_e4m3<-fp32"].forward == 2 + (first == "fp32")
    assert casts["fp8_e4m3<-bf16"] == Count(2 - (first == "fp32"), 2)
    for layer in ("0", "2"):
        assert usage.layers[layer]["deepseek_mp::product"] == {"fp8_e4m3": Count(1, 2)}
    assert usage.layers["4"]["addmm"] == {"bf16": Count(1, 0)}
    assert usage.formats["fp8_e4m3"] == Count(2, 4)
    inside = [fallback for fallback in usage.fallbacks if fallback.layer]
    assert inside == []
    assert "deepseek_mp::product" in str(usage)
    assert "fp8_e4m3" in str(usage)


def test_bf16_products_of_an_fp8_recipe_are_counted_in_bf16() -> None:
    model = fp8_model()
    plan = apply(model, "row_gw_hp", emulate=True)
    with PrecisionMonitor(model) as monitor:
        with autocast(torch.device("cpu"), plan.base.region):
            output = model(torch.randn(64, 128))
        output.float().sum().backward()
        usage = monitor.log_precision_usage()
    assert usage.layers["2"]["deepseek_mp::product"] == {"fp8_e4m3": Count(1, 1)}
    assert usage.layers["2"]["mm"] == {"bf16": Count(0, 1)}
    assert not [fallback for fallback in usage.fallbacks if fallback.layer]


def test_beside_fp8_what_ran_wide_is_still_a_fallback() -> None:
    model = fp8_model()
    plan = apply(model, PrecisionPlan.of("block", pin={"2": "fp32"}), emulate=True)
    with PrecisionMonitor(model) as monitor:
        with autocast(torch.device("cpu"), plan.base.region):
            output = model(torch.randn(128, 128))
        output.float().sum().backward()
        usage = monitor.log_precision_usage()
    assert {(one.layer, one.op, one.reason) for one in usage.fallbacks if one.layer in ("0", "2")} == {
        ("2", "addmm", Reason.PINNED),
        ("2", "mm", Reason.PINNED),
        ("2", "sum", Reason.PINNED),
    }
    assert usage.layers["0"]["deepseek_mp::product"] == {"fp8_e4m3": Count(1, 1)}


def test_each_report_starts_again_with_a_sampled_step() -> None:
    model, inputs, target = mlp()
    with PrecisionMonitor(model, sample_every=100) as monitor:
        reports = []
        for _ in range(3):
            for _ in range(4):
                step(model, inputs, target).backward()
            reports.append(monitor.log_precision_usage())
    assert [(r.steps, r.sampled_steps) for r in reports] == [(4, 1)] * 3
    assert reports[0].ops["addmm"] == reports[2].ops["addmm"]
    assert reports[0].ops["addmm"]["fp32"].forward == 2


def test_sample_without_a_model_call_and_twice_in_a_row() -> None:
    model, inputs, target = mlp()
    with PrecisionMonitor(model, sample_every=None) as monitor:
        with monitor.sample():
            pass
        model(inputs)
        assert not monitor.log_precision_usage().counts
        for _ in range(2):
            with monitor.sample():
                for _ in range(2):  # two micro-batches
                    step(model, inputs, target).backward()
        usage = monitor.log_precision_usage()
    assert usage.steps == usage.sampled_steps == 4
    assert usage.layers[""]["nll_loss_forward"]["fp32"].forward == 4


def test_sample_ends_with_an_error_in_it() -> None:
    model, inputs, _ = mlp()
    with PrecisionMonitor(model, sample_every=None) as monitor:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), monitor.sample():
            model(inputs[:, :2])
        with monitor.sample():
            model(inputs)
        assert monitor.log_precision_usage().ops["addmm"]["fp32"].forward == 2


def test_a_report_inside_sample_loses_nothing() -> None:
    model, inputs, _ = mlp()
    with PrecisionMonitor(model, sample_every=None) as monitor:
        with monitor.sample():
            model(inputs)
            first = monitor.log_precision_usage()
            model(inputs)
        second = monitor.log_precision_usage()
    assert first.ops["addmm"] == second.ops["addmm"]


def test_closing_keeps_what_was_counted() -> None:
    model, inputs, _ = mlp()
    monitor = PrecisionMonitor(model)
    model(inputs)
    monitor.close()
    monitor.close()
    model(inputs)
    usage = monitor.log_precision_usage()
    assert usage.steps == 1
    assert usage.ops["addmm"]["fp32"].forward == 2


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "often"])
def test_wrong_arguments(every: Any) -> None:
    with pytest.raises(ConfigError, match="whole number of steps"):
        PrecisionMonitor(nn.Linear(1, 1), sample_every=every)
    with pytest.raises(ConfigError, match=r"Allowed: a torch\.nn\.Module"):
        PrecisionMonitor([nn.Linear(1, 1)])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [("optimizer", [], "Optimizer"), ("sampling", 20, "Sampling"), ("limits", None, "Limits")],
)
def test_wrong_kinds_of_arguments(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} is a .*Allowed: .*{allowed}"):
        PrecisionMonitor(nn.Linear(1, 1), **{name: value})


def test_a_report_has_the_statistics_and_the_alarms_since_the_last_one() -> None:
    model, inputs, target = mlp()
    with PrecisionMonitor(model, sampling=Sampling(every=1, units=2)) as monitor:
        step(model, inputs, target).backward()
        first = monitor.log_precision_usage()
        step(model, inputs * float("inf"), target).backward()
        with torch.no_grad():
            model[0].weight.fill_(float("nan"))
        step(model, inputs, target).backward()
        second = monitor.log_precision_usage()
        third = monitor.log_precision_usage()
    assert {layer.status for layer in first.statistics.values()} == {"sampled"}
    assert first.alarms == third.alarms == ()
    assert [(alarm.layer, alarm.kind) for alarm in second.alarms] == [("0", "non_finite")]
    assert monitor.alarms == second.alarms
    assert monitor.alarms_raised == 1
    assert second.statistics["0"].non_finite["weight"] == 96
    assert second.statistics["0"].produced == {"forward": 1, "backward": 0}


def test_without_sampling_there_are_neither() -> None:
    model, inputs, target = mlp()
    with PrecisionMonitor(model, sampling=None) as monitor:
        step(model, inputs, target).backward()
        usage = monitor.log_precision_usage()
    assert usage.statistics == {}
    assert monitor.alarms == monitor.alarms_since(0) == ()
    assert monitor.alarms_raised == 0


def test_statistics_that_are_not_waited_for() -> None:
    model, inputs, target = mlp()
    with PrecisionMonitor(model, sampling=Sampling(every=1)) as monitor:
        step(model, inputs, target).backward()
        assert monitor.statistics(wait=False)["0"].status == "not sampled yet"  # the step has not ended
        step(model, inputs, target).backward()
        assert monitor.statistics(wait=False)["0"].tensors["weight"].samples == 1
        assert monitor.statistics()["0"].tensors["weight"].samples == 2


def test_sample_refuses_to_nest_and_to_run_after_close() -> None:
    monitor = PrecisionMonitor(nn.Linear(1, 1))
    with monitor.sample(), pytest.raises(ConfigError, match=r"sample\(\) inside sample\(\)"), monitor.sample():
        pass
    monitor.close()
    with pytest.raises(ConfigError, match=r"after close\(\)"), monitor.sample():
        pass


def test_a_model_that_was_never_called_is_said_so() -> None:
    with PrecisionMonitor(nn.Linear(1, 1)) as monitor:
        assert "was not called" in monitor.log_precision_usage().notes[0]


def test_calls_inside_paused_are_no_steps_and_are_not_counted() -> None:
    model = nn.Linear(3, 2)
    with PrecisionMonitor(model, sample_every=1) as monitor:
        with monitor.paused():
            model(torch.ones(1, 3)).sum().backward()
        assert monitor.log_precision_usage().steps == 0
        model(torch.ones(1, 3)).sum().backward()
        assert monitor.log_precision_usage().steps == 1
