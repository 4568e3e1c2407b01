"""Conditions on sizes: those of the exporter, and nothing else that Python could run."""

from __future__ import annotations

import pytest

from deepseek_mp.programs.conditions import holds, known, moved, named, readable

PLACES = {"['args'][0]": 0, "['kwargs']['mask']": 1, "['pair'].first['a-b'][\"it's\"]": 2}


@pytest.mark.parametrize(
    ("guard", "condition"),
    [
        ("L['args'][0].size()[0] > 3", "t0_0 > 3"),
        ("L['args'][0].size()[1] == L['kwargs']['mask'].size()[0]", "t0_1 == t1_0"),
        ("L['pair'].first['a-b'][\"it's\"].size()[12] != 2", "t2_12 != 2"),
        ("math.ceil(L['args'][0].size()[0] / 3) == 2", "math.ceil(t0_0 / 3) == 2"),
    ],
)
def test_the_exporter_s_guards_become_conditions_by_name(guard, condition):
    assert named(guard, PLACES) == condition


@pytest.mark.parametrize(
    "guard",
    [
        "L['other'][0].size()[0] > 3",
        "L['args'][0].stride()[0] == 1",
        "__import__('os')",
        "f(3) == 2",
        "1 < 2 < 3",
        "3 << 2 == 1",
        "3 ** 99 == 1",
        "math.ceil(math.inf) == 1",
        "math.factorial(9) == 1",
        "min(key=3) == 1",
        "round(L['args'][0].size()[0], -400000000) == 0",
    ],
)
def test_guards_about_other_things_are_refused(guard):
    with pytest.raises(ValueError, match="a condition"):
        named(guard, PLACES)


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("a == 6", True),
        ("a != 6", False),
        ("(2*a) == (4*(b // 2))", True),
        ("(a % b) == 0 and not a < b", False),
        ("(a % b) == 0 or a > b", False),
        ("a - b <= (-1) + 1", True),
        ("a >= b", False),
        ("a % (b - 7) == 0", True),  # code that divides by zero fails
        ("a / 4 == 1.5", True),
        ("a & 3 == 2", True),
        ("min(a, 7) == max(a, b - 1)", True),
        ("math.trunc(torch.sym_float(b) ** 0.5) == 2", True),
        ("math.ceil(b / 3) == 3 and math.floor(b / 3) == 2", True),
        ("round(b / 4) == 1", False),
        ("(a - b) ** 0.5 < 9", False),  # has no root
    ],
)
def test_conditions_hold_or_do_not(condition, expected):
    assert holds(condition, {"a": 6, "b": 7}) is expected


def test_conditions_can_be_of_inputs_in_another_order_and_with_their_names():
    assert moved("t0_1 == 2*t11_0", [5, *range(1, 11), 0]) == "t5_1 == 2*t0_0"
    assert readable("(t0_1 % t1_0) == 0", ["x", "['pair'][1]"]) == "(x.shape[1] % ['pair'][1].shape[0]) == 0"


def test_a_condition_calls_nothing_but_what_is_known():
    with pytest.raises(ValueError, match="a condition with print"):
        holds("print(1) == 2", {})
    with pytest.raises(ValueError, match="a condition with b"):
        holds("b == 2", {"a": 1})


@pytest.mark.parametrize(
    "condition",
    [
        "__import__('os')",
        "t0_0 ==",
        "(" * 500 + "1" + ")" * 500,
        "t0_0.real == 1",
        "-" * 1990 + "1",
        "not " * 9999 + "t0_0",
        "t0_0 == 1" + " and t0_0 == 1" * 999,
    ],
)
def test_what_is_no_condition_is_not_known(condition):
    assert known("t0_0 % 4 == 0") == "t0_0 % 4 == 0"
    with pytest.raises(ValueError, match="condition"):
        known(condition)
