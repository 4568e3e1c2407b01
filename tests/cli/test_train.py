"""`train`: bad input ends in one line and leaves nothing behind; a run is told, kept and can be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from deepseek_mp.cli.app import main
from deepseek_mp.report import report_run


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "Missing argument 'TARGET'"),
        (["net.py:jobb"], "no function 'jobb' in net.py"),
        (["net.py:alone"], "a target without loader, which training needs"),
        (["net.py:job", "--precision", "bf61"], "Did you mean 'bf16'"),
        (["net.py:job", "--precision", "plan.json"], "--precision plan.json: No such file"),
        (["net.py:job", "--epochs", "1", "--steps", "1"], "--epochs and --steps"),
        (["net.py:job", "--epochs", "0"], "Invalid value for '--epochs'"),
        (["net.py:job", "--steps", "0"], "Invalid value for '--steps'"),
        (["net.py:job", "--pin", "head"], "--pin 'head'"),
        (["net.py:job", "--pin", "head=fp32"], "rule 'head' -> fp32 matches no layer"),
        (["net.py:job", "--precision", "bf16", "--adapt"], "adapt=True. Allowed: adapt with precision_mode='auto'"),
        (["net.py:job", "--memory", "much"], "--memory much. Allowed: auto, or a number of GiB"),
        (["net.py:job", "--memory", "0"], "memory=0.0"),
        (["net.py:job", "--device", "bogus"], "device 'bogus' is not known to this PyTorch"),
        (["net.py:job", "--resume", "nowhere"], "no complete checkpoint under nowhere"),
        (["net.py:job", "--run-dir", "net.py"], "run_dir net.py is a file"),
        (["net.py:job", "--run-dir", "net.py/run"], "run_dir net.py/run, where "),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    net: Path, refused: Callable[[list[str]], str], arguments: list[str], expected: str
) -> None:
    assert expected in refused(["train", *arguments])
    assert [path.name for path in net.parent.iterdir() if path.suffix != ".py" and path.name != "__pycache__"] == []


def test_a_run_is_plain_text_that_says_where_it_is(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--precision", "bf16", "--pin", "5=fp32", "--epochs", "2", "--device", "cpu", "--seed", "3"]
    assert main(["train", "net.py:full", *options]) == 0
    out, err = capsys.readouterr()
    assert err == "the user's own print\n"
    assert all(char.isprintable() or char == "\n" for char in out)
    for fact in ("pinned", "24 steps, all applied; 2 epochs", "time per step", "loss ", "deepseek-mp report runs/full"):
        assert fact in out
    run = report_run("runs/full")
    assert (run.settings["config.seed"], run.settings["optimizer"]) == (3, "SGD")
    assert "val_loss" in run.history.validation
    assert main(["report", "runs/full"]) == 0


def test_a_budget_of_memory_is_kept_or_the_run_ends_in_one_line(
    net: Path, capsys: pytest.CaptureFixture[str], refused: Callable[[list[str]], str]
) -> None:
    options = ["train", "net.py:job", "--precision", "fp32", "--steps", "2", "--device", "cpu", "--memory"]
    assert main([*options, "4"]) == 0
    assert "memory_fits: a step holds" in capsys.readouterr().err
    assert "a memory budget of 0.00102 MiB; a step of this batch needs" in refused([*options, "1e-6"])


def test_live_precision_says_at_once_and_at_the_end_why_it_is_off(
    net: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "net.py:job", "--steps", "2", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if "adapt_off" in line]
    assert line.startswith("deepseek-mp: step 0: (model) ")
    assert "live precision  off: " in out
    assert main(["train", "net.py:job", "--steps", "2", "--device", "cpu", "--no-adapt"]) == 0
    out, err = capsys.readouterr()
    assert "adapt_off" not in err
    assert "live precision" not in out


def test_json_is_strict_and_alone(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "net.py:job", "--steps", "3", "--device", "cpu", "--run-dir", "here", "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (found["run_dir"], found["stopped"], found["run"]["applied"]) == ("here", False, 3)
    assert found["run"]["decisions"]


def test_a_run_directory_is_not_used_twice(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert main(["train", "net.py:job", "--steps", "1", "--device", "cpu", "--precision", "fp32"]) == 0
    assert {path.name for path in Path("runs").iterdir()} == {"job", "job-2"}
    assert main(["train", "net.py:job", "--steps", "1", "--device", "cpu", "--run-dir", "runs/job"]) == 2
    assert "an unused run_dir, or resume" in capsys.readouterr().err
