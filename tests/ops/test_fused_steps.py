"""What kernels of steps are given: plain ones, written from the formulas, do what the optimizers do without them."""

import pytest
import torch
from torch import nn

from deepseek_mp.ops.block_states import SIGNED, UNSIGNED, decode, dither, encode
from deepseek_mp.ops.fused_steps import fused_adamw, fused_sgd
from deepseek_mp.ops.stored import random_bits, round_by_bits, split
from deepseek_mp.optim import SGD, AdamW, adamw, set_storage, sgd

SHAPE = (33, 129)


def plain(parameter, grad, now):
    """The formula of `AdamWStep`, literally."""
    if now.skip is not None and now.skip.item():
        return
    g = grad.flatten().float() / (1.0 if now.scale is None else now.scale)
    m, v = decode(now.first), decode(now.second)
    m = m + (1 - now.betas[0]) * (g - m)
    v = now.betas[1] * v + (1 - now.betas[1]) * g.square()
    w = now.decay * whole(parameter, now) - now.size * m / (v.sqrt() / now.root + now.eps)
    write(parameter, w, now, ((now.first, m, SIGNED), (now.second, v, UNSIGNED)))


def plain_sgd(parameter, grad, now):
    """The formula of `MomentumStep`, literally."""
    if now.skip is not None and now.skip.item():
        return
    w = whole(parameter, now)
    g = grad.flatten().float() / (1.0 if now.scale is None else now.scale) + now.weight_decay * w
    m = now.momentum * decode(now.buffer) + now.entering * g
    write(parameter, w - now.rate * (g + now.momentum * m if now.nesterov else m), now, ((now.buffer, m, SIGNED),))


def whole(parameter, now):
    w = parameter.flatten().float()
    return w if now.compensation is None else w + now.compensation.flatten()


def write(parameter, w, now, moments):
    if now.storage == "bf16_sr":
        w = round_by_bits(w, *random_bits([w.numel()], [now.stream], [now.step], seed=now.seed))
    elif now.storage == "bf16_kahan":
        w, lacking = split(w)
        now.compensation.copy_(lacking.view(SHAPE))
    parameter.data.copy_(w.view(SHAPE))
    limits = dither(0, w.numel(), now.step, w.device)
    for blocks, values, kind in moments:
        for old, new in zip(blocks, encode(values, kind, limits), strict=True):
            old.copy_(new)


RULES = {
    "adamw": (AdamW, adamw, plain, {}, ("exp_avg_codes", "exp_avg_sq_codes")),
    "momentum": (SGD, sgd, plain_sgd, {"momentum": 0.9, "dampening": 0.3}, ("momentum_buffer_codes",)),
    "nesterov": (SGD, sgd, plain_sgd, {"momentum": 0.9, "nesterov": True}, ("momentum_buffer_codes",)),
}


def run(monkeypatch, rule, storage, *, fused, rate=1e-2, skipped=None, steps=5):
    """Two parameters, the second of which gets its first gradient later."""
    kind, module, kernel, options, _ = RULES[rule]
    monkeypatch.setattr(module, f"fused_{kind.__name__.lower()}", lambda _: kernel if fused else None)
    generator = torch.Generator().manual_seed(0)
    weight, late = (nn.Parameter(torch.randn(SHAPE, generator=generator)) for _ in range(2))
    optimizer = kind([late, weight], lr=rate, states="8bit", weight_decay=0.1, seed=5, **options)
    for parameter in (weight, late):
        set_storage(optimizer, parameter, storage)
    for step in range(steps):
        for parameter in (weight, late)[: 1 + (step > 1)]:
            parameter.grad = torch.randn(SHAPE, generator=generator)
        if skipped is not None:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(float(step in skipped))
        optimizer.step()
    states = optimizer.state
    return [(p.detach().float() + states[p].get("compensation", 0), states[p]) for p in (weight, late)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("storage", ["fp32", "bf16_kahan", "bf16_sr"])
@pytest.mark.parametrize("options", [{}, {"rate": torch.tensor(1e-2)}, {"skipped": {0, 3}}, {"skipped": set()}])
def test_a_kernel_gets_what_a_step_needs(monkeypatch, rule, storage, options):
    runs = zip(*(run(monkeypatch, rule, storage, fused=fused, **options) for fused in (True, False)), strict=True)
    for first, ((one, state), (two, expected)) in zip((0, 2), runs, strict=True):
        assert (one - two).norm() < 2e-4 * two.norm()
        applied = [step for step in range(first, 5) if step not in options.get("skipped", ())]
        assert float(state["step"]) == float(expected["step"]) == len(applied)
        for key in RULES[rule][-1]:
            apart = (state[key].int() - expected[key].int()).abs()
            assert apart.max() <= 1
            assert (apart > 0).float().mean() < 2e-3


def test_watched_updates_do_without(monkeypatch):
    def fail(*_):
        raise AssertionError("a kernel does not measure")

    monkeypatch.setattr(adamw, "fused_adamw", lambda _: fail)
    weight = nn.Parameter(torch.randn(64, 64))
    optimizer = AdamW([weight], states="8bit")
    weight.grad = torch.randn(64, 64)
    optimizer.watch([weight])
    optimizer.step()
    with pytest.raises(AssertionError, match="does not measure"):
        optimizer.step()


def test_a_kernel_is_given_what_lies_in_order(monkeypatch):
    given = []
    monkeypatch.setattr(adamw, "fused_adamw", lambda _: lambda *tensors: given.extend(tensors[:2]))
    weight = nn.Parameter(torch.randn(64, 64).t())
    optimizer = AdamW([weight], states="8bit")
    weight.grad = torch.randn(64, 64).t()
    optimizer.step()
    assert all(tensor.is_contiguous() for tensor in given)


def test_a_cpu_has_none():
    assert fused_adamw(torch.device("cpu")) is None
    assert fused_sgd(torch.device("cpu")) is None
