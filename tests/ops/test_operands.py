"""What can be quantised, and the memory for what comes out."""

import pytest
import torch

from deepseek_mp.errors import FormatError, ShapeError
from deepseek_mp.ops.layouts import ALIGNMENT, padded_rows, scale_shape
from deepseek_mp.ops.operands import Cast, check_magnitude, check_matrix, check_seed, empty_operands


@pytest.mark.parametrize("granularity", ALIGNMENT)
def test_operands_have_whole_groups_and_their_scales(granularity):
    x, padded = torch.empty(5, 256, dtype=torch.bfloat16), padded_rows(5, granularity)
    q, s, qt, st = empty_operands(x, Cast("fp8_e5m2", granularity, False, True, True))
    assert (q.shape, qt.shape) == ((padded, 256), (256, padded))
    assert (s.shape, st.shape) == (scale_shape(granularity, padded, 256), scale_shape(granularity, 256, padded))
    assert {q.dtype, qt.dtype} == {torch.float8_e5m2}
    assert {s.dtype, st.dtype} == {torch.float32}


def test_a_layout_that_is_not_asked_for_is_empty_and_a_tensor_of_its_own():
    x = torch.empty(16, 128)
    made = empty_operands(x, Cast("fp8_e4m3", "row", False, False, False))
    assert [tensor.shape for tensor in made] == [(0,)] * 4
    assert len({id(tensor) for tensor in made}) == 4
    assert empty_operands(x, Cast("fp8_e4m3", "row", False, False, True))[2].shape == (128, 16)


def test_widths_of_no_whole_groups_are_refused():
    with pytest.raises(ShapeError, match="multiples of 128"):
        empty_operands(torch.empty(4, 64), Cast("fp8_e4m3", "1x128", False, True, True))
    with pytest.raises(ShapeError, match="multiples of 16"):
        check_matrix(torch.empty(4, 17), "fp8_e4m3", "tensor")


def test_what_kernels_would_read_wrongly_is_refused():
    with pytest.raises(ShapeError, match="Allowed: contiguous matrices"):
        check_matrix(torch.empty(32, 16).t(), "fp8_e4m3", "tensor")
    with pytest.raises(FormatError, match="format 'bf16' to quantise to"):
        check_matrix(torch.empty(16, 32), "bf16", "tensor")


@pytest.mark.parametrize(
    "number", [torch.zeros(1), torch.zeros((), dtype=torch.float64), torch.zeros((), device="meta")]
)
def test_a_magnitude_is_an_fp32_scalar_where_the_tensor_is(number):
    x = torch.empty(4, 16)
    check_magnitude("top", torch.zeros(()), x)
    with pytest.raises(ShapeError, match=r"top of shape.*Allowed: fp32 of shape \[\] on cpu"):
        check_magnitude("top", number, x)


@pytest.mark.parametrize(
    "seed",
    [torch.tensor([1]), torch.tensor(1, dtype=torch.int32), torch.tensor(1.0), torch.tensor(1, device="meta")],
)
def test_a_seed_is_an_int64_scalar_where_the_tensor_is(seed):
    x = torch.empty(4, 16)
    check_seed(torch.tensor(1), x)
    with pytest.raises(ShapeError, match=r"a seed of shape.*Allowed: int64 of shape \[\] on cpu.*Draw it by torch"):
        check_seed(seed, x)
