"""The allocation: near the exact optimum, within budgets, the same for every order of the items."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import csr_array

from deepseek_mp.errors import ConfigError
from deepseek_mp.precision import solve
from deepseek_mp.precision.allocate import allocate
from deepseek_mp.precision.allocation import Allocation, Budget, Choice, Item, Objective

LOOSE = 1e6
quick = settings(max_examples=100, deadline=None, derandomize=True, database=None)


@dataclass(frozen=True)
class Kind:
    """A kind of random problem."""

    name: str
    items: int
    choices: int
    costs: str = "trained"
    budgets: int = 2
    low: float = 0.3
    """Part of the items that the budgets let run at a low precision."""
    seeds: int = 24
    gap: float = 1e-5
    """To which the exact solver proves its optimum, which is what takes the time here."""


KINDS = (
    Kind("few", items=4, choices=3),
    Kind("few, three budgets", items=6, choices=5, costs="traded", budgets=3),
    Kind("one budget", items=40, choices=6, budgets=1),
    Kind("tiny budgets", items=40, choices=6, low=0.02),
    Kind("three budgets", items=30, choices=6, budgets=3),
    Kind("unrelated costs", items=25, choices=8, costs="unrelated", budgets=3),
    Kind("whole numbers", items=12, choices=5, costs="whole", budgets=2),
    Kind("costs as uses", items=10, choices=6, costs="traded", budgets=2),
    Kind("hard", items=12, choices=8, costs="traded", budgets=3, seeds=5, gap=4e-3),
)


def random_items(kind: Kind, rng: random.Random) -> list[Item]:
    return [
        Item(f"item {i}", tuple(make_choice(kind, k, size, rng) for k in range(kind.choices)))
        for i, size in enumerate(rng.lognormvariate(0.0, 1.0) for _ in range(kind.items))
    ]


def make_choice(kind: Kind, k: int, size: float, rng: random.Random) -> Choice:
    """The `k`-th choice of an item: `trained` ones as measured in training, `traded` ones worth what they use."""
    name = f"choice {k}"
    if kind.costs == "unrelated":
        return Choice(name, rng.random(), rng.random(), rng.random(), rng.random())
    if kind.costs == "whole":
        return Choice(name, rng.randint(1, 9), rng.randint(0, 9), rng.randint(0, 9), rng.randint(0, 9))
    if kind.costs == "traded":
        uses = [rng.random() for _ in range(3)]
        return Choice(name, 2.0 - sum(uses[: kind.budgets]) / 2 + rng.uniform(0.0, 0.1), *uses)
    share = k / (kind.choices - 1)
    loss, noise = (size * c * 4.0**k * rng.uniform(0.5, 2.0) if k else 0.0 for c in (1e-7, 1e-6))
    return Choice(
        name, 1e-3 * size * (1.0 - 0.6 * share) * rng.uniform(0.9, 1.1), loss, noise, 1e6 * size * (1.0 - 0.5 * share)
    )


def random_budget(kind: Kind, items: list[Item], rng: random.Random) -> Budget:
    """What an allocation takes in which a part of the items has any choice, and the others that of least loss."""
    taken = [
        rng.choice(item.choices) if rng.random() < kind.low or kind.budgets == 3 else min(item.choices, key=use)
        for item in items
    ]
    loss, noise, memory = (math.fsum(choice.amounts[k] for choice in taken) for k in range(3))
    return Budget(
        max(loss, 1e-9), max(noise, 1e-9) if kind.budgets > 1 else LOOSE, memory if kind.budgets > 2 else None
    )


def use(choice: Choice) -> float:
    return choice.loss + choice.noise


def optimum(
    items: list[Item], budget: Budget, objective: Objective = "seconds", gap: float = 1e-5
) -> tuple[float, float]:
    """What the least objective lies between, from an integer program; budgets are exceeded by up to 1e-6."""
    options = [(i, choice) for i, item in enumerate(items) for choice in item.choices if choice.loss != math.inf]
    costs = np.array([getattr(choice, objective) for _, choice in options])
    limits = [limit for limit in budget.limits if limit != math.inf]
    uses = np.array([[choice.amounts[k] / limit for _, choice in options] for k, limit in enumerate(limits)])
    owners = ([i for i, _ in options], range(len(options)))
    one_each = csr_array((np.ones(len(options)), owners), shape=(len(items), len(options)))
    scale = float(np.abs(costs).max())
    solved = milp(
        costs / scale,
        constraints=[LinearConstraint(uses, ub=1.0), LinearConstraint(one_each, 1.0, 1.0)],
        integrality=np.ones(len(options)),
        bounds=(0, 1),
        options={"mip_rel_gap": gap},
    )
    return float(solved.mip_dual_bound) * scale, float(solved.fun) * scale


def check(allocation: Allocation, items: list[Item], budget: Budget) -> None:
    """What holds for every allocation."""
    assert list(allocation.choices) == [item.name for item in items]
    chosen = list(allocation.choices.values())
    assert all(choice in item.choices for choice, item in zip(chosen, items, strict=True))
    totals = [math.fsum(choice.amounts[k] for choice in chosen) for k in range(3)]
    assert totals == list(allocation.totals.amounts)
    assert allocation.totals.seconds == math.fsum(choice.seconds for choice in chosen)
    fits = all(total <= limit * (1 + 1e-9) for total, limit in zip(totals, budget.limits, strict=True))
    assert allocation.is_feasible == fits == (allocation.exceeded == "")
    reached = getattr(allocation.totals, allocation.objective)
    if allocation.bound is not None:
        assert allocation.gap is not None
        assert reached - allocation.bound <= allocation.gap * max(abs(reached), abs(allocation.bound)) * (1 + 1e-9)
        assert allocation.gap >= 0.0
        assert allocation.bound <= reached


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_within_one_percent_of_the_optimum(kind: Kind) -> None:
    for seed in range(kind.seeds):
        rng = random.Random(seed)
        items = random_items(kind, rng)
        budget = random_budget(kind, items, rng)
        allocation = allocate(items, budget)
        check(allocation, items, budget)
        low, high = optimum(items, budget, gap=kind.gap)
        assert allocation.is_feasible, seed
        assert allocation.totals.seconds <= low * 1.01, seed
        assert allocation.bound is not None
        assert allocation.bound <= high * (1 + 1e-4), seed


@pytest.mark.parametrize("budgets", [1, 2, 3])
def test_three_hundred_items(budgets: int) -> None:
    kind = Kind("many", items=300, choices=8, budgets=budgets)
    rng = random.Random(budgets)
    items = random_items(kind, rng)
    budget = random_budget(kind, items, rng)
    allocation = allocate(items, budget)
    check(allocation, items, budget)
    assert allocation.totals.seconds <= optimum(items, budget, gap=1e-3)[0] * 1.002


@pytest.mark.parametrize("seed", range(10))
def test_the_objective_may_be_bytes(seed: int) -> None:
    rng = random.Random(seed)
    kind = Kind("bytes", items=10, choices=4)
    items = random_items(kind, rng)
    budget = random_budget(kind, items, rng)
    allocation = allocate(items, budget, "bytes")
    check(allocation, items, budget)
    assert allocation.totals.bytes == pytest.approx(optimum(items, budget, "bytes")[0], rel=1e-4)


amounts = st.one_of(st.sampled_from([0.0, 1.0, 2.0, 3.0, 0.1]), st.floats(-1.0, 10.0), st.floats(0.0, 1e-6))
losses = st.one_of(amounts, st.just(math.inf))
positive = st.one_of(st.sampled_from([1.0, 3.0, 10.0]), st.floats(1e-7, 40.0))


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Item], Budget]:
    items = []
    for i in range(draw(st.integers(0, 5))):
        first = Choice("0", draw(amounts), draw(amounts), draw(amounts), abs(draw(amounts)))
        others = [
            Choice(str(k), draw(amounts), draw(losses), draw(amounts), abs(draw(amounts)))
            for k in range(1, draw(st.integers(1, 4)))
        ]
        items.append(Item(str(i), (first, *others)))
    return items, Budget(draw(positive), draw(positive), draw(st.none() | positive))


@quick
@given(problem=problems())
def test_any_allocation_keeps_its_promises(problem: tuple[list[Item], Budget]) -> None:
    items, budget = problem
    allocation = allocate(items, budget)
    check(allocation, items, budget)
    assert allocate(items, budget) == allocation
    for item in items:
        assert allocation.explain(item).startswith(f"{allocation.choices[item.name].name}: ")


@quick
@given(problem=problems(), share=st.floats(0.0, 1.0))
def test_first_choices_that_meet_the_budget_make_it_feasible(problem: tuple[list[Item], Budget], share: float) -> None:
    items, _ = problem
    totals = [math.fsum(item.choices[0].amounts[k] for item in items) for k in range(3)]
    budget = Budget(*(total if total > 1e-9 else share + 1e-9 for total in totals))
    allocation = allocate(items, budget)
    check(allocation, items, budget)
    assert allocation.is_feasible
    assert allocation.totals.seconds <= math.fsum(item.choices[0].seconds for item in items) + 1e-9


@quick
@given(problem=problems(), factors=st.tuples(*[st.floats(1.0, 3.0)] * 3))
def test_a_larger_budget_is_worse_by_no_more_than_its_gap(
    problem: tuple[list[Item], Budget], factors: tuple[float, float, float]
) -> None:
    items, small = problem
    memory = None if small.bytes is None else small.bytes * factors[2]
    before, after = (
        allocate(items, small),
        allocate(items, Budget(small.loss * factors[0], small.noise * factors[1], memory)),
    )
    if before.is_feasible:
        assert after.is_feasible
        assert after.gap == 0.0  # proven, since the problem is small
        assert after.totals.seconds <= before.totals.seconds + 1e-8


def test_a_larger_budget_over_a_sweep() -> None:
    kind = Kind("sweep", items=80, choices=6)
    items = random_items(kind, random.Random(0))
    allocations = [allocate(items, Budget(1e-5 * 1.3**k, 1e-4 * 1.3**k)) for k in range(30)]
    assert len({a.totals.seconds for a in allocations}) > 20
    for small, large in pairwise(allocations):
        assert large.gap is not None
        assert large.totals.seconds * (1.0 - large.gap) <= small.totals.seconds * (1 + 1e-9)


@pytest.mark.parametrize("kind", [KINDS[3], KINDS[6], KINDS[8]], ids=lambda kind: kind.name)
def test_the_order_of_the_items_changes_nothing(kind: Kind) -> None:
    rng = random.Random(1)
    items = random_items(kind, rng)
    budget = random_budget(kind, items, rng)
    allocation = allocate(items, budget)
    for _ in range(5):
        shuffled = rng.sample(items, len(items))
        again = allocate(shuffled, budget)
        assert again == allocation
        assert list(again.choices) == [item.name for item in shuffled]


def test_equal_choices_are_taken_in_order() -> None:
    twins = tuple(Choice(name, 1.0, 0.1, 0.1) for name in "abc")
    assert allocate([Item("x", twins)], Budget(1.0, 1.0)).choices["x"].name == "a"


def test_an_infinite_loss_is_never_chosen() -> None:
    item = Item("x", (Choice("bf16", 2.0, 0.0, 0.0), Choice("fp4", 1.0, math.inf, 0.0)))
    allocation = allocate([item], Budget(1e9, 1e9))
    assert allocation.choices["x"].name == "bf16"
    assert allocation.explain(item) == "bf16: fp4 would save 1 s, but its loss is infinite"


def test_a_gain_in_loss_buys_nothing_elsewhere() -> None:
    items = [
        Item("better", (Choice("high", 1.0, -5.0, -5.0), Choice("low", 1.0, 0.0, 0.0))),
        Item("worse", (Choice("high", 2.0, 0.0, 0.0), Choice("low", 1.0, 2.0, 2.0))),
    ]
    allocation = allocate(items, Budget(1.0, 1.0))
    assert allocation.choices["worse"].name == "high"
    assert (allocation.totals.loss, allocation.totals.noise) == (0.0, 0.0)


def test_budgets_that_nothing_meets() -> None:
    items = [
        Item("a", (Choice("high", 1.0, 2e-3, 0.5, 3e6), Choice("low", 0.5, 1e-3, 0.7, 2e6))),
        Item("b", (Choice("high", 1.0, 2e-3, 0.4, 3e6), Choice("low", 0.5, 2e-3, 0.3, 4e6))),
    ]
    allocation = allocate(items, Budget(loss=1e-3, noise=0.9, bytes=9e6))
    assert [choice.name for choice in allocation.choices.values()] == ["low", "low"]
    assert not allocation.is_feasible
    assert (allocation.bound, allocation.gap) == (None, None)
    assert (allocation.slack.loss, allocation.slack.noise) == pytest.approx((-2e-3, -0.1))
    assert allocation.exceeded == (
        "the loss budget of 1e-3 is exceeded by 2e-3 and the noise budget of 0.9 is exceeded by 0.1"
    )
    assert allocation.explain(items[0]) == f"low: the choice of least loss; {allocation.exceeded}"


def test_the_first_choices_are_kept_where_the_solver_finds_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepseek_mp.precision.allocate.solve", lambda problem: None)
    items = [Item("a", (Choice("high", 1.0, 2.0, 0.0), Choice("low", 0.5, 1.0, 3.0)))]
    allocation = allocate(items, Budget(2.0, 2.0))
    assert (allocation.choices["a"].name, allocation.is_feasible, allocation.bound) == ("high", True, None)


def test_multipliers_are_prices_of_the_budgets() -> None:
    """A little more of a budget is worth its price, where many items divide it finely."""
    kind = Kind("fine", items=400, choices=6)
    rng = random.Random(3)
    items = random_items(kind, rng)
    budget = random_budget(kind, items, rng)
    allocation = allocate(items, budget)
    more = allocate(items, replace(budget, loss=1.05 * budget.loss, noise=1.05 * budget.noise))
    assert allocation.bound is not None
    assert more.bound is not None
    prices = allocation.multipliers
    assert prices.bytes is None
    expected = 0.05 * (prices.loss * budget.loss + prices.noise * budget.noise)
    assert allocation.bound - more.bound == pytest.approx(expected, rel=0.3)


def test_without_scarcity_nothing_has_a_price() -> None:
    items = random_items(KINDS[0], random.Random(0))
    allocation = allocate(items, Budget(LOOSE, LOOSE, 1e12))
    assert (allocation.multipliers.loss, allocation.multipliers.noise, allocation.multipliers.bytes) == (0, 0, 0)
    assert allocation.gap == 0.0
    assert allocation.totals.seconds == math.fsum(min(c.seconds for c in item.choices) for item in items)


def test_no_items() -> None:
    allocation = allocate([], Budget(1.0, 1.0))
    assert (dict(allocation.choices), allocation.gap, allocation.is_feasible) == ({}, 0.0, True)


def test_what_is_refused() -> None:
    item = Item("a", (Choice("bf16", 1.0, 0.0, 0.0),))
    with pytest.raises(ConfigError, match=r"^objective is 'time'\. Allowed: 'seconds', 'bytes'\."):
        allocate([item], Budget(1.0, 1.0), "time")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^items: two are named 'a'\. Allowed: names that differ\."):
        allocate([item, item], Budget(1.0, 1.0))


def test_a_wide_gap_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = Kind("wide", items=50, choices=6, costs="traded", budgets=3)
    rng = random.Random(0)
    items = random_items(kind, rng)
    monkeypatch.setattr(solve, "MOST_SWAPS", 0)
    monkeypatch.setattr(solve, "WIDE_GAP", 1e-4)
    searched = allocate(items, budget := random_budget(kind, items, rng))
    monkeypatch.setattr(solve, "MOST_GROUPS", 0)
    assert searched.totals.seconds < allocate(items, budget).totals.seconds
