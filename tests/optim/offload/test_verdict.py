"""The verdict on a step: unscaled, checked, clipped as PyTorch does."""

import pytest
import torch
from torch import nn

from deepseek_mp.optim.offload import OffloadSettings
from deepseek_mp.optim.offload.verdict import Scaling, judge

GRADS = [torch.tensor([3.0]), torch.tensor([4.0])]


def verdict(grads=GRADS, *, scale=None, found_inf=None, **options):
    return judge(grads, OffloadSettings(**options), scale=scale, found_inf=found_inf)


def test_clips_as_pytorch_to_the_bit():
    grads = [torch.randn(7), torch.randn(3, 5)]
    parameters = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()
    norm = nn.utils.clip_grad_norm_(parameters, 0.7)
    found = verdict(grads, max_grad_norm=0.7)
    assert found.grad_norm == norm.item()
    clipped = [found.scaling.into(torch.empty_like(grad), grad) for grad in grads]
    assert all(torch.equal(p.grad, grad) for p, grad in zip(parameters, clipped, strict=True))


def test_nothing_to_scale_is_seen():
    assert verdict().scaling.is_one
    assert verdict(max_grad_norm=10.0).scaling.is_one
    assert verdict(scale=torch.tensor(1.0)).scaling.is_one
    assert not verdict(scale=torch.tensor(2.0)).scaling.is_one
    assert not verdict(max_grad_norm=1.0).scaling.is_one
    assert verdict().report.factor == 1.0


@pytest.mark.parametrize("scale", [3.0, 1 / 7])
def test_unscales_as_the_fused_kernel_to_the_bit(scale):
    """Which divides; a product with the reciprocal would differ in the last bit."""
    parameter = nn.Parameter(torch.zeros(1000))
    gradient = parameter.grad = torch.randn(1000)
    expected = gradient.clone()
    optimizer = torch.optim.AdamW([parameter], fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
    optimizer.step()
    scaling = verdict([expected], scale=torch.tensor(scale)).scaling
    assert torch.equal(scaling.into(torch.empty(1000), expected), parameter.grad)


def test_the_norm_is_of_unscaled_gradients():
    found = verdict([grad * 8 for grad in GRADS], scale=torch.tensor([8.0]), max_grad_norm=2.5)
    assert found.grad_norm == 5.0
    assert found.scaling.factor == pytest.approx(0.5 / 8)
    assert found.unscaling == Scaling(divisor=8.0)


@pytest.mark.parametrize(
    ("bad", "options", "found_inf", "reason"),
    [
        (float("nan"), {}, None, "nonfinite"),
        (float("inf"), {"max_grad_norm": 1.0}, None, "nonfinite"),
        (float("inf"), {"check_finite": False}, None, None),
        (1.0, {}, torch.tensor([1.0]), "scaler"),
        (1.0, {}, torch.tensor(0.0), None),
    ],
)
def test_reasons(bad, options, found_inf, reason):
    found = verdict([torch.tensor([bad])], found_inf=found_inf, **options)
    assert found.reason == reason
    assert found.report.applied is (reason is None)


def test_a_scaler_that_has_looked_saves_the_norm():
    assert verdict(found_inf=torch.tensor(0.0)).grad_norm is None
    assert verdict([]).reason == "no_grads"
