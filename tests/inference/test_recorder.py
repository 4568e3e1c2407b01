"""Recording on a device of the test's own: in which order streams, waits and graphs come, also where it fails."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from deepseek_mp.inference import recorder
from deepseek_mp.inference.recorder import DeviceRecorder, records


class Module:
    """What `torch.get_device_module` gives for a device with graphs; `log` says what was asked of it."""

    def __init__(self, log):
        self.log, self.stream_now, self.waits = log, Stream("caller", log), "default"
        self.broken = False

    def Stream(self, device):  # noqa: N802
        return Stream("side", self.log)

    def CUDAGraph(self):  # noqa: N802
        return SimpleNamespace(replay=lambda: self.log.append("replay"))

    def graph_pool_handle(self):
        self.log.append("pool")
        return (0, 7)

    def current_stream(self):
        return self.stream_now

    def set_stream(self, stream):
        self.stream_now = stream

    @contextmanager
    def stream(self, stream):
        before, self.stream_now = self.stream_now, stream
        yield
        self.stream_now = before

    @contextmanager
    def graph(self, graph, *, pool, stream, capture_error_mode):
        self.log.append(f"record in {pool} on {stream.name}")
        self.stream_now = stream
        yield
        if self.broken:
            self.broken = False
            raise RuntimeError("recording is invalid")
        self.log.append("recorded")

    def empty_cache(self):
        self.log.append("empty")

    def current_device(self):
        return 0

    def get_sync_debug_mode(self):
        return self.waits

    def set_sync_debug_mode(self, mode):
        self.waits = mode


class Stream:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} after {other.name}")


@pytest.fixture
def device(monkeypatch):
    log = []
    module = Module(log)
    monkeypatch.setattr(torch, "get_device_module", lambda where: module)
    held = iter(range(0, 10**6, 1000))
    monkeypatch.setattr(torch.accelerator, "memory_reserved", lambda where: next(held))
    monkeypatch.setattr(recorder, "synchronize", lambda where: log.append("wait"))
    for verb in ("end", "release"):
        name = {"end": "_cuda_endAllocateToPool", "release": "_cuda_releasePool"}[verb]
        monkeypatch.setattr(torch._C, name, lambda where, pool, verb=verb: log.append(f"{verb} {pool}"), raising=False)
    recorder._side_stream.cache_clear()
    yield module
    recorder._side_stream.cache_clear()


CPU = torch.device("cpu")


def test_the_call_is_warm_on_a_stream_of_its_own_and_may_not_wait_at_last(device):
    seen = []
    DeviceRecorder(CPU).warm(lambda: seen.append((device.stream_now.name, device.waits)))
    assert seen == [("side", "default")] * recorder.WARM + [("side", "error")]
    assert device.waits == "default"
    assert device.log == ["side after caller", "caller after side"]


def test_a_call_that_waits_is_found_before_anything_is_recorded(device):
    def waits():
        if device.waits == "error":
            raise RuntimeError("called a synchronizing operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        DeviceRecorder(CPU).warm(waits)
    assert device.waits == "default"
    assert device.stream_now.name == "caller"


def test_recordings_share_their_memory_and_count_it(device):
    made = DeviceRecorder(CPU)
    replay, outputs = made.record(lambda: 3)
    made.record(lambda: 4)
    assert outputs == 3
    assert made.bytes == 2000
    assert device.log.count("pool") == 1
    assert device.log.count("record in (0, 7) on side") == 2
    replay()
    assert device.log[-1] == "replay"
    assert device.stream_now.name == "caller"


def test_after_a_recording_that_fails_all_is_as_it_was(device):
    made, device.broken = DeviceRecorder(CPU), True
    with pytest.raises(RuntimeError, match="recording is invalid"):
        made.record(lambda: 3)
    assert device.stream_now.name == "caller"
    ended = device.log.index("end (0, 7)")
    assert device.log[ended + 1 : ended + 3] == ["release (0, 7)", "wait"]
    assert "recorded" in device.log[ended:], "the next one puts the generator right"
    assert made.record(lambda: 5)[1] == 5
    assert device.log.count("pool") == 2, "memory of the one that failed is not used again"


def test_a_cpu_has_no_recordings():
    assert not records(CPU)
