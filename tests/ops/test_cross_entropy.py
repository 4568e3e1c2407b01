"""Cross entropy by rows with its gradient, against PyTorch's."""

import pytest
import torch
from torch.nn import functional as F

from deepseek_mp.ops.cross_entropy import cross_entropy_rows


def rows(dtype, count=5, classes=11):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(count, classes, generator=generator)).to(dtype)
    return logits, torch.arange(count) % classes, torch.rand(count, generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_losses_and_gradients_are_pytorch_s(smoothing, dtype, close):
    logits, labels, factors = rows(dtype)
    wide = logits.to(torch.promote_types(dtype, torch.float32), copy=True).requires_grad_()
    expected = F.cross_entropy(wide, labels, reduction="none", label_smoothing=smoothing)
    factors = factors.to(expected.dtype)
    (gradient,) = torch.autograd.grad((factors * expected).sum(), wide)
    losses, found = cross_entropy_rows(logits, labels, smoothing=smoothing, factors=factors)
    assert (losses.dtype, found.dtype) == (expected.dtype, dtype)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.to(gradient.dtype), gradient, rtol=close, atol=close)


def test_without_factors_there_is_no_gradient():
    logits, labels, _ = rows(torch.float32)
    assert cross_entropy_rows(logits, labels)[1] is None


def test_masked_classes_have_no_share():
    logits, labels, factors = rows(torch.float32)
    logits[:, 7:] = float("-inf")
    losses, gradient = cross_entropy_rows(logits, labels, factors=factors)
    assert losses.isfinite().all()
    assert not gradient[:, 7:].any()
