"""`DelayedStep`: each gradient is applied one step late, the same on every machine."""

import copy

import pytest
import torch
from fake_device import WORKERS, LateWorker, backward, offloaded, plain, same, small_model, weights

from deepseek_mp.errors import ConfigError
from deepseek_mp.optim.offload import OffloadSettings


def delayed(model, *, worker=LateWorker, delay_from=0, **options):
    return offloaded(model, worker=worker, mode="delayed", delay_from=delay_from, **options)


def late_reference(model, steps, delay_from):
    """AdamW on other weights than those of the model, which get its numbers one step late."""
    shadow = copy.deepcopy(model)
    optimizer, seen = plain(shadow), []
    for step in range(steps):
        backward(model)
        seen.append(weights(model))
        model.load_state_dict(shadow.state_dict())
        for theirs, own in zip(shadow.parameters(), model.parameters(), strict=True):
            theirs.grad, own.grad = own.grad, None
        optimizer.step()
        if step < delay_from:
            model.load_state_dict(shadow.state_dict())
    return seen, weights(shadow)


@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("delay_from", [0, 3])
def test_is_one_step_late(worker, delay_from):
    seen, last = late_reference(small_model(), 7, delay_from)
    torch.manual_seed(3)
    model = small_model()
    optimizer = delayed(model, worker=worker, delay_from=delay_from)
    for expected in seen:
        backward(model)
        assert same(expected, weights(model))
        optimizer.step()
    optimizer.synchronize()
    assert same(last, weights(model))


def test_bf16_masters_are_kept_when_others_write_meanwhile():
    model = small_model(torch.bfloat16)
    optimizer = delayed(model)
    backward(model)
    optimizer.step()
    with torch.no_grad():
        model[0].weight[:2] = 0.25
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.synchronize()
    master = optimizer.master(model[0].weight).detach()
    assert torch.equal(master[:2], torch.full((2, 19), 0.25))
    assert not torch.equal(master[2:], master[2:].bfloat16().float())


def test_a_rate_that_changes_later_does_not_matter():
    first, second = small_model(), small_model()
    for model, late in ((first, False), (second, True)):
        torch.manual_seed(7)
        optimizer = delayed(model)
        backward(model)
        optimizer.step()
        if late:
            optimizer.param_groups[0]["lr"] = 5.0
        optimizer.synchronize()
    assert same(weights(first), weights(second))


def test_skips_what_is_not_finite_and_applies_what_came_before():
    theirs, ours = small_model(), small_model()
    reference, optimizer = plain(theirs), delayed(ours)
    backward(theirs, ours)
    reference.step()
    optimizer.step()
    backward(ours, scale=float("nan"))
    optimizer.step()
    assert optimizer.report.reason == "nonfinite"
    optimizer.synchronize()
    assert same(weights(theirs), weights(ours))


@pytest.mark.parametrize("worker", WORKERS)
def test_saving_finishes_what_is_outstanding(worker):
    theirs, ours = small_model(), small_model()
    reference, optimizer = plain(theirs), delayed(ours, worker=worker)
    backward(theirs, ours)
    reference.step()
    optimizer.step()
    assert same(list(theirs.state_dict().values()), list(ours.state_dict().values()))
    found, expected = optimizer.state_dict()["state"], reference.state_dict()["state"]
    assert all(torch.equal(found[i][key], expected[i][key]) for i in expected for key in expected[i])


@pytest.mark.parametrize("worker", WORKERS)
def test_a_failed_step_is_taken_back_and_said_one_step_later(worker, failing_step):
    model = small_model()
    optimizer = delayed(model, worker=worker)
    backward(model)
    optimizer.step()
    optimizer.synchronize()
    before = weights(model)
    failing_step.arm(after=2)
    backward(model)
    optimizer.step()
    torch.manual_seed(1)
    backward(model)
    with pytest.raises(RuntimeError, match="the host's step failed") as caught:
        optimizer.step()
    failing_step.undo()
    assert "taken back" in caught.value.__notes__[0]
    assert same(before, [optimizer.master(p).detach() for p in model.parameters()])
    assert same(before, weights(model))
    optimizer.step()
    optimizer.synchronize()
    assert all(optimizer.state[optimizer.master(p)]["step"] == 2 for p in model.parameters())


def test_refuses_a_part_on_the_device():
    with pytest.raises(ConfigError, match="free_bytes=100"):
        OffloadSettings(mode="delayed", free_bytes=100)
