"""Faults of the offloaded mode 'immediate': nobody is still at work on the state that is loaded after one."""

import copy
import gc
import sys
import time
from contextlib import contextmanager
from linecache import getline

import pytest
import torch
from fake_device import FakeLanes, InterruptedWorker, backward, offloaded, plain, same, small_model, weights

from deepseek_mp.errors import MixedPrecisionError
from deepseek_mp.optim.offload import OffloadedOptimizer, OffloadSettings, host_chunk, rule
from deepseek_mp.optim.offload.device_part import DevicePart
from deepseek_mp.optim.offload.pieces import Piece
from deepseek_mp.optim.offload.worker import ThreadWorker

FREE = {"mode": "immediate", "undo": False, "check_finite": False}
STRIDE = 23
"""Lines from one interrupt to the next: each place is met in some run, and the test takes seconds. 1 meets all."""


@pytest.fixture(autouse=True)
def slow_step(monkeypatch):
    """The host is still at work when somebody goes on."""
    real = rule.step
    monkeypatch.setattr(rule, "step", lambda *given: (time.sleep(2e-4), real(*given))[1])


def _is_with(frame):
    return getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with ")


@contextmanager
def interrupted(line):
    """Ctrl-C when this thread has gone through so many lines of the optimizer.

    Python takes none between a block's last line and the end of its `with`, which would leave a lock taken; a line is
    that of `with` then.
    """
    left = line

    def trace(frame, event, _argument):
        nonlocal left
        if "/optim/offload/" not in frame.f_code.co_filename or "fake_device" in frame.f_code.co_filename:
            return None
        if event == "line" and not _is_with(frame):
            left -= 1
            if left == 0:
                raise KeyboardInterrupt("pressed")
        return trace

    before = sys.gettrace()
    gc.collect()
    gc.disable()  # what it lets go says good-bye in here
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
        gc.enable()


def again(call):
    """What has failed is told once."""
    try:
        call()
    except Exception:  # noqa: BLE001 - whatever it was
        call()


def load(ours, optimizer, saved):
    again(optimizer.zero_grad)
    again(lambda: ours.load_state_dict(saved[0]))
    again(lambda: optimizer.load_state_dict(saved[1]))


def saved_of(model, optimizer):
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


def assert_trains_on_as_adamw(ours, optimizer, theirs, reference):
    ours.zero_grad()
    for _ in range(2):
        backward(ours, theirs)
        optimizer.step()
        reference.step()
        reference.zero_grad()
    optimizer.synchronize()
    assert same(weights(ours), weights(theirs))
    expected, found = reference.state_dict()["state"], optimizer.state_dict()["state"]
    assert all(torch.equal(found[i][key], expected[i][key]) for i in expected for key in expected[i])


@pytest.mark.parametrize("begin", ["step", "backward"])
@pytest.mark.parametrize("where", ["backward", "step"])
@pytest.mark.parametrize("hooked", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
def test_an_interrupt_anywhere_leaves_nobody_at_work_on_the_state_that_is_loaded(
    monkeypatch, begin, where, hooked, threads
):
    monkeypatch.setattr(host_chunk, "BLOCK", 128)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        line, was_pressed = 1, True
        while was_pressed:
            was_pressed = False
            lanes, ours, theirs = FakeLanes(), small_model(), small_model()
            settings = OffloadSettings(chunk_bytes=2700, free_bytes=2000, begin=begin, **FREE)
            optimizer = OffloadedOptimizer(
                ours.parameters(),
                lr=1e-2,
                model=ours if hooked else None,
                settings=settings,
                lanes=lambda _, one=lanes: one,
            )
            reference = plain(theirs)
            saved = saved_of(ours, optimizer)
            backward(ours)
            optimizer.step()
            if where == "step":
                backward(ours)
            try:
                with interrupted(line):
                    backward(ours) if where == "backward" else optimizer.step()
            except KeyboardInterrupt:
                was_pressed = True
            if where == "backward" and not was_pressed:
                optimizer.step()
            load(ours, optimizer, saved)
            assert_trains_on_as_adamw(ours, optimizer, theirs, reference)
            line += STRIDE
    finally:
        torch.set_num_threads(before)


def test_a_failure_on_the_device_ends_what_backward_has_begun(monkeypatch):
    ours, theirs = small_model(), small_model()
    optimizer, reference = offloaded(ours, begin="backward", chunk_bytes=4, free_bytes=2000, **FREE), plain(theirs)
    saved, real = saved_of(ours, optimizer), rule.step
    monkeypatch.setattr(rule, "step", lambda *given: (time.sleep(0.02), real(*given))[1])
    backward(ours)

    def fail(*_given):
        raise RuntimeError("the device is full")

    with monkeypatch.context() as patch:
        patch.setattr(DevicePart, "step", fail)
        with pytest.raises(RuntimeError, match="the device is full"):
            optimizer.step()
    with pytest.raises(MixedPrecisionError, match="could not be taken back"):
        optimizer.step()
    load(ours, optimizer, saved)
    assert_trains_on_as_adamw(ours, optimizer, theirs, reference)


def test_an_interrupt_while_step_waits_for_the_host_does_not_step_the_device_part_twice():
    """Without the model's hooks `step` waits for all weights, when the device has stepped its own."""
    workers, lanes, ours, theirs = [], FakeLanes(), small_model(), small_model()
    settings = OffloadSettings(chunk_bytes=1500, free_bytes=2000, **FREE)
    optimizer = OffloadedOptimizer(
        ours.parameters(),
        lr=1e-2,
        settings=settings,
        lanes=lambda _: lanes,
        worker=lambda: (workers.append(InterruptedWorker()), workers[-1])[1],
    )
    saved = saved_of(ours, optimizer)
    backward(ours)
    workers[-1].armed = True
    with pytest.raises(KeyboardInterrupt, match="pressed"):
        optimizer.step()
    with pytest.raises(MixedPrecisionError, match="could not be taken back"):
        optimizer.step()
    load(ours, optimizer, saved)
    assert_trains_on_as_adamw(ours, optimizer, theirs, plain(theirs))


class PressedWorker(ThreadWorker):
    """Somebody presses Ctrl-C when a task has been handed over, before that is noted."""

    armed = False

    def submit(self, task, *args):
        future = super().submit(task, *args)
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt("pressed")
        return future


def test_gradients_that_are_added_up_though_nobody_has_noted_it_are_not_those_of_the_next_window(monkeypatch):
    workers, ours, theirs = [], small_model(), small_model()
    optimizer = offloaded(
        ours, worker=lambda: (workers.append(PressedWorker()), workers[-1])[1], accumulation=2, **FREE
    )
    real = Piece.add
    monkeypatch.setattr(Piece, "add", lambda *given, **options: (time.sleep(0.02), real(*given, **options))[1])
    workers[0].armed = True
    with pytest.raises(KeyboardInterrupt, match="pressed"):
        backward(ours)
    optimizer.zero_grad()
    assert_trains_on_as_adamw(ours, optimizer, theirs, plain(theirs))
