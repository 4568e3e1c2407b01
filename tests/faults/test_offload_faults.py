"""Faults of an offloaded optimizer: a step is applied whole, or everything is as it was, and the reason is said."""

import copy
import gc
from contextlib import suppress

import pytest
import torch
from fake_device import FakeLanes, InterruptedWorker, NowWorker, backward, offloaded, plain, same, small_model, weights
from torch import nn

from deepseek_mp.errors import ConfigError, MixedPrecisionError
from deepseek_mp.optim.offload import OffloadedOptimizer, arena, device_part, rule

MODES = ("sync", "speculative", "delayed")


def everything(model, optimizer):
    """What a step may change: weights on the device, masters, states."""
    optimizer.synchronize()
    saved = optimizer.state_dict()["state"]
    found = {f"{i}.{key}": value.clone() for i, state in saved.items() for key, value in state.items()}
    found |= {f"weight {name}": p.detach().clone() for name, p in model.named_parameters()}
    return found | {f"master {n}": optimizer.master(p).detach().clone() for n, p in model.named_parameters()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def trained(dtype=torch.float32, steps=1, **options):
    model = small_model(dtype)
    optimizer = offloaded(model, **options)
    for _ in range(steps):
        backward(model)
        optimizer.step()
    return model, optimizer


class Break:
    """Lets a call of a function fail, after it has damaged what it was given."""

    def __init__(self, monkeypatch, owner, name):
        self.monkeypatch, self.owner, self.name, self.real = monkeypatch, owner, name, getattr(owner, name)

    def after(self, good, error):
        calls = iter(range(1000))

        def broken(*args, **kwargs):
            if next(calls) >= good:
                if self.owner is rule:
                    args[1][0].mul_(3.0)
                    args[3][0][0].mul_(3.0)
                raise error
            return self.real(*args, **kwargs)

        self.monkeypatch.setattr(self.owner, self.name, broken)

    def mend(self):
        self.monkeypatch.setattr(self.owner, self.name, self.real)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("good", [0, 1, 3])
@pytest.mark.parametrize("error", [RuntimeError("out of luck"), KeyboardInterrupt("out of luck")])
def test_an_exception_in_the_hosts_step_takes_it_back(dtype, steps, good, error, monkeypatch):
    model, optimizer = trained(dtype, steps)
    other, reference = trained(dtype, steps)
    reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = everything(model, optimizer)
    state = torch.get_rng_state()
    backward(model)
    torch.set_rng_state(state)
    other.load_state_dict(model.state_dict())
    backward(other)
    step = Break(monkeypatch, rule, "step")
    step.after(good, error)
    with pytest.raises(type(error), match="out of luck"):
        optimizer.step()
    step.mend()
    assert_same(before, everything(model, optimizer))
    optimizer.step()
    reference.step()
    assert_same(everything(other, reference), everything(model, optimizer))


@pytest.mark.parametrize("good", [0, 1, 3])
def test_an_exception_while_weights_are_sent_takes_the_step_back(good, monkeypatch):
    lanes = FakeLanes()
    model = small_model()
    optimizer = offloaded(model, lanes)
    backward(model)
    optimizer.step()
    before = everything(model, optimizer)
    backward(model)
    up = lanes.up
    calls = iter(range(1000))

    def broken(targets, sources, *, readers=None):
        if next(calls) == good:
            targets[0].mul_(3.0)
            raise RuntimeError("the link is down")
        return up(targets, sources, readers=readers)

    monkeypatch.setattr(lanes, "up", broken)
    with pytest.raises(RuntimeError, match="the link is down"):
        optimizer.step()
    assert_same(before, everything(model, optimizer))


def test_without_undo_a_half_updated_state_is_refused_until_one_is_loaded(monkeypatch):
    model, optimizer = trained(undo=False)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    before = everything(model, optimizer)
    backward(model)
    step = Break(monkeypatch, rule, "step")
    step.after(2, RuntimeError("out of luck"))
    with pytest.raises(RuntimeError, match="out of luck"):
        optimizer.step()
    step.mend()
    with pytest.raises(MixedPrecisionError, match=r"failed halfway.*Load saved states"):
        optimizer.step()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    optimizer.zero_grad()
    assert_same(before, everything(model, optimizer))
    backward(model)
    optimizer.step()
    assert optimizer.report.applied


def test_a_failure_on_the_device_takes_the_host_back_and_is_remembered(monkeypatch):
    model, optimizer = trained(free_bytes=2000)
    on_host = [p for p in model.parameters() if optimizer.master(p) is not p]
    assert 0 < len(on_host) < 8
    optimizer.synchronize()
    before = [p.detach().clone() for p in on_host]
    backward(model)
    step = Break(monkeypatch, device_part.DevicePart, "step")
    step.after(0, RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    step.mend()
    assert same(before, [p.detach() for p in on_host])
    with pytest.raises(MixedPrecisionError, match="failed halfway"):
        optimizer.step()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_number_in_one_chunk_skips_the_step(mode, dtype, bad):
    model, optimizer = trained(dtype, mode=mode, delay_from=0)
    before = everything(model, optimizer)
    hook = model[2].bias.register_hook(lambda grad: grad.index_fill(0, torch.tensor([3]), bad))
    backward(model)
    hook.remove()
    optimizer.step()
    assert (optimizer.report.applied, optimizer.report.reason) == (False, "nonfinite")
    assert_same(before, everything(model, optimizer))
    backward(model)
    optimizer.step()
    assert optimizer.report.applied


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("between", [True, False])
def test_saving_while_copies_are_on_their_way(mode, dtype, between):
    """After a step weights are still going up; after a backward gradients may be there too. Neither is lost."""
    model, optimizer = trained(dtype, steps=2, mode=mode, delay_from=0)
    other, reference = trained(dtype, steps=0)
    if between:
        backward(model)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other.load_state_dict(saved[0])
    reference.load_state_dict(saved[1])
    settled = everything(model, optimizer)
    assert_same(settled, everything(other, reference))
    if between:
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            reference.master(q).grad = optimizer.master(p).grad.clone()
        optimizer.step()
        reference.step()
        assert_same(everything(other, reference), everything(model, optimizer))


@pytest.mark.parametrize("mode", ["sync", "speculative"])
@pytest.mark.parametrize("free_bytes", [None, 2000])
def test_parameters_without_gradient_frozen_and_trained_again(mode, free_bytes):
    theirs, ours = small_model(), small_model()
    for model in (theirs, ours):
        model[0].requires_grad_(False)
        model.unused = nn.Linear(2, 2, bias=False)
        model.unused.weight.data.fill_(1.0)
        model.forward = lambda x, model=model: nn.Sequential(*list(model)[:5])(x)
    reference, optimizer = plain(theirs), offloaded(ours, mode=mode, free_bytes=free_bytes)
    for frozen in ([0], [0, 2], [4], []):
        for model in (theirs, ours):
            for place in (0, 2, 4):
                model[place].requires_grad_(place not in frozen)
        for _ in range(2):
            backward(theirs, ours)
            reference.step()
            reference.zero_grad()
            optimizer.step()
    optimizer.synchronize()
    assert same(weights(theirs), weights(ours))
    expected, found = reference.state_dict()["state"], optimizer.state_dict()["state"]
    assert found.keys() == expected.keys()
    assert optimizer.master(ours.unused.weight) not in optimizer.state


def test_a_copy_of_the_model_is_free_and_one_of_the_optimizer_is_refused():
    model, optimizer = trained()
    optimizer.synchronize()
    copied = copy.deepcopy(model)
    before = weights(model)
    reference = plain(copied)
    backward(copied)
    assert all(p.grad is not None for p in copied.parameters())
    assert all(optimizer.master(p).grad is None for p in model.parameters())
    reference.step()
    assert same(before, weights(model))
    assert not same(before, weights(copied))
    with pytest.raises(ConfigError, match="Make one for the copied model"):
        copy.deepcopy(optimizer)
    with pytest.raises(ConfigError, match="Make one for the copied model"):
        copy.copy(optimizer)


@pytest.mark.parametrize("mode", MODES)
def test_a_model_that_was_converted_is_refused_in_backward(mode):
    model, optimizer = trained(mode=mode, delay_from=0)
    before = everything(model, optimizer)
    model.to(torch.float64)
    with pytest.raises(ConfigError, match=r"moved from cpu torch\.float32 to cpu torch\.float64.*make the optimizer"):
        backward(model)
    model.to(torch.float32)
    optimizer.zero_grad()
    model.zero_grad()
    assert_same(before, everything(model, optimizer))


def test_a_model_that_was_converted_after_backward_is_refused_before_anything_changes():
    model, optimizer = trained()
    before = everything(model, optimizer)
    backward(model)
    model[2].to(torch.float64)
    with pytest.raises(ConfigError, match="moved from"):
        optimizer.step()
    model[2].to(torch.float32)
    assert_same(before, everything(model, optimizer))


def test_a_backward_that_fails_leaves_gradients_that_zero_grad_forgets():
    theirs, ours = small_model(), small_model()
    reference, optimizer = plain(theirs), offloaded(ours)

    def fail(grad):
        raise RuntimeError("in backward")

    hook = ours[0].weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="in backward"):
        backward(ours)
    hook.remove()
    optimizer.zero_grad()
    backward(theirs, ours)
    reference.step()
    optimizer.step()
    optimizer.synchronize()
    assert same(weights(theirs), weights(ours))


def test_a_backward_after_one_that_failed_is_complete():
    """What the first one left on its way is added, as PyTorch leaves it in `grad`."""
    ours = small_model()
    optimizer = offloaded(ours)

    def fail(grad):
        raise RuntimeError("in backward")

    hook = ours[0].weight.register_hook(fail)
    torch.manual_seed(5)
    with pytest.raises(RuntimeError, match="in backward"):
        backward(ours)
    hook.remove()
    torch.manual_seed(5)
    backward(ours)
    last, first = optimizer.master(ours[4].weight).grad.clone(), optimizer.master(ours[0].weight).grad.clone()
    optimizer.zero_grad()
    torch.manual_seed(5)
    backward(ours)
    assert torch.equal(last, 2 * optimizer.master(ours[4].weight).grad)
    assert torch.equal(first, optimizer.master(ours[0].weight).grad)


def test_weights_on_their_way_arrive_though_the_optimizer_is_gone():
    theirs, ours = small_model(), small_model()
    reference, optimizer = plain(theirs), offloaded(ours)
    backward(theirs, ours)
    reference.step()
    optimizer.step()
    del optimizer
    gc.collect()
    batch = torch.randn(4, 19)
    assert torch.equal(theirs(batch), ours(batch))
    assert same(weights(theirs), weights(ours))


def test_optimizers_that_are_gone_leave_no_hooks():
    model = small_model()
    for _ in range(3):
        optimizer = offloaded(model)
        backward(model)
        optimizer.step()
        del optimizer
        gc.collect()
    backward(model)
    assert all(p.grad is not None and not p._post_accumulate_grad_hooks for p in model.parameters())
    for module in model.modules():
        hooks = (module._forward_pre_hooks, module._state_dict_pre_hooks, module._load_state_dict_pre_hooks)
        assert not any(hooks)


def test_two_optimizers_of_one_parameter_are_refused_in_backward():
    model = small_model()
    first, second = offloaded(model), offloaded(model)
    with pytest.raises(ConfigError, match=r"another optimizer has taken.*Call close\(\) of the other"):
        backward(model)
    first.close()
    second.zero_grad()
    backward(model)
    second.step()
    assert second.report.applied


def test_two_optimizers_of_two_parts_of_a_model():
    theirs, ours = small_model(), small_model()
    halves = [[*m[:2].parameters()] for m in (theirs, ours)], [[*m[2:].parameters()] for m in (theirs, ours)]
    references = [torch.optim.AdamW(half, fused=True) for half, _ in halves]
    both = [OffloadedOptimizer(half, model=ours, lanes=lambda _: FakeLanes()) for _, half in halves]
    for _ in range(3):
        backward(theirs, ours)
        for each in (*references, *both):
            each.step()
            each.zero_grad()
    assert same(list(theirs.state_dict().values()), list(ours.state_dict().values()))


def test_a_sparse_gradient_is_refused():
    table = nn.Embedding(7, 3, sparse=True)
    optimizer = OffloadedOptimizer(table.parameters())
    with pytest.raises(ConfigError, match="sparse=False"):
        table(torch.tensor([1, 2])).sum().backward()
    assert optimizer.master(table.weight).grad is None


def test_memory_that_cannot_be_pinned_is_said(monkeypatch):
    def refuse(values, dtype):
        raise RuntimeError("locked memory is used up")

    real = arena.allocate
    monkeypatch.setattr(arena, "_pinned", refuse)
    monkeypatch.setattr(arena, "allocate", lambda values, dtype, *, pin: real(values, dtype, pin=True))
    _, optimizer = trained()
    assert (optimizer.pinned, optimizer.pinning_refused) == (False, "locked memory is used up")
    assert optimizer.report.applied


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("which", ["adds up", "steps"])
@pytest.mark.parametrize("call", ["synchronize", "step", "zero_grad"])
def test_an_interrupt_while_the_host_is_at_work_loses_nothing(mode, accumulation, which, call):
    """The work goes on beside whoever was interrupted, who may save, or go on."""
    workers = []

    def worker():
        workers.append(InterruptedWorker())
        return workers[-1]

    model, optimizer = trained(steps=2, mode=mode, delay_from=0, worker=worker, accumulation=accumulation)
    other, reference = trained(steps=2, mode=mode, delay_from=0, accumulation=accumulation)
    torch.manual_seed(6)
    backward(model)
    torch.manual_seed(6)
    backward(other)
    workers[0 if which == "adds up" else -1].armed = True
    with suppress(KeyboardInterrupt):
        getattr(optimizer, call)()
    for each in workers:
        each.armed = False
    getattr(optimizer, call)()
    getattr(reference, call)()
    assert_same(everything(other, reference), everything(model, optimizer))


def test_a_thread_that_cannot_be_started_is_said_and_nobody_waits_for_it():
    class Threads(NowWorker):
        are_left = True

        def submit(self, task, *args):
            if not self.are_left:
                raise RuntimeError("can't start new thread")
            return super().submit(task, *args)

    workers = Threads()
    model, optimizer = trained(mode="speculative", worker=lambda: workers)
    before = everything(model, optimizer)
    workers.are_left = False
    with pytest.raises(RuntimeError, match="can't start new thread"):
        backward(model)
    workers.are_left = True
    optimizer.zero_grad()
    assert_same(before, everything(model, optimizer))
    backward(model)
    optimizer.step()
    assert optimizer.report.applied
