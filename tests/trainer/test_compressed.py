"""The trainer with compressed activations: it keeps less and learns as well; what it cannot do is refused."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from deepseek_mp import MixedPrecisionTrainer
from deepseek_mp.activations import ActivationSettings
from deepseek_mp.activations.record import SavedForm
from deepseek_mp.errors import ConfigError
from deepseek_mp.workloads.data import TextWindows
from deepseek_mp.workloads.gpt import GPTConfig, byte_gpt, next_byte_loss

SMALL = ActivationSettings(min_bytes=4096)
WORDS = (b"weight ", b"gradient ", b"scale ", b"loss ", b"layer ", b"format ", b"step ", b"range ")
TEXT = torch.frombuffer(bytearray(b"".join(random.Random(0).choices(WORDS, k=4000))), dtype=torch.uint8)


def make(**options):
    model = byte_gpt(GPTConfig(width=64, heads=2, layers=2, context=32))
    return MixedPrecisionTrainer(model, "bf16", loss_fn=next_byte_loss, seed=0, progress=False, **options)


def batches(count):
    return TextWindows(TEXT, batch_size=8, length=32, count=count, seed=0)


def test_it_keeps_less_and_learns_as_well():
    losses = {}
    for option in (False, SMALL):
        trainer = make(activations=option)
        trainer.fit(batches(60), 1)
        losses[option] = trainer.evaluate(batches(8))["loss"]
    assert losses[SMALL] == pytest.approx(losses[False], rel=0.0025)
    record = trainer.activations
    assert record is not None
    rounded = [saved for saved in record.saved if saved.form is SavedForm.FP8]
    assert rounded
    assert sum(saved.bytes_after for saved in rounded) < 0.6 * sum(saved.bytes_before for saved in rounded)


def test_a_resumed_run_rounds_as_one_that_was_not_interrupted(tmp_path):
    whole, part = make(activations=SMALL), make(activations=SMALL)
    steps = list(batches(6))
    for batch in steps:
        whole.step(batch)
    for batch in steps[:3]:
        part.step(batch)
    part.save(tmp_path / "point")
    resumed = make(activations=SMALL)
    resumed.load(tmp_path / "point")
    for batch in steps[3:]:
        resumed.step(batch)
    for ours, theirs in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def small_gpt():
    return byte_gpt(GPTConfig(width=64, heads=2, layers=1, context=32))


def norm_and_relu():
    convolutions = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3)
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(16 * 16, 5))


def usage(model, mode, batch, **options):
    trainer = MixedPrecisionTrainer(model, mode, device="cpu", progress=False, **options)
    assert trainer.step(batch).status == "applied"
    found = trainer.monitor.log_precision_usage()
    return (found.ops, found.layers, found.fallbacks), trainer.activations


@pytest.mark.parametrize(
    ("model_of", "mode", "loss_fn", "form"),
    [(small_gpt, "bf16", next_byte_loss, "fp8"), (norm_and_relu, "fp32", None, "recomputed")],
)
def test_what_compression_computes_is_not_counted_as_the_models(model_of, mode, loss_fn, form):
    images = torch.randn(8, 3, 8, 8), torch.randint(5, (8,))
    batch = images if loss_fn is None else next(iter(batches(1)))
    settings = ActivationSettings(min_bytes=1, recompute_norm_relu=True)
    without, _ = usage(model_of(), mode, batch, loss_fn=loss_fn)
    found, activations = usage(model_of(), mode, batch, loss_fn=loss_fn, activations=settings)
    assert form in activations.by_form()
    assert found == without


def test_together_with_the_fused_loss_and_accumulation():
    trainer = make(activations=SMALL, fused_loss=True, gradient_accumulation_steps=2)
    for batch in batches(4):
        trainer.step(batch)
    trainer.settle()
    assert trainer.steps_applied == 2
    assert trainer.activations is not None


def test_nothing_is_recorded_where_nothing_is_compressed():
    trainer = make()
    assert trainer.activations is None
    trainer.step(next(iter(batches(1))))
    assert trainer.activations is None


def test_what_cannot_be_compressed_is_refused():
    with pytest.raises(ConfigError, match="activations=True with compile=True"):
        make(activations=True, compile=True)
    with pytest.raises(ConfigError, match="activations='yes'"):
        make(activations="yes")
