"""Emulated recipes on a GPU: what is rounded is what a CPU rounds, and products of BF16 give the sums of FP32."""

import pytest
import torch
from torch import nn

from deepseek_mp import MixedPrecisionTrainer
from deepseek_mp.backends import math_mode
from deepseek_mp.nn import apply
from deepseek_mp.nn.emulated import emulated_linear
from deepseek_mp.ops.rounding import fits_bf16, rounded
from deepseek_mp.precision import RECIPES, PrecisionPlan, with_power_of_two

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs torch.cuda, whose products these are"),
]
DEVICE = torch.device("cuda")
ROUNDED = ["nvfp4", "tensor", "row", "block", "mx", "fp16", "tf32"]


@pytest.mark.parametrize("name", ROUNDED)
def test_rounding_gives_the_bits_of_a_cpu(name):
    x = torch.randn(200, 330) * 10.0 ** (torch.rand(200, 1) * 12 - 6)
    x[3], x[9, 7] = 0.0, float("inf")
    for side in set(RECIPES[name].sides()):
        got, expected = rounded(x.to(DEVICE), side).cpu(), rounded(x, side)
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("recipe", [RECIPES["nvfp4"], with_power_of_two(RECIPES["block"]), RECIPES["block"]], ids=str)
def test_products_are_those_of_a_cpu(recipe):
    """In BF16 where that holds the operands: the sums, and the gradients of weights, are not rounded to it."""
    found = []
    start = torch.randn(96, 520), torch.randn(72, 520), torch.randn(96, 72).bfloat16()
    for device in ("cpu", DEVICE):
        x, weight, gradient = (tensor.detach().to(device).requires_grad_() for tensor in start)
        with math_mode(torch.device(device), fp32="ieee", search=False):
            y = emulated_linear(x, weight, None, recipe)
            y.backward(gradient.detach())
        found.append([y.detach().cpu(), x.grad.cpu(), weight.grad.cpu()])
    cpu, gpu = found
    for a, b in zip(cpu[:2], gpu[:2], strict=True):
        torch.testing.assert_close(b.float(), a.float(), rtol=2**-7, atol=1e-4)
    torch.testing.assert_close(gpu[2], cpu[2], rtol=1e-5, atol=1e-4)
    assert fits_bf16(RECIPES["nvfp4"].fprop.left)


@pytest.mark.parametrize("recipe", ["nvfp4", "tensor"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_with_convolutions_learns(recipe, compiled):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, stride=2),
        nn.ReLU(), nn.Flatten(), nn.Linear(32 * 9, 64), nn.ReLU(), nn.Linear(64, 4),
    )  # fmt: skip
    trainer = MixedPrecisionTrainer(
        model, recipe, loss_fn=nn.functional.cross_entropy, emulate=True, device=DEVICE, compile=compiled,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    )  # fmt: skip
    x, target = torch.randn(64, 3, 8, 8, device=DEVICE), torch.arange(64, device=DEVICE) % 4
    losses = [float(trainer.step((x, target)).loss) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


def test_convolutions_are_those_of_a_cpu():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(20, 24, 3, padding=1, stride=2), torch.randn(4, 20, 9, 9)
    found = []
    for device in ("cpu", DEVICE):
        model = nn.Sequential(conv.to(device))
        apply(model, PrecisionPlan.of("bf16", {"0": "nvfp4"}), emulate=True)
        with math_mode(torch.device(device), fp32="ieee", search=False):
            found.append(model(x.to(device)).detach().cpu().float())
    torch.testing.assert_close(found[1], found[0], rtol=2**-7, atol=1e-4)
