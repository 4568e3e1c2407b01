"""Repair, fill and swap on problems small enough to see the answer."""

from __future__ import annotations

import pytest

from deepseek_mp.precision.improve import Picks, fill, moves, repair, swap
from deepseek_mp.precision.knapsack import Group

PRICES = (0.1, 0.1, 0.1)


def group(*options: tuple[float, float]) -> Group:
    """Options that differ in cost and loss."""
    return [(cost, loss, 0.0, 0.0, at) for at, (cost, loss) in enumerate(options)]


def chosen(picks: Picks) -> list[int]:
    return [option[-1] for option in picks.options]


def test_repair_takes_the_cheaper_way_out() -> None:
    groups = [group((0.0, 0.7), (0.5, 0.1)), group((0.0, 0.7), (0.2, 0.1))]
    picks = Picks([groups[0][0], groups[1][0]])
    assert repair(groups, picks, PRICES)
    assert chosen(picks) == [0, 1]
    assert (picks.cost, picks.loss) == pytest.approx((0.2, 0.8))


def test_repair_needs_several_moves() -> None:
    groups = [group((0.0, 0.9), (0.1 * (i + 1), 0.2)) for i in range(4)]
    picks = Picks([g[0] for g in groups])
    assert repair(groups, picks, PRICES)
    assert chosen(picks) == [1, 1, 1, 1]


def test_repair_weighs_the_price_against_what_is_removed() -> None:
    groups = [group((0.0, 0.7), (0.12, 0.5)), group((0.0, 0.7), (0.2, 0.0))]
    picks = Picks([g[0] for g in groups])
    assert repair(groups, picks, (0.0, 0.0, 0.0))
    assert chosen(picks) == [0, 1]


def test_repair_says_that_it_cannot() -> None:
    groups = [group((0.0, 0.9), (0.1, 0.6)), group((0.0, 0.9))]
    picks = Picks([g[0] for g in groups])
    assert not repair(groups, picks, PRICES)


def test_repair_may_use_a_budget_that_has_room() -> None:
    groups: list[Group] = [[(0.0, 0.8, 0.0, 0.0, 0), (0.1, 0.0, 0.8, 0.0, 1)] for _ in range(2)]
    picks = Picks([g[0] for g in groups])
    assert repair(groups, picks, PRICES)
    assert sorted(chosen(picks)) == [0, 1]


def test_fill_saves_until_nothing_fits() -> None:
    groups = [group((0.4, 0.0), (0.0, 0.5)), group((0.3, 0.0), (0.0, 0.5)), group((0.2, 0.0), (0.0, 0.5))]
    picks = Picks([g[0] for g in groups])
    fill(groups, picks, PRICES)
    assert chosen(picks) == [1, 1, 0]
    assert picks.fits


def test_fill_counts_what_a_group_gives_back_once() -> None:
    groups = [group((0.4, 0.5), (0.3, 0.2), (0.2, 0.2)), *[group((0.1, 0.0), (0.0, 0.5))] * 2]
    picks = Picks([g[0] for g in groups])
    fill(groups, picks, PRICES)
    assert chosen(picks) == [2, 1, 0]
    assert picks.fits


def test_swap_makes_two_moves_that_only_fit_together() -> None:
    groups = [group((0.3, 0.2), (0.0, 0.8)), group((0.1, 0.2), (0.0, 0.8))]
    picks = Picks([groups[0][0], groups[1][1]])
    assert swap(groups, picks, PRICES)
    assert chosen(picks) == [1, 0]
    assert not swap(groups, picks, PRICES)
    assert chosen(picks) == [1, 0]


def test_swap_never_exceeds_a_budget() -> None:
    groups: list[Group] = [[(0.3, 0.0, 0.2, 0.0, 0), (0.0, 0.0, 0.9, 0.0, 1)] for _ in range(2)]
    picks = Picks([g[0] for g in groups])
    assert not swap(groups, picks, PRICES)


def test_moves_know_what_they_change() -> None:
    groups = [group((0.3, 0.2), (0.0, 0.8))]
    (move,) = moves(groups, Picks([groups[0][0]]), (0.5, 0.0, 0.0))
    assert move[:6] == pytest.approx((0.0, -0.3, 0.6, 0.0, 0.0, 0))
    assert moves(groups, Picks([groups[0][0]]), PRICES, lambda cost, *uses: cost > 0.0) == []
