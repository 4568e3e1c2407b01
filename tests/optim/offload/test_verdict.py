"""The verdict on a step: unscaled, checked, clipped as PyTorch does."""

import pytest
import torch
from torch import nn

from deepseek_mp.optim.offload import OffloadSettings
from deepseek_mp.optim.offload.verdict import judge

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
    assert all(torch.equal(p.grad, g * found.factor) for p, g in zip(parameters, grads, strict=True))


def test_nothing_to_multiply_is_none():
    assert verdict().factor is None
    assert verdict(max_grad_norm=10.0).factor is None
    assert verdict(scale=torch.tensor(1.0)).factor is None
    assert verdict().report.factor == 1.0


def test_the_norm_is_of_unscaled_gradients():
    found = verdict([grad * 8 for grad in GRADS], scale=torch.tensor([8.0]), max_grad_norm=2.5)
    assert found.grad_norm == 5.0
    assert found.factor.item() == pytest.approx(0.5 / 8)
    assert found.unscaling.item() == 1 / 8


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
