"""The error classes, and the one form of their messages."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_mp import errors
from deepseek_mp.errors import (
    CheckpointError,
    ConfigError,
    MixedPrecisionError,
    NonFiniteError,
    explain,
    first_line,
    suggest,
)

quick = settings(max_examples=50, deadline=None, derandomize=True, database=None)
CLASSES = [value for _, value in inspect.getmembers(errors, inspect.isclass) if value.__module__ == errors.__name__]
MISTAKES = [error for error in CLASSES if issubclass(error, ConfigError)]
PARTS = st.tuples(
    st.sampled_from(["a", "dtype 'b'", "really"]), st.sampled_from(["", ".", "?", "!", "...", ". ", "?."])
)


@pytest.mark.parametrize("error", CLASSES)
def test_every_error_is_caught_by_the_base(error: type[Exception]) -> None:
    assert issubclass(error, MixedPrecisionError)
    assert error.__doc__


@pytest.mark.parametrize("error", [*MISTAKES, CheckpointError])
def test_bad_input_is_a_value_error(error: type[Exception]) -> None:
    with pytest.raises(ValueError, match="what went wrong"):
        raise error("what went wrong")


def test_a_failing_run_is_not_a_value_error() -> None:
    error = NonFiniteError("non-finite", first_bad_module="layer1", skipped=20)
    assert isinstance(error, ArithmeticError)
    assert not isinstance(error, ValueError)
    assert (error.first_bad_module, error.skipped) == ("layer1", 20)


@pytest.mark.parametrize("renew", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
def test_non_finite_error_survives_copy_and_pickle(renew: Callable[[NonFiniteError], NonFiniteError]) -> None:
    again = renew(NonFiniteError("three in a row", first_bad_module=None, skipped=3))
    assert type(again) is NonFiniteError
    assert (str(again), again.first_bad_module, again.skipped) == ("three in a row", None, 3)


@pytest.mark.parametrize(
    ("change", "last"),
    [
        ("Use one", "Use one."),
        ("Use one.", "Use one."),
        ("Use one. Did you mean 'x'?", "Use one. Did you mean 'x'?"),
        ("Use one. Did you mean 'x'?.", "Use one. Did you mean 'x'?"),
        ("Use a, b, ...", "Use a, b and more."),
        ("Stop!\n", "Stop!"),
    ],
)
def test_explain_ends_each_part_once(change: str, last: str) -> None:
    assert explain("mode is 'x'", "a, b", change) == f"mode is 'x'. Allowed: a, b. {last}"


@quick
@given(passed=PARTS, allowed=PARTS, change=PARTS)
def test_explain_never_doubles_a_mark(
    passed: tuple[str, str], allowed: tuple[str, str], change: tuple[str, str]
) -> None:
    message = explain("".join(passed), "".join(allowed), "".join(change))
    for doubled in ("..", "?.", "!.", ". .", " ."):
        assert doubled not in message
    assert message[-1] in ".?!"


def test_explain_keeps_full_stops_inside_a_part() -> None:
    assert explain("file ../a.json", "a path", "Check layer4.0") == "file ../a.json. Allowed: a path. Check layer4.0."


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("bf61", " Did you mean 'bf16'?"),
        ("BF16", " Did you mean 'bf16'?"),
        ("layr4", " Did you mean 'Layer4'?"),
        ("", ""),
        ("something else", ""),
    ],
)
def test_suggest_names_what_is_near(word: str, expected: str) -> None:
    assert suggest(word, iter(["bf16", "Layer4"])) == expected


def test_suggest_names_three_at_most() -> None:
    assert suggest("fp", [f"fp{n}" for n in range(9)]).count("'fp") == 3
    assert suggest("fp", []) == ""


def test_the_first_line_of_an_error_has_its_type_and_an_end() -> None:
    assert first_line(ValueError("no such size\nin a long story")) == "ValueError: no such size"
    assert first_line(KeyError()) == "KeyError:"
    assert len(first_line(ValueError("x" * 999))) == 200
