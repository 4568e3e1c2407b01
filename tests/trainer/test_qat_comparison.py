"""INT8 is taken only where it is worth it, and the card says of each form why."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from deepseek_mp import QuantizationAwareTrainer
from deepseek_mp.errors import BatchError, ConfigError
from deepseek_mp.inference import Form, Latency, Trial
from deepseek_mp.qat import FloatingModel, Int8Model, compiled
from deepseek_mp.trainer import qat_comparison
from deepseek_mp.trainer.qat_comparison import chosen

FP32, BF16, INT8 = (Form(format=name, compiled=True) for name in ("fp32", "bf16", "int8"))


def trial(form, ms, error=0.0):
    return Trial(form=form, latency=Latency(median_ms=ms, p95_ms=ms, runs=9), error=error)


def reasons(fp32, bf16, int8, errors=(0.01, 0.05), budget=0.1):
    trials = [trial(FP32, fp32), trial(BF16, bf16, errors[0]), trial(INT8, int8, errors[1])]
    form, explained = chosen(trials, budget, 1.1)
    return form.format, [one.why for one in explained]


def test_int8_is_taken_where_it_is_fast_enough():
    form, why = reasons(4.0, 2.2, 2.0)
    assert form == "int8"
    assert why[2] == "taken: 1.1 times as fast as bf16+compiled, error 0.05 within 0.1"
    assert why[1] == "1.1 times the time of int8+compiled"


def test_otherwise_the_fastest_floating_form_is_and_it_is_said():
    form, why = reasons(4.0, 2.1, 2.0)
    assert form == "bf16"
    assert why[1] == "taken: the fastest of the floating forms, error 0.01 within 0.1"
    assert why[2] == "1.05 times as fast as bf16+compiled, less than the 1.1 times that INT8 must be"
    assert reasons(1.0, 2.1, 2.0)[0] == "fp32"


@pytest.mark.parametrize("error", [0.2, math.nan, math.inf])
def test_what_is_beyond_the_budget_is_not_taken(error):
    form, why = reasons(4.0, 3.0, 1.0, errors=(0.01, error))
    assert form == "bf16"
    assert "beyond the budget of 0.1" in why[2]
    assert reasons(4.0, 3.0, 1.0, errors=(error, error))[0] == "fp32"


def trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    x = torch.randn(8, 1, 6, 6)
    trainer = QuantizationAwareTrainer(model, example_inputs=x, ema_decay=0.5)
    trainer.fit([(x, x.mean((1, 2, 3)).gt(0).long())], epochs=3)
    return trainer, x


def test_the_forms_are_built_of_the_trained_weights_and_timed(monkeypatch):
    monkeypatch.setattr(compiled, "inductor_compile", lambda graph, inputs: graph)
    times = iter([3.0, 2.0, 1.0, 3.0, 2.0, 1.9])
    monkeypatch.setattr(
        qat_comparison, "latencies",
        lambda runs, device, seconds: {name: Latency(median_ms=next(times), p95_ms=9, runs=9) for name in runs},
    )  # fmt: skip
    trainer, x = trained()
    model, plan, card = trainer.compare(x)
    assert isinstance(model, Int8Model)
    assert plan.form == INT8
    assert (card.model, card.batch_size) == ("Sequential", 8)
    assert "taken: 2 times as fast as bf16+compiled" in str(card)
    assert card.plan.trials[0].error == 0
    assert 0 < card.plan.trials[1].error < 0.05
    assert 0 < card.plan.trials[2].error < 0.1
    assert card.plan.trials[2].weight_bytes < card.plan.trials[0].weight_bytes
    with trainer.ema.applied(), trainer.model.observing():
        exact = trainer.model(x)
    model, plan, card = trainer.compare(x, metric="relative", seconds=0)
    assert isinstance(model, FloatingModel)
    assert plan.form == BF16
    torch.testing.assert_close(model(x), exact, atol=5e-2, rtol=5e-2)
    assert model(x).dtype == torch.float32
    assert "less than the 1.1 times that INT8 must be" in str(card).replace("\n", " ")


def test_a_model_that_does_not_run_in_bf16_has_that_said(monkeypatch):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x.to(torch.float32) + torch.zeros(4, dtype=torch.float32))

    monkeypatch.setattr(compiled, "inductor_compile", lambda graph, inputs: graph)
    trainer = QuantizationAwareTrainer(Mixed(), example_inputs=torch.randn(4, 4))
    _, plan, card = trainer.compare(torch.randn(4, 4), seconds=0)
    bf16 = plan.trials[1]
    assert bf16.form == BF16
    assert "dtype" in bf16.why
    assert plan.form != BF16
    assert "dtype" in str(card)


def test_integers_that_cannot_be_compiled_leave_the_floating_forms(monkeypatch):
    def compile(graph, inputs):
        if any("quantize" in str(node.target) for node in graph.graph.nodes):
            raise RuntimeError("no compiler for integers")
        return graph

    monkeypatch.setattr(compiled, "inductor_compile", compile)
    trainer, x = trained()
    model, plan, card = trainer.compare(x, seconds=0)
    assert isinstance(model, FloatingModel)
    assert plan.trials[2].why == "RuntimeError: no compiler for integers"
    assert "no compiler for integers" in str(card)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"budget": -1}, "budget=-1"), ({"gain": 0.9}, "gain=0.9"), ({"seconds": math.inf}, "seconds=inf"),
     ({"metric": "x"}, "metric='x'"), ({"budget": "0.1"}, "budget='0.1'"), ({"gain": None}, "gain=None")],
)  # fmt: skip
def test_what_does_not_fit_is_refused(options, match):
    torch.manual_seed(0)
    trainer = QuantizationAwareTrainer(nn.Sequential(nn.Linear(4, 3)), example_inputs=torch.randn(4, 4))
    with pytest.raises(ConfigError, match=match):
        trainer.compare(torch.randn(4, 4), **options)


def test_inputs_that_are_not_finite_and_metrics_without_a_number_are_refused(monkeypatch):
    monkeypatch.setattr(compiled, "inductor_compile", lambda graph, inputs: graph)
    trainer = QuantizationAwareTrainer(nn.Sequential(nn.Linear(4, 3)), example_inputs=torch.randn(4, 4))
    with pytest.raises(ConfigError, match="gave a NoneType"):
        trainer.compare(torch.randn(4, 4), metric=lambda outputs, reference: None)
    with pytest.raises(ConfigError, match=r"a metric that is 0\.2 between"):
        trainer.compare(torch.randn(4, 4), metric=lambda outputs, reference: 0.2)
    with pytest.raises(BatchError, match="FP32 outputs are not finite"):
        trainer.compare(torch.full((4, 4), math.nan))


class Built(nn.Linear):
    """In the place of a form: takes a width of 4."""

    @property
    def graph(self):
        return self


def refusing(simulated):
    del simulated

    def refuse(x):
        raise BatchError(f"an input of {list(x.shape)} for INT8")

    built = Built(4, 4)
    built.forward = refuse
    return built


@pytest.mark.parametrize(
    ("width", "match"),
    [
        (3, r"inputs with which the model fails in FP32 \(RuntimeError: .*Allowed: inputs like"),
        (4, "an input of .*INT8"),
    ],
)
def test_inputs_that_a_form_does_not_take_are_refused(monkeypatch, width, match):
    monkeypatch.setattr(qat_comparison, "BUILDERS", {FP32: lambda _: Built(4, 4), INT8: refusing})
    simulated, inputs = nn.Identity(), torch.randn(2, width)
    with pytest.raises(BatchError, match=match):
        qat_comparison.compare(simulated, inputs, budget=0.1, metric="relative", gain=1.1, seconds=0.1)
