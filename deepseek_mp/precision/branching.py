"""Branch and bound: searches what the relaxation leaves open, until an allocation is proven best or nodes run out.

Groups are decided one after the other, those whose cost varies most first. A branch is left when it cannot
meet a budget, or when a bound says that it ends no better than the best allocation so far. The bounds are
those of the relaxation at several fixed prices, so a node costs a few multiplications: the prices of the whole
problem bound well at first, others where a branch has used more or less of a budget than usual.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from deepseek_mp.precision.knapsack import Group, Option, Prices, priced, sums

EPSILON = 1e-12
LOWER, HIGHER = 0.6, 1.6
"""Parts of the best prices that bound branches well; the search is right with any."""


class Search:
    """A search that may be continued with a smaller tolerance."""

    def __init__(self, groups: Sequence[Group], prices: Prices, best: Sequence[Option] | None, nodes: int) -> None:
        """`best` is the best allocation so far; `nodes` is how many may be visited in all."""
        # Groups with one option are no depth: recursion goes as deep as there are groups to decide.
        self._decided = {i: group[0] for i, group in enumerate(groups) if len(group) == 1}
        self._start = sums(self._decided.values())
        undecided = [i for i in range(len(groups)) if i not in self._decided]
        self._order = sorted(undecided, key=lambda i: (min(groups[i])[0] - max(groups[i])[0], i))
        self._groups = [sorted(groups[i], key=lambda o: (priced(o, prices), o)) for i in self._order]
        self._prices = price_sets(prices)
        self._rest = [_suffix_sums([min(priced(o, p) for o in g) for g in self._groups], -sum(p)) for p in self._prices]
        self._least = [_suffix_sums([min(o[k] for o in g) for g in self._groups], 0.0) for k in (1, 2, 3)]
        self.best = None if best is None else list(best)
        self.cost = math.inf if best is None else sums(best)[0]
        self._path: list[Option] = []
        self._left = nodes
        self._cut = math.inf

    def run(self, tolerance: float) -> bool:
        """Search for an allocation that is cheaper by more than `tolerance`; True when there is no other."""
        self._tolerance = max(tolerance, EPSILON)
        self._cut = self.cost - self._tolerance
        self._path = []
        return self._descend(0, *self._start)

    def _descend(self, depth: int, cost: float, loss: float, noise: float, memory: float) -> bool:
        """Visit every branch below a node; False when the nodes ran out."""
        if depth == len(self._groups):
            if cost < self._cut and max(loss, noise, memory) <= 1.0:  # not yet asked where nothing is undecided
                self._found(cost)
            return True
        loss_rest, noise_rest, memory_rest = (least[depth + 1] for least in self._least)
        (u, v, w, first_rest), *others = [
            (*p, rest[depth + 1]) for p, rest in zip(self._prices, self._rest, strict=True)
        ]
        for option in self._groups[depth]:
            t, a, b, c = cost + option[0], loss + option[1], noise + option[2], memory + option[3]
            if t + u * a + v * b + w * c + first_rest >= self._cut:
                break  # The options that follow are worse at these prices.
            if a + loss_rest > 1.0 or b + noise_rest > 1.0 or c + memory_rest > 1.0:
                continue
            for x, y, z, rest in others:
                if t + x * a + y * b + z * c + rest >= self._cut:
                    break
            else:
                self._left -= 1
                if self._left < 0:
                    return False
                self._path.append(option)
                finished = self._descend(depth + 1, t, a, b, c)
                self._path.pop()
                if not finished:
                    return False
        return True

    def _found(self, cost: float) -> None:
        best = {**self._decided, **dict(zip(self._order, self._path, strict=True))}
        self.best = [best[i] for i in range(len(best))]
        self.cost = cost
        self._cut = cost - self._tolerance


def price_sets(prices: Prices) -> list[Prices]:
    """The prices themselves, none, all of them lower and higher, and each alone lower and higher."""
    sets = [prices, (0.0, 0.0, 0.0)]
    for part in (LOWER, HIGHER):
        sets.append((part * prices[0], part * prices[1], part * prices[2]))
        if sum(price > 0.0 for price in prices) > 1:
            for k in range(3):
                if prices[k] > 0.0:
                    x, y, z = (part * price if i == k else price for i, price in enumerate(prices))
                    sets.append((x, y, z))
    return sets


def _suffix_sums(values: Sequence[float], end: float) -> list[float]:
    """Sums of all values from each position on, and `end` at the end."""
    return list(accumulate(reversed(values), initial=end))[::-1]
