from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from deepseek_mp.activations.places import Places


class Asking(nn.Module):
    """Notes where it is said to be."""

    def __init__(self) -> None:
        super().__init__()
        self.places = None
        self.seen = []

    def forward(self, x):
        self.seen.append(self.places.current)
        return x


def net() -> tuple[nn.Module, Asking]:
    asking = Asking()
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(asking)), asking


def test_the_innermost_module_is_named():
    model, asking = net()
    asking.places = places = Places(model)
    model(torch.zeros(1, 2))
    assert asking.seen == ["1.0"]
    assert places.current == ""


def test_modules_with_hooks_and_of_other_models_do_not_hide_it():
    model, asking = net()
    asking.places = Places(model)
    model[1].register_forward_pre_hook(lambda *_: None)
    model[1].register_forward_hook(lambda *_: None)
    nn.Sequential(model)(torch.zeros(1, 2))  # the model is a part of another one
    asking.places = Places(model[1])
    model(torch.zeros(1, 2))
    assert asking.seen == ["1.0", "0"]


def test_a_module_that_runs_within_another_s_forward():
    class Around(Asking):
        def __init__(self, inside):
            super().__init__()
            self.inside = inside

        def forward(self, x):
            super().forward(x)
            self.inside(x)
            return super().forward(x)

    inner = Asking()
    model = nn.Sequential(Around(inner))
    inner.places = model[0].places = Places(model)
    model(torch.zeros(1))
    assert inner.seen == ["0.inside"]
    assert model[0].seen == ["0", "0"]


def test_an_exception_that_is_caught_leaves_no_name_behind():
    class Failing(nn.Module):
        def forward(self, x):
            raise ValueError("broken")

    class Catching(Asking):
        def __init__(self) -> None:
            super().__init__()
            self.inside = Failing()

        def forward(self, x):
            with pytest.raises(ValueError, match="broken"):
                self.inside(x)
            return super().forward(x)

    catching = Catching()
    catching.places = places = Places(nn.Sequential(catching))
    catching(torch.zeros(1))
    assert catching.seen == ["0"]
    assert places.current == ""


def test_other_threads_have_places_of_their_own():
    model, asking = net()
    asking.places = Places(model)
    thread = threading.Thread(target=model, args=(torch.zeros(1, 2),))
    thread.start()
    thread.join()
    assert asking.seen == ["1.0"]
    assert asking.places.current == ""
