"""The file map of ARCHITECTURE.md: every module with the first line of its docstring.

`python tools/file_map.py` writes the section between the two markers; with `--check` it writes
nothing and fails when the section is out of date.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from source_tree import ROOT, Module, read_modules

BEGIN = "<!-- file map: begin -->"
END = "<!-- file map: end -->"
MAP_FILE = ROOT / "ARCHITECTURE.md"


def render(modules: Sequence[Module]) -> str:
    """The map as a Markdown list: a folder with what its `__init__.py` says, then its files."""
    lines = []
    for folder in sorted({module.folder for module in modules}):
        inside = [module for module in modules if module.folder == folder]
        own = next((m.summary for m in inside if m.path.endswith("/__init__.py")), "")
        lines.append(f"- **{folder}/** {own}".rstrip())
        for module in inside:
            name = module.path.removeprefix(f"{folder}/")
            if name != "__init__.py":
                lines.append(f"  - [{name}]({module.path}): {module.summary}")
    return "\n".join(lines)


def insert(text: str, section: str) -> str:
    """`text` with what stands between the markers replaced by `section`."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(
            f"{MAP_FILE.name} has no file map section. It needs a line {BEGIN} and, below it, a line {END}."
        )
    return f"{head}{BEGIN}\n{section}\n{END}{tail}"


def main(arguments: Sequence[str], path: Path = MAP_FILE) -> int:
    """Write the map, or with `--check` compare it; 1 if the file is out of date."""
    if list(arguments) not in ([], ["--check"]):
        print(f"file_map.py got {' '.join(arguments)}. Allowed: nothing, or --check.", file=sys.stderr)
        return 2
    old = path.read_text(encoding="utf-8")
    new = insert(old, render(read_modules()))
    if not arguments:
        path.write_text(new, encoding="utf-8")
    elif new != old:
        print(f"The file map in {path.name} is out of date. Run `make map`.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
