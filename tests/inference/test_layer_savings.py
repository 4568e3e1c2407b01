"""What kinds save in layers, on times that are the test's own."""

import pytest
import torch
from torch import nn

from deepseek_mp.inference import layer_savings as module
from deepseek_mp.inference.layer_savings import layer_savings
from deepseek_mp.inference.layer_times import LayerTime

INT8, INT4 = "int8_weights", "int4_weights"


class Blocks(nn.Module):
    """Two blocks of an `up` [512, 256], used twice, and a `down` [256, 512], and a layer that is not used."""

    def __init__(self):
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(256, 512) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(512, 256) for _ in range(2))
        self.idle = nn.Linear(256, 300)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(up(x).relu() + up(-x))
        return x


@pytest.fixture
def times(monkeypatch):
    """Milliseconds by channels and kind; 16 bits take 10, and what is not named takes 20."""
    given = {"ms": {}, "untimed": set(), "problems": {}}

    def layer_times(shapes, dtype, device, *, seconds, others, clock):
        given["asked"] = (dict(shapes), seconds, others)
        return {
            shape: LayerTime(
                plain=10e-3,
                kinds={
                    k: 1e-3 * given["ms"].get((shape.channels, k), 20.0) for k in kinds if k not in given["problems"]
                },
                problems=given["problems"],
            )
            for shape, kinds in shapes.items()
            if shape.channels not in given["untimed"]
        }

    monkeypatch.setattr(module, "layer_times", layer_times)
    return given


def measured(model=None, kinds=(INT8, INT4)):
    model = model or Blocks()
    x, now = torch.randn(2, 3, 256), iter((1.0, 4.0))
    return layer_savings(
        model, lambda: model(x), list(kinds), dtype=torch.bfloat16, device=torch.device("cpu"), seconds=7.0,
        clock=lambda: next(now),
    )  # fmt: skip


def test_a_kind_counts_where_it_is_faster(times):
    times["ms"] = {(512, INT8): 4.0, (512, INT4): 9.6, (256, INT8): 12.0, (256, INT4): 9.0}
    found = measured()
    assert found.layers == ("up.0", "up.1", "down.0", "down.1", "idle")
    assert found.saved == {
        **{f"up.{n}": {INT8: pytest.approx(12e-3)} for n in range(2)},
        **{f"down.{n}": {INT4: pytest.approx(1e-3)} for n in range(2)},
    }
    assert found.left == {"idle": "not called with these inputs"}
    assert found.seconds == 3.0


def test_the_share_is_of_all_calls_of_its_layers(times):
    times["ms"] = {(512, INT8): 4.0, (256, INT8): 13.0}
    assert measured().share == {INT8: pytest.approx((4 * 4.0 + 2 * 13.0) / 60), INT4: pytest.approx(2.0)}


def test_what_was_not_timed_is_not_judged(times):
    times["untimed"] = {256}
    found = measured(kinds=(INT8,))
    assert (found.share, found.left["down.0"]) == ({}, "the time to measure was up")
    times["untimed"], times["problems"] = set(), {INT8: "the device has no such product of its size"}
    found = measured()
    assert found.share.keys() == {INT4}
    assert measured(kinds=(INT8,)).left["up.0"] == "int8_weights: the device has no such product of its size"


def test_the_problem_of_any_call_is_told(monkeypatch):
    """Of a layer that is called with one row and with three, and has no time with three."""
    problem = "OutOfMemoryError: of three rows"

    def layer_times(shapes, dtype, device, *, seconds, others, clock):
        one, three = (LayerTime(plain=1.0, kinds={INT8: 0.1}), LayerTime(plain=1.0, kinds={}, problems={INT8: problem}))
        return {shape: one if shape.rows == 1 else three for shape in shapes}

    monkeypatch.setattr(module, "layer_times", layer_times)
    layer, now = nn.Linear(256, 256), iter((1.0, 4.0))
    found = layer_savings(
        nn.Sequential(layer), lambda: (layer(torch.ones(1, 256)), layer(torch.ones(3, 256))), [INT8],
        dtype=torch.bfloat16, device=torch.device("cpu"), seconds=7.0, clock=lambda: next(now),
    )  # fmt: skip
    assert (found.saved, found.left) == ({}, {"0": f"int8_weights: {problem}"})


def test_shapes_with_most_weights_come_first_and_once(times):
    measured()
    shapes, seconds, others = times["asked"]
    assert [(shape.channels, shape.width, shape.rows, kinds) for shape, kinds in shapes.items()] == [
        (512, 256, 6, [INT8, INT4]),
        (256, 512, 6, [INT8, INT4]),
    ]
    assert (seconds, others) == (7.0, 2 * 4 * 256 * 512)


def test_the_model_is_as_before(times):
    model = Blocks()
    measured(model)
    assert float(model.calls) == 0
    assert not any(layer._forward_pre_hooks for layer in model.modules())
