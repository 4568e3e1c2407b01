"""The fused AdamW step on a GPU, against plain PyTorch.

With TRITON_INTERPRET=1 in the environment it runs on a CPU, where Triton is installed, in minutes: that checks the
indexing, not what a compiler makes of the arithmetic. The interpreter cuts numbers off where BF16 is to be rounded to.
"""

import copy
import os
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from deepseek_mp.optim import AdamW, adamw, set_storage

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
DEVICE = "cpu" if INTERPRETED else "cuda"
SHAPES = [(64, 64), (33, 129), (4, 8, 16, 16)] + [(100, 1000), (3000, 1111)] * (not INTERPRETED)


def kernel():
    from deepseek_mp.ops.triton.adamw import adamw_in_blocks

    return adamw_in_blocks


def run(monkeypatch, shape, storage, *, fused, steps=4, rate=1e-2, skipped=None, scale=None):
    """Weight, codes, scales and compensation after some steps on the same gradients."""
    monkeypatch.setattr(adamw, "fused_adamw", lambda _: kernel() if fused else None)
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE))
    optimizer = AdamW([weight], lr=copy.deepcopy(rate), states="8bit", weight_decay=0.1, seed=(1 << 40) + 3)
    set_storage(optimizer, weight, storage)
    for step in range(steps):
        size = 10 ** (-3 * torch.rand(shape, generator=generator))
        weight.grad = (size * torch.randn(shape, generator=generator)).to(DEVICE)
        if skipped is not None:
            optimizer.grad_scale = torch.tensor(scale, device=DEVICE)
            optimizer.found_inf = torch.tensor(float(step in skipped), device=DEVICE)
            if step in skipped:
                weight.grad[0] = torch.inf
        optimizer.step()
    return weight.detach().clone(), optimizer.state[weight]


def assert_same(one, two):
    """Codes within one, and of one in a thousand."""
    (weight, state), (other, expected) = one, two
    for key in ("exp_avg_codes", "exp_avg_sq_codes"):
        apart = (state[key].int() - expected[key].int()).abs()
        assert apart.max() <= 1, key
        assert (apart > 0).float().mean() < 1e-3, key
    for key in ("exp_avg_scales", "exp_avg_sq_scales"):
        torch.testing.assert_close(state[key], expected[key], rtol=0.02, atol=0.0)
    assert float(state["step"]) == float(expected["step"])
    held, expected_held = (w.float() + s.get("compensation", 0) for w, s in (one, two))
    assert ((held - expected_held).norm() / expected_held.norm()) < 1e-4
    if weight.dtype is torch.bfloat16 and not INTERPRETED:
        assert (weight != other).float().mean() < 1e-2


@pytest.mark.parametrize("storage", ["fp32", "bf16_kahan", "bf16_sr"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_steps_as_plain_pytorch_does(monkeypatch, shape, storage):
    one, two = (run(monkeypatch, shape, storage, fused=fused) for fused in (True, False))
    assert_same(one, two)
    if storage == "bf16_sr":
        assert (one[0] != two[0]).float().mean() < 1e-3


@pytest.mark.parametrize("storage", ["fp32", "bf16_kahan", "bf16_sr"])
def test_a_rate_on_the_device_and_steps_that_it_skips(monkeypatch, storage):
    rate = torch.tensor(1e-2, device=DEVICE)
    for skipped in ({}, {0}, {2, 3}):
        one, two = (
            run(monkeypatch, (33, 129), storage, fused=fused, rate=rate, skipped=skipped, scale=8.0)
            for fused in (True, False)
        )
        assert_same(one, two)


@pytest.mark.parametrize("storage", ["fp32", "bf16_kahan", "bf16_sr"])
def test_a_skipped_step_leaves_every_bit(monkeypatch, storage):
    before, after = (
        run(monkeypatch, (33, 129), storage, fused=True, steps=steps, skipped={3}, scale=2.0) for steps in (3, 4)
    )
    assert torch.equal(before[0], after[0])
    for key, value in before[1].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, after[1][key]), key


def test_what_is_not_finite_spoils_its_block_and_no_other(monkeypatch):
    monkeypatch.setattr(adamw, "fused_adamw", lambda _: kernel())
    weight = nn.Parameter(torch.randn(20, 256, device=DEVICE))
    optimizer = AdamW([weight], states="8bit")
    weight.grad = torch.ones_like(weight)
    weight.grad[3, 7], weight.grad[19, 255] = torch.inf, torch.nan
    optimizer.step()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weight.isnan().any(1).nonzero().flatten().tolist() == [3, 19]
    assert optimizer.state[weight]["exp_avg_scales"].isnan().nonzero().flatten().tolist() == [3, 19]
