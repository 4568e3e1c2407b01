"""`bench inference`: a card for each batch size, and bad input in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from deepseek_mp.cli.app import main

QUICK = ["--no-compile", "--seconds", "0", "--device", "cpu"]


def test_a_card_for_each_batch_size(
    net: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    assert main(["bench", "inference", "net.py:job", "--batch", "1, 20", *QUICK, "--out", "bench.json"]) == 0
    out = capsys.readouterr().out
    for fact in (
        "Sequential on",
        "batches of 1;",
        "batches of 20;",
        "error by kl",
        "taken:",
        "fp32",
        "per second",
        "kinds by layer:",
    ):
        assert fact in out
    assert max(map(len, out.splitlines())) <= 90
    read = json.loads(Path("bench.json").read_text())
    assert [card["batch_size"] for card in read] == [1, 20], "the loader's batches of 8 are cut, or repeated"
    assert read[0]["trials"][0]["name"] == "fp32"
    assert read[0]["trials"][0]["latency"]["runs"] > 0


def test_json_and_nothing_else(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--metric", "relative", "--batch", "2", "--formats", "fp32", "--budget", "0", "--json"]
    assert main(["bench", "inference", "net.py:full", *asked, *QUICK]) == 0
    (card,) = json.loads(capsys.readouterr().out)
    assert [trial["name"] for trial in card["trials"]] == ["fp32"]
    assert (card["metric"], card["budget"], card["form"]["format"]) == ("relative", 0.0, "fp32")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["net.py:job", "--batch", "0"], "--batch '0'. Allowed: whole numbers from 1"),
        (["net.py:job", "--batch", "1;8"], "--batch '1;8'"),
        (["net.py:job", "--budget", "-1"], "budget=-1.0. Allowed: a number from 0"),
        (["net.py:job", "--metric", "psnr"], "metric='psnr'"),
        (["net.py:job", "--formats", "int3"], "formats with int3"),
        (["net.py:job", "--out", "."], "--out ., a directory"),
        (["net.py:alone"], "a target without loader, which bench inference needs"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    net: Path, refused: Callable[[list[str]], str], arguments: list[str], expected: str
) -> None:
    assert expected in refused(["bench", "inference", *arguments, *QUICK])


def test_numbers_of_the_sizes_before_one_that_fails_are_kept(net: Path, refused: Callable[[list[str]], str]) -> None:
    Path("small.py").write_text(
        "import torch\n"
        "from net import job\n"
        "class Small(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        assert len(x) < 9, 'too many'\n"
        "        return super().forward(x)\n"
        "def work():\n"
        "    _, loader, loss_fn = job()\n"
        "    return Small(next(iter(loader))[0].shape[1], 4), loader, loss_fn\n"
    )
    asked = ["bench", "inference", "small.py:work", "--batch", "2,20", "--out", "bench.json", "--json", *QUICK]
    assert "too many" in refused(asked)
    assert [card["batch_size"] for card in json.loads(Path("bench.json").read_text())] == [2]
