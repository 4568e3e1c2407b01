"""What FP8 adds to the ways a step can go wrong: scales ruined by one value, by zeros, by nothing at all.

The letters and numbers in the names are those of the project's list of faults. Tests with `theirs` in the
name run the same fault through the shortest plain way to scale and cast. Everything here is emulated.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from deepseek_mp import PrecisionPlan, autocast, convert
from deepseek_mp.backends.capabilities import Identity, resolve
from deepseek_mp.errors import FormatError
from deepseek_mp.nn import apply
from deepseek_mp.ops.cast import cast, read_fp8

INF, NAN = float("inf"), float("nan")
RECIPES = ["tensor", "row", "row_gw_hp", "block", "mx"]
E4M3_MAX = 448.0


def mlp():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(128, 256), nn.ReLU(inplace=True), nn.Linear(256, 128), nn.Linear(128, 3))


def batch(size=16):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(size, 128, generator=generator), torch.randint(0, 3, (size,), generator=generator)


def in_region(model, x):
    with autocast("cpu", "bf16"):
        return model(x)


def layer(recipe):
    """One linear layer that runs in the recipe."""
    model = nn.Sequential(mlp()[0])
    convert(model, PrecisionPlan.of("bf16", {"0": recipe}), emulate=True)
    return model


def theirs_scaled(x, dim):
    """The usual line: scale by the largest magnitude, cast, scale back."""
    scale = E4M3_MAX / x.abs().amax(dim=dim, keepdim=True)
    return (x * scale).to(torch.float8_e4m3fn).float() / scale


# --------------------------------------------------------------------- B06 one infinity or NaN


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_b06_one_bad_element_spoils_its_own_row_only(recipe, bad):
    model, (x, _) = layer(recipe), batch()
    x[5, 7] = 0.0
    want = in_region(model, x)
    x[5, 7] = bad
    got = in_region(model, x)
    assert got[5].isnan().all()
    others = torch.arange(len(x)) != 5
    assert torch.equal(got[others], want[others])


@pytest.mark.parametrize("recipe", RECIPES)
def test_b06_in_the_weight_gradient_it_spoils_its_own_column_only(recipe):
    model, (x, _) = layer(recipe), batch()
    x[5, 7] = INF
    in_region(model, x)[torch.arange(len(x)) != 5].float().square().sum().backward()
    bad = model[0].weight.grad.isfinite().logical_not()
    assert bad[:, 7].all()
    assert bad.sum() == bad[:, 7].sum()


@pytest.mark.parametrize("recipe", RECIPES)
def test_b06_the_step_is_skipped_and_the_layer_named(recipe, make_trainer):
    trainer, (x, target) = make_trainer(recipe, model=mlp()), batch()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    poison(trainer.model[1], row=5, column=7)
    result = trainer.step((x, target))
    assert (result.status, result.first_bad_module) == ("skipped", "1")
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    trainer.model[1]._forward_hooks.clear()
    assert trainer.step((x, target)).status == "applied"


def poison(module, row, column):
    """The module's output gets one infinity."""

    def hook(module, args, output):
        output = output.clone()
        output[row, column] = INF
        return output

    module.register_forward_hook(hook)


@pytest.mark.parametrize("recipe", RECIPES)
def test_b06_a_layer_in_fp8_that_makes_the_first_bad_value_is_named(recipe, make_trainer):
    trainer, (x, target) = make_trainer(recipe, model=mlp()), batch()
    with torch.no_grad():
        trainer.model[2].weight[3, 4] = INF
    result = trainer.step((x, target))
    assert (result.status, result.first_bad_module) == ("skipped", "2")


def test_b06_theirs_one_infinity_takes_every_row():
    x, _ = batch()
    x[5, 7] = INF
    assert theirs_scaled(x, dim=(0, 1)).isnan().sum() + (theirs_scaled(x, dim=(0, 1)) == 0).sum() == x.numel()


# --------------------------------------------------------------------------------- B08 zeros


@pytest.mark.parametrize("recipe", RECIPES)
def test_b08_zero_rows_blocks_and_tensors_are_zeros(recipe):
    model, (x, _) = layer(recipe), batch()
    bias = model[0].bias.detach().bfloat16()
    for zeros in (slice(3, 4), slice(0, 8), slice(None)):
        x[zeros] = 0
        model.zero_grad()
        y = in_region(model, x)
        assert torch.equal(y[zeros], bias.expand_as(y[zeros]))
        (y * 0).float().sum().backward()
        assert not model[0].weight.grad.any()
    with torch.no_grad():
        model[0].weight.zero_()
    assert torch.equal(in_region(model, batch()[0]), bias.expand(16, -1))


@pytest.mark.parametrize("recipe", RECIPES)
def test_b08_a_step_on_nothing_but_zeros_is_applied(recipe, make_trainer):
    trainer, (x, target) = make_trainer(recipe, model=mlp()), batch()
    assert trainer.step((torch.zeros_like(x), target)).status == "applied"
    assert trainer.step((x * 1e-42, target)).status == "applied"  # below the smallest normal number
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())


def test_b08_theirs_a_row_of_zeros_becomes_nan():
    x, _ = batch()
    x[3] = 0
    assert theirs_scaled(x, dim=1)[3].isnan().all()


# -------------------------------------------------------------------------------- B09 no rows


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("shape", [(0, 128), (4, 0, 128)])
def test_b09_without_rows_the_output_is_empty_and_the_gradient_zero(recipe, shape):
    model = layer(recipe)
    x = torch.zeros(shape, requires_grad=True)
    y = in_region(model, x)
    assert y.shape == (*shape[:-1], 256)
    y.float().sum().backward()
    assert x.grad.shape == shape
    assert not model[0].weight.grad.any()
    assert not model[0].bias.grad.any()


class Experts(nn.Module):
    """Two experts, of which a batch of positive numbers uses one."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(128, 128), nn.Linear(128, 128), nn.Linear(128, 3)

    def forward(self, x):
        where = x.mean(1) > 0
        hidden = x.new_empty(len(x), 128, dtype=torch.bfloat16)
        hidden[where], hidden[~where] = self.first(x[where]), self.second(x[~where])
        return self.head(hidden)


@pytest.mark.parametrize("recipe", RECIPES)
def test_b09_an_expert_without_tokens_stays_as_it_is_and_the_step_is_applied(recipe, make_trainer):
    trainer = make_trainer(recipe, model=Experts(), optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    x, target = batch()
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    assert trainer.step((x.abs(), target)).status == "applied"
    moved = [not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True)]
    assert moved == [True, True, False, False, True, True]


def test_b09_theirs_an_empty_batch_has_no_largest_magnitude():
    with pytest.raises((RuntimeError, IndexError), match=r"amax|max\(\)"):
        theirs_scaled(torch.zeros(0, 128), dim=(0, 1))


# ------------------------------------------------------------- D01 weights changed in the region


@pytest.mark.parametrize("recipe", RECIPES)
def test_d01_weights_changed_between_two_forwards_of_one_region_are_used(recipe):
    model, (x, _) = layer(recipe), batch()
    with autocast("cpu", "bf16", cache=True):
        first = model(x)
        with torch.no_grad():
            model[0].weight.neg_()
            model[0].bias.neg_()
        second = model(x)
    assert torch.equal(second, -first)


class Twice(nn.Module):
    """Uses its layer, changes it, and uses it again: what a step of meta-learning does."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(128, 128), nn.Linear(128, 3)

    def forward(self, x):
        first = self.layer(x)
        with torch.no_grad():
            self.layer.weight.mul_(-1)
        return self.head(first + self.layer(x))


def test_d01_in_the_trainer_too(make_trainer):
    x, target = batch()
    trainer = make_trainer("block", model=Twice())
    trainer.model.layer.bias.data.zero_()
    sums = []
    trainer.model.head.register_forward_hook(lambda module, args, output: sums.append(args[0].abs().max()))
    for _ in range(2):
        trainer.step((x, target))
    assert sums[0] == 0  # x W + x (-W)


# ------------------------------------------------------------------- D04 activation checkpointing


class Dropped(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.body, self.dropout, self.reentrant = mlp(), nn.Dropout(0.3), reentrant

    def inner(self, x):
        return self.body(self.dropout(x))

    def forward(self, x):
        if self.reentrant is None:
            return self.inner(x)
        return checkpoint(self.inner, x.requires_grad_(), use_reentrant=self.reentrant)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_d04_recomputed_layers_give_the_gradients_of_the_first_forward(recipe, reentrant):
    gradients = []
    for how in (None, reentrant):
        torch.manual_seed(5)
        model, (x, target) = Dropped(how), batch()
        apply(model, recipe, emulate=True)
        F.cross_entropy(in_region(model, x).float(), target).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# ----------------------------------------------------------------------------- D08 torch.compile


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("recipe", RECIPES)
def test_d08_compiled_once_for_all_scales_with_the_numbers_of_eager_code(recipe, fresh_compiler):
    model, (x, _) = mlp(), batch()
    apply(model, recipe, emulate=True)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for factor in (1.0, 1e-6, 1e6, 0.0):
        results = []
        for call in (model, compiled):
            model.zero_grad()
            y = in_region(call, x * factor)
            y.float().square().sum().backward()
            results.append([y, *(parameter.grad.clone() for parameter in model.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), factor
    assert counter.frame_count == 1


# --------------------------------------------------------------------- B07 an infinity cast to a format without one


@pytest.mark.parametrize("format", ["fp8_e4m3", "fp8_e4m3fnuz"])
@pytest.mark.parametrize("saturate", [False, True])
def test_b07_an_infinity_is_counted_before_the_cast_hides_it(format, saturate):
    result = cast(torch.tensor([1.0, INF, -INF, 2.0]), format, saturate=saturate)
    assert int(result.overflowed) == 2
    assert result.tensor.float()[[0, 3]].tolist() == [1.0, 2.0]
    assert saturate != bool(result.tensor.float()[1].isnan())


@pytest.mark.parametrize("recipe", RECIPES)
def test_b07_a_layer_never_turns_an_infinity_into_a_number(recipe):
    model, (x, _) = layer(recipe), batch()
    x[3, 0] = INF
    assert in_region(model, x)[3].isnan().all()


# --------------------------------------------------------------------- B12 the largest value is subnormal


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_b12_inputs_of_the_smallest_numbers_give_finite_outputs(recipe, dtype):
    model = layer(recipe)
    x = torch.full((16, 128), torch.finfo(dtype).smallest_normal / 8).to(dtype).requires_grad_()
    output = in_region(model, x)
    output.float().sum().backward()
    assert output.isfinite().all()
    assert x.grad.isfinite().all()
    assert model[0].weight.grad.isfinite().all()


# --------------------------------------------------------------------- H03 FP8 values moved between vendors


@pytest.mark.parametrize("format", ["fp8_e4m3", "fp8_e5m2"])
def test_h03_bytes_of_the_other_kind_are_read_by_value(format):
    values = torch.tensor([1.0, -2.0, 0.5, 96.0, 0.0])
    stored = cast(values, format).tensor.view(torch.uint8)
    moved = read_fp8(stored, format, f"{format}fnuz").tensor
    assert moved.float().tolist() == values.tolist()
    reinterpreted = stored.view(moved.dtype).float()
    assert reinterpreted[0] == 0.5, "the same byte means half the value there"


def test_h03_a_layer_in_either_kind_gives_the_same_numbers_within_the_format():
    (x, _), outputs = batch(), []
    for recipe in ("row", "row_fnuz"):
        outputs.append(in_region(layer(recipe), x).float())
    assert ((outputs[0] - outputs[1]).norm() / outputs[0].norm()) < 2 * 0.0375


# --------------------------------------------------------------------- H05 a device nobody knows


def test_h05_fp8_on_an_unknown_device_is_refused_or_emulated_and_said():
    executes = frozenset({"bf16", "fp8_e4m3", "fp8_e5m2"})
    unknown = resolve(Identity(row=None, device_name="Something 9000"), vendor="x", backend="cuda", executes=executes)
    with pytest.raises(FormatError, match=r"Something 9000 \(unknown\) does not multiply.*Use 'fp32'"):
        apply(mlp(), "fp8", capabilities=unknown)
    plan = apply(mlp(), "fp8", capabilities=unknown, emulate=True)
    assert plan.decisions[0].reason == "emulated"
