"""`SyncStep`: the order of a step, and what is left out of it."""

import time

import pytest
import torch
from fake_device import WORKERS, FakeLanes, LateWorker, backward, offloaded, plain, same, small_model, weights

from deepseek_mp.optim.offload import HostMemory, OffloadedOptimizer, host_chunk, rule


@pytest.mark.usefixtures("one_thread")
def test_chunks_go_up_one_by_one_in_the_order_of_forward(monkeypatch):
    lanes, model = FakeLanes(), small_model()
    optimizer = offloaded(model, lanes, chunk_bytes=4)
    backward(model)
    lanes.events.clear()
    real = rule.step

    def step(group, weights, *rest):
        names = [
            name for name, p in model.named_parameters() if optimizer.master(p).data_ptr() == weights[0].data_ptr()
        ]
        lanes.events.append(f"step {names[0]}")
        real(group, weights, *rest)

    monkeypatch.setattr(rule, "step", step)
    optimizer.step()
    names = [name for name, _ in model.named_parameters()]
    assert lanes.events == [word for i, name in enumerate(names) for word in (f"step {name}", f"up {i}")]


@pytest.mark.usefixtures("one_thread")
def test_masters_are_not_changed_before_they_have_arrived(monkeypatch):
    """FP32 masters are sent from where they are, and nothing else waits when no forward lies between two steps."""
    lanes, model = FakeLanes(), small_model()
    optimizer = offloaded(model, lanes, chunk_bytes=4)
    monkeypatch.setattr(rule, "step", lambda *_: lanes.events.append("step"))
    for _ in range(2):
        lanes.events.clear()
        for p in model.parameters():
            optimizer.master(p).grad = torch.ones_like(p)
        optimizer.step()
    expected = [word for i in range(8) for word in (f"land up {i}", "step", f"up {8 + i}")]
    assert lanes.events == expected


def test_a_chunk_without_gradients_is_left_alone():
    lanes, model = FakeLanes(), small_model()
    optimizer = offloaded(model, lanes, chunk_bytes=4)
    model[0].requires_grad_(False)
    backward(model)
    optimizer.step()
    assert sum(event.startswith("up") for event in lanes.events) == 6
    assert optimizer.master(model[0].weight) not in optimizer.state


def test_all_but_the_last_gradients_of_a_window_are_added_up_beside_the_next_ones():
    lanes, ours, theirs = FakeLanes(), small_model(), small_model()
    optimizer, reference = offloaded(ours, lanes, worker=LateWorker, accumulation=3), plain(theirs)
    for _ in range(2):
        for number in range(3):
            lanes.events.clear()
            backward(ours, theirs)
            landed = [event for event in lanes.events if event.startswith("land down")]
            assert len(landed) == (0, 8, 16)[number]  # those before, when their memory is needed, and at last all
        optimizer.step()
        reference.step()
        reference.zero_grad()
    optimizer.synchronize()
    assert same(weights(ours), weights(theirs))


@pytest.mark.parametrize("worker", WORKERS)
def test_a_window_that_ends_early_is_complete_after_land(worker):
    model = small_model()
    optimizer = offloaded(model, worker=worker, accumulation=3)
    backward(model)
    backward(model)
    optimizer.land()
    assert all(optimizer.master(p).grad is not None for p in model.parameters())
    other = small_model()
    optimizer.zero_grad()
    backward(model, other)
    optimizer.land()
    assert all(
        torch.equal(optimizer.master(p).grad, q.grad)
        for p, q in zip(model.parameters(), other.parameters(), strict=True)
    )


@pytest.fixture
def three_threads(monkeypatch):
    """Of each crew; and blocks that are small enough for all of them."""
    monkeypatch.setattr(host_chunk, "BLOCK", 32)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("mode", ["sync", "speculative"])
@pytest.mark.parametrize("fails", [0, 5, 30])
def test_several_threads_have_the_numbers_of_adamw_and_take_back_what_fails(three_threads, mode, fails, failing_step):
    theirs, ours = small_model(), small_model()
    reference, optimizer = plain(theirs), offloaded(ours, mode=mode)
    for _ in range(3):
        backward(theirs, ours)
        reference.step()
        reference.zero_grad()
        optimizer.step()
    optimizer.synchronize()
    before = weights(ours)
    assert same(weights(theirs), before)
    failing_step.arm(after=fails)
    backward(theirs, ours)
    with pytest.raises(RuntimeError, match="the host's step failed"):
        optimizer.step()
    failing_step.undo()
    optimizer.synchronize()
    assert same(before, weights(ours))
    assert same(before, [optimizer.master(p).detach() for p in ours.parameters()])
    reference.step()
    optimizer.step()
    optimizer.synchronize()
    assert same(weights(theirs), weights(ours))
    expected, found = reference.state_dict()["state"], optimizer.state_dict()["state"]
    assert all(torch.equal(found[i][key], expected[i][key]) for i in expected for key in expected[i])


def test_memory_that_is_given_back_is_not_copied_from_any_more(three_threads):
    memory = HostMemory()
    model = small_model()
    optimizer = OffloadedOptimizer(model.parameters(), lanes=lambda _: FakeLanes(), memory=memory)
    backward(model)
    optimizer.step()
    chunks = list(optimizer._chunks)
    assert all(chunk._ahead is not None for chunk in chunks)
    optimizer.close()
    assert all(chunk._ahead is None for chunk in chunks)


def test_a_chunk_that_is_under_way_when_another_fails_is_taken_back_whole(three_threads, monkeypatch):
    model = small_model()
    optimizer = offloaded(model)
    before = weights(model)
    backward(model)
    first, real = set(), rule.step

    def step(group, slices, *rest):
        first.update(piece.data_ptr() for piece in slices if not first)
        if slices[0].data_ptr() in first:
            time.sleep(0.05)  # the next chunk is begun
            raise RuntimeError("out of luck")
        time.sleep(0.1)
        real(group, slices, *rest)

    monkeypatch.setattr(rule, "step", step)
    with pytest.raises(RuntimeError, match="out of luck"):
        optimizer.step()
    time.sleep(0.3)
    assert same(before, [optimizer.master(p).detach() for p in model.parameters()])
    assert not optimizer.state
