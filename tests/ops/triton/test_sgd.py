"""The fused step of SGD with momentum on a GPU, against plain PyTorch.

With TRITON_INTERPRET=1 it runs on a CPU, as tests/ops/triton/test_adamw.py does and within the same limits.
"""

import copy
import os
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from deepseek_mp.optim import SGD, set_storage, sgd

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
DEVICE = "cpu" if INTERPRETED else "cuda"
SHAPES = [(64, 64), (33, 129), (4, 8, 16, 16)] + [(3000, 1111)] * (not INTERPRETED)
RULES = [{}, {"dampening": 0.3}, {"nesterov": True}]


def run(monkeypatch, shape, storage, rule, *, fused, steps=4, rate=1e-2, skipped=None, order=torch.contiguous_format):
    """Weight, compensation and momentum after some steps on the same gradients."""
    from deepseek_mp.ops.triton.sgd import sgd_in_blocks

    monkeypatch.setattr(sgd, "fused_sgd", lambda _: sgd_in_blocks if fused else None)
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE, memory_format=order))
    rate = copy.deepcopy(rate)
    optimizer = SGD([weight], lr=rate, momentum=0.9, states="8bit", weight_decay=0.1, seed=(1 << 40) + 3, **rule)
    set_storage(optimizer, weight, storage)
    for step in range(steps):
        weight.grad = torch.randn(shape, generator=generator).to(DEVICE, memory_format=order)
        if skipped is not None:
            optimizer.grad_scale = torch.tensor(4.0, device=DEVICE)
            optimizer.found_inf = torch.tensor(float(step in skipped), device=DEVICE)
            if step in skipped:
                weight.grad[0] = torch.inf
        optimizer.step()
    return weight.detach().clone(), optimizer.state[weight]


def assert_same(one, two):
    """One code in a thousand differs, and the next steps carry that on."""
    codes, expected = (state["momentum_buffer_codes"].float() for _, state in (one, two))
    assert (codes != expected).float().mean() < 1e-3
    assert (codes - expected).norm() < 1e-3 * expected.norm()
    assert float(one[1]["step"]) == float(two[1]["step"])
    held, expected = (w.float() + s.get("compensation", 0) for w, s in (one, two))
    assert ((held - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("storage", ["fp32", "bf16_kahan", "bf16_sr"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", RULES)
def test_it_steps_as_plain_pytorch_does(monkeypatch, shape, storage, rule):
    assert_same(*(run(monkeypatch, shape, storage, rule, fused=fused) for fused in (True, False)))


@pytest.mark.parametrize("storage", ["fp32", "bf16_kahan", "bf16_sr"])
def test_a_rate_on_the_device_and_steps_that_it_skips(monkeypatch, storage):
    rate = torch.tensor(1e-2, device=DEVICE)
    for skipped in (set(), {0}, {2, 3}):
        one, two = (
            run(monkeypatch, (33, 129), storage, {"dampening": 0.3}, fused=fused, rate=rate, skipped=skipped)
            for fused in (True, False)
        )
        assert_same(one, two)


@pytest.mark.parametrize("storage", ["fp32", "bf16_kahan", "bf16_sr"])
def test_weights_in_channels_last_are_stepped_to_the_same_values(monkeypatch, storage):
    one, two = (
        run(monkeypatch, (32, 16, 3, 3), storage, {}, fused=True, order=order)
        for order in (torch.channels_last, torch.contiguous_format)
    )
    assert not one[0].is_contiguous()
    torch.testing.assert_close(one[0].contiguous(), two[0], rtol=0, atol=0)
    torch.testing.assert_close(one[1]["momentum_buffer_codes"], two[1]["momentum_buffer_codes"], rtol=0, atol=0)
