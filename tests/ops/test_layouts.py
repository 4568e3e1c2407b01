"""Sizes of quantised operands and of their scales."""

import pytest

from deepseek_mp.errors import ShapeError
from deepseek_mp.ops.layouts import ALIGNMENT, alignment, check_width, padded_rows, scale_shape
from deepseek_mp.precision.scaling import GRANULARITIES


def test_every_granularity_of_fp8_has_a_layout():
    assert set(ALIGNMENT) == set(GRANULARITIES) - {"1x16"}  # of NVFP4, which nothing here multiplies


@pytest.mark.parametrize("granularity", ALIGNMENT)
def test_rows_are_padded_to_the_next_multiple(granularity):
    multiple = alignment(granularity)
    assert padded_rows(0, granularity) == 0
    assert padded_rows(1, granularity) == multiple
    assert padded_rows(multiple, granularity) == multiple
    assert padded_rows(multiple + 1, granularity) == 2 * multiple


@pytest.mark.parametrize("granularity", ALIGNMENT)
def test_there_is_one_scale_for_each_group(granularity):
    shape = scale_shape(granularity, 256, 384)
    count = 1
    for extent in shape:
        count *= extent
    down, across = GRANULARITIES[granularity].scales(256, 384)
    assert count == down * across


def test_a_width_must_consist_of_whole_groups():
    check_width(256, "1x128")
    with pytest.raises(ShapeError, match="a matrix 200 wide to quantise by 1x128"):
        check_width(200, "1x128")
