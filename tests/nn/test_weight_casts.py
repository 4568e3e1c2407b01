"""Weights cast in one pass for a whole model: the numbers of autocast, and never those of stale weights."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from deepseek_mp.nn import apply, current_plan
from deepseek_mp.nn.weight_casts import LENT, WeightCasts
from deepseek_mp.ops.dtypes import torch_dtype
from deepseek_mp.precision import PrecisionPlan


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 4))


def conv_net() -> nn.Module:
    layers = [
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, groups=2, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ]  # fmt: skip
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


class Conv13d(nn.Module):
    """Convolutions in one and in three dimensions, and one that is transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.three, self.back = nn.Conv1d(2, 4, 3), nn.Conv3d(2, 4, 3), nn.ConvTranspose1d(4, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.one(x.reshape(1, 2, 36))).sum() + self.three(x.reshape(1, 2, 3, 3, 4)).square().sum()


class Tied(nn.Module):
    """An embedding with the weight of the head, and one layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.twin = nn.Linear(8, 8)
        self.twin.weight = self.body.weight
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.twin(self.body(self.embed(tokens)).relu()))


class Attention(nn.Module):
    """Three layers that read one FP32 tensor, as in an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(x)
        return self.q(hidden) * self.k(hidden) + self.v(hidden)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (mlp, lambda: torch.randn(5, 8)),
    "conv": (conv_net, lambda: torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)),
    "conv in 1 and 3 dimensions": (Conv13d, lambda: torch.randn(2, 36)),
    "tied": (Tied, lambda: torch.randint(0, 11, (2, 5))),
}


def forward(model: nn.Module, x: Tensor, format: str = "bf16") -> Tensor:
    with torch.autocast("cpu", torch_dtype(format)):
        return model(x).float().square().mean()


def gradients(model: nn.Module, x: Tensor, format: str = "bf16") -> dict[str, Tensor | None]:
    model.zero_grad()
    forward(model, x, format).backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def lender(model: nn.Module, format: str = "bf16") -> Callable[..., Any]:
    apply(model, format, emulate=True)
    casts = WeightCasts(model, torch_dtype(format))
    return lambda mark=None: casts.lent(current_plan(model), mark)


def same(a: dict[str, Tensor | None], b: dict[str, Tensor | None]) -> bool:
    return a.keys() == b.keys() and all(
        (one is None and b[name] is None) or (one is not None and b[name] is not None and torch.equal(one, b[name]))
        for name, one in a.items()
    )


@pytest.mark.parametrize("format", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_are_those_of_autocast(kind: str, format: str) -> None:
    build, inputs = MODELS[kind]
    model, x = build(), inputs()
    lent = lender(model, format)
    loss, expected = forward(model, x, format), gradients(model, x, format)
    for _ in range(2):
        with lent():
            assert torch.equal(forward(model, x, format), loss)
            assert same(gradients(model, x, format), expected)


def test_casts_and_gradients_keep_the_memory_format() -> None:
    model, x = conv_net(), MODELS["conv"][1]()
    lent = lender(model)
    with lent():
        cast = model[0].lent_cast._casts.made[0]
        assert cast.stride() == model[0].weight.stride()
        gradients(model, x)
    assert model[0].weight.grad.stride() == model[0].weight.stride()


def test_all_weights_are_cast_by_one_operation_and_so_are_gradients() -> None:
    model, x = mlp(), torch.randn(5, 8, dtype=torch.bfloat16)
    lent = lender(model)
    with Operations() as counted, lent():
        loss = forward(model, x)
        before = counted.seen.copy()
        loss.backward()
    assert (before["_foreach_copy_"], before["_to_copy"]) == (1, 1), "the weights; the output, to FP32"
    after = counted.seen - before
    assert (after["_foreach_copy_"], after["_to_copy"], after["clone"]) == (1, 1, 0), "a clone would not be ours alone"


def test_a_tied_weight_is_cast_once() -> None:
    model = Tied()
    with lender(model)():
        assert model.body.lent_cast._casts is model.head.lent_cast._casts
        assert len(model.body.lent_cast._casts.made) == 4, "two weights of three layers, two biases"


def test_what_is_lent_with_a_mark_is_cast_once_and_serves_every_backward() -> None:
    model, x = mlp(), torch.randn(5, 8)
    lent = lender(model)
    gradients(model, x)
    forward(model, x).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with Operations() as counted:
        for _ in range(2):
            with lent("window"):
                forward(model, x).backward()
    assert counted.seen["_foreach_copy_"] == 1 + 2
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))
    with torch.no_grad():
        model[0].weight.data.zero_()
        model[0].bias.data.zero_()
        with lent("window"), torch.autocast("cpu", torch.bfloat16):
            assert model[0](x).any()
        with lent("another"), torch.autocast("cpu", torch.bfloat16):
            assert not model[0](x).any()


def test_frozen_parameters_are_left_to_autocast() -> None:
    model, x = mlp(), torch.randn(5, 8)
    lent = lender(model)
    model[0].weight.requires_grad_(False)
    model[4].bias.requires_grad_(False)
    expected = gradients(model, x)
    with lent():
        assert LENT not in vars(model[0])
        assert len(model[4].lent_cast._casts.made) == 2, "weights of the other two layers"
        assert same(gradients(model, x), expected)
    assert (expected["0.weight"], expected["4.bias"]) == (None, None)
    model[0].weight.requires_grad_(True)
    with lent():
        assert LENT in vars(model[0]), "trained from now on"


def test_units_outside_of_the_base_format_are_not_lent_to() -> None:
    model = mlp()
    apply(model, "bf16", emulate=True)
    casts = WeightCasts(model, torch.bfloat16)
    with casts.lent(current_plan(model)):
        assert LENT in vars(model[4])
    apply(model, PrecisionPlan.of("bf16", pin={"4": "fp32"}), emulate=True)
    with casts.lent(current_plan(model)):
        assert LENT not in vars(model[4])
        assert LENT in vars(model[0])
    apply(model, PrecisionPlan.of("bf16", pin={"2": "nvfp4"}), emulate=True)
    with casts.lent(current_plan(model)):
        assert LENT not in vars(model[2])
        assert LENT in vars(model[0])


def test_a_weight_that_is_written_or_replaced_inside_is_what_counts() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(5, 8)
    lent = lender(model)
    with lent("same"), torch.autocast("cpu", torch.bfloat16):
        zero = {"weight": torch.zeros(8, 8), "bias": torch.zeros(8)}
        assert not torch.func.functional_call(model[0], zero, (x,)).any()
        with torch.no_grad():
            model[0].weight.zero_()
            model[0].bias.zero_()
        assert not model[0](x).any()
        model[0].weight = nn.Parameter(torch.ones(8, 8))
        assert model[0](x).any()
    with lent():
        assert len(model[0].lent_cast._casts.made) == 2
        assert model[0].lent_cast._weight is model[0].weight, "looked for again"


def test_a_weight_read_by_other_code_is_the_parameter() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(5, 8)
    with lender(model)():
        assert model[0].weight.dtype == torch.float32
        assert F.linear(x, model[0].weight).dtype == torch.float32


def test_a_layer_that_did_not_run_has_no_gradient() -> None:
    model, x = Attention(), torch.randn(2, 5, 8)
    model.unused = nn.Linear(8, 8)
    with lender(model)():
        found = gradients(model, x)
    assert found["unused.weight"] is None
    assert found["q.weight"] is not None


def test_a_backward_that_reaches_no_layer_gives_none_a_gradient() -> None:
    class Stops(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:
            return None

    model, x = mlp(), torch.randn(5, 8)
    with lender(model)(), torch.autocast("cpu", torch.bfloat16):
        Stops.apply(model(x)).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hooks_of_parameters_see_fp32_gradients() -> None:
    model, x = mlp(), torch.randn(5, 8)
    seen: list[torch.dtype] = []
    model[0].weight.register_hook(lambda grad: seen.append(grad.dtype))
    model[0].bias.register_post_accumulate_grad_hook(lambda bias: seen.append(bias.grad.dtype))
    with lender(model)():
        gradients(model, x)
    assert seen == [torch.float32] * 2


def test_gradients_can_be_differentiated_again() -> None:
    def second(model: nn.Module, x: Tensor) -> Tensor:
        first = torch.autograd.grad(forward(model, x), model[0].weight, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), model[2].weight)[0]

    model, x = mlp(), torch.randn(5, 8)
    lent = lender(model)
    expected = second(model, x)
    with lent():
        assert torch.equal(second(model, x), expected)


def test_layers_that_read_one_tensor_share_its_cast() -> None:
    model, x = Attention(), torch.randn(2, 5, 8)
    lent = lender(model)
    plain = gradients(model, x)
    model.zero_grad()
    with lent(), Operations() as counted:
        loss = forward(model, x)
        casts = counted.seen["_to_copy"]
        loss.backward()
    assert casts == 1 + 1, "of the hidden state and of the output"
    assert counted.seen["_to_copy"] == 2 * casts
    for name, parameter in model.named_parameters():
        exact = not name.startswith("norm")
        torch.testing.assert_close(parameter.grad, plain[name], rtol=0 if exact else 2**-6, atol=0 if exact else 1e-4)


def test_an_input_that_changes_in_place_between_two_layers_is_seen() -> None:
    class Changes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            hidden = x * 1.5
            first = self.first(hidden)
            hidden.add_(1)
            return first + self.second(hidden)

    model, x = Changes(), torch.randn(5, 8)
    lent = lender(model)
    expected = gradients(model, x)
    with lent():
        assert same(gradients(model, x), expected)


def test_an_input_and_its_cast_live_no_longer_than_before() -> None:
    alive: list[weakref.ref[Tensor]] = []

    class Watched(Attention):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.norm(x)
            alive.append(weakref.ref(hidden))
            return self.q(hidden) + self.k(hidden)

    model = Watched()
    apply(model, "bf16", emulate=True)
    casts = WeightCasts(model, torch.bfloat16)
    with casts.lent(current_plan(model)):
        loss = forward(model, torch.randn(2, 5, 8))
        gc.collect()
        assert alive[0]() is None
        assert casts._inputs._last is None
        x = torch.randn(2, 5, 8)
        with torch.autocast("cpu", torch.bfloat16):
            model.q(x)
        assert casts._inputs._last is not None
        casts.forward_ended()
        assert casts._inputs._last is None
        with torch.autocast("cpu", torch.bfloat16):
            model.q(x)
        loss.backward()
    assert casts._inputs._last is None


def test_casts_die_with_the_step_or_when_they_are_dropped() -> None:
    model = mlp()
    apply(model, "bf16", emulate=True)
    casts = WeightCasts(model, torch.bfloat16)
    for mark in (None, "window"):
        with casts.lent(current_plan(model), mark):
            made = weakref.ref(casts._casts.made[0])
        assert (made() is None) == (mark is None)
        casts.drop()
        assert made() is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_numbers(reentrant: bool) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.out, self.checkpointed = Attention(), nn.Linear(8, 8), False

        def forward(self, x: Tensor) -> Tensor:
            x = self.attention.norm(x)
            before = self.out(x)
            if not self.checkpointed:
                return before + self.out(self.attention(x)) + self.out(x)
            inner = checkpoint(lambda y: self.out(self.attention(y)), x, use_reentrant=reentrant)
            return before + inner + self.out(x)

    model = nn.Sequential(Block(), Block())
    x = torch.randn(2, 5, 8, requires_grad=True)
    lent = lender(model)
    with lent():
        expected = gradients(model, x)
        for block in model:
            block.checkpointed = True
        found = gradients(model, x)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=2**-6 if reentrant else 0, atol=1e-4 if reentrant else 0)


def test_an_exception_leaves_nothing_lent() -> None:
    model = mlp()
    lent = lender(model)
    with pytest.raises(RuntimeError, match="stop"), lent():
        raise RuntimeError("stop")
    assert all(LENT not in vars(module) for module in model.modules())


def test_copies_and_pickles_made_inside_have_nothing_of_it() -> None:
    model, x = mlp(), torch.randn(5, 8)
    with lender(model)():
        loss = forward(model, x)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for made in copies:
            assert all(LENT not in vars(module) for module in made.modules())
            assert torch.equal(forward(made, x), loss)


def test_a_model_without_such_layers_is_lent_nothing() -> None:
    model = nn.Sequential(nn.LayerNorm(8))
    with lender(model)():
        gradients(model, torch.randn(5, 8))


def test_a_weight_that_is_stored_in_bf16_meanwhile_needs_no_cast() -> None:
    """The optimizer may change how it stores a weight between two steps of one plan."""
    model, x = mlp(), torch.randn(4, 8)
    lent = lender(model)
    model[0].weight.data = model[0].weight.data.bfloat16().float()
    expected = gradients(model, x)
    with lent():
        assert LENT in vars(model[0])
    for dtype in (torch.bfloat16, torch.float32):
        model.zero_grad()
        model[0].weight.data = model[0].weight.data.to(dtype)
        model[0].weight.grad_dtype = torch.float32
        with lent():
            assert (LENT in vars(model[0])) == (dtype is torch.float32)
            assert same(gradients(model, x), expected)
