"""What a kernel for AdamW is given: a plain one, written from the formula, does what the optimizer does without it."""

import pytest
import torch
from torch import nn

from deepseek_mp.ops.block_states import SIGNED, UNSIGNED, decode, dither, encode
from deepseek_mp.ops.fused_adamw import fused_adamw
from deepseek_mp.ops.stored import random_bits, round_by_bits, split
from deepseek_mp.optim import AdamW, adamw, set_storage

SHAPE = (33, 129)


def plain(parameter, grad, now):
    """The formula of `FusedStep`, literally."""
    if now.skip is not None and now.skip.item():
        return
    g = grad.flatten().float() / (1.0 if now.scale is None else now.scale)
    m, v = decode(now.first), decode(now.second)
    m = m + (1 - now.betas[0]) * (g - m)
    v = now.betas[1] * v + (1 - now.betas[1]) * g.square()
    w = parameter.flatten().float()
    if now.compensation is not None:
        w = w + now.compensation.flatten()
    w = now.decay * w - now.size * m / (v.sqrt() / now.root + now.eps)
    if now.storage == "bf16_sr":
        w = round_by_bits(w, *random_bits([w.numel()], [now.stream], [now.step], seed=now.seed))
    elif now.storage == "bf16_kahan":
        w, lacking = split(w)
        now.compensation.copy_(lacking.view(SHAPE))
    parameter.data.copy_(w.view(SHAPE))
    limits = dither(0, w.numel(), now.step, w.device)
    for blocks, values, kind in ((now.first, m, SIGNED), (now.second, v, UNSIGNED)):
        for old, new in zip(blocks, encode(values, kind, limits), strict=True):
            old.copy_(new)


def run(monkeypatch, run_fused, storage, *, rate=1e-2, skipped=None, steps=5):
    monkeypatch.setattr(adamw, "fused_adamw", lambda _: run_fused)
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(SHAPE, generator=generator))
    optimizer = AdamW([weight], lr=rate, states="8bit", weight_decay=0.1, seed=5)
    set_storage(optimizer, weight, storage)
    for step in range(steps):
        weight.grad = torch.randn(SHAPE, generator=generator)
        if skipped is not None:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(float(step in skipped))
        optimizer.step()
    return weight.detach().float() + optimizer.state[weight].get("compensation", 0), optimizer.state[weight]


@pytest.mark.parametrize("storage", ["fp32", "bf16_kahan", "bf16_sr"])
@pytest.mark.parametrize("options", [{}, {"rate": torch.tensor(1e-2)}, {"skipped": {0, 3}}, {"skipped": set()}])
def test_a_kernel_gets_what_a_step_needs(monkeypatch, storage, options):
    (one, state), (two, expected) = (run(monkeypatch, fused, storage, **options) for fused in (plain, None))
    assert (one - two).norm() < 2e-4 * two.norm()
    assert float(state["step"]) == float(expected["step"]) == 5 - len(options.get("skipped", ()))
    for key in ("exp_avg_codes", "exp_avg_sq_codes"):
        apart = (state[key].int() - expected[key].int()).abs()
        assert apart.max() <= 1
        assert (apart > 0).float().mean() < 2e-3


def test_strided_gradients_and_watched_updates_do_without(monkeypatch):
    def fail(*_):
        raise AssertionError("a kernel takes neither")

    monkeypatch.setattr(adamw, "fused_adamw", lambda _: fail)
    weight = nn.Parameter(torch.randn(64, 64))
    optimizer = AdamW([weight], states="8bit")
    weight.grad = torch.randn(64, 64).t()
    optimizer.step()
    weight.grad = torch.randn(64, 64)
    optimizer.watch([weight])
    optimizer.step()
    with pytest.raises(AssertionError, match="neither"):
        optimizer.step()


def test_a_cpu_has_none():
    assert fused_adamw(torch.device("cpu")) is None
