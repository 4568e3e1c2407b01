"""Attributes of modules come back as they were, whatever was tried."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deepseek_mp.costs.attributes import Attributes


class Restless(nn.Module):
    """Keeps something of every call, in every way."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.hidden, self.written = 0, None, torch.zeros(2)
        self.losses, self.by_name, self.names, self.last = [1.0], {"a": 1}, {"a"}, deque([1], maxlen=2)
        self.torch_draws, self.python_draws = torch.Generator().manual_seed(1), random.Random(1)
        self.numpy_draws = np.random.default_rng(1)
        self.gone: int | None = 1

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.hidden = x
        self.written += 1
        self.losses.append(2.0)
        self.by_name["b"] = 2
        self.names.add("b")
        self.last.append(2)
        noise = torch.rand(1, generator=self.torch_draws) + self.python_draws.random() + self.numpy_draws.random()
        return x + noise + self.calls


def seen(module: Restless) -> dict[str, Any]:
    about = {k: v for k, v in vars(module).items() if isinstance(v, list | dict | set | deque | int) and k[0] != "_"}
    numpy_state = str(module.numpy_draws.bit_generator.state)
    drawn = module.torch_draws.get_state().tolist(), module.python_draws.getstate(), numpy_state
    own = {"drawn": drawn, "hidden": module.hidden, "written": module.written.tolist()}
    return {k: repr(v) for k, v in about.items()} | own


def test_what_a_forward_keeps_is_put_back_in_the_same_objects() -> None:
    module = Restless()
    before, losses, written = seen(module), module.losses, module.written
    kept = Attributes(module.modules())
    first = module(torch.ones(1))
    del module.gone
    assert seen(module) != before
    kept.put_back()
    assert not hasattr(module, "gone")
    module.gone = 1
    assert seen(module) == before
    assert module.losses is losses
    assert module.written is written
    assert torch.equal(module(torch.ones(1)), first)


def test_a_tensor_that_nobody_wrote_to_is_not_written_to() -> None:
    module = Restless()
    kept, version = Attributes([module]), module.written._version
    kept.put_back()
    assert module.written._version == version


class Nested(nn.Module):
    """Keeps what forwards leave inside of containers that are in others."""

    def __init__(self) -> None:
        super().__init__()
        self.by_split: dict[str, Any] = {"train": [1.0], "seen": {1}, "memory": [torch.zeros(2)]}
        self.by_split["itself"] = self.by_split
        self.states = (torch.zeros(1), [torch.zeros(1)])
        self.shared = self.by_split["train"]

    def forward(self, x: Tensor) -> Tensor:
        self.by_split["train"].append(2.0)
        self.by_split["seen"].add(2)
        self.by_split["memory"][0] += 1
        self.states[0].add_(1)
        self.states = (self.states[1][0], [x])
        self.shared = []
        return x


def test_what_containers_hold_inside_of_others_is_put_back() -> None:
    module = Nested()
    by_split, states, shared = module.by_split, module.states, module.shared
    kept = Attributes([module])
    module(torch.ones(1))
    kept.put_back()
    assert module.by_split is by_split
    assert module.states is states
    assert module.shared is shared
    assert by_split["itself"] is by_split
    assert by_split["train"] == [1.0]
    assert by_split["seen"] == {1}
    assert by_split["memory"][0].tolist() == [0, 0]
    assert [states[0].item(), states[1][0].item()] == [0, 0]


def test_containers_may_be_deep() -> None:
    module, history = nn.Module(), [0]
    deepest = history
    for step in range(5000):
        history = [step, history]
    module.history = history
    kept = Attributes([module])
    deepest.append(1)
    kept.put_back()
    assert deepest == [0]
