"""Models that torchao's passes look at are let go of behind them, whatever ends the passes."""

from __future__ import annotations

import gc
import weakref
from importlib import import_module

import pytest
from torch import nn

from deepseek_mp.qat import letting_go
from deepseek_mp.qat.letting_go import models_let_go


def looked_up() -> list[weakref.ref[nn.Module]]:
    """Models that each of the caches has seen, and nobody else holds."""
    models = [nn.Linear(2, 2) for _ in letting_go._CACHES]
    for (module, name), model in zip(letting_go._CACHES, models, strict=True):
        getattr(import_module(module), name)(model)
    return [weakref.ref(model) for model in models]


def are_gone(models: list[weakref.ref[nn.Module]]) -> bool:
    gc.collect()
    return all(model() is None for model in models)


def test_they_are_gone_behind_the_region() -> None:
    with models_let_go():
        seen = looked_up()
        assert not are_gone(seen)
    assert are_gone(seen)


def test_a_pass_that_fails_holds_none() -> None:
    seen = []

    def failing() -> None:
        with models_let_go():
            seen.extend(looked_up())
            raise RuntimeError("failed")

    with pytest.raises(RuntimeError, match="failed"):
        failing()
    assert are_gone(seen)


def test_versions_without_these_caches_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(letting_go, "_CACHES", (("torch.nn", "no_such_function"), ("torch.nn", "Linear")))
    with models_let_go():
        pass
