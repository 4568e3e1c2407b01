"""Offloaded AdamW on an accelerator with streams: the numbers, the overlap, the memory of both sides."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from deepseek_mp import MixedPrecisionTrainer
from deepseek_mp.controller import LossScaler
from deepseek_mp.optim.offload import OffloadedOptimizer, OffloadSettings, calibrate
from deepseek_mp.optim.offload import lanes as lanes_module
from deepseek_mp.optim.offload.lanes import DirectLanes, StreamLanes, lanes_for

CHUNK = 1 << 20


def device():
    found = torch.accelerator.current_accelerator()
    if not isinstance(lanes_for(found), StreamLanes):
        pytest.skip(f"{found} has no streams that torch.get_device_module gives")
    return found


def model(dtype=torch.float32, width=512, layers=6):
    torch.manual_seed(0)
    blocks = [part for _ in range(layers) for part in (nn.Linear(width, width), nn.LayerNorm(width), nn.GELU())]
    return nn.Sequential(*blocks).to(device(), dtype)


def offloaded(net, lanes=lanes_for, **options):
    settings = OffloadSettings(**{"chunk_bytes": CHUNK, **options})
    return OffloadedOptimizer(net.parameters(), lr=1e-3, model=net, settings=settings, lanes=lanes)


def backward(*nets, micro=2):
    for _ in range(micro):
        first = next(nets[0].parameters())
        batch = torch.randn(256, first.shape[1], device=first.device, dtype=first.dtype)
        for net in nets:
            (net(batch) - batch).square().mean().backward()


def weights(net):
    return [p.detach().cpu() for p in net.parameters()]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("mode", ["sync", "speculative"])
@pytest.mark.parametrize("clip", [None, 1e-3])
def test_fp32_is_adamw_on_the_host_to_the_bit(mode, clip):
    """The reference gets its gradients from a model on the device, steps without chunks, and copies back at once."""
    theirs, ours = model(), model()
    masters = [nn.Parameter(p.detach().cpu()) for p in theirs.parameters()]
    reference = torch.optim.AdamW(masters, lr=1e-3, fused=True)
    optimizer = offloaded(ours, mode=mode, accumulation=2, max_grad_norm=clip)
    assert optimizer.pinned
    assert len(optimizer.split.host) > 3
    for _ in range(10):
        for _ in range(2):
            backward(theirs, ours, micro=1)
            for master, p in zip(masters, theirs.parameters(), strict=True):
                master.grad = p.grad.cpu() if master.grad is None else master.grad + p.grad.cpu()
                p.grad = None
        if clip is not None:
            nn.utils.clip_grad_norm_(masters, clip)
        reference.step()
        reference.zero_grad()
        with torch.no_grad():
            for master, p in zip(masters, theirs.parameters(), strict=True):
                p.copy_(master)
        optimizer.step()
    optimizer.synchronize()
    assert same(weights(theirs), weights(ours))


@pytest.mark.parametrize("mode", ["sync", "speculative", "delayed", "immediate", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cast", ["host", "device"])
def test_streams_give_the_numbers_of_copies_that_wait(mode, dtype, cast):
    """A copy that nobody waits for, or memory that is used too early, would change a bit in some of many steps."""
    slow, fast = model(dtype), model(dtype)
    options = {"mode": mode, "cast": cast, "accumulation": 2, "delay_from": 3}
    if mode in ("immediate", "backward"):
        begin = "backward" if mode == "backward" else "step"
        options |= {"mode": "immediate", "begin": begin, "undo": False, "check_finite": False}
    reference, optimizer = offloaded(slow, lambda _: DirectLanes(), **options), offloaded(fast, **options)
    for _ in range(40):
        backward(slow, fast)
        reference.step()
        optimizer.step()
    reference.synchronize()
    optimizer.synchronize()
    assert same(weights(slow), weights(fast))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_that_the_device_steps_while_weights_go_up_in_pieces(monkeypatch, dtype):
    monkeypatch.setattr(lanes_module, "STAGED_BYTES", 300_000)
    slow, fast = model(dtype), model(dtype)
    options = {"mode": "immediate", "undo": False, "check_finite": False, "free_bytes": 12 << 20}
    reference, optimizer = offloaded(slow, lambda _: DirectLanes(), **options), offloaded(fast, **options)
    assert 0.5 < optimizer.split.fraction < 1
    for _ in range(40):
        backward(slow, fast, micro=1)
        reference.step()
        optimizer.step()
    reference.synchronize()
    optimizer.synchronize()
    assert same(weights(slow), weights(fast))


@pytest.mark.parametrize("beside", [0, 1 << 20, 1 << 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("begin", ["step", "backward"])
def test_what_reads_weights_before_a_step_sees_the_old_ones(monkeypatch, begin, dtype, beside):
    """In 'immediate' new ones are on the device while backward, and what follows it, is still at work."""
    monkeypatch.setattr(lanes_module, "BESIDE_BYTES", beside)
    net, long = model(dtype), torch.randn(8192, 8192, device=device())
    optimizer = offloaded(net, mode="immediate", begin=begin, undo=False, check_finite=False)
    for _ in range(4):
        optimizer.synchronize()
        before = weights(net)
        backward(net, micro=1)
        for _ in range(20):
            long @ long
        seen = [p.detach().clone() for p in net.parameters()]
        optimizer.step()
        optimizer.settle()
        assert same(before, [p.cpu() for p in seen])
        optimizer.synchronize()
        assert not same(before, weights(net))


def test_weights_that_the_device_rounds_take_bounded_memory_there(monkeypatch):
    monkeypatch.setattr(lanes_module, "STAGED_BYTES", 1 << 20)
    where, lanes = device(), lanes_for(device())
    source = torch.randn(4, 1 << 22, pin_memory=True)
    target = torch.zeros(4, 1 << 22, device=where, dtype=torch.bfloat16)
    torch.accelerator.synchronize()
    before = torch.accelerator.memory_allocated(where)
    torch.accelerator.reset_peak_memory_stats(where)
    lanes.land(lanes.up([target], [source]))
    assert torch.accelerator.max_memory_allocated(where) - before <= 2 << 20
    assert torch.equal(target.cpu(), source.bfloat16())


def test_part_on_the_device_with_a_loss_scaler():
    theirs, ours = model(torch.bfloat16), model(torch.bfloat16)
    # The optimizers' arithmetic differs by the device, so half of it is compared with itself without streams.
    pairs = [
        (net, offloaded(net, lanes, free_bytes=5 << 20), LossScaler("dynamic", device=device()))
        for net, lanes in ((theirs, lambda _: DirectLanes()), (ours, lanes_for))
    ]
    assert 0 < pairs[0][1].split.fraction < 1
    for step in range(10):
        batch = torch.randn(64, 512, device=device(), dtype=torch.bfloat16) * (1e30 if step == 4 else 1)
        for net, optimizer, scaler in pairs:
            scaler.scale((net(batch).float() - batch.float()).square().mean()).backward()
            scaler.step(optimizer, max_grad_norm=1.0)
            optimizer.zero_grad()
    for _, optimizer, _ in pairs:
        optimizer.synchronize()
    assert same(weights(theirs), weights(ours))


class TimedLanes(StreamLanes):
    """Keeps the end of every copy as an event with a time."""

    def __init__(self, where):
        super().__init__(where)
        self.ends = {"down": [], "up": []}

    def _mark(self, stream):
        event = self._module.Event(enable_timing=True)
        event.record(stream)
        self.ends["down" if stream is self._down else "up"].append(event)
        return event


def test_copies_down_end_before_backward_does():
    lanes = TimedLanes(device())
    net = model(width=2048, layers=8)
    optimizer = offloaded(net, lambda _: lanes)
    backward(net, micro=1)
    optimizer.zero_grad()
    lanes.ends["down"].clear()
    module = torch.get_device_module(device())
    ended = module.Event(enable_timing=True)
    batch = torch.randn(8192, 2048, device=device())
    # The first layer's gradient is the last one; after backward itself the host has waited for all copies.
    hook = net[0].weight.register_hook(lambda _: ended.record())
    net(batch).square().mean().backward()
    hook.remove()
    torch.accelerator.synchronize()
    before = [end for end in lanes.ends["down"] if end.elapsed_time(ended) > 0]
    assert len(before) > len(lanes.ends["down"]) / 2


def test_forward_begins_before_all_weights_are_up():
    lanes = TimedLanes(device())
    net = model(width=4096, layers=8)
    optimizer = offloaded(net, lambda _: lanes, chunk_bytes=64 << 20)
    batch = torch.randn(16, 4096, device=device())
    net(batch).square().mean().backward()
    optimizer.step()
    module = torch.get_device_module(device())
    first = module.Event(enable_timing=True)
    hook = net[1].register_forward_pre_hook(lambda *_: first.record())
    # Weights that go up again, all at once, with nothing of the host in between.
    for chunk in reversed(optimizer._chunks):
        optimizer._mode.send(chunk)
    net(batch)
    hook.remove()
    torch.accelerator.synchronize()
    assert first.elapsed_time(lanes.ends["up"][-1]) > 0


def pinned_blocks():
    """How many blocks of pinned memory have been made so far; those that were given back are used again."""
    module = torch.get_device_module(device())
    if not hasattr(module, "host_memory_stats"):
        pytest.skip("needs host_memory_stats, which counts pinned memory")
    gc.collect()
    torch.accelerator.synchronize()
    return module.host_memory_stats()["num_host_alloc"]


def test_the_device_has_less_memory_in_use_and_the_host_gets_its_own_back():
    where = device()

    def steady(make):
        net = model(torch.bfloat16, width=1024)
        optimizer = make(net)
        for _ in range(2):
            backward(net)
            optimizer.step()
            optimizer.zero_grad()
        return torch.accelerator.memory_allocated(where)

    def masters_on_the_device(net):
        return offloaded(net, free_bytes=0)

    on_host, on_device = steady(offloaded), steady(masters_on_the_device)
    values = sum(p.numel() for p in model(torch.bfloat16, width=1024).parameters())
    assert on_device - on_host > 10 * values
    steady(offloaded)
    before = pinned_blocks()
    for _ in range(3):
        steady(offloaded)
    assert pinned_blocks() == before


def test_steps_allocate_no_pinned_memory():
    net = model(torch.bfloat16)
    optimizer = offloaded(net)
    backward(net)
    optimizer.step()
    before = pinned_blocks()
    for _ in range(3):
        backward(net)
        optimizer.step()
    assert pinned_blocks() == before


def test_calibration_finds_rates():
    rates = calibrate(device(), seconds=0.5)
    assert min(rates.down, rates.up, rates.cpu) > 1e8


@pytest.mark.parametrize("mode", ["sync", "speculative"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_trainer_gives_the_numbers_of_copies_that_wait(precision, mode):
    """Windows of three, clipping, a loss scale, and one step that is skipped."""
    found = []
    for lanes in (lambda _: DirectLanes(), lanes_for):
        net = model(width=256, layers=3)
        settings = OffloadSettings(chunk_bytes=CHUNK, mode=mode)
        trainer = MixedPrecisionTrainer(
            net,
            precision,
            loss_fn=nn.functional.mse_loss,
            optimizer=lambda params, lanes=lanes, settings=settings: OffloadedOptimizer(
                params, lr=1e-3, settings=settings, lanes=lanes
            ),
            gradient_accumulation_steps=3,
            max_grad_norm=0.1,
            ema_decay=0.9,
            seed=0,
        )
        generator = torch.Generator().manual_seed(0)
        for step in range(12):
            batch = torch.randn(64, 256, generator=generator) * (float("nan") if step == 7 else 1.0)
            trainer.step((batch, batch))
        trainer.settle()
        trainer.optimizer.synchronize()
        assert (trainer.steps_attempted, trainer.steps_applied) == (4, 3)
        assert all(p.grad is None for p in net.parameters())
        found.append([*weights(net), *(value.cpu() for value in trainer.ema.values.values())])
    assert same(*found)
