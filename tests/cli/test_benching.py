"""What `bench inference` measures: the model of the target, on its loader's first batch, at each size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from deepseek_mp.cli import benching
from deepseek_mp.cli.benching import Question, cards, sizes_of
from deepseek_mp.errors import ConfigError, LoaderError

QUESTION = Question(
    sizes=(2, 5), budget=1.0, metric="relative", formats=("fp32",), compiled=False, seconds=0.0, energy_seconds=0.0,
    device="cpu", seed=0,
)  # fmt: skip


def test_the_model_of_a_target_is_measured_at_each_size(net: Path) -> None:
    found = list(cards("net.py:job", QUESTION))
    assert [card.batch_size for card in found] == [2, 5]
    assert [trial.form.name for trial in found[0].plan.trials] == ["fp32"]


def test_a_loader_that_gives_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(text: str) -> Any:
        return SimpleNamespace(model=nn.Linear(3, 2), needed=lambda name, what_for: iter([]))

    monkeypatch.setattr(benching, "load_target", empty)
    with pytest.raises(LoaderError, match=r"a loader of net\.py:job without batches"):
        list(cards("net.py:job", QUESTION))


@pytest.mark.parametrize(
    ("model", "loader", "sizes", "match"),
    [
        (nn.Linear(3, 2), 3, (2,), r"loader 3\. Allowed: an iterable of batches"),
        (nn.Linear(3, 2, device="meta"), [torch.ones(2, 3)], (2,), "a model on the meta device"),
        (nn.Linear(3, 2), [torch.ones(2, 3)], (1 << 50,), "inputs of 1125899906842624 samples, which alone"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, loader: Any, sizes: tuple[int, ...], match: str
) -> None:
    found = SimpleNamespace(model=model, needed=lambda name, what_for: loader)
    monkeypatch.setattr(benching, "load_target", lambda text: found)
    with pytest.raises(ConfigError, match=match):
        list(cards("net.py:job", replace(QUESTION, sizes=sizes)))


def test_the_seed_is_set_before_the_target_is_called(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[float] = []

    def target(text: str) -> Any:
        drawn.append(float(torch.rand(())))
        raise ConfigError("seen")

    monkeypatch.setattr(benching, "load_target", target)
    for _ in range(2):
        with pytest.raises(ConfigError, match="seen"):
            list(cards("net.py:job", QUESTION))
    assert drawn[0] == drawn[1]


def test_sizes() -> None:
    assert sizes_of(" 8,1, 8 ") == (8, 1)
    for text in ("", "0", "1.5", "-1", "a"):
        with pytest.raises(ConfigError, match="whole numbers from 1"):
            sizes_of(text)
