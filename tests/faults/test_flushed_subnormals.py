"""Hardware that takes subnormal numbers for zero: everything is decided there as it is elsewhere.

C08 in the names is a number in the project's list of faults. A CPU flushes FP32's subnormals when it is told to;
units that flush those of FP16 are emulated by what a layer's output gradients lose.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from deepseek_mp.controller import DynamicLossScale, PredictiveLossScale
from deepseek_mp.ops.block_states import encode
from deepseek_mp.ops.cast import cast
from deepseek_mp.ops.grid import round_to_format
from deepseek_mp.ops.rounding import rounded
from deepseek_mp.ops.schema import quantise
from deepseek_mp.ops.updates import FATE_FIELDS, update_fate
from deepseek_mp.optim import SGD, Adafactor, AdamW, set_storage
from deepseek_mp.precision import FORMATS, OPERANDS, RECIPES, Role
from deepseek_mp.trainer.storage import WeightStorage

TINY = torch.finfo(torch.float32).tiny
LARGE = torch.finfo(torch.float32).max

pytestmark = pytest.mark.skipif(not torch.set_flush_denormal(False), reason="needs a CPU that can flush subnormals")


@contextmanager
def flushing(on=True):
    assert torch.set_flush_denormal(on)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def both(call):
    """What a call gives here, and where subnormals are flushed."""
    found = []
    for on in (False, True):
        torch.manual_seed(0)
        with flushing(on):
            found.append(call())
    return found


def test_c08_theirs_a_subnormal_divisor_is_a_division_by_zero():
    x = torch.full((16,), 2.0**-130)
    here, there = both(lambda: x / x)
    assert (here == 1).all()
    assert there.isnan().all()


def many_magnitudes():
    """Matrices whose values are normal numbers or zero: zeros between others, small, large and the largest ones."""
    x = torch.randn(128, 256, generator=torch.Generator().manual_seed(1))
    some = x.clone()
    some[:, ::3] = 0.0
    some[32:96] = 0.0
    spread = x * torch.logspace(-30, 30, 128, base=2.0)[:, None]
    return {
        "zeros": torch.zeros_like(x),
        "some zeros": some,
        "spread": spread,
        "small": torch.where(x.abs() < 0.01, 0.01, x) * 2.0**-118,
        "large": x.clamp(-3, 3) * (LARGE / 4),
        "largest": torch.full_like(x, LARGE).copysign(x),
    }


SIDES = sorted({
    recipe.operand(role, which) for recipe in RECIPES.values() for role in Role for which in OPERANDS[role]
}, key=str)  # fmt: skip
SCALED = [side for side in SIDES if side.rule == "current"]


def assert_equal(here, there):
    """But for what is subnormal, which is zero there."""
    one, other = (torch.where(found.float().abs() < TINY, 0.0, found.float()) for found in (here, there))
    torch.testing.assert_close(other, one, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("data", many_magnitudes())
@pytest.mark.parametrize("side", SCALED, ids=lambda side: f"{side.format}-{side.granularity.name}-{side.power_of_two}")
def test_c08_operands_are_rounded_to_the_same_values(side, data):
    x = many_magnitudes()[data]
    assert_equal(*both(lambda: rounded(x, side)))


@pytest.mark.parametrize("data", many_magnitudes())
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("granularity", ["tensor", "row", "1x32", "1x128", "128x128"])
def test_c08_casts_give_the_same_values_and_scales(granularity, power_of_two, seed, data):
    x, drawn = many_magnitudes()[data], None if seed is None else torch.tensor(seed)
    for format in ("fp8_e4m3", "fp8_e5m2"):
        how = format, granularity, power_of_two, True, True, "reference"
        here, there = both(lambda how=how: quantise(x, *how, seed=drawn))
        for one, other in zip(here, there, strict=True):
            assert torch.equal(*(found.reshape(-1).view(torch.uint8) for found in (one, other)))


@pytest.mark.parametrize("data", many_magnitudes())
@pytest.mark.parametrize("format", [name for name, found in FORMATS.items() if found.bits <= 32])
def test_c08_every_format_is_rounded_to_alike(format, data):
    x = many_magnitudes()[data]
    assert_equal(*both(lambda: round_to_format(x, format)))


@pytest.mark.parametrize("data", ["spread", "some zeros", "large"])
def test_c08_moments_in_blocks_have_the_same_codes(data):
    x = many_magnitudes()[data].abs()
    x[:, 1] = 2 * TINY  # normal, and far below the largest of its block
    for kind in (torch.int8, torch.uint8):
        here, there = both(lambda kind=kind: encode(x, kind))
        assert torch.equal(here.codes, there.codes)
        assert torch.equal(here.scales, there.scales)
    assert (there.codes.view(x.shape)[x > 0] > 0).all()


@pytest.mark.parametrize("data", ["zeros", "some zeros", "spread", "small"])
def test_c08_the_fate_of_updates_is_measured_alike(data):
    weight = many_magnitudes()[data]
    update = torch.randn(weight.shape) * 1e-3
    here, there = both(lambda: update_fate(weight, update))
    known = dict(zip(FATE_FIELDS, here.tolist(), strict=True))
    assert known["psi"] >= 0
    torch.testing.assert_close(there, here, rtol=1e-5, atol=0.0)


def linear():
    torch.manual_seed(0)
    return nn.Linear(64, 64, bias=False)


OPTIMIZERS = {
    "adamw": lambda params, **options: AdamW(params, lr=1e-3, **options),
    "adamw 8bit": lambda params, **options: AdamW(params, lr=1e-3, states="8bit", **options),
    "sgd": lambda params, **options: SGD(params, lr=1e-2, momentum=0.9, **options),
    "adafactor": lambda params, **options: Adafactor(params, **options),
}


@pytest.mark.parametrize("size", [1.0, 1e-25, 1e-37])
@pytest.mark.parametrize("storage", ["fp32", "bf16_kahan", "bf16_sr"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_c08_optimizers_step_alike_on_gradients_of_any_size(kind, storage, size):
    """Where squares of gradients vanish, all steps are those of a second moment of zero."""

    def trained():
        model = linear()
        nn.init.zeros_(model.weight[::2].detach())
        optimizer = OPTIMIZERS[kind](model.parameters())
        set_storage(optimizer, model.weight, storage)
        for _ in range(6):
            model.weight.grad = torch.randn(64, 64) * size
            model.weight.grad[:, ::5] = 0.0
            optimizer.step()
        return model.weight.detach().float()

    here, there = both(trained)
    assert there.isfinite().all()
    torch.testing.assert_close(there, here, rtol=1e-6, atol=1e-30)


def network():
    """With a layer that begins at zero, whose input's gradients do so too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 3))
    nn.init.zeros_(model[3].weight)
    return model


def run(make_trainer, mode, policy, *, factor=1.0, steps=12, bad=(), **options):
    """What a run decided, and the losses that it saw."""
    trainer = make_trainer(
        mode, policy(), model=network(), optimizer=lambda params: AdamW(params, lr=3e-3), scheduler=None,
        loss_fn=lambda output, target: (output.float() - target).square().mean() * factor, max_grad_norm=1.0, **options,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    decided, losses = [], []
    for step in range(steps):
        x, y = torch.randn(16, 32, generator=generator), torch.randn(16, 3, generator=generator)
        result = trainer.step((x * float("nan") if step in bad else x, y))
        trainer.settle()
        decided.append((result.status, result.scale))
        losses.append(result.loss)
    return trainer, decided, torch.tensor(losses)


POLICIES = {"dynamic": lambda: DynamicLossScale(2.0**24, interval=3), "predictive": PredictiveLossScale}
MODES = [("fp16", "dynamic"), ("fp16", "predictive"), ("bf16", "dynamic"), ("row", "dynamic"), ("nvfp4", "dynamic")]


@pytest.mark.parametrize("factor", [1.0, 1e-20, 1e-33])
@pytest.mark.parametrize(("mode", "policy"), MODES)
def test_c08_steps_are_applied_and_scales_move_alike(make_trainer, mode, factor, policy):
    (_, here, losses), (trainer, there, found) = both(
        lambda: run(make_trainer, mode, POLICIES[policy], factor=factor, steps=8, bad=(4,))
    )
    assert there == here
    assert "skipped" in [status for status, _ in here]
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())
    torch.testing.assert_close(found, losses, rtol=1e-4, atol=0.0, equal_nan=True)


def test_c08_the_storage_of_weights_is_decided_alike(make_trainer):
    def decisions():
        storage = WeightStorage(every=2)
        run(make_trainer, "bf16", POLICIES["dynamic"], callbacks=[storage])
        return [(found.layer, found.old, found.new, found.reason) for found in storage.decisions]

    here, there = both(decisions)
    assert here
    assert there == here


def moved_by_small_gradients(make_trainer, policy, *, flush):
    """How far weights go on gradients that are subnormal in FP16, with units that flush these or do not."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    nn.init.zeros_(model[0].weight)
    trainer = make_trainer(
        "fp16", policy, model=model, loss_fn=lambda output, target: (output.float() * 1e-6).sum(), scheduler=None,
        optimizer=lambda params: torch.optim.SGD(params, lr=1e6),
    )  # fmt: skip

    def units(grad):
        assert grad.dtype is torch.float16
        return cast(grad, "fp16", flush_subnormals=flush).tensor

    model[0].register_forward_hook(lambda _, __, output: output.register_hook(units) and None)
    for _ in range(3):
        assert trainer.step(torch.full((2, 4), 0.5)).status == "applied"
    return -model[0].weight.detach()


@pytest.mark.parametrize("policy", ["dynamic", "predictive"])
def test_c08_scaled_gradients_do_without_the_subnormals_of_fp16(make_trainer, policy):
    here, there = (moved_by_small_gradients(make_trainer, policy, flush=flush) for flush in (False, True))
    assert torch.equal(here, there)
    torch.testing.assert_close(there, torch.full((4, 4), 3.0), rtol=1e-3, atol=0.0)


def test_c08_theirs_without_a_scale_such_gradients_are_lost(make_trainer):
    assert not moved_by_small_gradients(make_trainer, "none", flush=True).any()
    assert moved_by_small_gradients(make_trainer, "none", flush=False).all()
