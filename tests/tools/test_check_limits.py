"""Each limit is kept at its value and broken one past it."""

from __future__ import annotations

import pytest

import check_limits
from check_limits import FILE_MAX, FUNCTION_MAX, POSITIONAL_MAX
from source_tree import Module


def module(text: str, path: str = "deepseek_mp/nn/part.py") -> Module:
    return Module(path, text)


def function_of(lines: int) -> str:
    return "def f() -> None:\n" + "    pass\n" * (lines - 1)


@pytest.mark.parametrize(("lines", "broken"), [(FILE_MAX, 0), (FILE_MAX + 1, 1)])
def test_file_length(lines: int, broken: int) -> None:
    assert len(check_limits.size_problems(module("x = 1\n" * lines))) == broken


@pytest.mark.parametrize(("lines", "broken"), [(80, 0), (81, 1)])
def test_command_line_files_are_short(lines: int, broken: int) -> None:
    assert len(check_limits.size_problems(module("x = 1\n" * lines, "deepseek_mp/cli/app.py"))) == broken


@pytest.mark.parametrize(("lines", "broken"), [(FUNCTION_MAX, 0), (FUNCTION_MAX + 1, 1)])
def test_function_length(lines: int, broken: int) -> None:
    assert len(check_limits.size_problems(module(function_of(lines)))) == broken


@pytest.mark.parametrize(("count", "broken"), [(POSITIONAL_MAX, 0), (POSITIONAL_MAX + 1, 1)])
def test_positional_parameters_without_self_and_keyword_only(count: int, broken: int) -> None:
    names = ", ".join(f"a{i}" for i in range(count))
    for text in (f"def f({names}, *, b, c): ...", f"class A:\n def f(self, {names}): ..."):
        assert len(check_limits.size_problems(module(text))) == broken


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("def f(a: int, *b: int, c: int = 0, **d: int) -> None: ...", None),
        ("class A:\n def f(self) -> None: ...\n @classmethod\n def g(cls) -> None: ...", None),
        ("def f(a: int): ...", "return"),
        ("def f(a) -> None: ...", "a"),
        ("def f(*, a) -> None: ...", "a"),
        ("def f(*a, **b) -> None: ...", "a, b"),
        ("class A:\n @staticmethod\n def f(a) -> None: ...", "a"),
        ("class A:\n def __init__(self): ...", "return"),
        ("def f() -> None:\n def g(a: int): ...", "return"),
        ("async def f(): ...", "return"),
    ],
)
def test_annotations(text: str, missing: str | None) -> None:
    problems = check_limits.clarity_problems(module(f'"""Doc."""\n{text}'))
    assert [p.partition("annotate ")[2] for p in problems] == ([] if missing is None else [missing])


def test_module_docstring() -> None:
    assert check_limits.clarity_problems(module("x = 1")) == ["deepseek_mp/nn/part.py:1: no module docstring"]
    assert check_limits.clarity_problems(module('"""Doc."""')) == []


@pytest.mark.parametrize("path", ["deepseek_mp/utils.py", "deepseek_mp/common/x.py", "deepseek_mp/nn/helpers.py"])
def test_utility_names(path: str) -> None:
    assert len(check_limits.clarity_problems(module('"""Doc."""', path))) == 1


def test_a_name_that_only_contains_a_utility_name_is_fine() -> None:
    assert check_limits.clarity_problems(module('"""Doc."""', "deepseek_mp/common_scale.py")) == []


def package(**texts: str) -> list[Module]:
    return [Module(f"deepseek_mp/{name}.py", text) for name, text in texts.items()]


def test_import_cycle_is_found_through_either_form_of_import() -> None:
    chain = package(a="from deepseek_mp import b", b="import deepseek_mp.c", c="x = 1")
    assert check_limits.cycle_problems(chain) == []
    closed = package(a="from deepseek_mp import b", b="import deepseek_mp.c", c="from deepseek_mp.a import value")
    (problem,) = check_limits.cycle_problems(closed)
    assert problem.startswith("import cycle: ")
    assert all(f"deepseek_mp.{name}" in problem for name in "abc")


def test_import_cycle_through_a_package_s_own_names() -> None:
    modules = [
        Module("deepseek_mp/nn/__init__.py", "from deepseek_mp.nn.unit import Unit"),
        Module("deepseek_mp/nn/unit.py", "from deepseek_mp.nn import Other"),
    ]
    assert len(check_limits.cycle_problems(modules)) == 1
    assert check_limits.cycle_problems(modules[:1]) == []


def test_late_import_is_part_of_a_cycle() -> None:
    modules = package(a="import deepseek_mp.b", b="def f() -> None:\n    import deepseek_mp.a")
    assert len(check_limits.cycle_problems(modules)) == 1


def test_type_only_import_is_not_part_of_a_cycle() -> None:
    modules = package(a="import deepseek_mp.b", b="if TYPE_CHECKING:\n    import deepseek_mp.a")
    assert check_limits.cycle_problems(modules) == []


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("with pytest.raises(ValueError, match='x'): ...", 0),
        ("with pytest.raises(ValueError): ...", 1),
        ("with pytest.raises(ValueError, check=f): ...", 1),
        ("with raises(ValueError): ...", 1),
        ("pytest.raises(ValueError, f, 1)", 1),
        ("'pytest.raises(ValueError)'", 0),
    ],
)
def test_raises_without_match(text: str, broken: int) -> None:
    assert len(check_limits.raises_problems(module(text, "tests/test_x.py"))) == broken


def readme(number_line: int, python_line: int) -> str:
    lines = ["words, Python 3.11 and 2 cores"] * 40
    lines[number_line - 1] = "trains 1.7x faster"
    lines[python_line - 2] = "```python"
    return "\n".join(lines)


def test_readme_first_screen() -> None:
    assert check_limits.readme_problems(readme(12, 25)) == []
    assert check_limits.readme_problems(readme(13, 25)) == ["README.md: first measured number on line 13 (limit 12)"]
    assert check_limits.readme_problems(readme(12, 26)) == ["README.md: first Python on line 26 (limit 25)"]
    assert len(check_limits.readme_problems("no number, no code")) == 2


def test_all_problems_collects_every_kind() -> None:
    problems = check_limits.all_problems(
        [module("def f(): ...\n" + "x = 1\n" * FILE_MAX)], [module("pytest.raises(X)", "tests/test_x.py")], ""
    )
    assert len(problems) == 6  # file length, docstring, annotation, raises, and two of the README


def test_percentile_and_median() -> None:
    assert [check_limits.percentile(range(1, 11), share) for share in (0.5, 0.9, 1.0)] == [5, 9, 10]
    assert check_limits.percentile([], 0.9) == 0
    assert check_limits.median([1, 2]) == 2
    assert check_limits.median([]) == 0


def test_table_has_a_row_per_folder_and_marks_alarms() -> None:
    modules = [module(function_of(40), "deepseek_mp/nn/a.py"), module(function_of(2), "deepseek_mp/ops/b.py")]
    rows = {line.split()[0]: line.split()[1:] for line in check_limits.table(modules).splitlines()}
    assert rows["deepseek_mp/nn"] == ["1", "40", "40/40/40", "40!/40!/40", "0/0"]
    assert rows["deepseek_mp/ops"] == ["1", "2", "2/2/2", "2/2/2", "0/0"]
    assert rows["all"] == ["2", "42", "21/40/40", "21!/40!/40", "0/0"]
