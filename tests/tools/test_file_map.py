from __future__ import annotations

from pathlib import Path

import pytest

import file_map
from file_map import BEGIN, END
from source_tree import Module

MODULES = [
    Module("deepseek_mp/__init__.py", '"""The public names."""'),
    Module("deepseek_mp/errors.py", '"""Every error.\n\nMore."""'),
    Module("deepseek_mp/nn/unit.py", '"""A unit."""'),
]
SECTION = """\
- **deepseek_mp/** The public names.
  - [errors.py](deepseek_mp/errors.py): Every error.
- **deepseek_mp/nn/**
  - [unit.py](deepseek_mp/nn/unit.py): A unit."""


def test_render_groups_files_by_folder() -> None:
    assert file_map.render(MODULES) == SECTION


def test_insert_replaces_only_what_is_between_the_markers() -> None:
    text = f"# Title\n\n{BEGIN}\nold\n{END}\n\nend\n"
    new = file_map.insert(text, SECTION)
    assert new == f"# Title\n\n{BEGIN}\n{SECTION}\n{END}\n\nend\n"
    assert file_map.insert(new, SECTION) == new


@pytest.mark.parametrize("text", ["no markers", f"{BEGIN} only", f"{END} before {BEGIN}"])
def test_missing_markers_are_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="no file map section"):
        file_map.insert(text, SECTION)


def test_check_fails_until_the_map_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ARCHITECTURE.md"
    stale = f"{BEGIN}\n{END}\n"
    path.write_text(stale)
    assert file_map.main(["--check"], path) == 1
    assert "out of date. Run `make map`" in capsys.readouterr().err
    assert path.read_text() == stale
    assert file_map.main([], path) == 0
    assert file_map.main(["--check"], path) == 0


def test_unknown_argument_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert file_map.main(["--verify"], tmp_path / "untouched.md") == 2
    assert "Allowed: nothing, or --check" in capsys.readouterr().err
