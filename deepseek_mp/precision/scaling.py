"""How a tensor is divided into parts that share a scale, and where each scale comes from.

Formats with a wide exponent (fp32, bf16) need no scale. Narrow ones do, and two choices describe
every published recipe: the *granularity* (how many values share one scale) and the *rule* (whether
the scale is taken from this tensor or from earlier ones).

Rows and columns are those of an operand as a product sees it, [outer, contraction] (`roles`): a group of
1x128 lies along the extent that is summed over, so its scale can be taken out of that part of the sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.precision.checks import find, shown


@dataclass(frozen=True, kw_only=True)
class Granularity:
    """A block of `rows` (outer) x `columns` (contraction) values shares one scale; None: the whole extent."""

    name: str
    rows: int | None
    columns: int | None

    def __post_init__(self) -> None:
        for size in (self.rows, self.columns):
            if size is not None and not (isinstance(size, int) and size >= 1):
                passed = f"granularity {self.name!r} has a block size of {shown(size)}"
                raise ConfigError(explain(passed, "1 or more, or None for the whole extent", "Correct the size"))

    def scales(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of the scale tensor for a matrix of rows x columns.

        Blocks at the far edges may be short. A matrix without rows or columns has no blocks, so the
        count is zero along an extent of zero that is divided, and one along one that is not.
        """
        if rows < 0 or columns < 0:
            raise ConfigError(explain(f"a matrix of {rows} x {columns}", "sizes of zero or more", "Pass its shape"))
        down = 1 if self.rows is None else -(-rows // self.rows)
        across = 1 if self.columns is None else -(-columns // self.columns)
        return down, across


TENSOR = Granularity(name="tensor", rows=None, columns=None)
ROW = Granularity(name="row", rows=1, columns=None)
BLOCK_1X128 = Granularity(name="1x128", rows=1, columns=128)
BLOCK_128X128 = Granularity(name="128x128", rows=128, columns=128)
MX_1X32 = Granularity(name="1x32", rows=1, columns=32)
NV_1X16 = Granularity(name="1x16", rows=1, columns=16)

GRANULARITIES: Mapping[str, Granularity] = MappingProxyType(
    {g.name: g for g in (TENSOR, ROW, BLOCK_1X128, BLOCK_128X128, MX_1X32, NV_1X16)}
)


def find_granularity(name: str | Granularity) -> Granularity:
    """The granularity of that name, or the granularity itself; `PlanError` names the known ones."""
    return find("granularity", GRANULARITIES, name)


class ScaleRule(StrEnum):
    """Where a scale comes from."""

    NONE = "none"
    """No scale: the values are used as they are."""
    CURRENT = "current"
    """The largest magnitude of this very tensor."""
    DELAYED = "delayed"
    """The largest magnitude of the same tensor over past steps."""
