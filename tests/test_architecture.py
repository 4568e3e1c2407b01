"""The rules of ARCHITECTURE.md hold for the package as it is.

Each rule is a function of tools/, and tests/tools/ shows for each that it fails on a violation.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import check_architecture
import check_limits
import file_map
from source_tree import ROOT, read_modules

MODULES = read_modules()

WITHOUT_MIRRORED_TEST = {
    "deepseek_mp/version.py": "one constant, from which the build takes the release's number",
}
"""Modules that need no test at the mirrored path, each with the reason."""


def test_there_is_a_package_to_check() -> None:
    assert any(module.path == "deepseek_mp/__init__.py" for module in MODULES)


@pytest.mark.parametrize("rule", check_architecture.RULES)
def test_source_rule_holds(rule: check_architecture.Rule) -> None:
    assert [problem for module in MODULES for problem in rule(module)] == []


def test_every_module_has_its_test_at_the_mirrored_path() -> None:
    tests = [module.path for module in read_modules("tests")]
    missing = check_architecture.missing_tests(MODULES, tests)
    assert [line for line in missing if line.partition(":")[0] not in WITHOUT_MIRRORED_TEST] == []


def test_no_exception_outlives_its_module() -> None:
    assert [path for path in WITHOUT_MIRRORED_TEST if not (ROOT / path).is_file()] == []


def test_importing_the_package_touches_no_device_and_no_optional_package() -> None:
    effects = check_architecture.effects_of("import deepseek_mp")
    assert effects == check_architecture.Effects(touched=(), optional=(), initialised=False)


def test_size_limits_are_kept() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else None
    assert check_limits.all_problems(MODULES, read_modules("tests"), text) == []


def test_file_map_is_up_to_date() -> None:
    assert file_map.main(["--check"]) == 0, "run `make map`"


def test_import_layers_are_kept() -> None:
    lint_imports = Path(sys.executable).with_name("lint-imports")
    if not lint_imports.exists():
        pytest.skip("import-linter is not installed beside this Python")
    run = subprocess.run(
        [lint_imports, "--no-logo", "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert run.returncode == 0, run.stdout + run.stderr
