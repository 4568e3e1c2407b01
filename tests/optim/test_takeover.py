"""PyTorch's optimizers become ours in place: same rule, same groups, same references; and back."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook

from deepseek_mp.errors import ConfigError
from deepseek_mp.optim import SGD, AdamW, set_storage
from deepseek_mp.optim.takeover import take_over, why_not


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 80), nn.ReLU(), nn.Linear(80, 3))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5, scheduler: Any = None) -> torch.Tensor:
    for seed in range(steps):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return torch.cat([p.detach().flatten() for p in net.parameters()])


Make = Callable[[Any], torch.optim.Optimizer]
MAKERS: list[tuple[Make, type]] = [
    (lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.8, 0.99), weight_decay=0.1), AdamW),
    (lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), fused=True), AdamW),
    (lambda p: torch.optim.Adam(p, lr=1e-2), AdamW),
    (lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.01), SGD),
]


@pytest.mark.parametrize(("make", "ours"), MAKERS)
def test_the_same_steps_are_made(make: Make, ours: type) -> None:
    plain, taken = model(), model()
    expected = train(plain, make(plain.parameters()))
    optimizer = make(taken.parameters())
    take_over(optimizer)
    assert type(optimizer) is ours
    torch.testing.assert_close(train(taken, optimizer), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("make", "ours"), MAKERS)
def test_it_can_be_made_again_what_it_was(make: Make, ours: type) -> None:
    plain, taken = model(), model()
    expected = train(plain, make(plain.parameters()))
    optimizer = make(taken.parameters())
    before = vars(optimizer).keys(), [list(group.items()) for group in optimizer.param_groups]
    kind, values = type(optimizer), copy.deepcopy(taken.state_dict())
    undo = take_over(optimizer, states="8bit")
    train(taken, optimizer)
    undo()
    assert type(optimizer) is kind
    assert not optimizer.state
    assert (vars(optimizer).keys(), [list(group.items()) for group in optimizer.param_groups]) == before
    taken.load_state_dict(values)
    assert torch.equal(train(taken, optimizer), expected)


def test_groups_keep_their_numbers_and_what_others_put_there() -> None:
    net: Any = model()
    groups = [{"params": net[0].parameters(), "lr": 0.5, "name": "first"}, {"params": net[2].parameters()}]
    optimizer: Any = torch.optim.AdamW(groups, lr=0.25)
    kept = list(optimizer.param_groups)
    take_over(optimizer, states="8bit")
    assert all(now is then for now, then in zip(optimizer.param_groups, kept, strict=True))
    assert [group["lr"] for group in kept] == [0.5, 0.25]
    assert kept[0]["name"] == "first"
    assert [group["states"] for group in kept] == ["8bit", "8bit"]
    train(net, optimizer, 1)
    assert "exp_avg_codes" in optimizer.state[net[0].weight]
    set_storage(optimizer, net[0].weight, "bf16_sr")
    with torch.autocast("cpu", torch.bfloat16):
        train(net, optimizer, 1)
    assert net[0].weight.dtype is torch.bfloat16


def test_a_scheduler_goes_on_with_it() -> None:
    def run(*, taken: bool) -> tuple[torch.Tensor, Any]:
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        scheduler = lr_scheduler.SequentialLR(
            optimizer,
            [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(optimizer, 5)],
            [2],
        )
        if taken:
            take_over(optimizer)
        return train(net, optimizer, scheduler=scheduler), optimizer.param_groups[0]["lr"]

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch warns where it sees no step before the scheduler's
        warnings.filterwarnings("ignore", message="The epoch parameter")
        (expected, rate), (found, new_rate) = run(taken=False), run(taken=True)
    assert new_rate == rate
    torch.testing.assert_close(found, expected)


def test_hooks_stay_and_those_of_all_optimizers_run() -> None:
    net, seen = model(), []
    optimizer = torch.optim.AdamW(net.parameters())
    optimizer.register_step_post_hook(lambda *_: seen.append("own"))
    handle = register_optimizer_step_post_hook(lambda *_: seen.append("all"))
    try:
        take_over(optimizer)
        train(net, optimizer, 1)
    finally:
        handle.remove()
    assert sorted(seen) == ["all", "own"]


def test_nothing_holds_the_optimizer() -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    take_over(optimizer)
    held = weakref.ref(optimizer)
    gc.collect()
    gc.disable()
    try:
        del optimizer
        assert held() is None
    finally:
        gc.enable()


class Own(torch.optim.AdamW):
    pass


def used() -> torch.optim.Optimizer:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    train(net, optimizer, 1)
    return optimizer


def replaced() -> torch.optim.Optimizer:
    optimizer: Any = torch.optim.AdamW(model().parameters())
    optimizer.step = lambda: None
    return optimizer  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Own(model().parameters()), "Own is none of PyTorch's AdamW, Adam and SGD"),
        (lambda: torch.optim.RMSprop(model().parameters()), "RMSprop is none"),
        (lambda: torch.optim.AdamW(model().parameters(), amsgrad=True), "amsgrad=True has no counterpart"),
        (lambda: torch.optim.SGD(model().parameters(), maximize=True), "maximize=True"),
        (lambda: torch.optim.Adam(model().parameters(), weight_decay=0.1), "Adam's weight decay"),
        (lambda: torch.optim.AdamW(model().bfloat16().parameters()), "neither FP32 nor FP64"),
        (used, "it has made steps already"),
        (replaced, "its step was replaced"),
    ],
)
def test_what_cannot_be_taken_over_is_refused_and_left_alone(make: Any, why: str) -> None:
    optimizer = make()
    kind, before = type(optimizer), copy.copy(optimizer.param_groups[0])
    assert why in why_not(optimizer)
    with pytest.raises(ConfigError, match=r"an optimizer to be taken over.*Allowed: a fresh AdamW, Adam or SGD"):
        take_over(optimizer)
    assert type(optimizer) is kind
    assert optimizer.param_groups[0].keys() == before.keys()
