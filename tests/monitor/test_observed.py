"""What is observed of a model, and that a change of recipe begins again."""

from __future__ import annotations

import torch
from torch import nn

from deepseek_mp.monitor import Sampling
from deepseek_mp.monitor.observed import Observed
from deepseek_mp.monitor.store import WIDTH
from deepseek_mp.precision import RECIPES


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 1)))


def test_layers_modules_and_the_size_of_the_store() -> None:
    seen = Observed.of(model(), Sampling(formats=("bf16", "mx")))
    assert [subject.name for subject in seen.subjects] == ["0", "1.1"]
    assert list(seen.modules) == ["", "0", "1", "1.0", "1.1"]
    assert list(seen.asked) == ["bf16", "mx"]
    assert seen.parts(seen.store.flat).last.shape == (2, 4, 1 + 3, WIDTH)
    assert seen.parts(seen.copies.latest).bad.shape == (5, 4)


def test_a_compiled_model_has_the_names_of_the_original() -> None:
    seen = Observed.of(torch.compile(model()), Sampling())
    assert [subject.name for subject in seen.subjects] == ["0", "1.1"]
    assert {"0", "1", "1.0", "1.1"} <= set(seen.modules)


def test_a_model_without_parameters() -> None:
    seen = Observed.of(nn.ReLU(), Sampling())
    assert seen.subjects == []
    assert seen.store.device == torch.device("cpu")


def test_a_layer_in_another_recipe_begins_again() -> None:
    seen = Observed.of(model(), Sampling(formats=()))
    first, second = seen.subjects
    for subject in (first, second):
        seen.ran_in(subject, RECIPES["bf16"])
        seen.store.add(subject.index, 0, torch.ones(2, WIDTH))
    seen.ran_in(first, RECIPES["bf16"])
    assert seen.store.parts.count[:, 0].tolist() == [1, 1]
    seen.ran_in(first, RECIPES["row"])
    assert seen.store.parts.count[:, 0].tolist() == [0, 1]
    assert seen.recipes == {0: RECIPES["row"], 1: RECIPES["bf16"]}
