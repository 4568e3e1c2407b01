"""Times of layers alone: what each layer is called with, each shape once, cold, in turns, and within a time."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from deepseek_mp.inference import layer_times as timed
from deepseek_mp.inference.layer_times import LayerTime, Shape, layer_times, recorded_shapes

CPU, BF16 = torch.device("cpu"), torch.bfloat16
SHAPE = Shape(64, 32, 3, True)


@pytest.fixture
def laps(monkeypatch):
    """Calls of layers, in order; a call of a kind takes as many milliseconds as `ms` says."""
    found = SimpleNamespace(order=[], pauses=set(), ms={}, now=0.0)

    def taken(call, before, device, pause_s, clock):
        before()
        call()
        name = getattr(call.func, "kind", "")
        found.order.append(name)
        found.pauses.add(pause_s)
        found.now += 1.0
        return [1e-3 * found.ms.get(name, 8.0)], 0.5

    monkeypatch.setattr(timed, "_laps", taken)
    return found


def of(shapes, laps, seconds=1e9):
    return layer_times(shapes, BF16, CPU, seconds=seconds, others=64, clock=lambda: laps.now)


def test_rows_are_recorded_call_by_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4, bias=False), nn.Linear(4, 2)

        def forward(self, x):
            return self.used(input=self.used(x)[0])

    model = Twice()
    layers = {"used": model.used, "idle": model.idle}
    shapes = recorded_shapes(layers, lambda: model(torch.randn(2, 3, 4)))
    assert shapes == {"used": [Shape(4, 4, 6, False), Shape(4, 4, 3, False)], "idle": []}
    assert not any(layer._forward_pre_hooks for layer in layers.values())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        recorded_shapes(layers, lambda: model(torch.randn(2, 5)))
    assert not any(layer._forward_pre_hooks for layer in layers.values())


def test_kinds_take_turns_with_16_bits(laps):
    laps.ms["int8_weights"] = 2.0
    assert of({SHAPE: ["int8_weights"]}, laps) == {SHAPE: LayerTime(plain=8e-3, kinds={"int8_weights": 2e-3})}
    warm, measured = laps.order[:4], laps.order[4:]
    assert warm == ["", "", "int8_weights", "int8_weights"]
    assert measured[:4] == ["", "int8_weights", "int8_weights", ""], "every other round in reverse"
    assert len(measured) == 2 * timed.ROUNDS
    assert laps.pauses == {0.0, 0.5 * timed.HOLD}, "longer than the host took to issue the calls"


def test_what_is_slow_or_fails_there_says_why(laps, monkeypatch):
    real = timed.QuantisedLinear.forward
    monkeypatch.setattr(
        timed.QuantisedLinear, "forward", lambda self, x: real(self, x) if self.kind != "int4_weights" else 1 / 0
    )
    found = of({SHAPE: ["int8_weights", "fp8", "int4_weights"]}, laps)[SHAPE]
    assert set(found.kinds) == {"int8_weights"}
    assert found.problems == {
        "fp8": "the device has no such product of its size",
        "int4_weights": "ZeroDivisionError: division by zero",
    }


def test_no_shape_is_begun_when_the_time_is_up(laps):
    shapes = {Shape(64, 32, rows, False): ["int8_weights"] for rows in (1, 2, 3)}
    found = of(shapes, laps, seconds=13.0)
    assert [shape.rows for shape in found] == [1, 2]
    assert len(laps.order) == (4 + 2 * timed.ROUNDS) + (4 + 2), "the second one has one visit for each kind"
    assert of(shapes, laps, seconds=0.0) == {}


def test_as_much_is_read_before_a_call_as_the_model_has(monkeypatch):
    sizes = []
    monkeypatch.setattr(timed, "_time_of", lambda shape, kinds, dtype, device, read, *_: sizes.append(read.nbytes))
    for others in (4096, 4 * timed.COLD):
        layer_times({SHAPE: []}, BF16, CPU, seconds=1.0, others=others)
    assert sizes == [4096, timed.COLD]


def test_on_a_device_the_host_is_ahead_of_what_is_timed(monkeypatch):
    """A call takes the device 2 ms and the host 5; what is before it is not part of it."""
    host, free, paused = 0.0, 0.0, []

    class Event:
        def __init__(self, *, enable_timing):
            assert enable_timing

        def record(self):
            self.at = max(host, free)

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    def sleep(cycles):
        nonlocal free
        paused.append(cycles / timed.CYCLES)
        free = max(host, free) + paused[-1]

    def work(seconds):
        nonlocal host, free
        host += 0.005
        free = max(host, free) + seconds

    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(Event=Event, _sleep=sleep))
    monkeypatch.setattr(timed, "synchronize", lambda device: None)

    def one(pause_s):
        return timed._laps(lambda: work(0.002), lambda: work(1.0), torch.device("cuda"), pause_s, lambda: host)

    _, issued = one(0.0)
    assert (issued, paused) == (pytest.approx(timed.RUNS * 0.010), [])
    taken, _ = one(1.5 * issued)
    assert taken == [pytest.approx(0.002)] * timed.RUNS
    assert paused == [pytest.approx(1.5 * issued)]


def test_on_a_cpu_calls_alone_are_timed():
    now = 0.0

    def passes(seconds):
        nonlocal now
        now += seconds

    taken, issued = timed._laps(lambda: passes(2.0), lambda: passes(7.0), CPU, 0.0, lambda: now)
    assert (taken, issued) == ([2.0] * timed.RUNS, 0.0)


def test_real_times():
    found = layer_times({SHAPE: ["int8_weights"]}, BF16, CPU, seconds=0.5, others=4096)[SHAPE]
    assert found.plain > 0
    assert set(found.kinds) | set(found.problems) == {"int8_weights"}
