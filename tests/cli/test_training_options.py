"""How far, in which precision, with which pins, and where."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from deepseek_mp import PrecisionPlan
from deepseek_mp.cli.training_options import Extent, read_pins, read_precision, unused
from deepseek_mp.errors import ConfigError, PlanError


@pytest.mark.parametrize(
    ("epochs", "steps", "wanted"), [(None, None, (1, None)), (3, None, (3, None)), (None, 7, (sys.maxsize, 7))]
)
def test_one_epoch_unless_more_is_asked_for(epochs: int | None, steps: int | None, wanted: tuple[int, int]) -> None:
    extent = Extent.of(epochs, steps)
    assert (extent.epochs, extent.steps) == wanted
    with pytest.raises(ConfigError, match="--epochs and --steps"):
        Extent.of(1, 1)


def test_a_precision_is_a_name_or_a_file(tmp_path: Path) -> None:
    plan = PrecisionPlan.of("bf16", {"a": "fp32"})
    plan.save(tmp_path / "plan.json")
    assert read_precision("bf16") == "bf16"
    assert read_precision(str(tmp_path / "plan.json")) == plan
    with pytest.raises(ConfigError, match=r"--precision .*other\.json: No such file"):
        read_precision(str(tmp_path / "other.json"))
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(PlanError, match="is not JSON"):
        read_precision(str(tmp_path / "bad.json"))


def test_a_pin_is_a_pattern_and_a_recipe() -> None:
    assert read_pins(["*.norm*=fp32", "a=b=bf16"]) == {"*.norm*": "fp32", "a=b": "bf16"}
    for text in ("head", "=fp32", "head="):
        with pytest.raises(ConfigError, match=re.escape(f"--pin {text!r}. Allowed: PATTERN=RECIPE")):
            read_pins([text])


def test_a_run_directory_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for expected in ("runs/job", "runs/job-2", "runs/job-3"):
        found = unused("net.py:job")
        assert found == Path(expected)
        found.mkdir(parents=True)
    assert unused("net.py:other") == Path("runs/other")
