"""`ImmediateStep`: AdamW's numbers chunk by chunk as gradients arrive, and nothing that would have to wait for all."""

import copy
import gc
from concurrent.futures import Future

import pytest
import torch
from fake_device import (
    WORKERS,
    FakeLanes,
    LateWorker,
    NowWorker,
    backward,
    offloaded,
    plain,
    same,
    small_model,
    weights,
)

from deepseek_mp.errors import ConfigError, MixedPrecisionError
from deepseek_mp.optim.offload import OffloadSettings, host_chunk, immediate_step, rule
from deepseek_mp.optim.offload.in_turn import UnderWay
from deepseek_mp.optim.offload.pieces import Piece

FREE = {"mode": "immediate", "undo": False, "check_finite": False}


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch):
    """Of each crew; and blocks that are small enough for all of them."""
    monkeypatch.setattr(host_chunk, "BLOCK", 32)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def _train(model, optimizer, *, settle=False):
    backward(model)
    optimizer.step()
    if settle:
        optimizer.settle()


@pytest.fixture(params=["step", "backward"])
def begin(request):
    """When the host begins."""
    return request.param


@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("free_bytes", [None, 2000])
@pytest.mark.usefixtures("threads")
def test_the_numbers_are_those_of_adamw(begin, worker, micro, free_bytes):
    ours, theirs = small_model(), small_model()
    options = {"worker": worker, "accumulation": micro, "free_bytes": free_bytes, "begin": begin}
    optimizer = offloaded(ours, **options, **FREE)
    reference = plain(theirs)
    for _ in range(3):
        for _ in range(micro):
            backward(ours, theirs)
        optimizer.step()
        reference.step()
        reference.zero_grad()
        assert optimizer.report.applied
    optimizer.synchronize()
    assert same(weights(ours), weights(theirs))
    expected, found = reference.state_dict()["state"], optimizer.state_dict()["state"]
    if free_bytes is None:
        assert all(torch.equal(found[i][key], expected[i][key]) for i in expected for key in expected[i])


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.usefixtures("threads")
def test_weights_in_bf16_have_the_numbers_of_sync(begin, micro):
    ours, theirs = small_model(torch.bfloat16), small_model(torch.bfloat16)
    optimizer = offloaded(ours, accumulation=micro, begin=begin, **FREE)
    other = offloaded(theirs, accumulation=micro, mode="sync")
    for _ in range(3):
        for _ in range(micro):
            backward(ours, theirs)
        optimizer.step()
        other.step()
    optimizer.synchronize()
    other.synchronize()
    assert same(weights(ours), weights(theirs))
    masters = [[one.master(p).detach() for p in net.parameters()] for one, net in ((optimizer, ours), (other, theirs))]
    assert same(*masters)


def test_chunks_are_stepped_as_they_arrive_and_none_waits_for_another(monkeypatch):
    lanes, model = FakeLanes(), small_model()
    optimizer = offloaded(model, lanes, chunk_bytes=4, **FREE)
    lanes.events.clear()
    backward(model)
    assert not any(event.startswith("land") for event in lanes.events), "backward waits for nothing"
    lanes.events.clear()
    real = rule.step
    monkeypatch.setattr(rule, "step", lambda *given: (lanes.events.append("step"), real(*given))[1])
    optimizer.step()
    optimizer.settle()
    landed, stepped, sent = (lanes.events[first::3] for first in range(3))
    assert sorted(landed) == [f"land down {i}" for i in range(8)]
    assert (stepped, sent) == (["step"] * 8, [f"up {i}" for i in range(8)])


class ArrivedLanes(FakeLanes):
    """Some copies have arrived, as if by themselves."""

    arrived = ()

    def has_landed(self, mark):
        return mark.number in self.arrived


@pytest.mark.parametrize(
    ("arrived", "order"),
    [
        ((), [0, 1, 2, 3, 4, 5, 6, 7]),
        (range(8), [7, 6, 5, 4, 3, 2, 1, 0]),
        ((2, 3, 6, 7), [7, 6, 3, 2, 0, 1, 4, 5]),
    ],
)
@pytest.mark.usefixtures("threads")
def test_of_the_chunks_that_are_there_the_host_steps_what_forward_reads_first(monkeypatch, arrived, order):
    """Others wait: for the one of them whose gradients arrive first."""
    lanes, late, model = ArrivedLanes(), LateWorker(), small_model()
    optimizer = offloaded(model, lanes, worker=lambda: late, chunk_bytes=4, **FREE)
    lanes.arrived = arrived
    begun = []
    real = host_chunk.HostChunk.begin_taken
    monkeypatch.setattr(
        host_chunk.HostChunk, "begin_taken", lambda chunk, *given: (begun.append(chunk.number), real(chunk, *given))[1]
    )
    backward(model)
    optimizer.step()
    optimizer.settle()
    assert begun == order


def test_what_arrives_while_the_host_finishes_a_chunk_is_stepped_in_the_order_of_forward(monkeypatch):
    lanes, late, model = ArrivedLanes(), LateWorker(), small_model()
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    optimizer = offloaded(model, lanes, worker=lambda: late, chunk_bytes=4, **FREE)
    torch.set_num_threads(before)
    lanes.arrived = [0]
    begun, begin, end = [], host_chunk.HostChunk.begin_taken, UnderWay.end

    def ended(work):
        end(work)
        lanes.arrived = range(5)

    monkeypatch.setattr(UnderWay, "end", ended)
    monkeypatch.setattr(
        host_chunk.HostChunk, "begin_taken", lambda chunk, *given: (begun.append(chunk.number), begin(chunk, *given))[1]
    )
    backward(model)
    optimizer.step()
    optimizer.settle()
    assert begun == [0, 4, 3, 2, 1, 5, 6, 7]


class Counted(set):
    """While one thread looks, another one waits for all of the tasks."""

    def __contains__(self, chunk):
        found = super().__contains__(chunk)
        self.add(chunk)
        self.window.ended = len(self.window.tasks)
        return found


def test_two_threads_may_wait_for_what_is_sent():
    done = Future()
    done.set_result(None)
    window = immediate_step._Window(options=[], tasks=[done], sent=Counted())
    window.sent.window = window
    assert immediate_step._Sending(window, object()).exception() is None


class PressedLanes(FakeLanes):
    """Somebody presses Ctrl-C when a step looks where the device is."""

    armed = True

    def now(self):
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt("pressed")
        return super().now()


@pytest.mark.parametrize("forget", [True, False])
def test_an_interrupt_before_anything_is_changed_leaves_the_window_as_it_was(forget):
    ours, theirs = small_model(), small_model()
    optimizer, reference = offloaded(ours, PressedLanes(), **FREE), plain(theirs)
    backward(ours, theirs)
    with pytest.raises(KeyboardInterrupt, match="pressed"):
        optimizer.step()
    optimizer.synchronize()
    if forget:
        optimizer.zero_grad()
        reference.zero_grad()
        backward(ours, theirs)
    optimizer.step()
    reference.step()
    optimizer.synchronize()
    assert same(weights(ours), weights(theirs))


def test_forward_goes_on_with_what_it_reads_first_while_the_host_steps_the_rest():
    late, model = LateWorker(), small_model()
    lanes = ArrivedLanes()
    optimizer = offloaded(model, lanes, worker=lambda: late, chunk_bytes=4, **FREE)
    lanes.arrived = range(8)
    backward(model)
    before = weights(model)
    optimizer.step()
    model[0](torch.randn(2, 19))
    assert not torch.equal(model[0].weight, before[0])
    stepped = {parameter for parameter in model.parameters() if optimizer.master(parameter) in optimizer.state}
    assert stepped >= set(model[0].parameters())
    assert stepped.isdisjoint(model[4].parameters())


def test_the_next_forward_waits_for_what_it_reads_and_for_nothing_else():
    """`step` returns when nothing is stepped yet; a layer that is on the device needs none of it."""
    late, model = LateWorker(), small_model()
    optimizer = offloaded(model, worker=lambda: late, chunk_bytes=4, free_bytes=3000, **FREE)
    assert {slot.parameter for chunk in optimizer._chunks for slot in chunk.slots}.isdisjoint(model[0].parameters())
    backward(model)
    before = weights(model)
    optimizer.step()
    host = [slot for chunk in optimizer._chunks for slot in chunk.slots]
    assert optimizer.report.applied
    assert all(slot.master not in optimizer.state for slot in host), "the host has not begun"
    assert not torch.equal(model[0].weight, before[0]), "the device has"
    hidden = model[1](model[0](torch.randn(2, 19)))
    assert all(slot.master not in optimizer.state for slot in host)
    model[2](hidden)
    assert not torch.equal(model[2].weight, before[2])


def test_a_chunk_that_is_stepped_takes_no_gradient_of_the_next_window():
    """Whoever reads weights without the model's hooks may send one before the host is done."""
    late, ours, theirs = LateWorker(), small_model(), small_model()
    optimizer, reference = offloaded(ours, worker=lambda: late, **FREE), plain(theirs)
    backward(ours, theirs)
    optimizer.step()
    reference.step()
    reference.zero_grad()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        (3.0 * mine).sum().backward()
        (3.0 * other).sum().backward()
    optimizer.step()
    reference.step()
    optimizer.synchronize()
    assert same(weights(ours), weights(theirs))


def test_an_optimizer_that_is_let_go_finishes_its_step():
    ours, theirs = small_model(), small_model()
    optimizer, reference = offloaded(ours, worker=NowWorker, **FREE), plain(theirs)
    backward(ours, theirs)
    optimizer.step()
    reference.step()
    del optimizer
    gc.collect()
    assert same(weights(ours), weights(theirs))


def test_schedules_change_the_next_step_only():
    late, ours, theirs = LateWorker(), small_model(), small_model()
    optimizer, reference = offloaded(ours, worker=lambda: late, **FREE), plain(theirs)
    for _ in range(2):
        backward(ours, theirs)
        for one in (optimizer, reference):
            one.step()
            for group in one.param_groups:
                group["lr"] *= 0.5
        optimizer.zero_grad()
        reference.zero_grad()
    optimizer.synchronize()
    assert same(weights(ours), weights(theirs))


# -- the host begins in backward -------------------------------------------------------------------------


def test_backward_steps_chunk_by_chunk_and_step_places_the_weights():
    lanes, model = FakeLanes(), small_model()
    optimizer = offloaded(model, lanes, worker=NowWorker, chunk_bytes=4, accumulation=2, begin="backward", **FREE)
    backward(model)
    assert not optimizer.state, "the first of two micro-batches"
    before = weights(model)
    lanes.events.clear()
    backward(model)
    masters = [optimizer.master(parameter) for parameter in model.parameters()]
    assert all(master in optimizer.state for master in masters), "stepped"
    assert not any(event.startswith("up") for event in lanes.events)
    assert same(weights(model), before), "but somebody may still read these"
    optimizer.step()
    optimizer.synchronize()
    assert not same(weights(model), before)


def test_parameters_without_a_gradient_do_not_hold_the_others_up():
    ours, theirs = small_model(), small_model()
    optimizer, reference = offloaded(ours, begin="backward", **FREE), plain(theirs)
    for _ in range(2):
        batch = torch.randn(8, 19)
        for net in (ours, theirs):
            net[:3](batch).square().mean().backward()  # the last two layers have none, and share a chunk with others
        optimizer.step()
        reference.step()
        reference.zero_grad()
    optimizer.synchronize()
    assert same(weights(ours), weights(theirs))


def test_a_window_that_is_shorter_is_stepped_in_step():
    ours, theirs = small_model(), small_model()
    optimizer, reference = offloaded(ours, accumulation=3, begin="backward", **FREE), plain(theirs)
    for micro in (2, 3, 1):
        for _ in range(micro):
            backward(ours, theirs)
        optimizer.step()
        reference.step()
        reference.zero_grad()
    optimizer.synchronize()
    assert same(weights(ours), weights(theirs))


def test_a_gradient_on_its_way_from_an_earlier_micro_batch_is_added_when_others_are_stepped():
    """That micro-batch has used a part of a chunk only, so that nobody has added up what it sent."""
    ours, theirs = small_model(), small_model()
    optimizer = offloaded(ours, accumulation=2, chunk_bytes=2700, begin="backward", **FREE)
    reference = plain(theirs)
    shared = {slot.parameter for slot in optimizer._chunks[1].slots}
    assert shared == {ours[0].bias, ours[2].weight}
    batch = torch.randn(8, 19)
    for _ in range(2):
        for net in (ours, theirs):
            net[0](batch).square().mean().backward()
            net(batch).square().mean().backward()
        optimizer.step()
        reference.step()
        reference.zero_grad()
    optimizer.synchronize()
    assert same(weights(ours), weights(theirs))


def test_weights_that_others_wrote_before_backward_are_taken_over():
    ours, theirs = small_model(), small_model()
    optimizer, reference = offloaded(ours, begin="backward", **FREE), plain(theirs)
    for _ in range(2):
        optimizer.synchronize()
        with torch.no_grad():
            for parameter in (*ours.parameters(), *theirs.parameters()):
                parameter.mul_(1.5)
        backward(ours, theirs)
        optimizer.step()
        reference.step()
        reference.zero_grad()
    optimizer.synchronize()
    assert same(weights(ours), weights(theirs))


def _changed_rate(optimizer):
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()


def _scaled(optimizer, *, unscale):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)


def _written(optimizer, model):
    with torch.no_grad():
        model[2].weight.mul_(2.0)
    optimizer.step()


def _graded(optimizer, model):
    optimizer.master(model[4].weight).grad = torch.ones_like(model[4].weight)
    optimizer.step()


@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize(
    ("misuse", "match"),
    [
        (lambda optimizer, _: optimizer.zero_grad(), "a window that is not wanted"),
        (lambda _, model: backward(model), "a gradient of parameters that this window's backward has stepped"),
        (lambda optimizer, _: _changed_rate(optimizer), "options that the backward that steps has not seen"),
        (lambda optimizer, _: _scaled(optimizer, unscale=False), "a loss scaler's step on gradients that backward"),
        (lambda optimizer, _: _scaled(optimizer, unscale=True), "a loss scaler's step on gradients that backward"),
        (_written, "weights that were written behind the backward that steps"),
        (_graded, "gradients that were put behind the backward that steps"),
    ],
)
def test_what_backward_has_stepped_cannot_be_undone(worker, misuse, match):
    ours, theirs = small_model(), small_model()
    optimizer, reference = offloaded(ours, worker=worker, begin="backward", **FREE), plain(theirs)
    saved = (copy.deepcopy(optimizer.state_dict()), copy.deepcopy(ours.state_dict()))
    backward(ours)
    with pytest.raises(ConfigError, match=match):
        misuse(optimizer, ours)
    with pytest.raises(MixedPrecisionError, match="could not be taken back"):
        _train(ours, optimizer)
    optimizer.zero_grad()
    ours.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[0])
    for _ in range(2):
        backward(ours, theirs)
        optimizer.step()
        reference.step()
        reference.zero_grad()
    optimizer.synchronize()
    assert same(weights(ours), weights(theirs))


@pytest.mark.parametrize("look", ["land", "synchronize", "state_dict", "refresh"])
def test_nothing_is_looked_at_between_backward_and_step(look):
    ours, theirs = small_model(), small_model()
    optimizer, reference = offloaded(ours, begin="backward", **FREE), plain(theirs)
    backward(ours, theirs)
    with pytest.raises(ConfigError, match=r"behind the backward that steps.*take begin='step'"):
        getattr(optimizer, look)()
    optimizer.step()
    reference.step()
    optimizer.synchronize()
    assert same(weights(ours), weights(theirs))


@pytest.mark.parametrize("worker", WORKERS)
def test_a_failure_in_backward_is_found_by_step_or_what_comes_next(failing_step, worker):
    ours, theirs = small_model(), small_model()
    optimizer = offloaded(ours, worker=worker, chunk_bytes=4, begin="backward", **FREE)
    reference = plain(theirs)
    saved = (copy.deepcopy(optimizer.state_dict()), copy.deepcopy(ours.state_dict()))
    backward(ours)
    optimizer.step()
    failing_step.arm(after=1)
    with pytest.raises((RuntimeError, MixedPrecisionError), match=r"the host's step failed|failed halfway") as found:
        _train(ours, optimizer, settle=True)
    assert "the host's step failed" in f"{found.value} {found.value.__cause__}"
    failing_step.undo()
    with pytest.raises(MixedPrecisionError, match="could not be taken back"):
        optimizer.step()
    with pytest.raises(MixedPrecisionError, match="could not be taken back"):
        _train(ours, optimizer)
    optimizer.zero_grad()
    ours.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[0])
    backward(ours, theirs)
    optimizer.step()
    reference.step()
    optimizer.synchronize()
    assert same(weights(ours), weights(theirs))


def test_only_immediate_begins_in_backward():
    with pytest.raises(ConfigError, match="begin='backward' with mode='sync'"):
        OffloadSettings(begin="backward")
    with pytest.raises(ConfigError, match="begin='now'"):
        OffloadSettings(begin="now", **FREE)


# -- gradients -------------------------------------------------------------------------------------------


def test_no_gradient_is_added_up_in_memory_of_its_own():
    model = small_model()
    optimizer = offloaded(model, **FREE)
    backward(model)
    optimizer.step()
    assert not any(slot.total.any() for pair in [optimizer.pairs] for slot in pair)


def test_a_loss_scale_is_taken_off_and_a_skipped_window_leaves_nothing():
    ours, theirs = small_model(), small_model()
    optimizer, reference = offloaded(ours, **FREE), plain(theirs)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)  # 4 after the first step
    before = weights(ours)
    for _ in range(2):
        backward(ours, scale=float("inf"))
    scaler.scale(torch.ones(()))
    optimizer.land()
    scaler.step(optimizer)
    scaler.update()
    optimizer.synchronize()
    assert optimizer.report.reason == "scaler"
    assert same(weights(ours), before)
    torch.manual_seed(5)
    backward(ours, scale=4.0)
    torch.manual_seed(5)
    backward(theirs)
    optimizer.land()
    scaler.step(optimizer)
    reference.step()
    optimizer.synchronize()
    assert same(weights(ours), weights(theirs))


@pytest.mark.parametrize("unscale", [True, False])
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("free_bytes", [None, 2000])
def test_a_scaler_that_has_not_seen_all_gradients_is_refused(unscale, micro, free_bytes):
    """It would let infinities through, and unscale only what it has seen."""
    ours, theirs = small_model(), small_model()
    optimizer, reference = offloaded(ours, accumulation=micro, free_bytes=free_bytes, **FREE), plain(theirs)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    before = weights(ours)
    for _ in range(micro):
        batch = torch.randn(8, 19)
        (4.0 * ours(batch).square().mean()).backward()
        theirs(batch).square().mean().backward()
    if unscale:
        scaler.unscale_(optimizer)
    with pytest.raises(ConfigError, match=r"Call land\(\) before the scaler"):
        scaler.step(optimizer)
    optimizer.synchronize()
    assert same(weights(ours), before)
    if not unscale:
        scaler.step(optimizer)  # `synchronize` has landed them
        reference.step()
        optimizer.synchronize()
        assert same(weights(ours), weights(theirs))


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("free_bytes", [None, 2000])
@pytest.mark.parametrize("noticed", ["forward", "evaluation", "step", "synchronize", "state_dict", "load_state_dict"])
def test_whoever_needs_the_weights_next_finds_a_failure(failing_step, micro, free_bytes, noticed):
    """The host's step runs beside what comes next. A window that failed is gone; a loaded state goes on."""
    ours, theirs = small_model(), small_model()
    settings = {"chunk_bytes": 4, "accumulation": micro, "free_bytes": free_bytes}
    optimizer, reference = offloaded(ours, **settings, **FREE), plain(theirs)
    saved = (copy.deepcopy(optimizer.state_dict()), copy.deepcopy(ours.state_dict()))
    for _ in range(micro):
        backward(ours)
    failing_step.arm(after=2)
    optimizer.step()
    what = {
        "forward": lambda: ours(torch.randn(8, 19)),
        "evaluation": lambda: torch.no_grad()(ours)(torch.randn(8, 19)),
        "step": optimizer.step,
        "synchronize": optimizer.synchronize,
        "state_dict": ours.state_dict,
        "load_state_dict": lambda: ours.load_state_dict(saved[1]),
    }
    with pytest.raises(RuntimeError, match="the host's step failed"):
        what[noticed]()
    failing_step.undo()
    with pytest.raises(MixedPrecisionError, match="could not be taken back"):
        _train(ours, optimizer)
    optimizer.zero_grad()
    ours.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[0])
    optimizer.step()
    assert optimizer.report.reason == "no_grads"
    for _ in range(micro):
        backward(ours, theirs)
    optimizer.step()
    reference.step()
    optimizer.synchronize()
    assert same(weights(ours), weights(theirs))


def test_a_chunk_that_is_added_up_just_now_is_stepped(monkeypatch):
    """A window that is shorter than `accumulation`: what its backward sent is added up on another thread."""
    late = LateWorker()
    ours, theirs = small_model(), small_model()
    optimizer = offloaded(ours, worker=lambda: late, accumulation=2, chunk_bytes=4, **FREE)
    reference = plain(theirs)
    backward(ours, theirs)
    landing = list(optimizer._mode._landing.values())

    def has_gradients(chunk):
        found = any(slot.master.grad is not None for slot in chunk.slots)
        late.run_until(landing[chunk.number])  # the thread ends between two looks
        return found

    monkeypatch.setattr(host_chunk.HostChunk, "has_gradients", property(has_gradients))
    optimizer.step()
    reference.step()
    optimizer.synchronize()
    assert same(weights(ours), weights(theirs))


@pytest.mark.usefixtures("threads")
def test_what_was_added_up_in_part_is_not_added_twice(monkeypatch):
    ours, theirs = small_model(), small_model()
    optimizer, reference = offloaded(ours, chunk_bytes=10_000, accumulation=3, **FREE), plain(theirs)
    for _ in range(2):
        backward(ours, theirs)
        optimizer.land()
    backward(ours, theirs)
    real, calls = Piece.add, iter(range(1000))

    def add(piece, *given, **options):
        if next(calls) == 5:
            raise RuntimeError("no memory")
        real(piece, *given, **options)

    monkeypatch.setattr(Piece, "add", add)
    with pytest.raises(RuntimeError, match="no memory"):
        optimizer.land()
    optimizer.step()
    reference.step()
    optimizer.synchronize()
    assert same(weights(ours), weights(theirs))


def test_gradients_that_are_forgotten_are_not_stepped_on():
    model = small_model()
    optimizer = offloaded(model, **FREE)
    before = weights(model)
    backward(model)
    optimizer.zero_grad()
    optimizer.step()
    optimizer.synchronize()
    assert optimizer.report.reason == "no_grads"
    assert same(weights(model), before)


def test_gradients_that_were_looked_at_count(monkeypatch):
    """`land` adds them up, and what is written to them then is stepped on."""
    ours, theirs = small_model(), small_model()
    optimizer, reference = offloaded(ours, **FREE), plain(theirs)
    backward(ours, theirs)
    optimizer.land()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        optimizer.master(mine).grad.mul_(2.0)
        other.grad.mul_(2.0)
    optimizer.step()
    reference.step()
    optimizer.synchronize()
    assert same(weights(ours), weights(theirs))


def test_after_a_failure_steps_are_refused_until_a_state_is_loaded(failing_step):
    ours, theirs = small_model(), small_model()
    optimizer, reference = offloaded(ours, **FREE), plain(theirs)
    backward(ours, theirs)
    optimizer.step()
    reference.step()
    reference.zero_grad()
    saved = (copy.deepcopy(optimizer.state_dict()), weights(ours))
    failing_step.arm(after=1)
    backward(ours)
    optimizer.step()
    with pytest.raises(RuntimeError, match="the host's step failed"):
        optimizer.settle()
    failing_step.undo()
    optimizer.zero_grad()
    backward(ours)
    with pytest.raises(
        MixedPrecisionError,
        match=r"could not be taken back.*states of the model and of this optimizer; undo=True, which 'immediate'",
    ):
        optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for parameter, before in zip(ours.parameters(), saved[1], strict=True):
            parameter.copy_(before)
    optimizer.load_state_dict(saved[0])
    backward(ours, theirs)
    optimizer.step()
    reference.step()
    optimizer.synchronize()
    assert same(weights(ours), weights(theirs))


@pytest.mark.parametrize("more", [{"undo": True}, {"check_finite": True}, {"max_grad_norm": 1.0}])
def test_what_would_have_to_wait_for_all_gradients_is_refused(more):
    with pytest.raises(ConfigError, match="mode='immediate' with"):
        OffloadSettings(**{**FREE, **more})


def test_a_failure_before_anything_is_changed_is_none_of_the_state_that_was_loaded(failing_step, monkeypatch):
    """In 'sync'; in 'immediate' whatever the host's thread fails with needs a loaded state."""
    ours, theirs = small_model(), small_model()
    lanes = FakeLanes()
    optimizer, reference = offloaded(ours, lanes, **{**FREE, "mode": "sync"}), plain(theirs)
    saved = (copy.deepcopy(optimizer.state_dict()), copy.deepcopy(ours.state_dict()))
    backward(ours, theirs)
    failing_step.arm(after=1)
    with pytest.raises(RuntimeError, match="the host's step failed"):
        optimizer.step()
    failing_step.undo()
    ours.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[0])
    real = FakeLanes.land

    def land(lanes, mark):
        raise RuntimeError("the device is busy")

    optimizer.land()
    monkeypatch.setattr(FakeLanes, "land", land)
    with pytest.raises(RuntimeError, match="the device is busy"):
        optimizer.step()
    monkeypatch.setattr(FakeLanes, "land", real)
    optimizer.step()
    reference.step()
    optimizer.synchronize()
    assert same(weights(ours), weights(theirs))
