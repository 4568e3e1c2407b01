"""Conversion of whole models: what stays, what changes, what is said about it."""

import copy
import gc
import pickle
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from own_function import Twice
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal

from deepseek_mp.backends import Capabilities, autocast
from deepseek_mp.errors import ConfigError, PlanError
from deepseek_mp.nn import apply, convert, current_plan, fp32_arithmetic, kernels_in_force, revert, units
from deepseek_mp.nn.convert import prepare
from deepseek_mp.precision import Decision, PrecisionPlan, Reason

CPU = torch.device("cpu")
MIXED = PrecisionPlan.of("bf16", {"norm": "fp32", "head": "fp32"})


class Model(nn.Module):
    """Tied weights, a frozen layer, an adapter, a loose parameter, in-place and custom functions, two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)
        self.gains = nn.ParameterList([torch.ones(8)])
        self.act = nn.ReLU(inplace=True)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, shift: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        hidden = self.lstm(hidden)[0] + shift
        hidden = self.frozen(hidden) + self.up(self.down(hidden))
        hidden = Twice.apply(hidden) * self.gains[0]
        hidden += shift
        hidden = self.act(hidden)
        return self.head(self.norm(hidden.transpose(1, 2)).transpose(1, 2))


def _model() -> Model:
    torch.manual_seed(0)
    return Model()


def _batch() -> tuple[Tensor, Tensor]:
    return torch.randint(0, 16, (4, 5)), torch.randn(8)


def _picture(model: nn.Module) -> Any:
    """All that must not change: identities, names, values, strides, order of keys."""
    return (
        [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)],
        [(name, id(p), p.stride(), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)],
        [(name, id(b)) for name, b in model.named_buffers()],
        list(model.state_dict()),
        [value.tolist() for value in model.state_dict().values()],
        repr(model),
    )


def test_apply_switch_and_revert_leave_identity_alone(everything: Capabilities) -> None:
    model = _model()
    before, classes, attributes = _picture(model), _classes(model), _attributes(model)
    for plan in ("bf16", MIXED, PrecisionPlan.of("fp32", {"lstm": "bf16"}), MIXED):
        apply(model, plan, capabilities=everything)
        assert _picture(model) == before
        assert model.head.weight is model.embed.weight
    revert(model)
    assert _picture(model) == before
    assert _classes(model) == classes
    assert _attributes(model) == attributes
    assert current_plan(model) is None


def _classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def _attributes(model: nn.Module) -> list[list[str]]:
    return [list(module.__dict__) for module in model.modules()]


def test_a_switch_changes_no_class(everything: Capabilities) -> None:
    model = _model()
    apply(model, "fp32", capabilities=everything)
    classes, attributes = _classes(model), _attributes(model)
    apply(model, MIXED, capabilities=everything)
    assert (_classes(model), _attributes(model)) == (classes, attributes)


def test_applying_twice_is_applying_once(everything: Capabilities) -> None:
    model = _model()
    first = apply(model, MIXED, capabilities=everything)
    precisions = {name: module.unit_precision for name, module in units(model).items()}
    second = apply(model, MIXED, capabilities=everything)
    assert {name: module.unit_precision for name, module in units(model).items()} == precisions
    assert second.digest == first.digest
    assert [(d.layer, d.new, d.reason) for d in second.decisions] == [
        (d.layer, d.new, d.reason) for d in first.decisions
    ]
    assert apply(model, second, capabilities=everything) == second


def test_reverting_twice_and_reverting_a_plain_model_do_nothing(everything: Capabilities) -> None:
    model = _model()
    classes = _classes(model)
    revert(model)
    apply(model, "bf16", capabilities=everything)
    revert(model)
    revert(model)
    assert _classes(model) == classes


@pytest.mark.parametrize("plan", ["fp32", "bf16", MIXED, PrecisionPlan.of("fp32", {"lstm": "bf16", "down": "bf16"})])
def test_a_converted_model_trains_with_an_optimizer_made_before(
    plan: PrecisionPlan | str, everything: Capabilities
) -> None:
    model = _model()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    calls = []
    model.frozen.register_forward_hook(lambda module, args, output: calls.append(module))
    base = apply(model, plan, capabilities=everything).base.name
    tokens, shift = _batch()
    losses = []
    for _ in range(8):
        with autocast(CPU, base):
            loss = F.cross_entropy(model(tokens, shift).flatten(0, 1).float(), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert calls == [model.frozen] * 8
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert model.norm.running_var.dtype == torch.float32


def test_an_fp32_plan_is_bitwise_the_plain_model(everything: Capabilities) -> None:
    plain, model = _model(), _model()
    apply(model, "fp32", capabilities=everything)
    batch = _batch()
    for module in (plain, model):
        module(*batch).square().mean().backward()
    for (name, got), want in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (got.grad is None) == (want.grad is None), name
        assert got.grad is None or torch.equal(got.grad, want.grad), name


def test_a_pinned_unit_inside_a_bf16_model_gets_fp32_gradients_of_fp32_operands(everything: Capabilities) -> None:
    """The head's weight gradient is the product of what went in and what came back, in FP32."""
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 4, bias=False)})
    apply(model, PrecisionPlan.of("bf16", {"head": "fp32"}), capabilities=everything)
    seen: dict[str, Tensor] = {}
    model["head"].register_forward_pre_hook(lambda module, args: seen.update(x=args[0].detach()))
    model["head"].register_full_backward_hook(lambda module, gi, go: seen.update(grad=go[0]))
    with autocast(CPU, "bf16"):
        output = model["head"](model["body"](torch.randn(16, 8)))
    output.square().sum().backward()
    assert seen["x"].dtype == torch.bfloat16
    assert seen["grad"].dtype == torch.float32
    assert torch.equal(model["head"].weight.grad, seen["grad"].T @ seen["x"].float())


def test_saved_weights_load_into_the_plain_model_and_back(everything: Capabilities) -> None:
    model, plain = _model(), Model()
    apply(model, MIXED, capabilities=everything)
    plain.load_state_dict(model.state_dict())
    batch = _batch()
    revert_copy = copy.deepcopy(model)
    revert(revert_copy)
    assert torch.equal(plain.eval()(*batch), revert_copy.eval()(*batch))
    model.load_state_dict(plain.state_dict())
    assert model.head.weight is model.embed.weight


def test_a_deep_copy_is_converted_apart_from_its_original(everything: Capabilities) -> None:
    model = _model()
    apply(model, MIXED, capabilities=everything)
    copied = copy.deepcopy(model)
    assert current_plan(copied) == current_plan(model)
    assert copied.head.weight is copied.embed.weight
    assert copied.head.weight is not model.head.weight
    revert(copied)
    assert current_plan(model) is not None
    assert model.norm.unit_precision.recipe.name == "fp32"


def test_a_reverted_model_can_be_garbage_collected(everything: Capabilities) -> None:
    model = _model()
    apply(model, MIXED, capabilities=everything)
    reference = weakref.ref(model.head)
    del model
    gc.collect()
    assert reference() is None


def test_decisions_say_what_changed_and_why(everything: Capabilities) -> None:
    model = _model()
    resolved = apply(model, MIXED, capabilities=everything)
    said = {d.layer: (d.old, d.new, d.reason) for d in resolved.decisions}
    assert list(said) == ["embed", "lstm", "frozen", "down", "up", "gains", "norm", "head"]
    assert said["lstm"] == ("fp32", "bf16", Reason.REQUESTED)
    assert said["norm"] == ("fp32", "fp32", Reason.PINNED)
    assert said["gains"] == ("fp32", "bf16", Reason.NOT_CONTROLLABLE)
    details = {d.layer: d.detail for d in resolved.decisions}
    assert details["head"] == "shares its weight with 'embed' (bf16), each casts its own copy"
    assert "ParameterList" in details["gains"]
    assert "autocast's own list decides" in details["embed"]

    said = {d.layer: (d.old, d.new) for d in apply(model, "fp32", capabilities=everything).decisions}
    assert said["lstm"] == ("bf16", "fp32")
    assert said["norm"] == ("fp32", "fp32")
    assert said["gains"] == ("bf16", "fp32")


def test_measured_reasons_are_kept_and_derived_ones_are_not(everything: Capabilities) -> None:
    timed = Decision(
        layer="lstm", old="fp32", new="fp32", reason=Reason.MEASURED_SLOWER, detail="slow", evidence={"bf16_ms": 2.0}
    )
    whole = Decision(layer="", old="fp32", new="bf16", reason=Reason.MEASURED_FASTEST, evidence={"bf16_ms": 1.0})
    stale = Decision(layer="up", old="fp32", new="fp32", reason=Reason.MEASURED_SLOWER)
    derived = Decision(layer="down", old="fp32", new="bf16", reason=Reason.EMULATED)
    plan = replace(PrecisionPlan.of("bf16", {"lstm": "fp32"}), decisions=(timed, whole, stale, derived))
    model = _model()
    for old in ("fp32", "bf16"):
        resolved = apply(model, plan, capabilities=everything)
        assert resolved.decisions[0] == whole
        said = {d.layer: d for d in resolved.decisions}
        assert said["lstm"] == replace(timed, old=old)
        assert said["up"].reason == Reason.REQUESTED  # the decision it carried was for another format
        assert said["down"].reason == Reason.REQUESTED
        apply(model, "bf16", capabilities=everything)


def test_the_plan_in_force_is_the_one_applied_last(everything: Capabilities) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
    assert current_plan(model) is None
    part = apply(model[0], "bf16", capabilities=everything)
    assert current_plan(model[0]) == part
    whole = convert(model, "fp32", capabilities=everything)
    assert current_plan(model) == whole
    assert current_plan(model[0]) is None
    assert model[0][0].unit_precision.recipe.name == "fp32"


def test_a_model_that_is_one_unit(everything: Capabilities) -> None:
    model = nn.Linear(2, 2)
    resolved = apply(model, "bf16", capabilities=everything)
    assert [(d.layer, d.new) for d in resolved.decisions] == [("", "bf16")]
    revert(model)
    assert type(model) is nn.Linear
    assert "unit_precision" not in model.__dict__


def test_a_model_without_parameters(everything: Capabilities) -> None:
    model = nn.Sequential(nn.ReLU(), nn.Flatten())
    assert apply(model, "bf16", capabilities=everything).decisions == ()
    assert torch.equal(model(torch.ones(2, 2)), torch.ones(2, 2))


def test_revert_refuses_units_whose_class_something_else_changed(everything: Capabilities) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    apply(model, "bf16", capabilities=everything)
    orthogonal(model[1])
    with pytest.raises(PlanError, match=r"class of unit '1' was changed.*remove_parametrizations"):
        revert(model)
    assert current_plan(model) is not None
    nn.utils.parametrize.remove_parametrizations(model[1], "weight")
    revert(model)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]


def test_units_that_later_got_out_of_control_follow_the_base(everything: Capabilities) -> None:
    """In eval mode torch's fused encoder layer computes with its layers' weights; an old pin must not linger."""
    model = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    apply(model, PrecisionPlan.of("bf16", {"linear1": "fp32"}), capabilities=everything)
    resolved = apply(model.eval(), "bf16", capabilities=everything)
    assert {d.layer: (d.new, d.reason) for d in resolved.decisions}["linear1"] == ("bf16", Reason.NOT_CONTROLLABLE)
    assert model.linear1.unit_precision.region is None
    revert(model)
    assert type(model.linear1) is nn.Linear


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(PlanError, match="unknown recipe 'bf61'"):
        apply(nn.Linear(2, 2), "bf61")


@pytest.mark.parametrize(
    ("base", "pin", "mode"),
    [
        ("fp32", {}, "ieee"),
        ("bf16", {}, "ieee"),
        ("tf32", {"norm": "fp32"}, "tf32"),
        ("bf16", {"head": "tf32", "norm": "fp32"}, "tf32"),
        ("hf32", {}, "hf32"),
        ("fp16", {"head": "hf32"}, "hf32"),
    ],
)
def test_fp32_arithmetic_of_a_plan(base: str, pin: dict[str, str], mode: str) -> None:
    assert fp32_arithmetic(PrecisionPlan.of(base, pin)) == mode


# -- FP8 -----------------------------------------------------------------------------------------------


def _mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(128, 256), nn.ReLU(inplace=True), nn.LayerNorm(256), nn.Linear(256, 128), nn.Linear(128, 16)
    )


def _gradients(model: nn.Module, call: Any, x: Tensor) -> list[Tensor]:
    with autocast(CPU, "bf16"):
        output = call(x)
    return [output, *torch.autograd.grad(output.float().square().sum(), list(model.parameters()))]


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


FP8_PLANS = ["fp8", "tensor", "row_gw_hp", "block", "mx", PrecisionPlan.of("fp32", {"0": "block", "4": "row"})]


@pytest.mark.parametrize("plan", FP8_PLANS, ids=str)
def test_an_fp8_plan_is_taken_back_exactly(plan: PrecisionPlan | str) -> None:
    model, x = _mlp(), torch.randn(8, 128)
    before, attributes, numbers = _picture(model), _attributes(model), _gradients(model, model, x)
    apply(model, plan, emulate=True)
    assert _picture(model) == before
    assert not _same(_gradients(model, model, x), numbers)
    revert(model)
    assert (_picture(model), _attributes(model)) == (before, attributes)
    assert _same(_gradients(model, model, x), numbers)


def test_layers_in_fp8_and_fp32_beside_each_other() -> None:
    model, x = _mlp(), torch.randn(8, 128)
    apply(model, PrecisionPlan.of("block", {"3": "fp32"}), emulate=True)
    seen: dict[str, Any] = {}
    for name in ("0", "3", "4"):
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: (args[0].dtype, output.dtype)})
        )
    output = _gradients(model, model, x)[0]
    assert seen["0"] == (torch.float32, torch.bfloat16)
    assert seen["3"][1] == torch.float32
    assert output.dtype == torch.bfloat16
    plain = F.linear(model[2](model[1](model[0](x)).float()), model[3].weight, model[3].bias)
    assert plain.dtype == torch.float32


def test_an_fp8_layer_of_an_fp32_model_gives_fp32_back() -> None:
    model = _mlp()
    apply(model, PrecisionPlan.of("fp32", {"0": "block"}), emulate=True)
    x = torch.randn(8, 128)
    assert model[0](x).dtype == torch.float32
    assert torch.equal(model[0](x), model[0](input=x))
    model(x).sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_equal_precisions_are_one_object_also_after_copies_and_pickles() -> None:
    model = _mlp()
    apply(model, "block", emulate=True)
    first = [layer.unit_precision for layer in model if hasattr(layer, "unit_precision")]
    copied = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    apply(model, "bf16", emulate=True)
    assert model[0].unit_precision is not first[0]
    apply(model, "block", emulate=True)
    for again in (model, *copied):
        found = [layer.unit_precision for layer in again if hasattr(layer, "unit_precision")]
        assert all(a is b for a, b in zip(found, first, strict=True))
    other = _mlp()
    apply(other, "block", emulate=True)
    assert other[0].unit_precision is first[0]


def test_copies_compute_the_same_in_fp8() -> None:
    model, x = _mlp(), torch.randn(8, 128)
    apply(model, "row", emulate=True)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert current_plan(again) == current_plan(model)
        assert _same(_gradients(again, again, x), _gradients(model, model, x))


def test_a_plan_that_ran_before_compiles_nothing_again(fresh_compiler: None) -> None:
    model, x = _mlp(), torch.randn(8, 128)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for plan in ("block", "bf16", "block", "bf16", "block"):
        apply(model, plan, emulate=True)
        assert _same(_gradients(model, compiled, x), _gradients(model, model, x)), plan
    assert counter.frame_count == 2


def test_what_prepare_takes_apply_takes_and_prepare_changes_nothing() -> None:
    model = _mlp()
    before = _picture(model), _classes(model), _attributes(model)
    prepared = prepare(model, PrecisionPlan.of("bf16", {"0": "fp8"}), emulate=True)
    assert (_picture(model), _classes(model), _attributes(model)) == before
    assert prepared.plan == apply(model, PrecisionPlan.of("bf16", {"0": "fp8"}), emulate=True)
    assert prepared.plan.recipe_for("0").name == "row"


def test_the_kernels_that_were_asked_for_are_remembered() -> None:
    model = _mlp()
    assert kernels_in_force(model) is None
    apply(model, "block", emulate=True, kernels="reference")
    assert kernels_in_force(model) == "reference"
    apply(model, "block", emulate=True)
    assert kernels_in_force(model) is None


def test_an_fp8_plan_that_no_layer_takes_warns() -> None:
    model = nn.Sequential(nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 100))
    with pytest.warns(UserWarning, match="no layer of this model runs in block"):
        apply(model, "block", emulate=True)


def test_what_is_no_module_is_refused():
    with pytest.raises(ConfigError, match=r"a model of type int\. Allowed: a torch\.nn\.Module"):
        convert(3, "bf16")
    with pytest.raises(ConfigError, match="a model of type type"):
        revert(nn.Linear)
