"""Which layers get which kind: by what they save and take of the budget, split and taken back where that is needed."""

import math

import pytest

from deepseek_mp.inference.layer_choice import Part, apart, better, by_role, chosen, role, taken_back


def part(saved, errors, kind="int8_weights"):
    return Part(layers=tuple(saved), saved={kind: saved}, errors={kind: errors})


def test_layers_of_equal_role_differ_in_numbers_only():
    saved = {"blocks.0.up": {"fp8": 1.0}, "head": {"fp8": 2.0}, "blocks.11.up": {"fp8": 3.0, "int8_weights": 1.0}}
    assert role("blocks.11.up") == role("blocks.0.up") != role("blocks.0.down")
    ups, head = by_role(saved)
    assert ups.layers == ("blocks.0.up", "blocks.11.up")
    assert ups.gain("fp8") == 4.0
    assert ups.kinds("int8_weights") == {"blocks.11.up": "int8_weights"}, "only where it is faster"
    assert ups.gain(None) == 0
    assert head.layers == ("head",)


def test_what_saves_most_within_the_budget_is_chosen():
    parts = [part({"a": 5.0}, 6.0), part({"b": 4.0}, 4.0), part({"c": 3.0}, 5.0)]
    assert chosen(parts, 9.0) == [None, "int8_weights", "int8_weights"]
    assert chosen(parts, 10.0) == ["int8_weights", "int8_weights", None]
    assert chosen(parts, 15.0) == ["int8_weights"] * 3
    assert chosen(parts, math.inf) == ["int8_weights"] * 3
    assert chosen(parts, 1.0) == [None] * 3


def test_kinds_of_one_layer_compete():
    errors = {"int4_weights": 9.0, "fp8": 1.0}
    both = Part(layers=("a",), saved={"int4_weights": {"a": 5.0}, "fp8": {"a": 2.0}}, errors=errors)
    assert chosen([both], 10.0) == ["int4_weights"]
    assert chosen([both], 5.0) == ["fp8"]


def test_what_was_not_measured_or_is_no_number_is_not_chosen():
    unknown = Part(layers=("a",), saved={"fp8": {"a": 1.0}}, errors={})
    assert chosen([unknown, part({"b": 1.0}, math.inf), part({"c": 1.0}, 0.0)], 1e300) == [None, None, "int8_weights"]


def test_a_kind_is_better_if_it_saves_more():
    several = Part(
        layers=("a.0", "a.1"),
        saved={"int4_weights": {"a.0": 5.0, "a.1": 5.0}, "fp8": {"a.0": 1.0, "a.1": 1.0}},
        errors={"int4_weights": 8.0, "fp8": 2.0},
    )
    assert better(several, "int4_weights") == []
    assert better(several, "fp8") == ["int4_weights"]
    assert better(several, None) == ["int4_weights", "fp8"]
    singles = apart(several)
    assert [single.layers for single in singles] == [("a.0",), ("a.1",)]
    assert singles[0].errors == {"int4_weights": 4.0, "fp8": 1.0}
    assert better(singles[0], "fp8") == ["int4_weights"]


def test_most_error_for_the_time_is_taken_back_first():
    errors, saved = {"a": 4.0, "b": 3.0, "c": 1.0, "d": 1.0}, {"a": 10.0, "b": 1.0, "c": 1.0, "d": 2.0}
    assert taken_back(errors, saved, found=9.5, limit=9.0) == {"b"}
    assert taken_back(errors, saved, found=18.0, limit=11.0) == {"b", "c"}, "twice as much as was predicted"
    assert taken_back(errors, saved, found=9.5, limit=9.0, least=3) == {"b", "c", "d"}
    assert taken_back(errors, saved, found=math.inf, limit=9.0) == set(errors)
    assert len(taken_back(dict.fromkeys("ab", 0.0), dict.fromkeys("ab", 1.0), found=2.0, limit=1.0)) == 1
    assert pytest.approx(part({"a": 1.0, "b": 1.0}, 3.0).share("int8_weights")) == 1.5
