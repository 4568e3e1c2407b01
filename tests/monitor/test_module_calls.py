"""Looks at calls: of which modules, in which order, and that nothing stays."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepseek_mp.monitor.module_calls import ModuleCalls
from deepseek_mp.nn.deferred import deferring, is_pending
from deepseek_mp.nn.nested import tensors


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_hooks_with_kwargs) for module in model.modules())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(input=x)  # type: ignore[no-any-return]


def test_looks_come_inner_modules_first_with_all_arguments_and_end_with_the_model() -> None:
    model, seen = nn.Sequential(Block(), nn.Tanh()), []

    def look(name: str) -> Any:
        return lambda args, kwargs, output: seen.append((name, len(args), list(kwargs), output.shape))

    ModuleCalls(model, ({model[0]: look("block"), model[0].linear: look("linear")}, {model: look("model")}))
    for _ in range(2):
        model(torch.ones(1, 2))
    shape = torch.Size([1, 2])
    assert seen == [("linear", 0, ["input"], shape), ("block", 1, [], shape), ("model", 1, [], shape)]
    assert hooks(model) == 0


def test_a_forward_that_raises_leaves_hooks_until_the_end() -> None:
    model = nn.Sequential(Block())
    calls = ModuleCalls(model, ({model[0]: lambda *_: None},))
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.ones(1, 3))
    assert hooks(model) > 0
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(torch.ones(1, 2))  # their hooks do nothing
    calls.end()
    assert hooks(model) == 0


@dataclass
class Scores:
    """As the outputs of transformers."""

    loss: Tensor | None
    logits: Tensor


class Wrapped(nn.Module):
    """Passes on what its head gives, by a keyword, and in a dataclass of its own or a dict."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.head, self.same, self.wrap = nn.Linear(2, 3), nn.Identity(), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.same(input=self.head(x)))


@pytest.mark.parametrize("wrap", [lambda x: Scores(None, x), lambda x: {"logits": x}, lambda x: (x, 1), lambda x: x])
def test_what_nobody_has_computed_is_not_shown_wherever_it_is(wrap: Any) -> None:
    model = Wrapped(wrap)
    x, shown = torch.ones(1, 2, requires_grad=True), []

    def look(args: Any, kwargs: Any, output: Any) -> None:
        shown.append([len(list(tensors(tree))) for tree in (args, kwargs, output)])

    ModuleCalls(model, [dict.fromkeys((model.head, model.same, model), look)])
    with deferring(model.head):
        output = next(iter(tensors(model(x))))
    assert shown == [[1, 0, 0], [0, 0, 0], [1, 0, 0]]
    assert is_pending(output)
