"""Kinds by layer, on a model whose layers' times and errors are the test's own."""

import math

import pytest
import torch
from torch import nn

from deepseek_mp.errors import ConfigError
from deepseek_mp.inference import by_layer as chooser
from deepseek_mp.inference.by_layer import Bench, by_layer
from deepseek_mp.inference.fidelity import relative
from deepseek_mp.inference.layer_savings import LayerSavings
from deepseek_mp.inference.quantised_linear import linear_layers

INT8, INT4 = "int8_weights", "int4_weights"
DEVICE, DTYPE = torch.device("cpu"), torch.bfloat16


class Blocks(nn.Module):
    """Three blocks of an `up` [512, 256] and a `down` [256, 512], and a layer that is not used."""

    def __init__(self):
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(256, 512) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(512, 256) for _ in range(3))
        self.idle = nn.Linear(256, 300)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(up(x).relu())
        return x


class World:
    """Times by channels and kind, 16 bits taking 10 ms, and errors by layer and kind, which add up to `more` times."""

    def __init__(self, monkeypatch):
        self.ms, self.error, self.more, self.plain = {}, {}, 1.0, 0.0
        self.seen, self.now = [], 0.0
        world = self

        class Errors:
            looks = property(lambda self: len(world.seen))

            def __init__(self, *about, **others):
                pass

            def error(self, kinds):
                world.seen.append(dict(kinds))
                world.now += 1.0
                found = [world.error.get((name, kind), 0.0) for name, kind in kinds.items()]
                if any(isinstance(one, Exception) for one in found):
                    raise next(one for one in found if isinstance(one, Exception))
                return world.plain + sum(found) * (world.more if len(kinds) > 3 else 1.0)

        monkeypatch.setattr(chooser, "LayerErrors", Errors)

    def run(self, kinds=(INT8,), budget=1.0, seconds=1e9, model=None, metric=None):
        model = model or Blocks()
        bench = Bench(
            model=model, base=model, call=lambda: model(torch.randn(2, 3, 256)), reference=None, metric=metric or max,
            dtype=DTYPE, device=DEVICE,
        )  # fmt: skip
        return by_layer(bench, self.savings(model, kinds), budget=budget, seconds=seconds, clock=lambda: self.now)

    def savings(self, model, kinds):
        layers = {name: layer for kind in kinds for name, layer in linear_layers(model, kind)[0].items()}
        saved = {
            name: {
                k: 10e-3 - 1e-3 * self.ms[layer.out_features, k] for k in kinds if (layer.out_features, k) in self.ms
            }
            for name, layer in layers.items()
        }
        return LayerSavings(
            layers=tuple(layers),
            saved={name: kinds for name, kinds in saved.items() if kinds},
            left={name: "no kind is faster" for name, kinds in saved.items() if not kinds},
            share={},
            seconds=0.0,
        )


@pytest.fixture
def world(monkeypatch):
    return World(monkeypatch)


def why(plan):
    return {choice.layer: choice.why for choice in plan.choices}


def test_a_role_that_fits_is_measured_once_and_taken_whole(world):
    world.ms[512, INT8] = 4.0
    world.error.update({(f"up.{n}", INT8): 0.1 for n in range(3)})
    plan = world.run()
    assert plan.kinds == tuple((f"up.{n}", INT8) for n in range(3))
    ups = dict(plan.kinds)
    assert world.seen == [{}, ups, ups], "16 bits, the role, and the whole"
    first = plan.choices[0]
    assert (first.saved_us, first.error) == (pytest.approx(6000), pytest.approx(0.1))
    assert why(plan)["down.0"] == "no kind is faster"
    assert "3 of 7 layers, 1.8e+04 µs less" in plan.why


def test_the_models_state_is_as_before(world):
    model = Blocks()
    world.run(model=model)
    assert float(model.calls) == 0
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_without_a_faster_kind_nothing_is_measured(world):
    plan = world.run()
    assert plan.why == "no kind is faster than 16 bits in any layer"
    assert (plan.kinds, world.seen) == ((), [])


def test_a_role_that_does_not_fit_is_split(world):
    world.ms[512, INT8] = 4.0
    world.error.update({("up.0", INT8): 0.1, ("up.1", INT8): 2.0, ("up.2", INT8): 0.1})
    plan = world.run()
    assert plan.kinds == (("up.0", INT8), ("up.2", INT8))
    assert [list(kinds) for kinds in world.seen[2:5]] == [["up.0"], ["up.1"], ["up.2"]]
    assert why(plan)["up.1"] == "int8_weights would be faster, but takes too much of the budget"
    assert plan.choices[1].error == pytest.approx(2.0)


def test_each_layer_has_the_kind_that_saves_most_within_the_budget(world):
    world.ms.update({(512, INT4): 2.0, (512, INT8): 5.0, (256, INT4): 3.0})
    world.error.update({(f"up.{n}", INT4): 0.3 for n in range(3)})
    world.error.update({("down.0", INT4): 5.0, ("down.1", INT4): 0.1, ("down.2", INT4): 5.0})
    plan = world.run(kinds=(INT8, INT4))
    assert sorted(dict(plan.kinds)) == ["down.1", "up.0", "up.1", "up.2"]
    assert sorted(dict(plan.kinds).values()) == [INT4, INT4, INT4, INT8], "a part of a role may give way to another one"
    assert dict(plan.kinds)["down.1"] == INT4
    assert sum(choice.error for choice in plan.choices if choice.kind) <= chooser.MARGIN


def test_errors_that_do_more_than_add_up_are_taken_back(world):
    world.ms.update({(512, INT8): 4.0, (256, INT8): 9.0})
    world.more = 2.9
    world.error.update({(f"{name}.{n}", INT8): 0.1 for n in range(3) for name in ("up", "down")})
    plan = world.run()
    assert plan.kinds == tuple((f"up.{n}", INT8) for n in range(3)), "those that save least go first"
    assert why(plan)["down.1"] == "taken back: the whole was beyond the budget"
    assert plan.why.endswith("1 times some taken back")


def test_squares_of_the_relative_error_add_up(world):
    world.ms[512, INT8] = 4.0
    world.error.update({(f"up.{n}", INT8): 0.5 / 3 for n in range(3)})
    world.plain = 0.5
    assert world.run(metric=relative, budget=1.1).choices[0].error == pytest.approx((1.0 - 0.25) / 3)


def test_what_16_bits_take_is_not_there_for_layers(world):
    world.ms[512, INT8] = 4.0
    world.error.update({(f"up.{n}", INT8): 0.11 for n in range(3)})
    world.plain = 0.7
    assert len(world.run().kinds) == 1, "0.2 are left within the margin"
    world.plain = 0.95
    assert world.run().why == "16 bits alone take 0.95 of the budget of 1, nothing is left"


def test_when_the_time_is_up_layers_stay_as_they_are(world):
    world.ms.update({(512, INT8): 4.0, (256, INT8): 5.0})
    world.error.update({(f"up.{n}", INT8): 0.1 for n in range(3)})
    plan = world.run(seconds=1.5)
    assert {layer for layer, _ in plan.kinds} == {"up.0", "up.1", "up.2"}, "the role with most to win was begun"
    assert why(plan)["down.0"] == "int8_weights would be faster, but the time to measure was up"


def test_a_layer_that_cannot_be_rounded_leaves_the_others(world):
    world.ms[512, INT8] = 4.0
    world.error["up.1", INT8] = ConfigError("weight of 'up.1' with values that are not finite")
    plan = world.run()
    assert dict(plan.kinds) == {"up.0": INT8, "up.2": INT8}
    assert why(plan)["up.1"] == "int8_weights: weight of 'up.1' with values that are not finite"
    world.error["up.2", INT8] = 5.0
    assert why(world.run())["up.2"] == "int8_weights would be faster, but takes too much of the budget"


def test_an_error_without_end_is_never_taken(world):
    world.ms[512, INT8] = 4.0
    world.error["up.1", INT8] = math.inf
    plan = world.run(budget=math.inf)
    assert dict(plan.kinds) == {"up.0": INT8, "up.2": INT8}
    assert plan.choices[1].error is None


def test_one_layer_is_not_worth_it(world):
    model = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 8))
    plan = world.run(model=model)
    assert plan.why == "not tried: fewer than 2 linear layers can be of another kind"


@pytest.mark.parametrize("kinds", [(INT8,), (INT8, INT4)])
def test_with_real_errors_the_whole_is_within_the_budget(monkeypatch, kinds):
    errors = chooser.LayerErrors
    world = World(monkeypatch)
    monkeypatch.setattr(chooser, "LayerErrors", errors)
    world.ms.update({(512, INT8): 4.0, (256, INT8): 4.0, (512, INT4): 2.0, (256, INT4): 2.0})
    torch.manual_seed(0)
    model, x = Blocks(), torch.randn(4, 256)
    base = Blocks()
    base.load_state_dict(model.state_dict())
    base.to(DTYPE)
    with torch.no_grad():
        reference = model(x)
        bench = Bench(
            model=model, base=base, call=lambda: base(x.to(DTYPE)).float(), reference=reference, metric=relative,
            dtype=DTYPE, device=DEVICE,
        )  # fmt: skip
        plan = by_layer(bench, world.savings(base, kinds), budget=0.03, seconds=1e9)
        assert plan.kinds
        assert set(dict(plan.kinds).values()) == set(kinds)
        found = errors(model, base, bench.call, reference=reference, metric=relative, dtype=DTYPE, device=DEVICE)
        assert found.error(dict(plan.kinds)) <= 0.03
