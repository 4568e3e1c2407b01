"""The quantisation-aware trainer: it learns, converts, skips bad steps, resumes, and refuses what does not fit."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.datasets import load_digits
from small_runs import accuracy, same_models
from torch import nn

from deepseek_mp import MixedPrecisionTrainer, QuantizationAwareTrainer
from deepseek_mp.errors import ConfigError
from deepseek_mp.precision import PrecisionPlan
from deepseek_mp.profiler import ProfileReport


def digits():
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    batches = [(images[i : i + 64], labels[i : i + 64]) for i in range(0, 1280, 64)]
    return batches, [(images[1280:], labels[1280:])]


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


def sgd(params):
    return torch.optim.SGD(params, lr=0.02, momentum=0.9)


def small(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    options = {"example_inputs": torch.randn(4, 4), "optimizer": sgd} | options
    return QuantizationAwareTrainer(model, **options)


def pairs(count=6, bad=()):
    made = torch.Generator().manual_seed(1)
    inputs = [torch.randn(4, 4, generator=made) for _ in range(count)]
    return [(x * math.nan if i in bad else x, x[:, :3].argmax(1)) for i, x in enumerate(inputs)]


def test_digits_in_int8_are_as_good_as_in_fp32():
    train, test = digits()
    model = net()
    MixedPrecisionTrainer(model, "fp32", optimizer=sgd, device="cpu").fit(train, epochs=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fp32 = MixedPrecisionTrainer(model, "fp32", device="cpu").evaluate(test, metrics={"accuracy": accuracy})
    trainer = QuantizationAwareTrainer(model, example_inputs=train[0][0], calibration=train[:3], optimizer=sgd)
    trainer.fit(train, epochs=1)
    int8 = trainer.convert()
    got = accuracy(int8.reference(test[0][0]), test[0][1])
    assert got > fp32["accuracy"] - 0.01
    simulated = trainer.predict(test[0])
    assert accuracy(simulated, test[0][1]) == pytest.approx(float(got), abs=0.01)
    assert (int8.reference(test[0][0]) - simulated).norm() < 0.01 * simulated.norm()
    assert not int8.not_converted
    assert trainer.model.norms_frozen
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_bad_batch_is_skipped_and_leaves_no_trace_in_ranges():
    clean, spoilt = small(), small()
    clean.fit(pairs(5))
    result = spoilt.fit(pairs(6, bad=[5]))
    assert (result.steps_attempted, result.steps_applied) == (6, 5)
    assert same_models(clean, spoilt)


def test_resumed_it_is_bit_for_bit_the_run_without_a_break(tmp_path):
    whole = small()
    whole.fit(pairs(), epochs=2)
    first = small(run_dir=tmp_path / "run")
    first.fit(pairs(), epochs=1)
    second = small(run_dir=tmp_path / "run")
    second.fit(pairs(), epochs=2, resume=tmp_path / "run")
    assert same_models(whole, second)


@pytest.mark.parametrize("simulate_fp32", [True, False])
def test_learned_steps_move_and_are_those_converted(simulate_fp32):
    trainer = small(learned_step_size=True, simulate_fp32=simulate_fp32, optimizer=None)
    trainer.fit(pairs(), epochs=3)
    steps = [value for name, value in trainer.model.named_parameters() if name.endswith("log_step")]
    assert len(steps) == 4
    assert all(step.abs().max() > 0 for step in steps)
    x = pairs(1)[0][0]
    found, tolerance = trainer.convert().reference(x), 1e-2 if simulate_fp32 else 5e-2
    torch.testing.assert_close(found, trainer.predict(x).float(), atol=tolerance, rtol=tolerance)


def test_averaged_weights_are_those_converted():
    trainer = small(ema_decay=0.9)
    trainer.fit(pairs())
    x = pairs(1)[0][0]
    torch.testing.assert_close(trainer.convert().reference(x), trainer.predict(x), atol=1e-2, rtol=1e-2)


def test_without_simulated_fp32_it_computes_in_bf16():
    trainer = small(simulate_fp32=False)
    assert trainer.fit(pairs()).steps_applied == 6
    assert "bf16" in trainer.plan.formats
    assert trainer.predict(pairs(1)[0]).dtype == torch.bfloat16


def test_norms_freeze_when_their_share_of_the_steps_is_done():
    seen = []
    for share in (None, 0.5):
        trainer = small(freeze_norms_at=share)
        for batch in pairs():
            trainer.planned_steps = 6
            trainer.step(batch)
            seen.append(trainer.model.norms_frozen)
    assert seen == [False] * 6 + [False] * 3 + [True] * 3


def test_what_a_profile_raises_to_fp32_is_kept(monkeypatch, tmp_path):
    plan = PrecisionPlan.of("bf16", {"2": "fp32"})
    monkeypatch.setattr(ProfileReport, "plan", lambda self: plan)
    plan.save(tmp_path / "plan.json")
    report = ProfileReport({}, basis="batches", base="bf16", recipes=["bf16"])
    for keep in (report, plan, tmp_path / "plan.json"):
        assert [decision.new for decision in small(keep=keep).decisions] == ["int8", "fp32"]


def test_decisions_are_written_down(tmp_path):
    small(run_dir=tmp_path / "run", keep=["2"]).fit(pairs())
    written = (tmp_path / "run" / "decisions.jsonl").read_text()
    assert "named in keep" in written


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"precision": "int4"}, "precision='int4'"),
        ({"precision": torch.ones(2)}, r"precision=Tensor\. Allowed: 'int8',"),
        ({"precision": "bf16"}, "MixedPrecisionTrainer for floating-point formats"),
        ({"simulate_fp32": 1}, "simulate_fp32=1"),
        ({"freeze_norms_at": 2}, "freeze_norms_at=2"),
        ({"compile": True}, "compile beside quantisation-aware training"),
        ({"precision_mode": "bf16"}, "precision_mode beside"),
        ({"device": "meta"}, "device='meta'"),
        ({"device": "foo"}, "device 'foo' is not known"),
        ({"calibration": 3}, r"calibration=3\. Allowed: batches"),
        ({"calibration": 3, "example_inputs": None}, r"calibration=3\. Allowed: batches"),
        ({"calibration": []}, "calibration without a batch"),
        ({"calibration": [torch.full((2, 4), math.nan)]}, "NaN or infinite values in batch 0"),
        ({"example_inputs": torch.randn(1, 4)}, "two samples or more"),
        ({"optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters())}, "pass a function from parameters"),
    ],
)
def test_what_does_not_fit_is_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        small(**options)


def test_what_is_no_model_is_refused():
    with pytest.raises(ConfigError, match=r"a torch\.nn\.Module"):
        QuantizationAwareTrainer(3, example_inputs=torch.randn(2, 2))
