"""A pattern covers exactly its layers, however they are mixed."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_mp.report.group import Group, grouped, merged


def covers(pattern: str, name: str) -> bool:
    """Whether a pattern names the layer, by the meaning that the module's docstring gives."""
    parts, names = re.split(r"\.(?![^{]*\})", pattern), name.split(".")
    return len(parts) == len(names) and all(_part(p, n) for p, n in zip(parts, names, strict=True))


def _part(part: str, name: str) -> bool:
    if part == "*":
        return name.isdecimal()
    for word in part.strip("{}").split(","):
        low, _, high = word.strip().partition("-")
        if word.strip() == name or (high and name.isdecimal() and int(low) <= int(name) <= int(high)):
            return True
    return False


def blocks(count: int, key: str = "x") -> list[tuple[str, tuple[str, ...]]]:
    return [(f"blocks.{i}.{leaf}", (key,)) for i in range(count) for leaf in ("up", "down")]


def patterns(groups: list[Group]) -> list[tuple[str, int]]:
    return [(group.pattern, len(group.layers)) for group in groups]


def test_hundreds_of_equal_layers_are_one_pattern() -> None:
    assert patterns(grouped(blocks(200))) == [("blocks.*.up", 200), ("blocks.*.down", 200)]
    assert patterns(merged(grouped(blocks(200)))) == [("blocks.*.{up, down}", 400)]


def test_one_that_differs_is_named_and_the_others_leave_it_out() -> None:
    layers = [(name, ("fp32",) if name == "blocks.3.up" else key) for name, key in blocks(12)]
    assert patterns(grouped(layers)) == [("blocks.{0-2,4-11}.up", 11), ("blocks.*.down", 12), ("blocks.3.up", 1)]


def test_several_indices() -> None:
    layers = [(f"layers.{i}.experts.{j}", ("a" if j < 3 else "b",)) for i in range(4) for j in range(8)]
    assert patterns(grouped(layers)) == [("layers.*.experts.{0-2}", 12), ("layers.*.experts.{3-7}", 20)]


def test_what_is_no_product_of_sets_is_several_patterns() -> None:
    layers = [(f"a.{i}.b.{j}", ("x" if (i, j) != (0, 0) else "y",)) for i in range(3) for j in range(2)]
    assert patterns(grouped(layers)) == [("a.0.b.0", 1), ("a.0.b.1", 1), ("a.{1,2}.b.*", 4)]


def test_names_without_indices_and_the_model_itself() -> None:
    groups = grouped([("", ("x",)), ("head", ("x",)), ("norm", ("x",)), ("7", ("x",))])
    assert patterns(groups) == [("(model)", 1), ("head", 1), ("norm", 1), ("7", 1)]
    assert patterns(merged(groups)) == [("(model), head, norm, 7", 4)]


def test_keys_are_not_put_together_and_a_layer_may_have_two() -> None:
    groups = merged(grouped([("a.0", ("x",)), ("a.0", ("y",)), ("a.1", ("x",)), ("a.1", ("z",))]))
    assert [(group.pattern, group.key) for group in groups] == [("a.*", ("x",)), ("a.0", ("y",)), ("a.1", ("z",))]


names = st.lists(
    st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 4), st.sampled_from(["u", "v"]), st.integers(0, 12)),
    unique=True,
    max_size=40,
)


@pytest.mark.parametrize("together", [False, True])
@given(names=names, keys=st.lists(st.sampled_from("xyz"), min_size=40, max_size=40))
def test_every_pattern_covers_its_layers_and_no_others(
    together: bool, names: list[tuple[str, int, str, int]], keys: list[str]
) -> None:
    layers = [(".".join(map(str, name)), (key,)) for name, key in zip(names, keys, strict=False)]
    groups = grouped(layers)
    if together:
        groups = merged(groups)
    for group in groups:
        if not together:  # one that is merged may be a list of patterns without a common prefix
            assert {name for name, _ in layers if covers(group.pattern, name)} == set(group.layers)
        assert {key for name, key in layers if name in group.layers} == {group.key}
    assert sorted(name for group in groups for name in group.layers) == sorted(name for name, _ in layers)
