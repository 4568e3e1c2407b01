"""Modules by file and by name, and the functions in them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deepseek_mp.cli.user_module import find_function, find_module
from deepseek_mp.errors import ConfigError

Write = Callable[[str, str], Path]


def test_a_file_is_imported_under_its_own_name_and_may_import_its_neighbours(write: Write) -> None:
    write("sub/part.py", "VALUE = 3")
    write("sub/whole.py", "from part import VALUE")
    found = find_module("sub/whole.py")
    assert (found.VALUE, found.__name__) == (3, "whole")
    assert sys.modules["whole"] is found


def test_a_file_never_takes_the_name_of_a_module_that_is_there(write: Write) -> None:
    write("json.py", "VALUE = 3")
    before = sys.modules["json"]
    assert find_module("./json.py").VALUE == 3
    assert sys.modules["json"] is before


def test_a_module_is_found_from_the_working_directory(write: Write) -> None:
    write("package/__init__.py", "")
    write("package/user_net.py", "VALUE = 3")
    assert find_module("package.user_net").VALUE == 3


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("nett.py", r"no Python file 'nett\.py'\. .*Did you mean 'net\.py'"),
        ("nowhere/net.py", r"no Python file 'nowhere/net\.py'"),
        ("./net.txt", r"no Python file 'net\.txt'\. .*Did you mean 'net\.py'"),
        ("no_such_module", "no module 'no_such_module'"),
        ("package.no_such_module", r"no module 'package\.no_such_module'"),
        ("broken.py", r"broken\.py could not be run: ModuleNotFoundError: .*broken\.py line 2: import not_there"),
        ("broken", r"module 'broken' could not be imported: ModuleNotFoundError: .*line 2: import not_there"),
        ("syntax.py", r"syntax\.py could not be run: SyntaxError: .*\(syntax\.py line 1\)"),
    ],
)
def test_what_cannot_be_imported_is_named(write: Write, place: str, expected: str) -> None:
    write("net.py", "")
    write("net.txt", "")
    write("package/__init__.py", "")
    write("broken.py", "\nimport not_there")
    write("syntax.py", "def f(:")
    with pytest.raises(ConfigError, match=expected):
        find_module(place)


def test_a_module_that_failed_is_not_left_behind_for_the_next_try(write: Write) -> None:
    path = write("broken.py", "1 / 0")
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        find_module("broken.py")
    path.write_text("VALUE = 3")
    assert find_module("broken.py").__name__ == "broken"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("setpu", r"no function 'setpu' in net\.py\. Allowed: a function of it: setup, needs\. .*'setup'\?"),
        ("VALUE", r"'VALUE' in net\.py is 3"),
        ("needs", r"net\.py:needs needs arguments \(missing a required argument: 'x'\)"),
    ],
)
def test_a_function_is_one_that_needs_no_arguments(write: Write, name: str, expected: str) -> None:
    write("net.py", "from json import loads\nVALUE = 3\ndef setup(x=1): return x\ndef needs(x): pass\n")
    module = find_module("net.py")
    assert find_function(module, "setup", "net.py")() == 1
    with pytest.raises(ConfigError, match=expected):
        find_function(module, name, "net.py")
