from __future__ import annotations

import copy
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
    places.begin()
    model(torch.zeros(1, 2))
    assert asking.seen == ["1.0"]
    assert places.current == ""
    places.end()
    model(torch.zeros(1, 2))
    assert asking.seen == ["1.0", ""]


def test_hooks_are_taken_away_and_copies_made_meanwhile_look_at_nothing():
    model, asking = net()
    asking.places = Places(model)
    asking.places.begin()
    twin = copy.deepcopy(model)
    asking.places.end()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    twin(torch.zeros(1, 2))
    assert asking.places.current == ""


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
            return x

    asking = Asking()
    model = nn.Sequential(Catching(), asking)
    asking.places = places = Places(model)
    places.begin()
    model(torch.zeros(1))
    assert asking.seen == ["1"]
    assert places.current == ""
    places.end()


def test_modules_inside_compiled_ones_have_no_hooks():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    model[1].compile(backend="eager")
    places = Places(model)
    places.begin()
    assert model[0]._forward_hooks
    assert not model[1]._forward_hooks
    assert not model[1][0]._forward_hooks
    places.end()


def test_other_threads_are_not_looked_at():
    model, asking = net()
    asking.places = Places(model)
    asking.places.begin()
    thread = threading.Thread(target=model, args=(torch.zeros(1, 2),))
    thread.start()
    thread.join()
    asking.places.end()
    assert asking.seen == [""]
