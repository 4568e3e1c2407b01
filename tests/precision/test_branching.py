"""Branch and bound against the enumeration of all allocations."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from deepseek_mp.precision.branching import Search, price_sets
from deepseek_mp.precision.knapsack import Group, sums
from deepseek_mp.precision.relaxation import relax


def random_groups(number: int, options: int) -> list[Group]:
    """Groups whose costs fall as their uses rise, with whole numbers so that many allocations are equal."""
    groups: list[Group] = []
    for _ in range(number):
        uses = [[random.randint(0, 9) / 40 for _ in range(3)] for _ in range(options)]
        groups.append([(1.0 - sum(u) / 3 + random.randint(0, 3) / 60, u[0], u[1], u[2], k) for k, u in enumerate(uses)])
    return groups


def enumerated(groups: list[Group]) -> float:
    costs = [(c, a, b, m) for c, a, b, m in map(sums, itertools.product(*groups))]
    return min((c for c, *uses in costs if max(uses) <= 1.0), default=math.inf)


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_the_best_allocation_is_found_and_proven(seed: int, start: bool) -> None:
    random.seed(seed)
    groups = random_groups(6, 4)
    best = enumerated(groups)
    fitting = next(picks for picks in itertools.product(*groups) if max(sums(picks)[1:]) <= 1.0)
    search = Search(groups, relax(groups, 1e-5, 1.0).prices, fitting if start else None, nodes=100_000)
    assert search.run(0.0)
    assert search.cost == pytest.approx(best, abs=1e-9)
    assert search.best is not None
    cost, *uses = sums(search.best)
    assert cost == pytest.approx(best, abs=1e-9)
    assert max(uses) <= 1.0 + 1e-9
    assert all(option in group for option, group in zip(search.best, groups, strict=True))


def test_a_tolerance_bounds_what_is_missed() -> None:
    groups = random_groups(6, 5)
    best = enumerated(groups)
    search = Search(groups, (0.3, 0.3, 0.3), None, nodes=100_000)
    assert search.run(0.2)
    assert best <= search.cost <= best + 0.2
    assert search.run(0.0)
    assert search.cost == pytest.approx(best, abs=1e-9)


def test_it_stops_when_the_nodes_run_out() -> None:
    groups = random_groups(8, 5)
    search = Search(groups, (0.0, 0.0, 0.0), None, nodes=20)
    assert not search.run(0.0)
    assert search.cost >= enumerated(groups) - 1e-9


def test_what_cannot_be_met_has_no_best() -> None:
    groups: list[Group] = [[(0.0, 0.8, 0.0, 0.0, 0), (0.0, 0.7, 0.0, 0.0, 1)]] * 2
    search = Search(groups, (0.0, 0.0, 0.0), None, nodes=100)
    assert search.run(0.0)
    assert search.best is None


def test_nothing_to_decide() -> None:
    groups: list[Group] = [[(0.0, 0.6, 0.0, 0.0, 0)]]
    search = Search(groups, (0.0, 0.0, 0.0), None, nodes=10)
    assert search.run(0.0)
    assert search.best == [groups[0][0]]
    too_much = Search(groups * 2, (0.0, 0.0, 0.0), None, nodes=10)
    assert too_much.run(0.0)
    assert too_much.best is None


def test_thousands_of_decided_groups_are_no_depth() -> None:
    decided: Group = [(0.0, 1e-4, 0.0, 0.0, 0)]
    open_group: Group = [(0.5, 0.0, 0.0, 0.0, 0), (0.2, 0.4, 0.0, 0.0, 1), (0.0, 0.8, 0.0, 0.0, 2)]
    groups = [decided] * 2000 + [open_group] + [decided] * 1000
    search = Search(groups, (0.1, 0.0, 0.0), None, nodes=100)
    assert search.run(0.0)
    assert search.best is not None
    assert search.best[2000][-1] == 1
    assert len(search.best) == 3001


def test_prices_around_those_of_the_relaxation() -> None:
    assert price_sets((1.0, 0.0, 0.0)) == [(1.0, 0.0, 0.0), (0.0, 0.0, 0.0), (0.6, 0.0, 0.0), (1.6, 0.0, 0.0)]
    sets = price_sets((1.0, 0.0, 2.0))
    assert (1.0, 0.0, 1.2) in sets
    assert (1.6, 0.0, 2.0) in sets
