"""Overlaps against numbers computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from deepseek_mp.workloads.boxes import areas, complete_overlap, intersections, overlap, pairwise_overlap

SQUARE = torch.tensor([0.0, 0.0, 2.0, 2.0])
SHIFTED = torch.tensor([1.0, 1.0, 3.0, 3.0])
APART = torch.tensor([5.0, 0.0, 6.0, 1.0])


def test_an_area_is_width_times_height_and_never_negative() -> None:
    assert areas(torch.stack([SQUARE, torch.tensor([1.0, 2.0, 4.0, 3.0])])).tolist() == [4.0, 3.0]
    assert areas(torch.tensor([3.0, 3.0, 1.0, 1.0])) == 0


def test_overlap_is_the_shared_area_over_the_area_of_both() -> None:
    assert intersections(SQUARE, SHIFTED) == 1
    assert overlap(SQUARE, SHIFTED).item() == pytest.approx(1 / 7)
    assert overlap(SQUARE, SQUARE).item() == pytest.approx(1)
    assert overlap(SQUARE, APART) == 0


def test_boxes_that_only_touch_do_not_overlap() -> None:
    assert overlap(SQUARE, torch.tensor([2.0, 0.0, 4.0, 2.0])) == 0


def test_pairs_are_all_with_all_in_order() -> None:
    table = pairwise_overlap(torch.stack([SQUARE, SHIFTED]), torch.stack([SQUARE, SHIFTED, APART]))
    torch.testing.assert_close(table, torch.tensor([[1, 1 / 7, 0], [1 / 7, 1, 0]]), atol=1e-6, rtol=0)


def test_of_boxes_alike_only_the_distance_of_the_centres_counts() -> None:
    assert complete_overlap(SQUARE, SHIFTED).item() == pytest.approx(1 / 7 - 2 / 18)
    assert complete_overlap(SQUARE, APART).item() == pytest.approx(-(4.5**2 + 0.5**2) / (6**2 + 2**2), abs=1e-6)
    assert complete_overlap(SHIFTED, SHIFTED).item() == pytest.approx(1)


def test_of_boxes_around_one_centre_only_the_aspect_ratio_counts() -> None:
    wide, tall = torch.tensor([0.0, 1.0, 4.0, 3.0]), torch.tensor([1.0, 0.0, 3.0, 4.0])
    shape = 4 / math.pi**2 * (math.atan(0.5) - math.atan(2)) ** 2
    assert complete_overlap(wide, tall).item() == pytest.approx(1 / 3 - shape**2 / (2 / 3 + shape), abs=1e-6)


def test_boxes_apart_are_pulled_together_and_empty_ones_have_finite_gradients() -> None:
    box = APART.clone().requires_grad_()
    complete_overlap(box, SQUARE).backward()
    assert box.grad is not None
    assert box.grad[0] < 0  # a smaller left edge makes the overlap larger
    empty = torch.zeros(4, requires_grad=True)
    complete_overlap(empty, torch.zeros(4)).backward()
    assert empty.grad is not None
    assert empty.grad.isfinite().all()
