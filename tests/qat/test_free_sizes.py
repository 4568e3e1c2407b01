"""Which sizes of inputs a graph leaves free, and for which of them code holds that was compiled for free ones."""

import pytest
import torch
from torch import nn

from deepseek_mp.qat.free_sizes import FreeSizes


class Both(nn.Module):
    def forward(self, x, y):
        return x + y.sum(1, keepdim=True)


class Each(nn.Module):
    def forward(self, x, y):
        return x.relu(), y.relu()


def sizes_of(model, inputs, free):
    dims = tuple({0: torch.export.Dim.AUTO} if is_free else None for is_free in free)
    return FreeSizes(torch.export.export(model, inputs, dynamic_shapes=dims).graph)


@pytest.fixture
def both():
    return sizes_of(Both(), (torch.randn(4, 3), torch.randn(4, 5)), (True, True))


def pair(size, other=None, width=3):
    return torch.randn(size, width), torch.randn(size if other is None else other, 5)


def test_inputs_are_alike_that_differ_in_free_sizes(both):
    assert both.alike(pair(4)) == both.alike(pair(7))
    x, y = pair(4)
    for others in ((x.double(), y), pair(4, width=2), (x.t().contiguous().t(), y), (x.to("meta"), y)):
        assert both.alike(others) != both.alike((x, y))


def test_code_can_leave_free_what_the_graph_does_from_2_on(both):
    assert both.may_be_free(pair(2))
    assert not both.may_be_free(pair(1))
    assert not both.may_be_free(pair(0))
    fixed = sizes_of(Both(), pair(4), (False, False))
    assert not fixed.may_be_free(pair(4))
    assert fixed.alike(pair(4)) != fixed.alike(pair(7))


def test_sizes_are_symbols_where_the_graph_leaves_them_free():
    opened = sizes_of(Each(), pair(4, 6), (True, False)).opened(pair(4, 6))
    x, y = opened.fakes
    assert isinstance(x.shape[0], torch.SymInt)
    assert (x.shape[1], tuple(y.shape)) == (3, (6, 5))
    assert x.stride() == (3, 1)


def test_strides_are_those_of_the_inputs_also_where_one_is_a_multiple_of_the_free_size():
    sizes = sizes_of(Each(), (torch.randn(4, 5, 3), torch.randn(4, 5)), (True, False))
    rows = torch.randn(5, 4, 3).transpose(0, 1)  # (3, 12, 1), and the same of its first ones
    y = torch.randn(4, 5)
    assert sizes.alike((rows, y)) == sizes.alike((rows[:2], y))
    opened = sizes.opened((rows, y))
    assert opened.fakes[0].stride() == (3, 12, 1)
    columns = torch.randn(4, 5, 9)[..., :3]
    opened = sizes.opened((columns, y))
    assert opened.fakes[0].stride() == (45, 9, 1)
    assert opened.fits((columns[:2], y))


def test_code_holds_for_sizes_that_are_equal_where_they_have_to_be(both):
    opened = both.opened(pair(4))
    Both()(*opened.fakes)
    assert opened.fits(pair(9))
    assert not opened.fits(pair(9, 8))
    assert not opened.fits(pair(1))
    apart = sizes_of(Each(), pair(4, 6), (True, True)).opened(pair(4, 6))
    Each()(*apart.fakes)
    assert apart.fits(pair(9, 8))


def test_code_holds_where_what_the_compiler_assumed_does(both):
    opened = both.opened(pair(4))
    assert bool(opened.fakes[0].shape[0] < 16)  # as the compiler asks
    assert bool(opened.fakes[1].shape[0] % 2 == 0)
    assert [opened.fits(pair(size)) for size in (14, 16, 13)] == [True, False, False]
