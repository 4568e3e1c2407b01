"""The kernel for cross entropy by rows, against the reference."""

import pytest
import torch

from deepseek_mp.ops.choose import cross_entropy_of

pytestmark = pytest.mark.gpu
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def rows(count, classes, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    logits = (8 * torch.randn(count, classes, device="cuda", generator=generator)).to(dtype)
    labels = torch.randint(0, classes, (count,), device="cuda", generator=generator)
    labels[-1] = classes - 1
    return logits, labels, torch.rand(count, device="cuda", generator=generator)


@pytest.mark.parametrize("sizes", [(1, 1), (7, 5), (64, 4096), (33, 50257), (3, 128256)])
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_kernel_agrees_with_the_reference(sizes, dtype, smoothing):
    logits, labels, factors = rows(*sizes, dtype)
    factors[0] = 0.0
    expected, wanted = cross_entropy_of("reference")(logits.clone(), labels, smoothing, factors)
    alone, nothing = cross_entropy_of("triton")(logits, labels, smoothing, None)
    assert nothing is None
    losses, gradient = cross_entropy_of("triton")(logits, labels, smoothing, factors)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alone, losses, rtol=0, atol=0)
    torch.testing.assert_close(gradient, wanted, rtol=CLOSE[dtype], atol=1e-6)


def test_infinite_logits_count_as_in_the_reference():
    logits, labels, factors = rows(4, 9000, torch.float32)
    logits[:, :5000] = float("-inf")
    labels[:] = 8000
    logits[1, 7000] = float("nan")
    logits[2, 100] = float("inf")
    expected, wanted = cross_entropy_of("reference")(logits.clone(), labels, 0.0, factors)
    losses, gradient = cross_entropy_of("triton")(logits, labels, 0.0, factors)
    torch.testing.assert_close(losses[[0, 3]], expected[[0, 3]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient[[0, 3]], wanted[[0, 3]], rtol=1e-5, atol=1e-6)
    assert losses[1].isnan()
    assert not losses[2].isfinite()
    assert not gradient[0, :5000].any()


def test_a_label_that_is_no_class_makes_its_row_nan():
    logits, labels, factors = rows(4, 1000, torch.bfloat16)
    labels[1], labels[2] = 1000, -3
    losses, gradient = cross_entropy_of("triton")(logits, labels, 0.0, factors)
    assert losses.isnan().tolist() == [False, True, True, False]
    assert gradient.isnan().all(1).tolist() == [False, True, True, False]
