"""A working directory with a user's file in it, and the import state as it was afterwards."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deepseek_mp.cli.app import main

NET = """
import signal

import torch
from torch import nn
from torch.nn import functional as F

print("the user's own print", file=__import__("sys").stderr)


class Batches:
    # Interrupts the program when it gives batch number `at`, as many times as asked.
    def __init__(self, at=None, times=1):
        x = torch.randn(12, 8, 64, generator=torch.Generator().manual_seed(0))
        self.all, self.at, self.times = [(b, b[:, :4].argmax(1)) for b in x], at, times

    def __len__(self):
        return len(self.all)

    def __iter__(self):
        for number, batch in enumerate(self.all):
            if number == self.at:
                for _ in range(self.times):
                    signal.raise_signal(signal.SIGINT)
            yield batch


def network():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 4))


def job():
    return network(), Batches(), F.cross_entropy


def full():
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.1)
    return {"model": network(), "loader": Batches(), "optimizer": sgd, "val_loader": Batches()}


def interrupted():
    return network(), Batches(at=5), None


def interrupted_twice():
    return network(), Batches(at=5, times=2), None


def metric():
    model, (x, _) = network().eval(), Batches().all[0]
    return {"model": model, "metric": lambda m: float(m(x).square().mean()), "tolerance": 1e-5}


def alone():
    return {"model": network()}
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], Path]]:
    """Write a file of the user in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
        return path

    yield write
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def net(write: Callable[[str, str], Path]) -> Path:
    """The file of a user with several functions to name."""
    return write("net.py", NET)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """Run the program with bad input; gives its one line of output."""

    def run(arguments: list[str]) -> str:
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        (line,) = [line for line in err.splitlines() if "own print" not in line]
        assert line.startswith("deepseek-mp: ")
        return line

    return run
