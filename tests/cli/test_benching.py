"""What a model is measured on: the samples of the loader's first batch, as many as asked for."""

from __future__ import annotations

from pathlib import Path
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


class Named(nn.Module):
    """Keyword arguments, of which one is no sample's own; labels are the target's alone."""

    def __init__(self, *args: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, *, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * scale


def seen_for(batch: Any, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `optimize_for_inference` was given."""
    seen: list[Any] = []

    def optimise(model: nn.Module, inputs: Any, **options: Any) -> Any:
        seen.append(inputs)
        return Made()

    class Made:
        card = None

    class Found:
        def __init__(self) -> None:
            self.model = model

        def needed(self, name: str, what_for: str) -> Any:
            return [] if batch is None else [batch]

    monkeypatch.setattr(benching, "optimize_for_inference", optimise)
    monkeypatch.setattr(benching, "load_target", lambda text: Found())
    list(cards("net.py:job", QUESTION))
    return seen


def test_samples_are_cut_and_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(9.0).view(3, 3)
    two, five = seen_for((x, torch.zeros(3)), nn.Linear(3, 2), monkeypatch)
    torch.testing.assert_close(two, (x[:2],))
    torch.testing.assert_close(five, (x[[0, 1, 2, 0, 1]],))


def test_names_are_kept_and_what_is_no_sample_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = {"x": torch.randn(3, 3), "scale": torch.tensor(2.0), "labels": torch.zeros(3)}
    two, five = seen_for(batch, Named(), monkeypatch)
    assert set(two) == {"x", "scale"}
    assert (len(two["x"]), len(five["x"]), two["scale"].dim()) == (2, 5, 0)


def test_loaders_that_give_nothing_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LoaderError, match=r"a loader of net\.py:job without batches"):
        seen_for(None, nn.Linear(3, 2), monkeypatch)
    with pytest.raises(LoaderError, match="a first batch without samples"):
        seen_for((torch.zeros(0, 3), torch.zeros(0)), nn.Linear(3, 2), monkeypatch)


def test_sizes() -> None:
    assert sizes_of(" 8,1, 8 ") == (8, 1)
    for text in ("", "0", "1.5", "-1", "a"):
        with pytest.raises(ConfigError, match="whole numbers from 1"):
            sizes_of(text)


def test_the_model_of_a_target_is_measured(net: Path) -> None:
    found = list(cards("net.py:job", QUESTION))
    assert [card.batch_size for card in found] == [2, 5]
