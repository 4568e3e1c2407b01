"""Lanes: direct copies on a CPU; those on streams, with a module that writes down what is asked of it."""

from contextlib import nullcontext

import pytest
import torch

from deepseek_mp.optim.offload import lanes as lanes_module
from deepseek_mp.optim.offload.lanes import DirectLanes, StreamLanes, lanes_for


class FakeStream:
    def __init__(self, name, events):
        self.name, self.events, self.is_idle = name, events, True

    def wait_stream(self, other):
        self.events.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.events.append(f"{self.name} waits for event of {event.stream}")


class FakeModule:
    """As torch.cuda, for streams whose work is done at once."""

    def __init__(self):
        self.events, self._names = [], iter(["down", "up", "put"])
        self._current = FakeStream("main", self.events)

    def Stream(self, device):  # noqa: N802 - the name in torch
        return FakeStream(next(self._names), self.events)

    def stream(self, stream):
        return nullcontext()

    def current_stream(self, device):
        return self._current

    def Event(self):  # noqa: N802 - the name in torch
        return FakeEvent(self.events)


class FakeEvent:
    def __init__(self, events):
        self.events, self.stream = events, None

    def record(self, stream):
        self.stream, self.is_over = stream.name, stream.is_idle

    def query(self):
        return self.is_over

    def synchronize(self):
        self.events.append(f"host waits for event of {self.stream}")


class Recorded(torch.Tensor):
    """A tensor of the CPU that can be recorded on a stream."""

    def record_stream(self, stream):
        stream.events.append(f"memory is used on {stream.name}")


@pytest.fixture
def streams(monkeypatch):
    module = FakeModule()
    monkeypatch.setattr(lanes_module.torch, "get_device_module", lambda device: module)
    return StreamLanes(torch.device("cpu")), module.events


def test_direct_copies_cast():
    lanes, host = DirectLanes(), torch.zeros(3, dtype=torch.bfloat16)
    mark = lanes.down(host, torch.ones(3))
    assert lanes.has_landed(mark)
    lanes.land(mark)
    there = torch.zeros(3)
    lanes.wait(lanes.up([there], [host]))
    assert there.tolist() == [1.0, 1.0, 1.0]


def test_a_cpu_has_direct_lanes():
    assert isinstance(lanes_for(torch.device("cpu")), DirectLanes)


def test_a_device_without_streams_has_direct_lanes(monkeypatch):
    monkeypatch.setattr(lanes_module.torch, "get_device_module", lambda device: object())
    assert isinstance(lanes_for(torch.device("mps")), DirectLanes)


def test_down_waits_for_the_gradient_and_keeps_its_memory(streams):
    lanes, events = streams
    host = torch.zeros(2, 3, dtype=torch.bfloat16)
    source = torch.ones(3, 2).t().as_subclass(Recorded)
    mark = lanes.down(host, source)
    assert events == ["down waits for main", "memory is used on down"]
    lanes.land(mark)
    assert events[-1] == "host waits for event of down"
    assert torch.equal(host, torch.ones(2, 3, dtype=torch.bfloat16))


@pytest.mark.parametrize("is_idle", [True, False])
def test_a_copy_has_landed_when_its_stream_is_done_with_it(streams, is_idle):
    lanes, events = streams
    lanes._down.is_idle = is_idle
    mark = lanes.down(torch.zeros(2), torch.ones(2).as_subclass(Recorded))
    events.clear()
    assert lanes.has_landed(mark) is is_idle
    assert not events, "nobody waits"


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_up_waits_for_readers_and_is_waited_for(streams, transposed, dtype):
    lanes, events = streams
    target = (torch.zeros(3, 2, dtype=dtype).t() if transposed else torch.zeros(2, 3, dtype=dtype)).as_subclass(
        Recorded
    )
    values = torch.arange(6.0).view(2, 3)
    other = torch.zeros(2, 3).as_subclass(Recorded)
    lanes.wait(lanes.up([target, other], [values, values + 1]))
    assert events == ["up waits for main", *["memory is used on up"] * 2, "main waits for event of up"]
    assert torch.equal(other.as_subclass(torch.Tensor), values + 1)
    assert torch.equal(target.as_subclass(torch.Tensor).float(), values)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_still_read_is_replaced_behind_its_readers_from_memory_beside(streams, transposed, dtype):
    """The way up waits for nobody; only what puts the weights into their place does."""
    lanes, events = streams
    target = torch.zeros(3, 2, dtype=dtype).t() if transposed else torch.zeros(2, 3, dtype=dtype)
    values = torch.arange(6.0).view(2, 3)
    lanes._current().is_idle = False
    mark = lanes.up([target.as_subclass(Recorded)], [values], readers=lanes.now())
    assert events[:2] == ["put waits for event of up", "put waits for event of main"]
    assert events[2] == "memory is used on put"
    assert not any(event.startswith("up waits") for event in events)
    lanes.wait(mark)
    assert events[-1] == "main waits for event of put"
    assert torch.equal(target.float(), values)


def test_memory_beside_is_bounded_and_comes_back(streams, monkeypatch):
    lanes, events = streams
    monkeypatch.setattr(lanes_module, "BESIDE_BYTES", 24)
    lanes._current().is_idle = lanes._put.is_idle = False
    target, source = torch.zeros(4).as_subclass(Recorded), torch.ones(4)
    lanes.up([target], [source], readers=lanes.now())
    marks = [mark for mark, _ in lanes._beside]
    events.clear()
    lanes.up([target], [source], readers=lanes.now())
    assert events[0] == "up waits for event of main", "no room: behind the readers, in place"
    marks[0].is_over = True
    events.clear()
    lanes.up([target], [source], readers=lanes.now())
    assert events[0] == "put waits for event of up"


def test_without_memory_beside_weights_go_into_their_place_behind_the_readers(streams, monkeypatch):
    lanes, events = streams
    lanes._current().is_idle = False

    def full(*_args, **_options):
        raise torch.OutOfMemoryError("the device is full")

    monkeypatch.setattr(torch, "empty_like", full)
    target = torch.zeros(4).as_subclass(Recorded)
    lanes.up([target], [torch.ones(4)], readers=lanes.now())
    assert events == ["up waits for event of main", "memory is used on up"]
    assert target.tolist() == [1.0] * 4


def test_where_nobody_reads_any_more_weights_go_into_their_place(streams):
    lanes, events = streams
    lanes.up([torch.zeros(4).as_subclass(Recorded)], [torch.ones(4)], readers=lanes.now())
    assert events == ["up waits for event of main", "memory is used on up"]


@pytest.mark.parametrize(
    ("shape", "is_transposed", "most"),
    [((), False, 1), ((0,), False, 0), ((30,), False, 8), ((2, 30), False, 8), ((30, 2), True, 8), ((2, 30), True, 30)],
)
def test_what_is_cast_on_the_device_takes_bounded_memory_there(streams, monkeypatch, shape, is_transposed, most):
    """Of one piece at a time: some values, or rows where the target is not contiguous."""
    lanes, _ = streams
    monkeypatch.setattr(lanes_module, "STAGED_BYTES", 32)
    values = torch.linspace(-3, 3, torch.Size(shape).numel()).view(shape)
    target = torch.zeros(shape[::-1], dtype=torch.bfloat16).t() if is_transposed else values.new_zeros(shape).bfloat16()
    sizes, real = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, **given: (sizes.append(size.numel()), real(size, **given))[1])
    lanes.up([target.as_subclass(Recorded)], [values])
    assert torch.equal(target, values.bfloat16())
    assert max(sizes) == most
