"""Gradients that come down through a placement: a simulated NPU, whose numbers are the host's."""

import copy
import math

import pytest
import torch
from fake_device import WORKERS, FakeLanes
from simulated_npu import HOST, SimulatedNpu
from torch import nn

from deepseek_mp.optim.offload import OffloadedOptimizer, OffloadSettings
from deepseek_mp.optim.offload.compressed_down import SMALLEST, CompressedDown, compressed_gradients


def model():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 8))


def offloaded(net, npu, *, lanes=None, **options):
    lanes = FakeLanes() if lanes is None else lanes
    settings = OffloadSettings(chunk_bytes=6000, **options)
    return OffloadedOptimizer(
        net.parameters(), lr=1e-2, model=net, settings=settings, lanes=compressed_gradients(npu, lambda _: lanes)
    )


def backward(*nets, factor=1.0):
    batch = torch.randn(16, 64)
    for net in nets:
        (net(batch).square().mean() * factor).backward()


def test_the_masters_get_what_the_placement_made_of_the_gradients():
    ours, theirs, npu, lanes = model(), model(), SimulatedNpu(), FakeLanes()
    assert npu.simulated
    optimizer = offloaded(ours, npu, lanes=lanes)
    backward(ours, theirs)
    large = theirs[0].weight.grad
    assert torch.equal(optimizer.master(ours[0].weight).grad, HOST.expand(HOST.compress(large)))
    assert not torch.equal(optimizer.master(ours[0].weight).grad, large)
    for mine, other in list(zip(ours.parameters(), theirs.parameters(), strict=True))[1:]:
        assert torch.equal(optimizer.master(mine).grad, other.grad)  # small ones are sent as they are
    assert npu.calls == ["compress", "expand"]
    assert sum(event.startswith("down") for event in lanes.events) == 3


@pytest.mark.parametrize("mode", ["sync", "speculative"])
@pytest.mark.parametrize("worker", WORKERS)
def test_micro_batches_add_up_in_fp32_and_train(mode, worker):
    ours, npu = model(), SimulatedNpu()
    reference = copy.deepcopy(ours)
    adamw = torch.optim.AdamW(reference.parameters(), lr=1e-2, fused=True)
    settings = OffloadSettings(chunk_bytes=6000, mode=mode, accumulation=3)
    optimizer = OffloadedOptimizer(
        ours.parameters(),
        lr=1e-2,
        model=ours,
        settings=settings,
        lanes=compressed_gradients(npu, lambda _: FakeLanes()),
        worker=worker,
    )
    for _ in range(4):
        sums = None
        for _ in range(3):
            backward(ours, reference)
            sent = [HOST.expand(HOST.compress(p.grad)) if p.numel() >= 4096 else p.grad for p in reference.parameters()]
            sums = [g.clone() for g in sent] if sums is None else [s + g for s, g in zip(sums, sent, strict=True)]
            reference.zero_grad()
        for p, gradient in zip(reference.parameters(), sums, strict=True):
            p.grad = gradient
        adamw.step()
        adamw.zero_grad()
        optimizer.step()
    optimizer.synchronize()
    assert all(map(torch.equal, ours.parameters(), reference.parameters()))
    assert len(npu.calls) == 2 * 12


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_with_numbers_that_are_not_finite_is_skipped(bad):
    net = model()
    optimizer = offloaded(net, SimulatedNpu())
    before = [p.detach().clone() for p in net.parameters()]
    backward(net, factor=bad)
    optimizer.step()
    assert optimizer.report.reason == "nonfinite"
    assert all(map(torch.equal, before, net.parameters()))


def test_what_is_sent_is_a_quarter_of_fp32():
    lanes = CompressedDown(FakeLanes(), SimulatedNpu())
    source, target = torch.randn(64, 128), torch.zeros(64, 128, dtype=torch.bfloat16)
    mark = lanes.down(target, source)
    assert not target.any()
    lanes.land(mark)
    assert torch.equal(target, HOST.expand(HOST.compress(source)).bfloat16())
    assert lanes.sent_bytes == 64 * 128 + 64 * 4


def test_weights_go_up_as_they_are():
    below = FakeLanes()
    lanes = CompressedDown(below, SimulatedNpu())
    target = torch.zeros(8192)
    mark = lanes.up([target], [torch.full((8192,), 1.001)])
    lanes.wait(mark)
    assert torch.equal(target, torch.full((8192,), 1.001))
    assert below.events == ["up 0", "wait up 0"]


def test_what_was_compressed_is_there_and_what_was_not_comes_by_the_lanes():
    lanes = FakeLanes()
    down, target, source = CompressedDown(lanes, SimulatedNpu()), torch.zeros(SMALLEST), torch.randn(SMALLEST)
    assert down.has_landed(down.down(target, source))
    small = down.down(target[:4], source[:4])
    assert not down.has_landed(small)
    down.land(small)
    assert down.has_landed(small)
