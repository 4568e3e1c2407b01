"""Which module made the first infinity or NaN, forward or backward, and who only passed it on."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from deepseek_mp.monitor import PrecisionMonitor
from deepseek_mp.monitor.module_calls import ModuleCalls
from deepseek_mp.monitor.nonfinite import NonFiniteWatch
from deepseek_mp.monitor.store import PHASES, SEEN, Layout, Store
from deepseek_mp.nn.lazy import lazy
from deepseek_mp.ops import non_finite as front
from deepseek_mp.ops.choose import non_finite_of
from deepseek_mp.ops.reference import non_finite as reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
NAN, INF = float("nan"), float("inf")


class Times(nn.Module):
    """Multiplies the activation and, on the way back, the gradient."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
            ctx.factor = backward
            return x * forward

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
            return grad * ctx.factor, None, None

    def __init__(self, forward: float = 1.0, backward: float = 1.0) -> None:
        super().__init__()
        self.factors = forward, backward

    def forward(self, x: Tensor) -> Tensor:
        return self.Function.apply(x, *self.factors)  # type: ignore[no-any-return, no-untyped-call]


class Seen:
    """What a watch of all modules found in one step."""

    def __init__(
        self, model: nn.Module, x: Any, *, loss: Callable[[Any], Tensor] = torch.sum, only: list[str] | None = None
    ) -> None:
        places = {module: place for place, module in enumerate(model.modules())}
        self.names = [name for name, _ in model.named_modules()]
        self.store = Store(Layout(units=0, ways=1, modules=len(places)), torch.device("cpu"), 0.5)
        watched = {m: p for m, p in places.items() if only is None or self.names[p] in only}
        watch = NonFiniteWatch(self.store, watched, 7)
        ModuleCalls(model, (watch.looks(), {model: watch.look_at_root}))
        loss(model(x)).backward()
        watch.close()
        watch.close()  # does nothing

    @property
    def origin(self) -> tuple[str, str] | None:
        step, place, phase = (int(number) for number in self.store.parts.origin[1].tolist())
        assert torch.equal(self.store.parts.origin[0], self.store.parts.origin[1])
        return None if step < 0 else (self.names[place], PHASES[phase])

    def bad(self, name: str) -> dict[str, int]:
        return dict(zip(SEEN, map(int, self.store.parts.bad[self.names.index(name)].tolist()), strict=True))

    def produced(self, name: str) -> list[float]:
        return self.store.parts.produced[self.names.index(name)].tolist()


X = torch.ones(4, 3)


def chain(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), *middle, nn.Linear(3, 2))


def test_a_finite_step_has_no_producer() -> None:
    seen = Seen(chain(nn.Tanh(), nn.LayerNorm(3)), X)
    assert seen.origin is None
    assert not seen.store.parts.bad.any()
    assert not seen.store.parts.produced.any()


@pytest.mark.parametrize("factor", [NAN, INF])
def test_the_producer_of_the_forward_and_not_those_that_pass_it_on(factor: float) -> None:
    seen = Seen(chain(nn.Tanh(), Times(factor), nn.LeakyReLU(), nn.LayerNorm(3)), X)
    assert seen.origin == ("2", "forward")
    assert seen.produced("2") == [1, 0]
    assert seen.store.parts.produced.sum() == 1  # not the modules around it either
    assert seen.bad("2")["input"] == 0
    assert seen.bad("2")["output"] == 12 == seen.bad("4")["input"]


def test_the_producer_of_the_backward_and_not_those_below() -> None:
    seen = Seen(chain(nn.Tanh(), Times(1.0, INF), nn.ReLU(), nn.LayerNorm(3)), X)
    assert seen.origin == ("2", "backward")
    assert seen.bad("2")["grad_output"] == 0
    assert seen.bad("1")["grad_output"] == 12 == seen.bad("0")["grad_output"]
    assert seen.produced("2") == [0, 1]
    assert seen.store.parts.produced.sum() == 1


def test_a_module_inside_another_is_named_and_not_the_one_around_it() -> None:
    seen = Seen(chain(nn.Sequential(nn.Tanh(), nn.Sequential(Times(NAN)))), X)
    assert seen.origin == ("1.1.0", "forward")
    seen = Seen(chain(nn.Sequential(nn.Tanh(), nn.Sequential(Times(1.0, NAN), nn.Tanh()))), X)
    assert seen.origin == ("1.1.0", "backward")


def test_a_module_s_own_computation_is_its_own_fault() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * INF  # type: ignore[no-any-return]

    assert Seen(chain(Outer()), X).origin == ("1", "forward")


def test_a_bad_weight_makes_a_producer_of_its_layer_whatever_comes_in() -> None:
    model = chain(nn.Tanh())
    with torch.no_grad():
        model[2].weight[0, 0] = NAN
    seen = Seen(model, X)
    assert seen.origin == ("2", "forward")
    assert seen.bad("2")["weight"] == 1


def test_a_bad_weight_behind_a_bad_batch() -> None:
    model = chain(nn.Tanh())
    with torch.no_grad():
        model[2].weight[0, 0] = NAN
    assert Seen(model, X * NAN).origin == ("2", "forward")  # it would be bad without the batch too


def test_a_bad_batch_has_no_producer_but_is_counted() -> None:
    seen = Seen(chain(nn.Tanh()), torch.tensor([[1.0, NAN, INF]] * 4))
    assert seen.origin is None
    assert seen.bad("0")["input"] == 8
    assert seen.bad("0")["output"] == 12


def test_infinities_that_are_meant_are_no_fault() -> None:
    class Mask(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.masked_fill(torch.tensor([True, False, False]), -INF)

    seen = Seen(chain(Mask(), nn.Softmax(1)), X)
    assert seen.origin is None
    assert seen.bad("1")["output"] == 4
    assert not seen.store.parts.produced.any()


def test_a_bad_loss_gradient_counts_against_nobody() -> None:
    seen = Seen(chain(nn.Tanh()), X, loss=lambda y: (y * INF).sum())
    assert seen.origin is None
    assert seen.bad("0")["grad_output"] == 12


def test_arguments_by_name_and_nested_outputs_are_seen() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.times = Times(NAN)

        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"parts": (self.times(x=x), x)}

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.two = nn.Linear(3, 3), Two()

        def forward(self, x: Tensor) -> Tensor:
            return sum(self.two(x=self.first(input=x))["parts"])  # type: ignore[return-value]

    seen = Seen(Around(), X)
    assert seen.origin == ("two.times", "forward")
    assert seen.bad("first")["input"] == 0
    assert seen.bad("two")["output"] == 12


def test_modules_that_are_not_watched_are_not_judged() -> None:
    model = chain(nn.Tanh(), Times(NAN), nn.ReLU())
    seen = Seen(model, X, only=["4"])
    assert seen.origin is None
    assert seen.bad("4")["input"] == 12
    assert Seen(model, X, only=["2"]).origin == ("2", "forward")


def test_a_tensor_is_counted_once_for_all_who_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[torch.Size] = []
    original = Tensor.count_nonzero
    monkeypatch.setattr(Tensor, "count_nonzero", lambda x: (counted.append(x.shape), original(x))[1])
    Seen(nn.Sequential(nn.Sequential(nn.Tanh()), nn.Tanh()), torch.ones(2, 5, requires_grad=True))
    forward, backward = counted[:3], counted[3:]
    assert forward == [torch.Size([2, 5])] * 3  # the input, and what each of the two makes
    assert len(backward) >= 3


def test_a_tensor_that_was_written_to_is_counted_again() -> None:
    class Spoils(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(NAN)

    seen = Seen(chain(Times(), Spoils()), X)
    assert seen.bad("1")["output"] == 0
    assert seen.bad("2")["output"] == 12
    assert seen.bad("3")["input"] == 12


def test_the_first_ever_stays_and_the_latest_is_that_of_the_step() -> None:
    model = chain(Times(NAN), Times())
    places = {module: place for place, module in enumerate(model.modules())}
    store = Store(Layout(units=0, ways=1, modules=len(places)), torch.device("cpu"), 0.5)
    for step, factors in enumerate([(1.0, 1.0), (NAN, 1.0), (1.0, NAN), (1.0, 1.0)], 1):
        model[1].factors, model[2].factors = (factors[0], 1.0), (factors[1], 1.0)
        watch = NonFiniteWatch(store, places, step)
        ModuleCalls(model, (watch.looks(), {model: watch.look_at_root}))
        model(X).sum().backward()
        watch.close()
        latest = [[-1.0] * 3, [2.0, 2.0, 0.0], [3.0, 3.0, 0.0], [-1.0] * 3][step - 1]
        assert store.parts.origin[1].tolist() == latest
    assert store.parts.origin[0].tolist() == [2.0, 2.0, 0.0]
    assert store.parts.produced[:, 0].tolist() == [0, 0, 1, 1, 0]


def watch() -> NonFiniteWatch:
    return NonFiniteWatch(Store(Layout(units=0, ways=1, modules=0), torch.device("cpu"), 0.5), {}, 7)


def test_numbers_in_8_bits_are_counted() -> None:
    assert watch()._count(torch.tensor([1.0, NAN, -2.0]).to(torch.float8_e4m3fn)) == 1
    assert watch()._count(torch.tensor([1.0, INF, NAN]).to(torch.float8_e5m2)) == 2


class Operations(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def with_a_kernel(monkeypatch: pytest.MonkeyPatch, run: Callable[[Tensor], Tensor]) -> list[torch.Size]:
    """Has a CPU take the kernel, or what stands for it; the sizes of what it counted."""
    seen: list[torch.Size] = []
    kinds = {"triton": lambda x: (seen.append(x.shape), run(x))[1], "reference": non_finite_of("reference")}
    monkeypatch.setattr(front, "has_kernels", lambda device: True)
    monkeypatch.setattr(front, "_kernel_runs", lambda device: True)
    monkeypatch.setattr(front, "non_finite_of", kinds.__getitem__)
    return seen


def test_a_large_tensor_is_looked_at_at_once_where_there_is_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operation of a counted step passes through Python: those of many pieces took seconds."""
    monkeypatch.setattr(reference, "PIECE", 1000)

    def operations(values: Tensor) -> int:
        watched = watch()
        with Operations() as seen:
            watched._count(values)
        return seen.count

    assert operations(torch.zeros(500_000)) > 1000
    seen = with_a_kernel(monkeypatch, lambda x: x.new_zeros(()))
    assert operations(torch.zeros(500_000)) < 10
    assert operations(nn.Parameter(torch.zeros(700, 900))) < 10
    assert operations(torch.zeros(700, 900).t()) < 10
    assert seen == [(500_000,), (700, 900), (900, 700)]


def test_tensors_with_operations_of_their_own_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(Tensor):
        pass

    seen = with_a_kernel(monkeypatch, lambda x: x.new_zeros(()))
    with FakeTensorMode():
        fake = torch.full((3,), NAN)
    assert watch()._count([torch.full((3,), NAN).as_subclass(Other), fake]) == 0
    assert not seen


def test_a_lazy_activation_is_counted_and_stays_put_off(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = with_a_kernel(monkeypatch, non_finite_of("reference"))
    gate, up = lazy(torch.tensor([[1.0, NAN]])), lazy(torch.ones(1, 2))
    product = nn.functional.silu(gate) * up
    assert watch()._count(product) == 1
    assert seen == [(1, 2)]
    assert product.promise.made_of() is not None  # type: ignore[attr-defined]


@pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET=1, and Triton: a CPU has no kernels")
def test_the_kernel_counts_and_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = chain(nn.Tanh(), Times(NAN), nn.LayerNorm(3))
        monitor = PrecisionMonitor(model)
        with FlopCounterMode(display=False) as counter:
            model(X).sum().backward()
        usage, layers = monitor.log_precision_usage(), monitor.statistics()
        return (usage.ops, counter.get_flop_counts()), {name: layer.non_finite for name, layer in layers.items()}

    expected = found()
    assert any(count["output"] for count in expected[1].values())
    seen = with_a_kernel(monkeypatch, non_finite_of("triton"))
    assert found() == expected
    assert seen
