"""An interrupt leaves a run that goes on as if nothing had happened, and says how."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deepseek_mp.cli.app import main
from deepseek_mp.report import report_run

RUN = ["--precision", "fp32", "--device", "cpu", "--run-dir", "run"]


def weights(run: str) -> dict[str, torch.Tensor]:
    newest = max(Path(run, "checkpoints").glob("step-*"))
    return load_file(newest / "model.safetensors")


def test_a_run_that_was_stopped_can_go_on(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "net.py:interrupted", "--epochs", "2", *RUN]) == 130
    out, err = capsys.readouterr()
    assert "6 steps, all applied" in out
    assert "stopping after this step" in err
    assert "stopped after step 6; go on with the same command and --resume run in place of --run-dir" in err
    assert report_run("run").attempts[0].outcome == "stopped"
    assert main(["train", "net.py:job", "--epochs", "2", "--resume", "run", *RUN[:-2]]) == 0
    assert "24 steps, all applied; 2 epochs" in capsys.readouterr().out
    assert main(["train", "net.py:job", "--epochs", "2", *RUN[:-1], "straight"]) == 0
    resumed, straight = weights("run"), weights("straight")
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_a_second_interrupt_stops_at_once(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "net.py:interrupted_twice", *RUN]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert "deepseek-mp: interrupted; there is no checkpoint yet to go on from" in err


def test_json_of_a_run_that_was_stopped(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "net.py:interrupted", *RUN, "--json"]) == 130
    assert '"stopped": true' in capsys.readouterr().out
