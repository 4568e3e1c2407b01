"""Autocast and the graph under faults, beside what plain PyTorch does then.

The letters and numbers in the names are those of the project's list of faults, section D.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from safetensors.torch import load_model
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from deepseek_mp import MixedPrecisionTrainer, PrecisionPlan, autocast, backends
from deepseek_mp.errors import ConfigError, FormatError, PlanError
from deepseek_mp.trainer.checkpoint import read_checkpoint

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def data(count=12):
    inputs = torch.randn(count, 4, generator=torch.Generator().manual_seed(1))
    return inputs, inputs[:, :2].argmax(dim=1)


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def trainer_of(model, mode="bf16", **options):
    options = {"loss_scale_policy": 64.0, "optimizer": sgd, "device": "cpu", "emulate": True} | options
    return MixedPrecisionTrainer(model, mode, **options)


def growth(first, second):
    return (second.float().norm() / first.float().norm()).item()


class CountCasts(TorchDispatchMode):
    """Counts the casts of trained tensors to 16 bits."""

    def __init__(self):
        super().__init__()
        self.weights = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        narrow = (kwargs or {}).get("dtype") in HALF.values()
        self.weights += narrow and "_to_copy" in str(func) and args[0].requires_grad
        return func(*args, **(kwargs or {}))


# -- D01: weights that change inside a region --------------------------------------------------------


@pytest.mark.parametrize("format", HALF)
def test_d01_the_public_region_sees_weights_that_change_inside_it(format):
    layer, inputs = nn.Linear(4, 4, bias=False), data()[0]
    with autocast("cpu", format):
        first = layer(inputs)
        with torch.no_grad():
            layer.weight.mul_(2.0)
        second = layer(inputs)
    assert first.dtype == HALF[format]
    assert growth(first, second) == 2.0


def test_d01_torch_autocast_goes_on_with_the_old_weights():
    layer, inputs = nn.Linear(4, 4, bias=False), data()[0]
    with torch.autocast("cpu", torch.bfloat16):
        first = layer(inputs)
        with torch.no_grad():
            layer.weight.mul_(2.0)
        second = layer(inputs)
    assert growth(first, second) == 1.0


class EditsWeights(nn.Module):
    """Uses a layer, changes its weight as an average of weights would, and uses it again."""

    def __init__(self, *, trained):
        super().__init__()
        torch.manual_seed(0)
        self.student, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 2)
        self.teacher = nn.Linear(4, 4, bias=False).requires_grad_(trained)
        self.seen = []

    def forward(self, inputs):
        with torch.no_grad():
            first = self.teacher(inputs)
            self.teacher.weight.mul_(2.0)
            second = self.teacher(inputs)
        self.seen.append(growth(first, second))
        return self.head(self.student(inputs) + second)


def test_d01_a_frozen_teacher_updated_in_forward_is_seen_by_the_trainer():
    model = EditsWeights(trained=False)
    trainer = trainer_of(model)
    trainer.step(data())
    trainer.step(data())
    assert model.seen == [2.0, 2.0]


class Renewed(nn.Module):
    """A model whose only change of weights in forward comes before their first use, as in momentum contrast."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.seen = nn.Linear(4, 2, bias=False), []

    def forward(self, inputs):
        with torch.no_grad():
            self.layer.weight.mul_(2.0)
            expected = F.linear(inputs.bfloat16(), self.layer.weight.bfloat16())
        output = self.layer(inputs)
        self.seen.append(torch.equal(output.detach(), expected))
        return output


def test_d01_a_trained_weight_changed_before_its_use_is_seen_in_every_micro_batch():
    model = Renewed()
    trainer = trainer_of(model, gradient_accumulation_steps=2)
    for _ in range(4):
        trainer.step(data())
    assert model.seen == [True] * 4


def test_d01_a_weight_that_requires_grad_changed_between_two_uses_is_seen_by_the_trainer():
    model = EditsWeights(trained=True)
    trainer = trainer_of(model)
    for _ in range(3):
        trainer.step(data())
    assert model.seen == [2.0] * 3


def test_d01_casts_are_cached_once_a_forward_has_left_the_weights_alone():
    class TwoUses(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.casts = nn.Linear(4, 4), []

        def forward(self, inputs):
            with CountCasts() as counted:
                hidden = F.linear(inputs, self.layer.weight, self.layer.bias)  # the layer itself is lent its casts
                output = F.linear(hidden, self.layer.weight, self.layer.bias)
            self.casts.append(counted.weights)
            return output

    model = TwoUses()
    trainer = trainer_of(model)
    for _ in range(3):
        trainer.step((torch.ones(2, 4), torch.zeros(2, dtype=torch.long)))
    assert model.casts == [4, 2, 2]  # weight and bias, for each use and then once


# -- D02: without gradients first, then with -----------------------------------------------------------


class LooksFirst(nn.Module):
    """Calls its layer without gradients before it calls it with them, in one region."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 2)

    def forward(self, inputs):
        with torch.no_grad():
            self.layer(inputs)
        return self.layer(inputs)


def gradients(model, format):
    """Loss and gradients of one backward in plain PyTorch's region, without its cache."""
    inputs, target = data()
    with torch.autocast("cpu", HALF[format], cache_enabled=False):
        loss = F.cross_entropy(model(inputs).float(), target)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("format", HALF)
def test_d02_gradients_are_there_after_a_forward_without_them(format):
    plain, model = nn.Sequential(nn.Linear(4, 2)), LooksFirst()
    plain[0].load_state_dict(model.layer.state_dict())
    expected = gradients(plain, format)
    trainer = trainer_of(model, format, loss_scale_policy="none")
    assert trainer.step(data()).status == "applied"
    moved = {n: (p - q) / 0.1 for (n, p), q in zip(plain.named_parameters(), model.parameters(), strict=True)}
    for name, gradient in expected.items():
        torch.testing.assert_close(moved[name], gradient)


@pytest.mark.parametrize("cache", [False, True])
def test_d02_the_public_region_gives_gradients_after_a_forward_without_them(cache):
    layer, inputs = nn.Linear(4, 4), data()[0]
    with autocast("cpu", "bf16", cache=cache):
        with torch.no_grad():
            layer(inputs)
        output = layer(inputs)
    output.sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().sum() > 0


# -- D03: custom Functions ------------------------------------------------------------------------------


class Multiply(torch.autograd.Function):
    """A product whose author knew of FP32 only."""

    @staticmethod
    def forward(context, inputs, weight):
        context.save_for_backward(inputs, weight)
        return inputs @ weight.t()

    @staticmethod
    def backward(context, gradient):
        inputs, weight = context.saved_tensors
        return gradient @ weight, gradient.t() @ inputs


class MultiplyAware(Multiply):
    """The same, saying how it is to be called in a region."""

    forward = staticmethod(torch.amp.custom_fwd(Multiply.forward, device_type="cpu", cast_inputs=torch.float32))
    backward = staticmethod(torch.amp.custom_bwd(Multiply.backward, device_type="cpu"))


class UsesFunction(nn.Module):
    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.function, self.inner, self.head = function, nn.Linear(4, 4), nn.Linear(4, 2)
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, inputs):
        return self.head(self.function.apply(self.inner(inputs), self.weight))


def test_d03_a_function_without_custom_fwd_is_named():
    model = UsesFunction(Multiply)
    before = copy.deepcopy(model.state_dict())
    trainer = trainer_of(model)
    with pytest.raises(ConfigError, match=r"autograd\.Function Multiply .*BFloat16.*Allowed.*custom_fwd") as caught:
        trainer.step(data())
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_d03_plain_torch_does_not_name_it():
    model, (inputs, target) = UsesFunction(Multiply), data()
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(inputs), target)
    with pytest.raises(RuntimeError, match="BFloat16") as caught:
        loss.backward()
    assert "Multiply" not in str(caught.value)


@pytest.mark.parametrize(("function", "mode"), [(MultiplyAware, "bf16"), (MultiplyAware, "fp16"), (Multiply, "fp32")])
def test_d03_a_function_that_fits_its_region_trains(function, mode):
    assert trainer_of(UsesFunction(function), mode).step(data()).status == "applied"


class Refuses(torch.autograd.Function):
    """A Function that fails for a reason of its own."""

    @staticmethod
    def forward(context, inputs, weight):
        raise RuntimeError("the shapes do not fit")

    @staticmethod
    def backward(context, gradient):
        return None


def test_d03_other_errors_of_a_function_stay_as_they_are():
    with pytest.raises(RuntimeError, match=r"^the shapes do not fit$"):
        trainer_of(UsesFunction(Refuses)).step(data())


# -- D04: activation checkpointing ------------------------------------------------------------------------


class Recomputed(nn.Module):
    """A block with dropout that is computed again in backward; `reentrant=None` keeps its activations."""

    def __init__(self, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.stem, self.head = nn.Linear(4, 16), nn.Linear(16, 2)
        self.block = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.5), nn.Linear(64, 16))

    def forward(self, inputs):
        hidden = self.stem(inputs)
        if self.reentrant is None:
            return self.head(self.block(hidden))
        return self.head(checkpoint(self.block, hidden, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("mode", "pin"), [("bf16", {}), ("fp16", {}), ("fp32", {}), ("bf16", {"block.3": "fp32"})])
def test_d04_recomputing_gives_the_same_gradients(reentrant, mode, pin):
    kept, recomputed = Recomputed(None), Recomputed(reentrant)
    norms = []
    for model in (kept, recomputed):
        trainer = trainer_of(model, mode, pin=pin, gradient_accumulation_steps=2)
        torch.manual_seed(5)
        norms += [trainer.step(batch).grad_norm for batch in [data(), data(5)] * 2]
    assert norms[1] == norms[5]
    for one, two in zip(kept.parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("reentrant", [False, True])
def test_d04_a_skipped_step_with_recomputation_is_replayed_and_named(reentrant):
    trainer = trainer_of(Recomputed(reentrant), "bf16")
    spoil = trainer.model.block[3].register_forward_hook(lambda module, args, output: output * math.inf)
    result = trainer.step(data())
    spoil.remove()
    assert (result.status, result.first_bad_module) == ("skipped", "block.3")
    assert trainer.step(data()).status == "applied"


# -- D05: a precision that is not there ---------------------------------------------------------------------


def without(monkeypatch, *formats):
    """The CPU as one that multiplies none of these formats; those that it does it can run without units, too."""
    found = backends.capabilities("cpu")
    fewer = copy.copy(found)
    taken = found.matmul_formats & set(formats)
    object.__setattr__(fewer, "matmul_formats", found.matmul_formats - taken)
    object.__setattr__(fewer, "emulated_formats", found.emulated_formats | taken)
    monkeypatch.setattr(backends, "capabilities", lambda device: fewer)


@pytest.mark.parametrize("mode", ["bf16", "fp16"])
def test_d05_a_format_the_device_lacks_is_an_error_that_names_the_nearest(monkeypatch, mode):
    without(monkeypatch, "bf16", "fp16")
    model = LooksFirst()
    with pytest.raises(FormatError, match=rf"does not multiply {mode}\. Allowed: .*fp32.*Use '\w+', the nearest"):
        MixedPrecisionTrainer(model, mode, device="cpu")
    assert type(model.layer) is nn.Linear


def test_d05_tf32_on_a_cpu_is_an_error_even_when_emulation_is_allowed():
    with pytest.raises(FormatError, match=r"does not multiply tf32.*nearest it has"):
        MixedPrecisionTrainer(LooksFirst(), "tf32", device="cpu", emulate=True)


def test_d05_an_emulated_format_is_what_runs_and_is_labelled_so(monkeypatch):
    without(monkeypatch, "fp16")
    trainer = MixedPrecisionTrainer(nn.Sequential(nn.Linear(4, 2)), "fp16", device="cpu", emulate=True)
    dtypes = []
    trainer.model[0].register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    assert trainer.step(data()).scale > 1.0
    assert dtypes == [torch.float16]
    assert [str(decision.reason) for decision in trainer.plan.decisions] == ["emulated"]


def test_d05_the_public_region_refuses_what_torch_autocast_runs_in_fp32():
    layer, inputs = nn.Linear(4, 4), data()[0]
    with pytest.warns(UserWarning, match="autocast"), torch.autocast("cpu", torch.float64):
        silently = layer(inputs)
    assert silently.dtype == torch.float32
    with pytest.raises(FormatError, match=r"torch.autocast cannot run fp8_e4m3 on device 'cpu'.*Allowed: .*bf16"):
        autocast("cpu", "fp8_e4m3")


# -- D06: tied weights ----------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.mix, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.mix(self.embedding(tokens)))


def tokens():
    drawn = torch.randint(0, 11, (6, 5), generator=torch.Generator().manual_seed(1))
    return drawn, drawn.roll(-1, dims=1)


@pytest.mark.parametrize("mode", ["bf16", "fp16", "fp32"])
def test_d06_tied_weights_stay_tied_and_get_both_gradients(mode):
    model, reference = Tied(), Tied()
    trainer = trainer_of(model, mode)
    norm = trainer.step(tokens()).grad_norm
    assert model.head.weight is model.embedding.weight
    F.cross_entropy(reference(tokens()[0]).flatten(0, 1), tokens()[1].flatten()).backward()
    expected = torch.stack([p.grad.norm() for p in reference.parameters()]).norm().item()
    assert norm == pytest.approx(expected, rel={"fp32": 1e-6}.get(mode, 2e-2))
    assert len(list(model.parameters())) == 3


def test_d06_tied_weights_are_saved_once_and_load_into_the_plain_model(tmp_path):
    trainer = trainer_of(Tied(), ema_decay=0.9)
    trainer.step(tokens())
    saved = trainer.save(tmp_path)
    size = (saved / "model.safetensors").stat().st_size
    assert size < 4 * (11 * 8 + 8 * 8 + 8) + 2048  # the table once, and a header
    plain = Tied()
    load_model(plain, saved / "model.safetensors")
    assert plain.head.weight is plain.embedding.weight
    for name, value in plain.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name])
    resumed = trainer_of(Tied(), ema_decay=0.9)
    resumed.fit([tokens()], epochs=0, resume=tmp_path)
    assert resumed.model.head.weight is resumed.model.embedding.weight
    assert torch.equal(resumed.model.head.weight, trainer.model.head.weight)
    assert read_checkpoint(saved).tensors["ema"].keys() == {"embedding.weight", "mix.weight", "mix.bias"}


def test_d06_loading_by_assignment_breaks_the_tie_in_plain_torch():
    source, target = Tied(), Tied()
    target.load_state_dict({name: value.clone() for name, value in source.state_dict().items()}, assign=True)
    assert target.head.weight is not target.embedding.weight


# -- D07: regions in regions --------------------------------------------------------------------------------------


class Regions(nn.Module):
    """Layers in the trainer's region, in a region switched off, in one of the other format, and in-place ops."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.outer, self.exact, self.other, self.last = (nn.Linear(4, 4) for _ in range(4))
        self.dtypes = []

    def forward(self, inputs):
        hidden = self.outer(inputs)
        self.dtypes.append(hidden.dtype)
        with torch.autocast("cpu", enabled=False):
            exact = self.exact(hidden.float())
            self.dtypes.append(exact.dtype)
            with torch.autocast("cpu", torch.float16):
                inner = self.other(exact)
                self.dtypes.append(inner.dtype)
        total = hidden.float().add_(exact).mul_(0.5).add_(inner)
        last = self.last(total.relu_())
        self.dtypes.append(last.dtype)
        return last[:, :2]


def test_d07_nested_regions_run_in_the_formats_they_say():
    model = Regions()
    trainer = trainer_of(model, "bf16")
    for _ in range(2):
        assert trainer.step(data()).status == "applied"
    assert model.dtypes == [torch.bfloat16, torch.float32, torch.float16, torch.bfloat16] * 2
    assert not torch.is_autocast_enabled("cpu")


def test_d07_a_pinned_unit_is_fp32_inside_the_region_forward_and_backward():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    trainer = trainer_of(model, "bf16", pin={"1": "fp32"}, monitor_every=1)
    for _ in range(3):
        trainer.step(data())
    counts = trainer.monitor.log_precision_usage().counts
    products = [(row.layer, row.format, row.count) for row in counts if row.op in ("mm", "addmm")]
    assert {(layer, format) for layer, format, _ in products} == {("0", "bf16"), ("1", "fp32"), ("2", "bf16")}
    assert sum(count.forward for *_, count in products) == 3 * 3  # a product per layer and step
    assert sum(count.backward for *_, count in products) == 3 * 5  # two per layer, but for the first one's input


# -- D09: modules that are out of the ordinary -----------------------------------------------------------------------


def test_d09_batch_norm_on_one_sample_is_the_error_it_is_and_leaves_no_trace():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    trainer = trainer_of(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        trainer.step(data(1))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert trainer.steps_attempted == 0
    assert trainer.step(data()).status == "applied"
    assert trainer.predict(data(1)).shape == (1, 2)


class Lists(nn.Module):
    """Parameters in lists, and modules that have none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(4, 4)) for _ in range(2)])
        self.gains = nn.ParameterDict({"a": nn.Parameter(torch.ones(4))})
        self.nothing, self.act, self.head = nn.Identity(), nn.Sequential(nn.ReLU(), nn.Flatten()), nn.Linear(4, 2)

    def forward(self, inputs):
        for weight in self.weights:
            inputs = self.nothing(inputs @ weight)
        return self.head(self.act(inputs) * self.gains["a"])


@pytest.mark.parametrize("mode", ["bf16", "fp16", "fp32"])
def test_d09_parameter_lists_and_empty_modules_train_and_are_listed_as_not_controllable(tmp_path, mode):
    trainer = trainer_of(Lists(), mode, ema_decay=0.9)
    before = copy.deepcopy(trainer.model.state_dict())
    assert trainer.step(data()).status == "applied"
    assert all(not torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    reasons = {decision.layer: str(decision.reason) for decision in trainer.plan.decisions}
    assert reasons["weights"] == reasons["gains"] == "not_controllable"
    assert "head" in reasons
    trainer.save(tmp_path)
    resumed = trainer_of(Lists(), mode, ema_decay=0.9)
    resumed.fit([data()], epochs=0, resume=tmp_path)
    for one, two in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("mode", ["bf16", "auto", PrecisionPlan.of("fp32")])
def test_d09_lazy_modules_are_refused_early_with_what_to_do(mode):
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    with pytest.raises(PlanError, match=r"'0' has parameters without a shape yet.*Run one batch through the model"):
        trainer_of(model, mode)
    model(data()[0])
    assert trainer_of(model, "bf16").step(data()).status == "applied"


@pytest.mark.parametrize("model", [nn.Identity(), nn.Sequential(nn.ReLU()), nn.Linear(4, 2).requires_grad_(False)])
def test_d09_a_model_with_nothing_to_train_is_refused(model):
    with pytest.raises(ConfigError, match=r"without trainable parameters.*Allowed: at least one.*Unfreeze"):
        trainer_of(model)


def test_d09_a_rule_for_a_module_without_parameters_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(PlanError, match=r"rule '1' -> fp32 matches no layer of this model.*Allowed: a glob over '0'"):
        trainer_of(model, PrecisionPlan.of("bf16", {"1": "fp32"}))
    assert type(model[0]) is nn.Linear
