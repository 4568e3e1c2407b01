"""`SpeculativeStep`: begins early, and has the numbers of AdamW whether or not its guess was right."""

import pytest
import torch
from fake_device import WORKERS, FakeLanes, NowWorker, backward, offloaded, plain, same, small_model, weights
from torch import nn

from deepseek_mp.controller import LossScaler
from deepseek_mp.errors import ConfigError
from deepseek_mp.optim.offload import OffloadSettings, rule
from deepseek_mp.optim.offload.host_chunk import HostChunk
from deepseek_mp.optim.offload.pieces import Piece


def speculative(model, lanes=None, *, worker=NowWorker, accumulation=2, **options):
    return offloaded(model, lanes, worker=worker, mode="speculative", accumulation=accumulation, **options)


def both(theirs, ours, reference, optimizer, *, steps=1, micro=2, clip=None, between=None):
    for _ in range(steps):
        for _ in range(micro):
            backward(theirs, ours)
        if between is not None:
            between()
        if clip is not None:
            nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        reference.step()
        reference.zero_grad()
        optimizer.step()


def assert_equal(theirs, ours, reference, optimizer):
    optimizer.synchronize()
    assert same(weights(theirs), weights(ours))
    expected, found = reference.state_dict()["state"], optimizer.state_dict()["state"]
    assert all(torch.equal(found[i][key], expected[i][key]) for i in expected for key in expected[i])


@pytest.fixture
def pair():
    def make(**options):
        theirs, ours = small_model(), small_model()
        return theirs, ours, plain(theirs), speculative(ours, **options)

    return make


@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("clip", [None, 0.1, 1.5])
def test_is_adamw_to_the_bit(worker, clip, pair):
    four = pair(worker=worker, max_grad_norm=clip)
    both(*four, steps=5, clip=clip)
    assert_equal(*four)


def test_a_right_guess_is_not_redone_and_a_wrong_one_is(pair):
    right, wrong = pair(), pair(max_grad_norm=0.1)
    for _ in range(3):
        both(*right)
        both(*wrong, clip=0.1)
        assert right[3].report.redone == 0
        assert wrong[3].report.redone == len(wrong[3].split.host)


def test_a_window_that_is_longer_than_was_said_shows_in_the_report(pair):
    four = pair(accumulation=1)
    optimizer = four[3]
    both(*four, micro=1)
    assert optimizer.report.redone == 0
    both(*four, micro=3)
    assert optimizer.report.redone == 2 * len(optimizer.split.host)
    both(*four, micro=1)
    assert optimizer.report.redone == 0
    assert_equal(*four)


def test_chunks_are_stepped_while_backward_runs():
    lanes, model = FakeLanes(), small_model()
    optimizer = speculative(model, lanes, accumulation=1)
    backward(model)
    downs = [place for place, event in enumerate(lanes.events) if event.startswith("down")]
    assert lanes.events[downs[0] :].index("land down 0") < downs[-1]
    stepped = [optimizer.state[optimizer.master(p)]["step"].item() for p in model.parameters()]
    assert stepped == [1.0] * 8
    assert not any(event.startswith("up") for event in lanes.events)


def test_only_the_last_backward_of_a_window_begins():
    model = small_model()
    optimizer = speculative(model, accumulation=2)
    backward(model)
    assert not optimizer.state
    backward(model)
    assert optimizer.state


def test_no_chunk_is_stepped_twice_without_need(pair, monkeypatch):
    """Not after a window that was given up, and not where weights were written before forward."""
    theirs, ours, reference, optimizer = pair()
    calls, real = [], rule.step
    monkeypatch.setattr(rule, "step", lambda *args: (calls.append(1), real(*args)))
    backward(ours)
    optimizer.zero_grad()
    backward(ours)
    assert calls == []
    optimizer.zero_grad()
    both(theirs, ours, reference, optimizer)
    optimizer.synchronize()
    with torch.no_grad():
        for model in (theirs, ours):
            model[2].weight.mul_(0.5)
    both(theirs, ours, reference, optimizer)
    assert len(calls) == 2 * len(optimizer.split.host)
    assert optimizer.report.redone == 0
    assert_equal(theirs, ours, reference, optimizer)


@pytest.mark.parametrize("micro", [1, 3, 4])
@pytest.mark.parametrize("worker", WORKERS)
def test_windows_of_other_lengths(micro, worker, pair):
    four = pair(worker=worker)
    both(*four, steps=3, micro=micro)
    assert_equal(*four)


@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("chunk_bytes", [4, 1500])
def test_what_happens_between_backward_and_step_counts(worker, chunk_bytes, pair):
    theirs, ours, reference, optimizer = pair(worker=worker, chunk_bytes=chunk_bytes)

    def other_rate():
        for each in (reference, optimizer):
            each.param_groups[0]["lr"] *= 0.5

    def other_gradients():
        for model, master in ((theirs, lambda p: p), (ours, optimizer.master)):
            for p in list(model.parameters())[:3]:
                master(p).grad.mul_(0.5)

    def other_weights():
        with torch.no_grad():
            for model in (theirs, ours):
                model[2].weight.mul_(0.5)

    def no_gradient():
        theirs[4].weight.grad = None
        optimizer.master(ours[4].weight).grad = None

    def look():
        assert optimizer.state_dict()["state"].keys() == reference.state_dict()["state"].keys()
        ours.state_dict()

    four = theirs, ours, reference, optimizer
    for between in (look, other_rate, other_gradients, other_weights, no_gradient, look):
        both(*four, between=between)
        assert_equal(*four)


def test_a_loss_scale_is_guessed_from_the_step_before(pair):
    theirs, ours, reference, optimizer = pair(accumulation=1)
    scaler = LossScaler(1024.0)
    redone = []
    for _ in range(3):
        batch = torch.randn(8, 19)
        theirs(batch).square().mean().backward()
        reference.step()
        reference.zero_grad()
        scaler.scale(ours(batch).square().mean()).backward()
        scaler.step(optimizer)
        redone.append(optimizer.report.redone)
    assert_equal(theirs, ours, reference, optimizer)
    assert redone == [len(optimizer.split.host), 0, 0]


@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("write", ["unscale_", "data"])
def test_writes_into_gradients_that_nobody_counts_are_seen(worker, write, pair):
    theirs, ours, reference, optimizer = pair(worker=worker, accumulation=1)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
    for _ in range(3):
        batch = torch.randn(8, 19)
        for model, scaler, own in zip((theirs, ours), scalers, (reference, optimizer), strict=True):
            scaler.scale(model(batch).square().mean()).backward()
            if write == "unscale_":
                scaler.unscale_(own)
            else:
                for parameter in own.param_groups[0]["params"]:
                    parameter.grad.data.mul_(0.25)
            scaler.step(own)
            scaler.update()
        reference.zero_grad()
    assert_equal(theirs, ours, reference, optimizer)


@pytest.mark.parametrize("worker", WORKERS)
def test_numbers_that_are_not_finite_are_taken_back(worker, pair):
    four = pair(worker=worker, accumulation=1)
    both(*four, micro=1)
    four[3].synchronize()
    before = weights(four[1])
    backward(four[1], scale=float("inf"))
    four[3].step()
    assert four[3].report.reason == "nonfinite"
    assert same(before, [four[3].master(p).detach() for p in four[1].parameters()])
    assert same(before, weights(four[1]))
    both(*four, micro=1)
    assert_equal(*four)


@pytest.mark.parametrize("worker", WORKERS)
def test_zero_grad_takes_back(worker, pair):
    four = pair(worker=worker, accumulation=1)
    both(*four, micro=1)
    backward(four[1])
    four[3].zero_grad()
    both(*four, micro=1)
    assert_equal(*four)


@pytest.mark.parametrize("worker", WORKERS)
def test_a_failed_step_is_taken_back_and_can_be_made_again(worker, pair, failing_step):
    four = theirs, ours, reference, optimizer = pair(worker=worker, accumulation=1)
    both(*four, micro=1)
    optimizer.synchronize()
    before = weights(ours)
    failing_step.arm(after=2)
    backward(ours)  # the failure is on the worker, and backward goes on
    with pytest.raises(RuntimeError, match="the host's step failed"):
        optimizer.step()
    failing_step.undo()
    assert same(before, [optimizer.master(p).detach() for p in ours.parameters()])
    optimizer.synchronize()
    assert same(before, weights(ours))
    for theirs_p, p in zip(theirs.parameters(), ours.parameters(), strict=True):
        theirs_p.grad = optimizer.master(p).grad.clone()
    reference.step()
    optimizer.step()
    assert_equal(*four)


def test_needs_undo():
    with pytest.raises(ConfigError, match="undo=False"):
        OffloadSettings(mode="speculative", undo=False)


@pytest.mark.parametrize("mode", ["sync", "speculative", "delayed", "immediate"])
def test_what_failed_in_a_window_that_is_forgotten_is_no_error(monkeypatch, mode):
    ours, theirs = small_model(), small_model()
    more = {"undo": False, "check_finite": False} if mode == "immediate" else {}
    optimizer, reference = offloaded(ours, mode=mode, worker=NowWorker, accumulation=2, **more), plain(theirs)
    real = HostChunk.land

    def land(chunk, lanes, **options):
        raise RuntimeError("no memory")

    monkeypatch.setattr(HostChunk, "land", land)
    backward(ours)
    optimizer.zero_grad()
    monkeypatch.setattr(HostChunk, "land", real)
    backward(ours, theirs)
    optimizer.step()
    reference.step()
    optimizer.synchronize()
    assert same(weights(ours), weights(theirs))


@pytest.mark.parametrize("worker", WORKERS)
def test_gradients_that_could_not_be_added_are_added_at_the_next_try(monkeypatch, worker):
    ours, theirs = small_model(), small_model()
    optimizer, reference = speculative(ours, worker=worker, accumulation=1), plain(theirs)
    real, calls = HostChunk.land, iter(range(100))

    def land(chunk, lanes, **options):
        if next(calls) == 1:
            raise RuntimeError("no memory")
        real(chunk, lanes, **options)

    monkeypatch.setattr(HostChunk, "land", land)
    batch = torch.randn(8, 19)
    theirs(batch).square().mean().backward()
    with pytest.raises(RuntimeError, match="no memory"):
        ours(batch).square().mean().backward()
    optimizer.step()
    reference.step()
    optimizer.synchronize()
    assert same(weights(ours), weights(theirs))


def test_a_chunk_that_was_put_back_in_part_is_put_back_again(monkeypatch):
    """As after an interrupt: its guess would hold, but what it has made is not all there any more."""
    ours, theirs = small_model(), small_model()
    optimizer, reference = speculative(ours, accumulation=1), plain(theirs)
    backward(ours, theirs)
    real, calls = Piece.restore, iter(range(1000))

    def restore(piece):
        if next(calls) == 3:
            raise KeyboardInterrupt("pressed")
        real(piece)

    monkeypatch.setattr(Piece, "restore", restore)
    with pytest.raises(KeyboardInterrupt, match="pressed"):
        optimizer.synchronize()
    optimizer.step()
    reference.step()
    optimizer.synchronize()
    assert same(weights(ours), weights(theirs))
