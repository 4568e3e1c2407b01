"""Statistics on an accelerator of the CUDA kind: nothing waits, and the numbers are those of a CPU."""

from __future__ import annotations

import pytest
import torch
from no_waiting import no_waiting
from torch import nn

from deepseek_mp import MixedPrecisionTrainer, PrecisionMonitor
from deepseek_mp.monitor import Sampling
from deepseek_mp.ops.reference import non_finite as reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs torch.cuda, which says when something waits"),
]
DEVICE = torch.device("cuda")
EVERY_LAYER = Sampling(every=1, units=8)
FORMATS = ("bf16", "fp16", "fp8_e4m3", "fp8_e5m2", "mx", "block", "tensor", "nvfp4", "int8")


def model(width=128):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 1),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * width, width), nn.GELU(), nn.Linear(width, 10),
    )  # fmt: skip


def batches(count, device=DEVICE):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(8, 3, 16, 16, generator=generator).to(device),
            torch.randint(0, 10, (8,), generator=generator).to(device),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("optimizer", ["adamw", "fused", "sgd"])
def test_a_sampled_step_does_not_wait(optimizer, memory_format):
    net = model().to(DEVICE, memory_format=memory_format)
    made = {
        "adamw": lambda: torch.optim.AdamW(net.parameters(), lr=1e-3),
        "fused": lambda: torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True),
        "sgd": lambda: torch.optim.SGD(net.parameters(), lr=0.1),
    }[optimizer]()
    sampling = Sampling(every=1, units=8, formats=FORMATS)
    monitor = PrecisionMonitor(net, made, sample_every=None, sampling=sampling)

    def step(batch):
        made.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = nn.functional.cross_entropy(net(batch[0].to(memory_format=memory_format)), batch[1])
        loss.backward()
        made.step()

    data = batches(8)
    for batch in data[:3]:
        step(batch)
    with no_waiting():
        for batch in data[3:]:
            step(batch)
    found = monitor.statistics()
    assert {layer.tensors["grad_output"].samples for layer in found.values()} == {8}
    assert {layer.updates for layer in found.values()} == {8}


@pytest.mark.parametrize("mode", ["bf16", "fp16", "fp8"])
def test_the_trainer_does_not_wait_either(mode):
    trainer = MixedPrecisionTrainer(model(), mode, device=DEVICE, emulate=True, statistics_every=1, progress=False)
    data = batches(16)
    for batch in data[:8]:
        trainer.step(batch)
    with no_waiting():
        for batch in data[8:]:
            trainer.step(batch)
    trainer.settle()
    assert all(layer.updates > 2 for layer in trainer.monitor.statistics().values())


def test_all_modules_are_watched_without_waiting_and_the_producer_is_named():
    class Spoils(nn.Module):
        factor = 1.0

        def forward(self, x):
            return x * self.factor

    net = nn.Sequential(nn.Linear(8, 8), Spoils(), nn.Linear(8, 8)).to(DEVICE)
    monitor = PrecisionMonitor(net, sample_every=None, sampling=EVERY_LAYER)
    x = torch.ones(4, 8, device=DEVICE)
    for _ in range(3):
        net(x).sum().backward()
    net[1].factor = float("inf")
    net(x).sum().backward()
    for _ in range(4):
        torch.cuda.synchronize()  # what was counted has arrived, and is read without waiting
        with no_waiting():
            net(x).sum().backward()
    monitor.statistics()
    # It does so in every step from then on; as many are told as had arrived when the next one was sampled.
    assert {(alarm.layer, alarm.kind) for alarm in monitor.alarms} == {("1", "non_finite")}


def test_a_counted_step_looks_at_large_tensors_at_once(monkeypatch):
    """In pieces, those of 580 million values took seconds of a counted step."""
    pieces = []
    original = reference._of_piece
    monkeypatch.setattr(reference, "_of_piece", lambda piece: (pieces.append(piece.shape), original(piece))[1])
    net = nn.Sequential(nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 8)).to(DEVICE)
    monitor = PrecisionMonitor(net, sampling=EVERY_LAYER)
    net(torch.ones(8192, 64, device=DEVICE)).square().mean().backward()
    assert monitor.statistics()["0"].non_finite["output"] == 0
    assert monitor.log_precision_usage().sampled_steps == 1
    assert not pieces


def test_the_numbers_are_those_of_a_cpu():
    found = {}
    for device in ("cpu", "cuda"):
        net = nn.Sequential(nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 128))
        torch.manual_seed(0)
        for p in net.parameters():
            nn.init.normal_(p, std=0.05)
        net.to(device)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        sampling = Sampling(every=1, units=2, formats=("mx", "nvfp4", "fp16"))
        monitor = PrecisionMonitor(net, optimizer, sample_every=None, sampling=sampling)
        x = torch.randn(32, 128, generator=torch.Generator().manual_seed(2)).to(device)
        net(x).square().mean().backward()
        optimizer.step()
        found[device] = monitor.statistics()
    for name, layer in found["cpu"].items():
        other = found["cuda"][name]
        for tensor, statistics in layer.tensors.items():
            for field, value in statistics.spread.items():
                assert other.tensors[tensor].spread[field].last == pytest.approx(value.last, rel=0.02, abs=1e-7)
            for way, errors in statistics.errors.items():
                seen = other.tensors[tensor].errors[way]["relative"].last
                assert seen == pytest.approx(errors["relative"].last, rel=0.1, abs=1e-12)
        assert other.update["ratio"].last == pytest.approx(layer.update["ratio"].last, rel=1e-3)


def test_a_step_that_is_recorded_as_a_graph_is_let_pass():
    net = nn.Linear(8, 8).to(DEVICE)
    monitor = PrecisionMonitor(net, sample_every=None, sampling=EVERY_LAYER)
    x = torch.ones(4, 8, device=DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            net(x).sum().backward()
    torch.cuda.current_stream().wait_stream(side)
    monitor.statistics()
    graph = torch.cuda.CUDAGraph()
    net.zero_grad()
    with torch.cuda.graph(graph):
        net(x).sum().backward()
    graph.replay()
    assert monitor.statistics()[""].tensors["weight"].samples == 3
