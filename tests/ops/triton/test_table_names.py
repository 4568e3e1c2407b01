"""Kernels of many parameters, compiled for what a step is: bit by bit what the kernels of one parameter do.

With TRITON_INTERPRET=1 they run on a CPU, as in tests/ops/triton/test_adamw.py and within the same limits.
"""

import os
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from deepseek_mp.optim import SGD, AdamW, adamw, set_storage, sgd

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
DEVICE = "cpu" if INTERPRETED else "cuda"
LARGE = [] if INTERPRETED else [(512, 1024), (3000, 1111), (256, 128, 3, 3), (64, 3, 7, 7), (512, 512, 1, 1)]
SHAPES = [(64, 64), (33, 129), (16, 30, 3, 3), (65, 64), (16, 29, 3, 3), *LARGE, (32,), (20,)]
STORAGES = ["fp32", "bf16_kahan", "bf16_sr"]


def run(monkeypatch, kind, storage, *, many, device_rate=False, skipped=None, gradient=torch.float32):
    """Every tensor of some parameters after three steps, the second of which is the first of one of them."""
    from deepseek_mp.ops.triton.adamw import adamw_in_blocks, adamw_of_many
    from deepseek_mp.ops.triton.sgd import sgd_in_blocks, sgd_of_many

    for module, rule, one, all_ in (
        (adamw, "adamw", adamw_in_blocks, adamw_of_many),
        (sgd, "sgd", sgd_in_blocks, sgd_of_many),
    ):
        monkeypatch.setattr(module, f"fused_{rule}", lambda _, one=one: one)
        monkeypatch.setattr(module, f"{rule}_of_many", lambda _, all_=all_: all_ if many else None)
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in SHAPES:
        order = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        params.append(nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE, memory_format=order)))
    rate = torch.tensor(1e-2, device=DEVICE) if device_rate else 1e-2
    options = {"momentum": 0.9, "dampening": 0.3} if kind is SGD else {}
    optimizer = kind(params, lr=rate, weight_decay=0.1, states="8bit", seed=(1 << 40) + 3, **options)
    for parameter in params:
        set_storage(optimizer, parameter, storage)
        parameter.grad_dtype = gradient
    for step in range(3):
        for index, parameter in enumerate(params):
            drawn = torch.randn(parameter.shape, generator=generator).to(DEVICE)
            late = index == 2 and not step
            parameter.grad = None if late else torch.empty_like(parameter, dtype=gradient).copy_(drawn)
        if skipped is not None:
            optimizer.grad_scale = torch.tensor(4.0, device=DEVICE)
            optimizer.found_inf = torch.tensor(float(step in skipped), device=DEVICE)
        optimizer.step()
    assert bool(optimizer.tables) is many
    return {(p, key): value for p, value in enumerate(params) for key, value in tensors(optimizer, value)}


def tensors(optimizer, parameter):
    yield "value", parameter.detach().clone()
    yield from ((key, value) for key, value in optimizer.state[parameter].items() if isinstance(value, torch.Tensor))


def assert_same(one, two):
    """Every bit of what is in blocks; what is not is stepped by PyTorch without a kernel of many, and is close."""
    assert one.keys() == two.keys()
    for (index, key), value in one.items():
        other = two[index, key]
        if len(SHAPES[index]) > 1:
            assert torch.equal(value, other), (SHAPES[index], key)
        elif value.dtype is torch.float32:
            torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-5)
    for index in range(len(SHAPES) - 2, len(SHAPES)):
        held, other = (x[index, "value"].float() + x.get((index, "compensation"), 0) for x in (one, two))
        torch.testing.assert_close(held, other, rtol=1e-3 if (index, "compensation") in one else 1e-2, atol=1e-4)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_many_are_stepped_bit_by_bit_as_one_by_one(monkeypatch, kind, storage):
    assert_same(*(run(monkeypatch, kind, storage, many=many) for many in (False, True)))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_many_whose_numbers_are_the_device_s(monkeypatch, kind, storage):
    runs = (run(monkeypatch, kind, storage, many=many, device_rate=True, skipped={1}) for many in (False, True))
    assert_same(*runs)


@pytest.mark.parametrize("gradient", [torch.bfloat16, torch.float16])
def test_many_with_gradients_of_16_bits(monkeypatch, gradient):
    assert_same(*(run(monkeypatch, AdamW, "bf16_kahan", many=many, gradient=gradient) for many in (False, True)))
