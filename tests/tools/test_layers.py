"""The import contracts of pyproject.toml, run on an empty package with one violation planted."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from source_tree import ROOT

LINT_IMPORTS = Path(sys.executable).with_name("lint-imports")
pytestmark = pytest.mark.skipif(
    not LINT_IMPORTS.exists(), reason="no import-linter: the command lint-imports is not beside this Python"
)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package with one empty folder for every layer, beside the project's contracts."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(text, encoding="utf-8")
    layers, _ = tomllib.loads(text)["tool"]["importlinter"]["contracts"]
    for line in layers["layers"]:
        for name in line.split(" | "):
            (tmp_path / "deepseek_mp" / name).mkdir(parents=True)
            (tmp_path / "deepseek_mp" / name / "__init__.py").touch()
    (tmp_path / "deepseek_mp" / "__init__.py").touch()
    return tmp_path / "deepseek_mp"


def lint(package: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [LINT_IMPORTS, "--no-logo", "--no-cache"],
        cwd=package.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_imports_downwards_are_kept(package: Path) -> None:
    (package / "trainer/__init__.py").write_text("import deepseek_mp.controller, deepseek_mp.nn, torch\n")
    (package / "__init__.py").write_text("import deepseek_mp.trainer\n")
    run = lint(package)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize(
    ("folder", "violation"),
    [
        ("nn", "import deepseek_mp.trainer"),
        ("controller", "import deepseek_mp.monitor"),
        ("nn", "import deepseek_mp.costs"),
        ("backends", "from deepseek_mp import ops"),
        ("cli", "import deepseek_mp.testing"),
        ("records", "import deepseek_mp.precision"),
        ("precision", "import torch"),
        ("report", "import torch"),
        ("report", "import deepseek_mp.backends"),
    ],
)
def test_violation_breaks_a_contract(package: Path, folder: str, violation: str) -> None:
    (package / folder / "__init__.py").write_text(f"{violation}\n")
    run = lint(package)
    assert run.returncode == 1, run.stdout
    assert "BROKEN" in run.stdout


def test_violation_through_the_package_s_own_names(package: Path) -> None:
    (package / "__init__.py").write_text("import deepseek_mp.trainer\n")
    (package / "nn/__init__.py").write_text("from deepseek_mp import MixedPrecisionTrainer\n")
    assert lint(package).returncode == 1


def test_folder_without_a_layer_is_refused(package: Path) -> None:
    (package / "extra").mkdir()
    (package / "extra/__init__.py").touch()
    run = lint(package)
    assert run.returncode == 1
    assert "extra" in run.stdout
