"""Stochastic rounding where training uses it: of BF16 weights, of operands in FP8, and of saved activations.

C06 in the names is a number in the project's list of faults: unbiased, to neighbours only, NaN and infinities kept,
different for each shard, and repeated by what was saved.
"""

from __future__ import annotations

import io

import pytest
import torch
from small_runs import by_chance
from torch import nn

from deepseek_mp import PrecisionPlan
from deepseek_mp.activations import ActivationSettings
from deepseek_mp.activations.compress import rounded
from deepseek_mp.ops.dtypes import torch_dtype
from deepseek_mp.ops.reference.product import dequantise
from deepseek_mp.ops.schema import quantise
from deepseek_mp.optim import SGD, AdamW, set_storage

COUNT = 1 << 16
Z = 4.0
"""Standard errors that a share of up to a million draws may be off."""
GRANULARITIES = ["tensor", "row", "1x32", "1x128", "128x128"]
ULP = 2.0**-8
"""Between BF16 values just below one."""


def share_is(found, part):
    """Whether a share of draws is what chance makes of `part`."""
    count = found.numel()
    return abs(found.double().mean().item() - part) <= Z * (part * (1 - part) / count) ** 0.5


# -- BF16 weights ------------------------------------------------------------------------------------


def stepped(part, *, seed=0, count=COUNT, parameters=1):
    """Weights of one after a step that takes off `part` of the distance to the value below."""
    weights = [nn.Parameter(torch.ones(count, dtype=torch.bfloat16)) for _ in range(parameters)]
    optimizer = SGD(weights, lr=1.0, storage="bf16_sr", seed=seed)
    for weight in weights:
        weight.grad = torch.full((count,), part * ULP)
    optimizer.step()
    return [weight.detach().float() for weight in weights]


@pytest.mark.parametrize("part", [0.01, 0.3, 0.5, 0.9])
def test_c06_weights_go_to_a_neighbour_and_are_right_on_average(part):
    (after,) = stepped(part)
    assert set(after.unique().tolist()) == {1.0, 1 - ULP}
    assert share_is(after < 1, part)


def test_c06_theirs_rounded_to_nearest_all_go_one_way():
    for part, expected in ((0.3, 1.0), (0.9, 1 - ULP)):
        weight = nn.Parameter(torch.ones(16, dtype=torch.bfloat16))
        weight.grad = torch.full((16,), part * ULP, dtype=torch.bfloat16)
        torch.optim.SGD([weight], lr=1.0).step()
        assert weight.unique().tolist() == [expected]


@pytest.mark.parametrize("raw", [0x7F800000, -0x800000, 0x7FC00000, 0x7FFFFFFF], ids=["inf", "-inf", "nan", "full nan"])
def test_c06_what_is_not_finite_stays_so_in_weights_and_touches_no_other(raw):
    """Random bits must not be carried from a NaN into its sign, and on."""
    bad = torch.tensor(raw, dtype=torch.int32).view(torch.float32)
    weight = nn.Parameter(torch.ones(COUNT, dtype=torch.bfloat16))
    optimizer = SGD([weight], lr=1.0, storage="bf16_sr")
    weight.grad = torch.zeros(COUNT)
    weight.grad[::7] = bad
    optimizer.step()
    assert (weight[::7].isnan() if bad.isnan() else weight[::7] == -bad).all()
    rest = torch.ones(COUNT, dtype=torch.bool)
    rest[::7] = False
    assert (weight[rest] == 1).all()


def independent(one, other):
    """Whether two shards of draws that are as often up as down agree as often as not."""
    return share_is((one == other).float(), 0.5)


def test_c06_shards_of_a_weight_are_rounded_by_different_numbers():
    """Of one optimizer, and of one on each rank, told apart by the seed; replicas of one weight agree."""
    shards = [*stepped(0.5, parameters=3), *stepped(0.5, seed=1), *stepped(0.5, seed=1 << 32)]
    for index, shard in enumerate(shards):
        assert all(independent(shard, other) for other in shards[:index])
        assert independent(shard[1:], shard[:-1])
        assert independent(shard[COUNT // 2 :], shard[: COUNT // 2])
    assert torch.equal(stepped(0.5)[0], shards[0])


def test_c06_steps_of_a_weight_are_rounded_by_different_numbers():
    weight = nn.Parameter(torch.ones(COUNT, dtype=torch.bfloat16))
    optimizer = SGD([weight], lr=1.0, storage="bf16_sr")
    found = []
    for _ in range(4):
        weight.data.fill_(1.0)
        weight.grad = torch.full((COUNT,), 0.5 * ULP)
        optimizer.step()
        found.append(weight.detach().clone())
    assert all(independent(found[i], found[j]) for i in range(4) for j in range(i))


def test_c06_a_saved_optimizer_goes_on_with_the_same_numbers():
    def run(weight, optimizer, steps):
        for step in range(steps):
            weight.grad = torch.full_like(weight, 0.1 * ULP * (step + 1), dtype=torch.float32)
            optimizer.step()

    straight = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = AdamW([straight], lr=1e-4, storage="bf16_sr", seed=5)
    run(straight, optimizer, 3)
    file = io.BytesIO()
    torch.save((straight.detach(), optimizer.state_dict()), file)
    run(straight, optimizer, 3)
    file.seek(0)
    values, saved = torch.load(file)
    torch.manual_seed(99)  # the state of PyTorch's generators does not matter
    resumed = nn.Parameter(values.clone())
    again = AdamW([resumed], lr=1e-4, storage="bf16_sr", seed=0)  # the saved one counts
    again.load_state_dict(saved)
    run(resumed, again, 3)
    assert torch.equal(straight, resumed)


# -- Operands in FP8 ---------------------------------------------------------------------------------


def cast(x, granularity, seed, format="fp8_e4m3"):
    """Values and scales of a matrix in FP8, in FP32 each; a seed of None rounds to the nearest."""
    drawn = None if seed is None else torch.tensor(seed)
    q, scale, _, _ = quantise(x, format, granularity, False, True, False, "reference", seed=drawn)
    return q.float(), dequantise(torch.ones_like(q.float()).to(q.dtype), scale, granularity)


def between(part, granularity, seed):
    """Draws of numbers that are `part` of the way from 1 to the next FP8 value, in units of their scale."""
    x = torch.full((256, 256), 1 + part / 8)
    x[:, ::32] = 448.0  # so that scales are one
    q, scale = cast(x, granularity, seed)
    assert (scale == 1).all()
    return q[:, torch.arange(256) % 32 != 0]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("part", [0.05, 0.5, 0.8])
def test_c06_operands_go_to_a_neighbour_and_are_right_on_average(part, granularity):
    found = between(part, granularity, 7)
    assert set(found.unique().tolist()) == {1.0, 1.125}
    assert share_is(found > 1, part)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_c06_what_is_not_finite_is_nan_in_operands_just_where_it_is_to_the_nearest(bad, granularity):
    x = torch.randn(256, 256)
    x[3, 5], x[200, 70] = bad, -bad
    found, nearest = cast(x, granularity, 1), cast(x, granularity, None)
    assert nearest[0].isnan().any()
    for ours, theirs in zip(found, nearest, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_c06_operands_of_each_seed_are_rounded_by_different_numbers(granularity):
    draws = [between(0.5, granularity, seed) for seed in (0, 1, 1 << 32)]
    assert all(independent(draws[i], draws[j]) for i in range(3) for j in range(i))
    assert torch.equal(draws[0], between(0.5, granularity, 0))


# -- Saved activations -------------------------------------------------------------------------------


def test_c06_saved_activations_go_to_a_neighbour_are_right_on_average_and_follow_the_seed():
    x = torch.full((512, 128), 1.0625)
    x[:, ::32] = 448.0
    draws = [rounded(x, 128, seed).restore()[:, torch.arange(128) % 32 != 0] for seed in (3, 3, 4)]
    assert set(draws[0].unique().tolist()) == {1.0, 1.125}
    assert share_is(draws[0] > 1, 0.5)
    assert torch.equal(draws[0], draws[1])
    assert independent(draws[0], draws[2])


# -- A whole run -------------------------------------------------------------------------------------


def test_c06_a_resumed_run_rounds_weights_operands_and_activations_as_one_that_was_not(make_trainer, tmp_path):
    def build(seed):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 16))
        trainer = make_trainer(
            PrecisionPlan.of(by_chance("tensor")), 1.0, model=model, activations=ActivationSettings(min_bytes=1024),
            optimizer=lambda params: AdamW(params, lr=1e-3), scheduler=None, ema_decay=None, loss_fn=nn.MSELoss(),
        )  # fmt: skip
        torch.manual_seed(seed)
        return trainer

    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(32, 128, generator=generator), torch.randn(32, 16, generator=generator)) for _ in range(6)]

    def run(trainer, part):
        for batch in part:
            trainer.step(batch)
        trainer.settle()

    straight, other, resumed = build(3), build(4), build(5)
    run(other, batches[:1])
    run(straight, batches[:1])
    for trainer in (straight, other):
        set_storage(trainer.optimizer, trainer.model[0].weight, "bf16_sr")
    run(straight, batches[1:3])
    straight.save(tmp_path / "half")
    run(straight, batches[3:])
    resumed.load(tmp_path / "half")
    run(resumed, batches[3:])
    run(other, batches[1:])
    assert resumed.model[0].weight.dtype is torch_dtype("bf16")
    ends = [trainer.model.state_dict() for trainer in (straight, resumed, other)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not all(torch.equal(ends[0][name], ends[2][name]) for name in ends[0])
