"""Sampled steps from beginning to end: turns, hooks, waiting, memory, compiled models."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from deepseek_mp.monitor import LayerStatistics, PrecisionMonitor, Sampling
from deepseek_mp.monitor.layer_statistics import COMPILED, NOT_YET, SAMPLED
from deepseek_mp.nn import apply

OPEN: list[PrecisionMonitor] = []


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No compiled code of other tests, and no hooks for them."""
    torch.compiler.reset()
    yield
    while OPEN:
        OPEN.pop().close()
    torch.compiler.reset()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()  # type: ignore[no-any-return]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 16)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(16, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


LAYERS = ["tokens", "blocks.0.linear", "blocks.1.linear", "blocks.2.linear", "head"]


class Loop:
    """A training loop of the user's own, with a monitor."""

    autocast = False

    def __init__(self, model: nn.Module | None = None, *, watch_optimizer: bool = True, **options: Any) -> None:
        self.model = Net() if model is None else model
        self.optimizer = options.pop("optimizer", None) or torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        optimizer = self.optimizer if watch_optimizer else None
        options.setdefault("sample_every", None)
        self.monitor = PrecisionMonitor(self.model, optimizer, **options)
        OPEN.append(self.monitor)

    def backward(self) -> None:
        x = torch.randint(7, (4, 5))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            loss = F.cross_entropy(self.model(x).flatten(0, 1), x.flatten())
        loss.backward()

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            self.backward()
            self.optimizer.step()

    def samples(self) -> dict[str, int]:
        """Layer -> samples of its weight."""
        return {
            name: layer.tensors["weight"].samples if layer.tensors else 0
            for name, layer in self.monitor.statistics().items()
        }


# ---------------------------------------------------------------- turns


def test_layers_take_turns_at_the_rate_that_was_asked_for() -> None:
    loop = Loop(sampling=Sampling(every=3, units=2))
    loop.step()
    assert loop.samples() == dict(zip(LAYERS, [1, 1, 0, 0, 0], strict=True))
    loop.step(2)
    assert sum(loop.samples().values()) == 2  # only every third step
    loop.step()
    assert loop.samples() == dict(zip(LAYERS, [1, 1, 1, 1, 0], strict=True))
    loop.step(3)
    assert loop.samples() == dict(zip(LAYERS, [2, 1, 1, 1, 1], strict=True))


def test_all_of_a_layer_is_known_after_its_turn() -> None:
    loop = Loop(sampling=Sampling(every=1, units=5))
    loop.step(2)
    for name, layer in loop.monitor.statistics().items():
        inputs = set() if name == "tokens" else {"input"}  # of an embedding they are no numbers
        assert (layer.layer, layer.status, layer.recipe, layer.updates) == (name, SAMPLED, "fp32", 2)
        assert set(layer.tensors) == inputs | {"weight", "grad_output"}
        assert all(tensor.samples == 2 for tensor in layer.tensors.values())
        assert layer.tensors["weight"].errors["bf16"]["relative"].mean == pytest.approx(2.8e-6, rel=0.6)
        assert layer.non_finite == dict.fromkeys(("input", "output", "grad_output", "weight"), 0)
        json.dumps(layer.to_json())


def test_the_same_seed_samples_the_same_rows() -> None:
    def run(seed: int) -> dict[str, Any]:
        torch.manual_seed(0)
        loop = Loop(sampling=Sampling(every=1, units=5, rows=2, seed=seed))
        loop.step(3)
        return {name: layer.to_json() for name, layer in loop.monitor.statistics().items()}

    assert run(0) == run(0)
    assert run(0) != run(1)


@pytest.mark.parametrize("sampling", [None, Sampling(every=1, units=5)])
def test_training_is_not_changed(sampling: Sampling | None) -> None:
    def run(sampling: Sampling | None) -> list[Tensor]:
        torch.manual_seed(0)
        loop = Loop(sampling=sampling)
        loop.step(5)
        return [p.detach() for p in loop.model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(run(None), run(sampling), strict=True))


def test_calls_without_gradients_are_no_steps() -> None:
    loop = Loop(sampling=Sampling(every=2, units=5))
    with torch.no_grad():
        for _ in range(3):
            loop.model(torch.randint(7, (2, 2)))
    with loop.monitor.paused():
        loop.backward()
    assert sum(loop.samples().values()) == 0
    loop.step()
    assert set(loop.samples().values()) == {1}


def test_two_forwards_before_one_backward_keep_the_gradients_of_the_first() -> None:
    loop = Loop(sampling=Sampling(every=10, units=5), watch_optimizer=False)
    x = torch.randint(7, (4, 5))
    (loop.model(x) - loop.model(x)).square().sum().backward()
    found = loop.monitor.statistics()
    assert all(layer.tensors["grad_output"].samples == 1 for layer in found.values())


def test_accumulation_ends_with_the_optimizer_s_step() -> None:
    loop = Loop(sampling=Sampling(every=8, units=5))
    for _ in range(4):
        loop.backward()
    assert all(layer.updates == 0 for layer in loop.monitor.statistics().values())
    loop.optimizer.step()
    found = loop.monitor.statistics()
    assert all((layer.updates, layer.tensors["weight"].samples) == (1, 1) for layer in found.values())


def test_a_step_that_the_optimizer_skips_is_known_at_the_next_call() -> None:
    loop = Loop(sampling=Sampling(every=8, units=5))
    loop.backward()  # no optimizer step, as after an overflow
    loop.backward()
    found = loop.monitor.statistics(wait=False)
    assert all((layer.updates, layer.tensors["weight"].samples) == (0, 1) for layer in found.values())
    loop.optimizer.step()
    assert all(layer.updates == 1 for layer in loop.monitor.statistics(wait=False).values())


def test_a_change_of_the_plan_begins_again_in_the_new_recipe() -> None:
    loop = Loop(sampling=Sampling(every=1, units=5))
    apply(loop.model, "bf16", emulate=True)
    loop.step(3)
    assert loop.monitor.statistics()["head"].recipe == "bf16"
    apply(loop.model, "fp16", emulate=True)
    loop.step(2)
    head = loop.monitor.statistics()["head"]
    assert (head.recipe, head.tensors["weight"].samples) == ("fp16", 2)


# ---------------------------------------------------------------- nothing stays, nothing waits


def hooks(loop: Loop) -> int:
    modules = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in loop.model.modules())
    return modules + len(loop.optimizer._optimizer_step_pre_hooks) + len(loop.optimizer._optimizer_step_post_hooks)


def test_a_step_that_is_not_sampled_meets_one_hook() -> None:
    seen: list[int] = []
    loop = Loop(sampling=Sampling(every=3, units=2))
    loop.model.head.register_forward_pre_hook(lambda *_: seen.append(hooks(loop) - 1))
    loop.step(6)
    assert [count > 1 for count in seen] == [True, False, False] * 2
    assert seen[1] == 1  # the one that notices the call
    loop.monitor.close()
    assert hooks(loop) == 1
    loop.step()
    assert hooks(loop) == 1


@pytest.mark.parametrize("close", [False, True])
def test_a_forward_that_raises_leaves_nothing_behind(close: bool) -> None:
    loop = Loop(sampling=Sampling(every=1, units=5))
    with pytest.raises(IndexError, match="out of range"):
        loop.model(torch.full((1, 1), 99))
    copy.deepcopy(loop.model)
    if close:
        loop.monitor.close()
        assert hooks(loop) == 0
    else:
        loop.step()
        assert set(loop.samples().values()) == {1}


def test_a_step_that_raised_is_not_measured_by_a_trial_after_it() -> None:
    loop = Loop(sampling=Sampling(every=9, units=5))
    with pytest.raises(IndexError, match="out of range"):
        loop.model(torch.full((1, 1), 99))
    with loop.monitor.paused():
        loop.backward()
    assert sum(loop.samples().values()) == 0


class Waits(TorchDispatchMode):
    """Counts the operations by which the host reads a value, and all others."""

    def __init__(self) -> None:
        super().__init__()
        self.read: Counter[str] = Counter()
        self.all = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select", "unique_dim"):
            self.read[name] += 1
        self.all += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("usage_too", [False, True])
@pytest.mark.parametrize("recipe", ["fp32", "row"])
def test_no_value_is_read_by_the_host_in_a_sampled_step(recipe: str, usage_too: bool) -> None:
    model = Net()
    apply(model, recipe, emulate=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # AdamW's own code reads its step on a CPU
    every_layer = Sampling(every=1, units=5)
    loop = Loop(model, optimizer=optimizer, sampling=every_layer, sample_every=1 if usage_too else None)
    loop.autocast = recipe == "row"
    loop.step(2)
    with Waits() as waits:
        loop.step(3)
    assert not waits.read
    assert waits.all > 1000  # it did see the work
    assert set(loop.samples().values()) == {5}


def test_memory_is_the_same_after_ten_steps_and_after_a_thousand() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    monitor = PrecisionMonitor(model, optimizer, sample_every=None, sampling=Sampling(every=5, formats=()))

    def held() -> dict[str, int]:
        """Numbers in the monitor's memory, and how many things it holds."""
        statistics = monitor._statistics
        assert statistics is not None
        seen = statistics._observed
        assert seen is not None
        copies = seen.copies
        return {
            "buffer": seen.store.flat.untyped_storage().nbytes(),
            "latest": copies.latest.untyped_storage().nbytes(),
            "slots": sum(slot.untyped_storage().nbytes() for slot in copies._free) + len(copies._under_way) * 10**9,
            "recipes": len(seen.recipes),
            "in a row": len(statistics.log._judge._in_a_row),
            "hooks": sum(len(m._forward_hooks) for m in model.modules()) + len(optimizer._optimizer_step_pre_hooks),
        }

    found = []
    for step in range(1001):
        optimizer.zero_grad()
        model(torch.ones(3, 4)).square().sum().backward()
        optimizer.step()
        if step in (10, 1000):
            monitor.statistics()
            found.append(held())
    assert found[0] == found[1]
    assert monitor.statistics()["0"].updates > 150


# ---------------------------------------------------------------- non-finite values


class Spoils(nn.Module):
    factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def test_a_non_finite_value_makes_the_next_step_look_for_its_producer() -> None:
    spoils = Spoils()
    model = nn.Sequential(nn.Linear(3, 3), spoils, nn.Linear(3, 3), nn.Linear(3, 3))
    monitor = PrecisionMonitor(model, sample_every=None, sampling=Sampling(every=4, units=1))

    def step() -> None:
        model(torch.ones(2, 3)).sum().backward()

    for _ in range(4):
        step()
    spoils.factor = float("inf")
    step()  # the second turn, of layer 2: its input is bad already
    assert not monitor.alarms
    assert monitor.statistics()["2"].non_finite["input"] == 6
    assert monitor.statistics()["2"].produced == {"forward": 0, "backward": 0}
    step()  # all modules are watched in this one, though no turn is due
    found = monitor.statistics()["1"]
    assert found.produced == {"forward": 1, "backward": 0}
    assert found.non_finite == {"input": 0, "output": 6, "grad_output": 0, "weight": 0} | {
        "grad_output": found.non_finite["grad_output"]
    }
    alarm = monitor.alarms[-1]
    assert (alarm.step, alarm.layer, alarm.tensor, alarm.kind) == (6, "1", "output", "non_finite")
    step()
    assert monitor.alarms[-1].step == 6  # and not again before the next turn


# ---------------------------------------------------------------- compiled models


def whole() -> nn.Module:
    return torch.compile(Net(), backend="eager", fullgraph=True)


def in_place() -> nn.Module:
    model = Net()
    model.compile(backend="eager", fullgraph=True)
    return model


def by_block() -> nn.Module:
    model = Net()
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    return model


COMPILED_MODELS = pytest.mark.parametrize("make", [whole, in_place, by_block])


@COMPILED_MODELS
def test_a_compiled_model_says_why_it_was_not_sampled(make: Callable[[], nn.Module]) -> None:
    loop = Loop(make(), sampling=Sampling(every=1, units=2))
    assert {layer.status for layer in loop.monitor.statistics().values()} == {COMPILED}
    loop.step(3)
    found = loop.monitor.statistics()
    assert list(found) == LAYERS
    assert {layer.status for layer in found.values()} == {COMPILED}


@COMPILED_MODELS
def test_steps_that_run_uncompiled_are_sampled_for_all_layers(make: Callable[[], nn.Module]) -> None:
    loop = Loop(make(), sampling=Sampling(every=1, units=2), sample_every=3)
    loop.step(4)
    found: dict[str, LayerStatistics] = loop.monitor.statistics()
    assert {layer.status for layer in found.values()} == {SAMPLED}
    assert {layer.updates for layer in found.values()} == {2}  # the first step and the fourth


def test_a_model_that_was_not_called_yet() -> None:
    assert {layer.status for layer in Loop(sampling=Sampling()).monitor.statistics().values()} == {NOT_YET}


def test_a_function_that_is_compiled_around_the_model() -> None:
    loop = Loop(sampling=Sampling(every=1, units=5))
    compiled = torch.compile(lambda x: loop.model(x).sum(), backend="eager")
    compiled(torch.randint(7, (2, 2))).backward()
    with loop.monitor.sample(compiled=True):
        loop.model(torch.randint(7, (2, 2))).sum().backward()
    assert {layer.status for layer in loop.monitor.statistics().values()} == {SAMPLED}


def test_transforms_of_torch_func_are_let_pass() -> None:
    loop = Loop(nn.Linear(3, 2), sampling=Sampling(every=1))
    torch.func.vmap(loop.model)(torch.ones(4, 2, 3))
    torch.func.grad(lambda x: loop.model(x).sum())(torch.ones(2, 3))
    assert loop.monitor.statistics()[""].status == NOT_YET
