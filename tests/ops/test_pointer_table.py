"""Tables of where parameters lie: what they say, when they are made anew, and that what was sent stays."""

from dataclasses import replace

import pytest
import torch

from deepseek_mp.ops.pointer_table import ROWS, WIDTH, Lines, PointerTable

CPU = torch.device("cpu")
PROGRAM = 256 * ROWS
LINES = Lines(
    weights=[64, 128, 192],
    compensations=[0, 256, 0],
    counts=[PROGRAM, 3 * PROGRAM + 16, 16],
    streams=[5, 6, 7],
    channels=[3, 4, 5],
    pixels=[9, 1, 1],
    numbers=[2, 0, 1],
    moments=[[512, 1024, 2048], [16, 32, 48]],
)
GRADS = [32, 48, 96]


def filled():
    table = PointerTable(CPU)
    table.refresh(LINES, GRADS)
    return table


def test_each_parameter_has_a_line_and_its_programs():
    table = filled()
    assert table.lines.shape == (3, WIDTH)
    assert table.lines.is_contiguous()
    assert table.lines[1].tolist() == [128, 256, 3 * PROGRAM + 16, 1, 6, 4, 1, 0, 1024, 32, 0, 0]
    assert table.lines[:, 3].tolist() == [0, 1, 5]
    assert table.owners.tolist() == [0, 1, 1, 1, 1, 2]
    assert table.programs == 6
    assert table.grads.tolist() == GRADS


def test_what_is_the_same_is_not_made_again():
    table = filled()
    before = table.lines, table.owners, table.grads
    table.refresh(replace(LINES, weights=list(LINES.weights)), list(GRADS))
    assert all(one is two for one, two in zip(before, (table.lines, table.owners, table.grads), strict=True))


@pytest.mark.parametrize("changed", ["weights", "compensations", "counts", "streams", "channels", "pixels", "numbers"])
def test_whatever_changes_is_taken_over_and_the_old_table_stays(changed):
    table = filled()
    lines, grads = table.lines, table.grads
    before = lines.clone()
    table.refresh(replace(LINES, **{changed: [1, 2, 3]}), GRADS)
    assert (table.lines != before).any(0).sum() >= 1
    assert table.grads is grads
    assert torch.equal(lines, before)


def test_gradients_that_moved_leave_the_lines_alone():
    table = filled()
    lines, grads = table.lines, table.grads
    table.refresh(LINES, [32, 48, 112])
    assert table.lines is lines
    assert table.grads.tolist() == [32, 48, 112]
    assert grads.tolist() == GRADS


def test_fewer_parameters_make_another_table():
    table = filled()
    short = {name: value[:1] for name, value in vars(LINES).items() if name != "moments"}
    table.refresh(Lines(**short, moments=[codes[:1] for codes in LINES.moments]), GRADS[:1])
    assert table.lines.shape == (1, WIDTH)
    assert table.programs == 1


def test_one_address_or_count_off_sixteen_is_not_aligned():
    assert filled().aligned
    for changes in ({"weights": [64, 130, 192]}, {"counts": [8, 16, 16]}, {"moments": [[0, 0, 1], [0, 0, 0]]}):
        table = filled()
        table.refresh(replace(LINES, **changes), GRADS)
        assert not table.aligned
    table = filled()
    table.refresh(LINES, [32, 48, 100])
    assert not table.aligned
    table.refresh(LINES, GRADS)
    assert table.aligned


def test_the_default_device_changes_nothing():
    with torch.device("meta"):
        table = filled()
    for here, expected in zip(*([t.lines, t.owners, t.grads] for t in (table, filled())), strict=True):
        assert torch.equal(here, expected)
