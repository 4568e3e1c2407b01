"""Sums of rounding errors on a GPU, against the reference."""

import pytest
import torch

from deepseek_mp.ops.choose import row_sums_of
from deepseek_mp.ops.statistics import ROW_FIELDS, comparison, rounding_error

pytestmark = pytest.mark.gpu


def matrix(rows, columns, seed=0):
    """Values over seven decades, with zeros, infinities and a NaN."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(rows, columns, device="cuda", generator=generator)
    x *= 10.0 ** torch.randint(-7, 1, (rows, columns), device="cuda", generator=generator)
    x[0, 0], x[1, 1], x[2, 0] = float("inf"), float("nan"), 0.0
    return x


def ways(x):
    lost = torch.where(x.abs() < 1e-3, 0.0, x)
    return torch.stack([x.bfloat16().float(), (1e4 * x).half().float() / 1e4, lost, torch.zeros_like(x)])


@pytest.mark.parametrize("sizes", [(3, 5), (64, 1024), (257, 3000), (1024, 8192)])
@pytest.mark.parametrize("turned", [False, True])
def test_the_kernel_agrees_with_the_reference(sizes, turned):
    x = matrix(*sizes)
    made = ways(x)
    if turned:
        x, made = x.t(), made.transpose(1, 2)
    ours, expected = (row_sums_of(name)(x, made).double() for name in ("triton", "reference"))
    assert ours.shape == (4, x.shape[0], len(ROW_FIELDS))
    for place, name in enumerate(ROW_FIELDS):
        scale = expected[..., ROW_FIELDS.index("nonzero")].clamp_min(1) if name in ("ratio", "side") else 1.0
        torch.testing.assert_close(
            ours[..., place] / scale, expected[..., place] / scale, rtol=1e-5, atol=1e-6, msg=name
        )


def test_one_way_and_the_numbers_made_of_it():
    x = matrix(128, 512)
    x[0, 0] = x[1, 1] = 1.0
    made = ways(x)
    assert torch.equal(row_sums_of("triton")(x, made[2]), row_sums_of("triton")(x, made)[2])
    torch.testing.assert_close(rounding_error(x, made).cpu(), rounding_error(x.cpu(), made.cpu()), rtol=1e-4, atol=1e-6)
    for found, expected in zip(comparison(x, made), comparison(x.cpu(), made.cpu()), strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-6)
