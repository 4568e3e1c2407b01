"""The project's Python files as values: path, dotted name, text and syntax tree.

Standard library only, like everything in this folder: the checks run before anything is installed
and never import what they read.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "deepseek_mp"


@dataclass(frozen=True)
class Module:
    """One Python file. `path` is relative to the repository's root, with forward slashes."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=self.path)

    @property
    def lines(self) -> int:
        return len(self.text.splitlines())

    @property
    def name(self) -> str:
        """The dotted name it is imported by; a package's `__init__.py` has the package's name."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def folder(self) -> str:
        return str(PurePosixPath(self.path).parent)

    @property
    def inner_path(self) -> str:
        """The path inside the package: `nn/convert.py`."""
        return self.path.removeprefix(f"{PACKAGE}/")

    @property
    def summary(self) -> str:
        """First line of the docstring, empty without one."""
        return (ast.get_docstring(self.tree) or "").partition("\n")[0]

    def at(self, node: ast.AST, problem: str) -> str:
        """The problem with the place of `node` in front of it, as editors and terminals link it."""
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {problem}"


def read_modules(top: str = PACKAGE, root: Path = ROOT) -> list[Module]:
    """Every Python file below `root/top`, ordered by path."""
    files = sorted((root / top).rglob("*.py"))
    return [Module(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")) for path in files]


def under(path: str, homes: tuple[str, ...]) -> bool:
    """Whether `path` is one of `homes` or lies in one: a home ending in `/` is a folder."""
    return any(path.startswith(home) if home.endswith("/") else path == home for home in homes)


def imports(tree: ast.AST) -> list[tuple[ast.Import | ast.ImportFrom, str]]:
    """Every absolute name that an import statement reads, with its statement.

    `from a.b import c` reads `a.b.c`: whether `c` is a module or a value in one cannot be told from
    the statement alone. Relative imports are not resolved; the linter refuses them.
    """
    found: list[tuple[ast.Import | ast.ImportFrom, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found += [(node, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def type_only_imports(tree: ast.AST) -> set[ast.AST]:
    """The import statements under `if TYPE_CHECKING:`."""
    return {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING")
        for node in ast.walk(block)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
