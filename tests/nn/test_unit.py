"""A unit's forward in each precision, alone: conversion of whole models is tested in test_convert."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from deepseek_mp.backends import Capabilities, autocast
from deepseek_mp.errors import ConfigError, FormatError
from deepseek_mp.nn import Unit, apply, register_unit
from deepseek_mp.nn import unit as unit_module
from deepseek_mp.nn.nested import map_leaves
from deepseek_mp.precision import PrecisionPlan

CPU = torch.device("cpu")


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_leaves(tree, lambda leaf: found.append(leaf) if isinstance(leaf, Tensor) else None)
    return found


def _backward(module: nn.Module, output: Any, inputs: tuple[Tensor, ...]) -> list[Tensor | None]:
    """Gradients of a fixed function of the output: of the parameters, then of the inputs."""
    total = sum((tensor.double() * torch.arange(tensor.numel()).view_as(tensor)).sum() for tensor in _tensors(output))
    wanted = [*module.parameters(), *(x for x in inputs if x.requires_grad)]
    return list(torch.autograd.grad(total, wanted, allow_unused=True)) if wanted else []


def _require_grad(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.requires_grad_() if x.is_floating_point() else x for x in inputs)


def test_a_unit_pinned_to_fp32_is_bitwise_fp32_inside_a_bf16_region(kind: Any, everything: Capabilities) -> None:
    module = kind.make()
    plain = copy.deepcopy(module)
    narrow = tuple(x.bfloat16() if x.is_floating_point() else x for x in kind.inputs())

    wide_inputs = _require_grad(tuple(x.float() if x.is_floating_point() else x for x in narrow))
    expected = plain(*wide_inputs)
    expected_grads = _backward(plain, expected, wide_inputs)

    apply(model := nn.Sequential(module), PrecisionPlan.of("bf16", {"0": "fp32"}), capabilities=everything)
    assert type(model[0]).__name__ == type(plain).__name__
    inputs = _require_grad(narrow)
    with autocast(CPU, "bf16"):
        output = module(*inputs)
    grads = _backward(module, output, inputs)

    for got, want in zip(_tensors(output), _tensors(expected), strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, want)
    parameters = len(list(module.parameters()))
    for got, want in zip(grads[:parameters], expected_grads[:parameters], strict=True):
        assert torch.equal(got, want)
    for got, want in zip(grads[parameters:], expected_grads[parameters:], strict=True):
        assert torch.equal(got, want.bfloat16())  # an input's gradient has the input's type


def test_a_bf16_unit_of_an_fp32_model_computes_as_autocast_and_gives_back_fp32(
    kind: Any, everything: Capabilities
) -> None:
    module, inputs = kind.make(), kind.inputs()
    plain = copy.deepcopy(module)
    apply(nn.Sequential(module), PrecisionPlan.of("fp32", {"0": "bf16"}), capabilities=everything)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected = plain(*inputs)
    for got, want in zip(_tensors(module(*inputs)), _tensors(expected), strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, want.float())


def test_a_unit_in_the_base_format_is_the_original_forward(kind: Any, everything: Capabilities) -> None:
    module, inputs = kind.make(), kind.inputs()
    plain = copy.deepcopy(module)
    apply(module, "bf16", capabilities=everything)
    for region in ("bf16", "fp32"):
        with autocast(CPU, region):
            for got, want in zip(_tensors(module(*inputs)), _tensors(plain(*inputs)), strict=True):
                assert got.dtype == want.dtype
                assert torch.equal(got, want)


def test_pins_change_numbers(everything: Capabilities) -> None:
    """Guards the tests above: the two formats do differ on this machine."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(4, 64)
    outputs = []
    for recipe in ("fp32", "bf16"):
        apply(model, PrecisionPlan.of("bf16", {"0": recipe}), capabilities=everything)
        with autocast(CPU, "bf16"):
            outputs.append(model(x))
    assert outputs[0].dtype == torch.float32
    assert outputs[1].dtype == torch.bfloat16
    assert not torch.equal(outputs[0], outputs[1].float())


def test_an_fp64_unit_takes_and_gives_the_type_of_the_model_around_it(everything: Capabilities) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).double(), nn.Linear(4, 4))
    apply(model, PrecisionPlan.of("fp32", {"1": "fp64"}), capabilities=everything)
    seen = []
    model[1].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    x = torch.randn(3, 4)
    want = model[1].original_class.forward(model[1], model[0](x).double()).float()
    assert torch.equal(model[:2](x), want)
    model(x).sum().backward()
    assert seen[-1] == torch.float32
    assert model[1].weight.grad.dtype == torch.float64


def test_narrow_and_fp32_units_inside_an_fp64_model(everything: Capabilities) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)).double()
    model[0].float()
    model[1].float()
    apply(model, PrecisionPlan.of("fp64", {"0": "bf16", "1": "fp32"}), capabilities=everything)
    output = model(torch.randn(3, 4, dtype=torch.float64))
    output.sum().backward()
    assert output.dtype == torch.float64
    assert [layer.weight.grad.dtype for layer in model] == [torch.float32, torch.float32, torch.float64]


def test_inputs_are_cast_wherever_they_stand(everything: Capabilities) -> None:
    """Nested tuples, keywords and packed sequences; integers and flags are left alone."""
    seen: list[Any] = []

    @register_unit
    class Recorder(nn.Linear):
        def forward(self, x: Tensor, more: Any = None, *, extra: Any = None) -> Tensor:
            seen.append((x, more, extra))
            return super().forward(x)

    module = Recorder(4, 4)
    apply(nn.Sequential(module), PrecisionPlan.of("bf16", {"0": "fp32"}), capabilities=everything)
    half, count = torch.randn(2, 4).bfloat16(), torch.arange(3)
    module(half, (half, [count, None]), extra={"flag": True, "value": half})
    x, (nested, [integers, nothing]), extra = seen[0]
    assert [x.dtype, nested.dtype, extra["value"].dtype] == [torch.float32] * 3
    assert integers is count
    assert nothing is None
    assert extra["flag"] is True


def test_keyword_only_input(scaled: Any, everything: Capabilities) -> None:
    module = scaled(4)
    apply(nn.Sequential(module), PrecisionPlan.of("bf16", {"0": "fp32"}), capabilities=everything)
    x = torch.randn(2, 4).bfloat16()
    assert torch.equal(module(x=x, double=True), 2 * (x.float() @ module.matrix) * module.scale)


@pytest.mark.parametrize("recurrent", [nn.RNN, nn.LSTM, nn.GRU])
def test_packed_sequences_and_state_pass_through_a_pinned_recurrent_unit(
    recurrent: Any, everything: Capabilities
) -> None:
    module = recurrent(5, 6)
    module.flatten_parameters()
    plain = copy.deepcopy(module)
    apply(nn.Sequential(module), PrecisionPlan.of("bf16", {"0": "fp32"}), capabilities=everything)
    module.flatten_parameters()
    packed = pack_padded_sequence(torch.randn(4, 3, 5).bfloat16(), torch.tensor([2, 4, 1]), enforce_sorted=False)
    state = torch.randn(1, 3, 6)
    state = (state, state) if recurrent is nn.LSTM else state
    expected, _ = plain(packed.to(torch.float32), state)
    with autocast(CPU, "bf16"):
        output, _ = module(packed, map_leaves(state, Tensor.bfloat16))
    assert type(output) is type(packed)
    assert output.data.dtype == torch.float32
    assert torch.allclose(output.data, expected.data, atol=5e-2)  # the state was rounded to bf16
    exact, _ = module(packed, map_leaves(state, Tensor.float))
    assert torch.equal(exact.data, expected.data)


def test_on_a_device_without_autocast_a_narrow_unit_refuses_and_an_fp32_unit_runs(everything: Capabilities) -> None:
    """A model can be moved after its conversion; torch.autocast itself would warn and run FP32."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    apply(model, PrecisionPlan.of("fp16", {"0": "bf16", "1": "fp32"}), capabilities=everything)
    model.to("meta")
    x = torch.empty(2, 4, device="meta")
    with pytest.raises(FormatError, match="cannot run bf16 on device 'meta'"):
        model[0](x)
    assert model[1](x.bfloat16()).dtype == torch.float32


def test_batch_norm_pinned_to_fp32_updates_its_statistics_from_fp32(everything: Capabilities) -> None:
    module = nn.BatchNorm1d(4)
    plain = copy.deepcopy(module)
    apply(nn.Sequential(module), PrecisionPlan.of("bf16", {"0": "fp32"}), capabilities=everything)
    x = torch.randn(16, 4).bfloat16()
    with autocast(CPU, "bf16"):
        module(x)
    plain(x.float())
    assert torch.equal(module.running_var, plain.running_var)
    assert module.num_batches_tracked == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_in_the_units_precision(reentrant: bool, everything: Capabilities) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
    apply(model, PrecisionPlan.of("bf16", {"2": "fp32"}), capabilities=everything)
    x = torch.randn(4, 16, requires_grad=True)
    seen = []
    model[2].register_forward_hook(lambda module, args, output: seen.append(output.dtype))

    def gradients(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        x.grad = None
        model.zero_grad()
        with autocast(CPU, "bf16"):
            loss = call(x).float().square().sum()
        loss.backward()
        return [x.grad, *(p.grad for p in model.parameters())]

    straight = gradients(model)
    recomputed = gradients(lambda value: checkpoint(model, value, use_reentrant=reentrant))
    assert seen == [torch.float32] * 3  # straight, first forward, recomputation
    for got, want in zip(recomputed, straight, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("base", ["bf16", "fp32"])
def test_a_compiled_model_computes_the_same_and_follows_a_switch(
    base: str, everything: Capabilities, fresh_compiler: None
) -> None:
    torch.manual_seed(0)
    other = "fp32" if base == "bf16" else "bf16"
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16))
    x = torch.randn(4, 16)
    apply(model, PrecisionPlan.of(base, {"0": other}), capabilities=everything)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for pin in ({"0": other}, {"2": other}, {"1": other, "2": other}, {}, {"0": other}):
        apply(model, PrecisionPlan.of(base, pin), capabilities=everything)
        with autocast(CPU, base):
            got, want = compiled(x), model(x)
        wide = base == "fp32" or "2" in pin
        assert got.dtype == want.dtype == (torch.float32 if wide else torch.bfloat16)
        assert torch.equal(got, want)
        results.append(got)
    assert not torch.equal(results[0].float(), results[1].float())


def test_the_generated_class_stands_for_the_original(kind: Any, everything: Capabilities) -> None:
    module = kind.make()
    original = type(module)
    before = repr(module)
    apply(module, "bf16", capabilities=everything)
    assert isinstance(module, original)
    assert isinstance(module, Unit)
    assert (type(module).__name__, type(module).__qualname__) == (original.__name__, original.__qualname__)
    assert repr(module) == before
    # torch.compile ignores attribute changes of modules that say they are torch's own.
    assert not type(module).__module__.startswith("torch.")


def test_the_class_is_generated_once(everything: Capabilities) -> None:
    first, second = nn.Linear(2, 2), nn.Linear(3, 3)
    apply(first, "fp32", capabilities=everything)
    converted = type(first)
    apply(second, "bf16", capabilities=everything)
    apply(first, "bf16", capabilities=everything)
    assert type(first) is type(second) is converted


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 4), lambda: nn.LSTM(4, 4), lambda: nn.BatchNorm1d(4)])
def test_pickle_and_deepcopy_keep_precision_and_values(
    make: Any, monkeypatch: pytest.MonkeyPatch, everything: Capabilities
) -> None:
    model = nn.Sequential(make())
    apply(model, PrecisionPlan.of("bf16", {"0": "fp32"}), capabilities=everything)
    stored = pickle.dumps(model)
    copied = copy.deepcopy(model)
    monkeypatch.setattr(unit_module, "_unit_classes", {})  # as in a fresh process
    for same in (pickle.loads(stored), copied):
        assert type(same[0]).__name__ == type(model[0]).__name__
        assert same[0].unit_precision == model[0].unit_precision
        assert same.state_dict().keys() == model.state_dict().keys()
        for got, want in zip(same.parameters(), model.parameters(), strict=True):
            assert got is not want
            assert torch.equal(got, want)
        x = torch.randn(3, 4).bfloat16()
        with autocast(CPU, "bf16"):
            assert torch.equal(_tensors(same(x))[0], _tensors(model(x))[0])


def test_a_class_with_its_own_reduce_keeps_it(everything: Capabilities) -> None:
    @register_unit
    class OwnReduce(nn.Linear):
        def __reduce__(self) -> tuple[Any, ...]:
            return nn.Linear, (self.in_features, self.out_features)

    module = OwnReduce(2, 3)
    apply(module, "fp32", capabilities=everything)
    assert type(copy.deepcopy(module)) is nn.Linear


@pytest.mark.parametrize(
    "bad",
    [nn.Linear(2, 2), int, type("NoForward", (nn.Module,), {}), torch.jit.ScriptModule],
    ids=["instance", "no module", "no forward", "scripted"],
)
def test_register_unit_refuses_what_cannot_be_a_unit(bad: Any) -> None:
    with pytest.raises(ConfigError, match=r"register_unit\(.*Allowed: a subclass of torch\.nn\.Module"):
        register_unit(bad)


def test_the_precision_cannot_be_changed_in_place(everything: Capabilities) -> None:
    module = nn.Linear(2, 2)
    apply(module, "fp32", capabilities=everything)
    with pytest.raises(AttributeError, match="cannot assign to field"):
        module.unit_precision.region = "bf16"
