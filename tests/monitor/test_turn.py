"""The layers of one sampled step are measured once each, as they run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from deepseek_mp import backends
from deepseek_mp.monitor.measure import block, largest_magnitude
from deepseek_mp.monitor.module_calls import ModuleCalls
from deepseek_mp.monitor.sides import sides_of, what_if
from deepseek_mp.monitor.store import TENSORS, UPDATE, Layout, Store
from deepseek_mp.monitor.subjects import Choice, subjects_of
from deepseek_mp.monitor.turn import Turn
from deepseek_mp.nn import convert
from deepseek_mp.nn.lazy import Lazy
from deepseek_mp.precision import RECIPES, Operand, PrecisionPlan

CPU = torch.device("cpu")
ASKED = what_if(("fp16", "block"), backends.capabilities(CPU))


class Watched:
    """A turn of all layers of a model."""

    def __init__(self, model: nn.Module) -> None:
        subjects = subjects_of(model)
        self.recipes: list[tuple[str, str]] = []
        self.store = Store(Layout(units=len(subjects), ways=1 + len(ASKED), modules=1), CPU, 0.5)

        def ran_in(subject: object, recipe: object) -> None:
            self.recipes.append((subject.name, recipe.name))  # type: ignore[attr-defined]

        self.turn = Turn(subjects, self.store, ASKED, Choice(128, 0), ran_in)
        self.calls = ModuleCalls(model, (self.turn.looks(),))

    def counts(self) -> list[list[float]]:
        """Per layer, samples of input, weight and output gradient."""
        return self.store.parts.count[:, :UPDATE].tolist()


def test_numbers_are_those_of_the_tensors_that_the_layer_read() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    x = torch.randn(10, 6)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model[:2](x).detach()
        seen = Watched(model)
        output = model(x)
    gradient = torch.randn_like(output)
    output.backward(gradient)
    assert seen.turn.backward_seen
    assert seen.recipes == [("0", "bf16"), ("2", "bf16")]
    used = sides_of(RECIPES["bf16"])
    values = {"input": hidden, "weight": model[2].weight.detach(), "grad_output": gradient}
    for name, tensor in values.items():
        operand = Operand(name)
        ways = [used[operand], *(sides[operand] for sides in ASKED.values())]
        expected = block(tensor, ways, lambda t=tensor: largest_magnitude(t))
        assert torch.equal(seen.store.parts.last[1, TENSORS.index(name)], expected)
    assert seen.counts() == [[1, 1, 1]] * 2


def test_only_the_first_call_of_a_layer_counts() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.linear(x) * 100)  # type: ignore[no-any-return]

    model = Twice()
    seen = Watched(model)
    model(torch.ones(2, 3)).sum().backward()
    assert seen.counts() == [[1, 1, 1]]
    assert seen.store.parts.last[0, 0, 0, 0] == 1  # the largest input of the first call


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_measures_once(reentrant: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.second, self.first(x), use_reentrant=reentrant)  # type: ignore[no-any-return]

    model = Model()
    seen = Watched(model)
    model(torch.ones(2, 3)).sum().backward()
    assert seen.counts()[0] == [1, 1, 1]
    # What runs without gradients is not looked at, and its second run is outside of the model's forward.
    assert seen.counts()[1] == ([0, 0, 0] if reentrant else [1, 1, 1])


def test_without_gradients_nothing_is_measured() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    seen = Watched(model)
    with torch.no_grad():
        model(torch.ones(2, 3))
    assert seen.counts() == [[0, 0, 0]]


def test_a_closed_turn_measures_no_gradient() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    seen = Watched(model)
    output = model(torch.ones(2, 3))
    seen.turn.is_open = False
    output.sum().backward()
    assert seen.counts() == [[1, 1, 0]]


@pytest.mark.parametrize(
    ("module", "make", "expected"),
    [
        (nn.Embedding(5, 4), lambda: torch.randint(5, (3,)), [0, 1, 1]),
        (nn.Conv2d(3, 4, 3), lambda: torch.randn(2, 3, 5, 5), [1, 1, 1]),
        (nn.Linear(3, 4), lambda: torch.randn(0, 3), [0, 1, 0]),
        (nn.GRUCell(3, 4), lambda: torch.randn(2, 3), [1, 1, 1]),
        (nn.Linear(3, 4).requires_grad_(False), lambda: torch.randn(2, 3), [1, 1, 0]),
    ],
)
def test_layers_of_all_kinds(module: nn.Module, make: Callable[[], Tensor], expected: list[float]) -> None:
    model = nn.Sequential(module)
    seen = Watched(model)
    output = model(make())
    if output.requires_grad:
        output.sum().backward()
    assert seen.counts() == [expected]


def test_activations_that_are_put_off_stay_put_off() -> None:
    """Measuring changes nothing in what an FP8 model computes, bit by bit, nor what its casts compute."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(128, 256), nn.Linear(128, 256), nn.Linear(256, 128)

        def forward(self, x: Tensor) -> Tensor:
            self.hidden = F.silu(self.gate(x)) * self.up(x)
            return self.down(self.hidden)  # type: ignore[no-any-return]

    def run(*, measured: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = Gated()
        convert(model, PrecisionPlan.of("bf16", {"*": "block"}), emulate=True)
        seen = Watched(model) if measured else None
        with torch.autocast("cpu", torch.bfloat16):
            output = model(torch.randn(16, 128))
        output.float().square().sum().backward()
        if seen is not None:
            assert seen.counts() == [[1, 1, 1]] * 3
            assert seen.store.parts.last[2, 0, 0, 0] > 0
        assert isinstance(model.hidden, Lazy)
        return [
            output,
            torch.tensor(model.hidden.promise.values is not None),
            *(p.grad for p in model.parameters() if p.grad is not None),
        ]

    for plain, with_statistics in zip(run(measured=False), run(measured=True), strict=True):
        assert torch.equal(plain, with_statistics)


def test_a_weight_s_rows_that_share_a_scale_are_taken_together() -> None:
    module = nn.Linear(128, 512, bias=False)
    with torch.no_grad():
        module.weight.copy_(100.0 ** -(torch.arange(512) // 128)[:, None] * torch.randn(512, 128))
    model = nn.Sequential(module)
    for _ in range(5):  # whichever block it is
        seen = Watched(model)
        model(torch.randn(2, 128))
        row = 1 + 1 + list(ASKED).index("block")
        by_row = float(seen.store.parts.last[0, 1, row, 1])
        assert by_row < 1e-3  # of one magnitude; rows of all four would not fit one scale


def test_weights_that_are_lent_for_a_call_are_measured_as_they_are() -> None:
    """`torch.func.functional_call` puts tensors that are no parameters into their place."""
    model = nn.Sequential(nn.Linear(8, 8))
    seen = Watched(model)
    lent = {name: 3.0 * parameter for name, parameter in model.named_parameters()}
    torch.func.functional_call(model, lent, (torch.randn(4, 8),)).square().sum().backward()
    assert seen.counts() == [[1, 1, 1]]
    plain = Watched(model)
    model(torch.randn(4, 8)).square().sum().backward()
    of_weight = [one.store.parts.last[0, TENSORS.index("weight"), 0] for one in (seen, plain)]
    assert not torch.equal(*of_weight)
