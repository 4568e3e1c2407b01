"""The size limits: prints a table for each folder, and fails when a hard limit is broken.

Long files, long functions and import cycles are what separates a code base that is easy to enter
from one that is not; averages do not. So the maxima are hard limits, while medians and 90th
percentiles above their limit are only marked with `!`. Lines of a function include its signature
and docstring; parameters are counted without self, cls and keyword-only ones.
"""

from __future__ import annotations

import ast
import graphlib
import math
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from source_tree import PACKAGE, ROOT, Module, imports, read_modules, type_only_imports

FILE_MAX = 500
FUNCTION_MAX = 70
KERNEL_MAX = 90
POSITIONAL_MAX = 7
CLI_FILE_MAX = 80
README_FIRST_PYTHON = 25
README_FIRST_NUMBER = 12
ALARMS = {
    "file median": 150, "file p90": 350,
    "function median": 10, "function p90": 30,
    "parameters p90": 4,
}  # fmt: skip
UTILITY_NAMES = {"util", "utils", "utility", "utilities", "common", "misc", "helper", "helpers"}
MEASURED_NUMBER = re.compile(
    r"\d\s?(%|x\b|×|ms\b|µs\b|s\b|seconds\b|minutes\b|GB\b|GiB\b|MB\b|MiB\b|TFLOP|J\b|(tokens|samples|images)/s)"
)


@dataclass(frozen=True)
class Function:
    """What the limits need to know of one function."""

    node: ast.FunctionDef | ast.AsyncFunctionDef
    lines: int
    positional: int
    unannotated: tuple[str, ...]
    kernel: bool
    """Written in Triton's language, which takes pointers one by one and knows no types of tensors."""


def functions(module: Module) -> list[Function]:
    """Every function, method and nested function of the module."""
    found = []
    for parent in ast.walk(module.tree):
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found.append(measure(node, method=isinstance(parent, ast.ClassDef)))
    return found


def measure(node: ast.FunctionDef | ast.AsyncFunctionDef, *, method: bool) -> Function:
    """The numbers of one function; `method` says that its first parameter may be self or cls."""
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
    positional = (node.args.posonlyargs + node.args.args)[1 if method and not static else 0 :]
    extra = [a for a in (node.args.vararg, node.args.kwarg) if a is not None]
    unannotated = [a.arg for a in positional + node.args.kwonlyargs + extra if a.annotation is None]
    if node.returns is None:
        unannotated.append("return")
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    kernel = any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)
    return Function(node, lines, len(positional), tuple(unannotated), kernel)


def size_problems(module: Module) -> list[str]:
    """Files and functions that are too long, and functions with too many positional parameters."""
    limit = CLI_FILE_MAX if module.inner_path.startswith("cli/") else FILE_MAX
    problems = []
    if module.lines > limit:
        problems.append(f"{module.path}: {module.lines} lines (limit {limit})")
    for f in functions(module):
        longest = KERNEL_MAX if f.kernel else FUNCTION_MAX
        if f.lines > longest:
            problems.append(module.at(f.node, f"{f.node.name} has {f.lines} lines (limit {longest})"))
        if f.positional > POSITIONAL_MAX and not f.kernel:
            problems.append(
                module.at(f.node, f"{f.node.name} has {f.positional} positional parameters (limit {POSITIONAL_MAX})")
            )
    return problems


def clarity_problems(module: Module) -> list[str]:
    """A missing docstring, a name that says nothing, parameters or returns without a type."""
    problems = []
    if not module.summary:
        problems.append(f"{module.path}:1: no module docstring")
    if UTILITY_NAMES & set(PurePosixPath(module.path).with_suffix("").parts):
        problems.append(f"{module.path}: a file or folder with a utility name; name what it holds")
    for f in functions(module):
        if f.unannotated and not f.kernel:
            problems.append(module.at(f.node, f"{f.node.name} does not annotate {', '.join(f.unannotated)}"))
    return problems


def cycle_problems(modules: Sequence[Module]) -> list[str]:
    """The first import cycle among the modules, if there is one.

    Imports inside functions count; those under `if TYPE_CHECKING:` do not, since they never run.
    """
    names = {module.name for module in modules}
    graph: dict[str, set[str]] = {}
    for module in modules:
        type_only = type_only_imports(module.tree)
        read = {nearest_module(name, names) for node, name in imports(module.tree) if node not in type_only}
        graph[module.name] = {name for name in read if name is not None}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [f"import cycle: {' <- '.join(error.args[1])}"]
    return []


def nearest_module(name: str, names: set[str]) -> str | None:
    """The module that importing `name` reads: itself, or the one that holds it as a value."""
    for candidate in (name, name.rpartition(".")[0]):
        if candidate in names:
            return candidate
    return None


def raises_problems(module: Module) -> list[str]:
    """`pytest.raises` that would accept any message."""
    return [
        module.at(node, "pytest.raises without match=")
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("pytest.raises", "raises")
        and not any(keyword.arg == "match" for keyword in node.keywords)
    ]


def readme_problems(text: str) -> list[str]:
    """A README whose first screen does not show code and a measured number."""
    lines = text.splitlines()
    python = next((i for i, line in enumerate(lines, 2) if line.startswith("```python")), None)
    number = next((i for i, line in enumerate(lines, 1) if MEASURED_NUMBER.search(line)), None)
    problems = []
    if python is None or python > README_FIRST_PYTHON:
        problems.append(f"README.md: first Python on line {python} (limit {README_FIRST_PYTHON})")
    if number is None or number > README_FIRST_NUMBER:
        problems.append(f"README.md: first measured number on line {number} (limit {README_FIRST_NUMBER})")
    return problems


def all_problems(modules: Sequence[Module], tests: Iterable[Module], readme: str | None) -> list[str]:
    """Every broken hard limit, one line each."""
    problems = [p for module in modules for p in size_problems(module) + clarity_problems(module)]
    problems += cycle_problems(modules)
    problems += [p for test in tests for p in raises_problems(test)]
    return problems + (readme_problems(readme) if readme is not None else [])


def percentile(values: Sequence[int], share: float) -> int:
    """The smallest value that at least `share` of the values do not exceed; 0 without values."""
    return sorted(values)[math.ceil(share * len(values)) - 1] if values else 0


def row(folder: str, modules: Sequence[Module]) -> list[str]:
    """One line of the table: counts, then median/p90/max of files, functions, parameters."""
    files = [module.lines for module in modules]
    measured = [f for module in modules for f in functions(module)]
    lengths = [f.lines for f in measured]
    parameters = [f.positional for f in measured if not f.kernel]
    return [
        folder,
        str(len(files)),
        str(sum(files)),
        "/".join((mark("file median", median(files)), mark("file p90", percentile(files, 0.9)), str(max(files)))),
        "/".join(
            (
                mark("function median", median(lengths)),
                mark("function p90", percentile(lengths, 0.9)),
                str(max(lengths, default=0)),
            )
        ),
        "/".join((mark("parameters p90", percentile(parameters, 0.9)), str(max(parameters, default=0)))),
    ]


def median(values: Sequence[int]) -> int:
    """The median, rounded up; 0 without values."""
    return math.ceil(statistics.median(values)) if values else 0


def mark(measure: str, value: int) -> str:
    """The value, with a `!` when it is over its alarm."""
    return f"{value}!" if value > ALARMS[measure] else str(value)


def table(modules: Sequence[Module]) -> str:
    """The sizes of every folder and of all of them together."""
    heads = ["folder", "files", "lines", "file med/p90/max", "function med/p90/max", "params p90/max"]
    folders = sorted({module.folder for module in modules})
    rows = [heads] + [row(folder, [m for m in modules if m.folder == folder]) for folder in folders]
    rows.append(row("all", modules))
    widths = [max(len(cells[i]) for cells in rows) for i in range(len(heads))]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        for cells in rows
    ]
    alarms = ", ".join(f"{name} {limit}" for name, limit in ALARMS.items())
    return "\n".join([*lines, f"! is over an alarm ({alarms})"])


def main() -> int:
    """Print the table, then the broken limits; 1 if there are any."""
    modules = read_modules(PACKAGE)
    readme = ROOT / "README.md"
    problems = all_problems(
        modules, read_modules("tests"), readme.read_text(encoding="utf-8") if readme.exists() else None
    )
    print(table(modules))
    print("\n".join(problems) or "All size limits are kept.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
