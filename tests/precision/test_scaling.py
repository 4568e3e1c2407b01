"""How many scales a matrix takes, and which granularities there are."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_mp.errors import ConfigError, PlanError
from deepseek_mp.precision import GRANULARITIES, Granularity, ScaleRule
from deepseek_mp.precision.scaling import find_granularity

quick = settings(max_examples=50, deadline=None, derandomize=True, database=None)
extents = st.integers(0, 400)


@pytest.mark.parametrize(
    ("name", "rows", "columns", "expected"),
    [
        ("tensor", 256, 512, (1, 1)),
        ("row", 256, 512, (256, 1)),
        ("1x128", 256, 512, (256, 4)),
        ("128x128", 256, 512, (2, 4)),
        ("1x32", 256, 512, (256, 16)),
        ("1x128", 3, 129, (3, 2)),
        ("128x128", 129, 127, (2, 1)),
        ("128x128", 1, 1, (1, 1)),
        ("1x32", 1, 33, (1, 2)),
        ("1x16", 3, 33, (3, 3)),
        ("tensor", 0, 0, (1, 1)),
        ("row", 0, 512, (0, 1)),
        ("1x128", 0, 512, (0, 4)),
        ("128x128", 0, 512, (0, 4)),
        ("128x128", 256, 0, (2, 0)),
    ],
)
def test_shape_of_the_scales(name: str, rows: int, columns: int, expected: tuple[int, int]) -> None:
    assert GRANULARITIES[name].scales(rows, columns) == expected


@quick
@given(granularity=st.sampled_from([*GRANULARITIES.values()]), rows=extents, columns=extents)
def test_blocks_cover_the_matrix_and_none_is_spare(granularity: Granularity, rows: int, columns: int) -> None:
    pairs = zip(
        granularity.scales(rows, columns), (granularity.rows, granularity.columns), (rows, columns), strict=True
    )
    for count, size, extent in pairs:
        if size is None:
            assert count == 1
        else:
            assert count * size >= extent
            assert count == len(range(0, extent, size))


@pytest.mark.parametrize(("rows", "columns"), [(-1, 4), (4, -1)])
def test_negative_extents_are_refused(rows: int, columns: int) -> None:
    with pytest.raises(ConfigError, match=rf"^a matrix of {rows} x {columns}\. Allowed: sizes of zero or more\."):
        GRANULARITIES["1x128"].scales(rows, columns)


@pytest.mark.parametrize("size", [0, -1, 1.5, "128"])
def test_blocks_have_at_least_one_value(size: object) -> None:
    with pytest.raises(ConfigError, match=r"^granularity 'mine' has a block size of .*\. Allowed: 1 or more, or None"):
        Granularity(name="mine", rows=1, columns=size)  # type: ignore[arg-type]


def test_find_takes_a_name_or_a_granularity() -> None:
    own = Granularity(name="1x16", rows=1, columns=16)
    assert find_granularity("1x32") is GRANULARITIES["1x32"]
    assert find_granularity(own) is own
    with pytest.raises(
        PlanError, match=r"^unknown granularity '1x33'\. Allowed: tensor, row, 1x128, .* Did you mean '1x32'"
    ):
        find_granularity("1x33")


def test_names_say_the_block() -> None:
    for name, granularity in GRANULARITIES.items():
        assert granularity.name == name
        if "x" in name:
            assert name == f"{granularity.rows}x{granularity.columns}"
    assert [*map(str, ScaleRule)] == ["none", "current", "delayed"]
