"""Which blocks to compute again in the backward, so that what a forward keeps is within a budget, at least time.

A block that is computed again keeps its inputs and frees what its backward needs, but for what somebody else keeps
too. So bytes are those of distinct storages, and what one block frees depends on the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

_ALIKE = 0.9
"""Copies of one block differ in their timings by as much. Of blocks alike the earliest is taken: when the backward
comes to it, what later blocks keep is gone, so that its second run is not at the peak."""
_LEAST_MS = 1e-6
"""A time of zero is one that the clock could not tell."""


@dataclass(frozen=True, kw_only=True)
class BlockCost:
    """A block: what its forward costs, and which storages it has to do with, by their numbers."""

    name: str
    forward_ms: float
    saved: frozenset[int]
    """What its backward needs."""
    inputs: frozenset[int]
    """What it keeps if it is computed again."""
    obstacle: str = ""
    """Why it cannot be computed again; empty if it can."""


@dataclass(frozen=True, kw_only=True)
class ForwardCost:
    """A forward: its storages, and who keeps which."""

    sizes: tuple[int, ...]
    """Bytes of each storage."""
    elsewhere: frozenset[int]
    """What is kept outside of all blocks."""
    blocks: tuple[BlockCost, ...]

    def kept_bytes(self, again: Collection[str]) -> int:
        """What is kept for the backward if the blocks of these names are computed again."""
        kept = set(self.elsewhere)
        for block in self.blocks:
            kept |= block.inputs if block.name in again else block.saved
        return sum(self.sizes[number] for number in kept)


@dataclass(frozen=True, kw_only=True)
class ChosenBlock:
    """A block, and what was decided about it."""

    name: str
    recomputed: bool
    forward_ms: float
    bytes_freed: int
    """Bytes that computing it again frees, were it the only one."""
    obstacle: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "recomputed": self.recomputed,
            "forward_ms": self.forward_ms,
            "bytes_freed": self.bytes_freed,
            "obstacle": self.obstacle,
        }


@dataclass(frozen=True, kw_only=True)
class BlockChoice:
    """Which blocks are computed again, and what a forward keeps with and without that."""

    blocks: tuple[ChosenBlock, ...]
    bytes_before: int
    bytes_after: int
    bytes_allowed: int

    @property
    def recomputed(self) -> tuple[str, ...]:
        """Names of the blocks that are computed again."""
        return tuple(block.name for block in self.blocks if block.recomputed)

    @property
    def extra_ms(self) -> float:
        """What that adds to a backward, about: the forwards of these blocks."""
        return sum(block.forward_ms for block in self.blocks if block.recomputed)

    @property
    def is_within(self) -> bool:
        """Whether the budget is kept to."""
        return self.bytes_after <= self.bytes_allowed

    def to_json(self) -> dict[str, Any]:
        return {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bytes_allowed": self.bytes_allowed,
            "blocks": [block.to_json() for block in self.blocks],
        }


def choose_blocks(cost: ForwardCost, budget: float) -> BlockChoice:
    """Blocks in order of the bytes that each frees for its time, until the forward is within the budget.

    Blocks that are alike in that are taken from the model's first to its last. In the end those are dropped again, the
    last ones first, that turned out not to be needed. If the budget is out of reach, all are taken that free anything.

    Args:
        budget: share, above 0 and up to 1, of the bytes kept if nothing is computed again.
    """
    before = cost.kept_bytes(())
    allowed = int(budget * before)
    again = _needed(cost, _taken(cost, allowed), allowed)
    blocks = tuple(
        ChosenBlock(
            name=block.name,
            recomputed=block.name in again,
            forward_ms=block.forward_ms,
            bytes_freed=before - cost.kept_bytes((block.name,)),
            obstacle=block.obstacle,
        )
        for block in cost.blocks
    )
    return BlockChoice(blocks=blocks, bytes_before=before, bytes_after=cost.kept_bytes(again), bytes_allowed=allowed)


def _taken(cost: ForwardCost, allowed: int) -> list[BlockCost]:
    """Blocks until the forward is within what is allowed, or none frees anything more."""
    holders: Counter[int] = Counter(cost.elsewhere)
    for block in cost.blocks:
        holders.update(block.saved)
    kept = sum(cost.sizes[number] for number in holders)
    left = [block for block in cost.blocks if not block.obstacle]
    taken: list[BlockCost] = []
    while kept > allowed:
        freed = {block.name: _freed(block, cost.sizes, holders) for block in left}
        useful = [block for block in left if freed[block.name] > 0]
        if not useful:
            break
        gain = {block.name: freed[block.name] / max(block.forward_ms, _LEAST_MS) for block in useful}
        best = next(block for block in useful if gain[block.name] >= _ALIKE * max(gain.values()))
        kept -= freed[best.name]
        holders.subtract(best.saved)
        holders.update(best.inputs)
        left.remove(best)
        taken.append(best)
    return taken


def _freed(block: BlockCost, sizes: tuple[int, ...], holders: Counter[int]) -> int:
    """Bytes that go if the block is the next to be computed again."""
    gone = sum(sizes[number] for number in block.saved - block.inputs if holders[number] == 1)
    come = sum(sizes[number] for number in block.inputs - block.saved if holders[number] == 0)
    return gone - come


def _needed(cost: ForwardCost, taken: list[BlockCost], allowed: int) -> frozenset[str]:
    """The names of those taken without which the budget would not be kept to, or is not anyway."""
    again = frozenset(block.name for block in taken)
    if cost.kept_bytes(again) > allowed:
        return again
    for block in reversed(taken):
        fewer = again - {block.name}
        if cost.kept_bytes(fewer) <= allowed:
            again = fewer
    return again
