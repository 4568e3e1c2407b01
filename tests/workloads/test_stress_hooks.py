"""Stress is felt where it is put, changes nothing in exact arithmetic, and is gone afterwards."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deepseek_mp.workloads.stress_hooks import (
    AlignedGate,
    DriftingGain,
    OutlierChannels,
    RateSpike,
    Stress,
    TinyGradients,
)
from deepseek_mp.workloads.stress_models import ResidualConfig, residual_net

Factory = Callable[[nn.Module, Optimizer], Stress]
SIZES = {"features": 8, "width": 16, "hidden": 32, "outputs": 4}
OUTLIER = partial(OutlierChannels, layer="blocks.0.up", every=8, factor=1000.0, start=2)
TINY = partial(TinyGradients, layer="blocks.0.down", bits=20, start=1, end=4)
DRIFT = partial(DriftingGain, first="blocks.1.up", second="blocks.1.down", every=2, bits=2)
GATE = partial(AlignedGate, block="blocks.1", channel=3, growth=4.0, limit=32.0)
SPIKE = partial(RateSpike, factor=5.0, start=1, end=3)


class Training:
    """A few steps of FP32 under a stress, and what they were made of."""

    def __init__(self, factory: Factory, *, steps: int = 6, gated: bool = False) -> None:
        self.net = residual_net(ResidualConfig(**SIZES, gated=gated))
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-2)
        self.stress = factory(self.net, self.optimizer)
        self.seen: dict[str, list[Tensor]] = {}
        self.losses: list[float] = []
        generator = torch.Generator().manual_seed(0)
        with self.stress:
            for name, module in self.net.named_modules():
                if isinstance(module, nn.Linear):
                    module.register_forward_pre_hook(partial(self._see, name))
            for step in range(steps):
                self.stress.begin(step)
                inputs = torch.randn(64, 8, generator=generator)
                self.optimizer.zero_grad()
                loss = (self.net(inputs) - inputs[:, :4].abs()).square().mean()
                loss.backward()
                self.optimizer.step()
                self.losses.append(float(loss.detach()))

    def _see(self, name: str, _: nn.Module, args: tuple[Tensor]) -> None:
        self.seen.setdefault(name, []).append(args[0].detach().abs().amax(0))

    @property
    def weights(self) -> list[Tensor]:
        return [parameter.detach() for parameter in self.net.parameters()]


@pytest.mark.parametrize("factory", [TINY, DRIFT])
def test_powers_of_two_leave_fp32_bit_for_bit(factory: Factory) -> None:
    calm, stressed = Training(Stress), Training(factory)
    assert calm.losses == stressed.losses
    assert all(torch.equal(a, b) for a, b in zip(calm.weights, stressed.weights, strict=True))


def test_outliers_leave_fp32_to_its_roundings() -> None:
    calm, stressed = Training(Stress), Training(OUTLIER)
    assert calm.losses != stressed.losses
    assert stressed.losses == pytest.approx(calm.losses, rel=1e-4)


def test_a_channel_that_nobody_reads_leaves_fp32_alone_however_large_it_is() -> None:
    small, large = (Training(partial(GATE, limit=limit), gated=True) for limit in (1.0, 512.0))
    assert small.losses == large.losses
    assert large.net.blocks[1].down.weight[:, 3].eq(0).all()
    assert large.seen["blocks.1.down"][-1][3] > 1e4 * small.seen["blocks.1.down"][-1][3]


def test_outliers_are_a_thousand_times_as_large_from_their_step_on() -> None:
    calm, stressed = Training(Stress).seen["blocks.0.up"], Training(OUTLIER).seen["blocks.0.up"]
    for step in range(6):
        factors = torch.ones(16)
        factors[[4, 12]] = 1000.0 if step >= 2 else 1.0
        assert torch.allclose(stressed[step] / calm[step], factors, rtol=1e-3)


def test_gradients_at_a_layer_are_a_millionth_in_its_steps_and_whole_below_it() -> None:
    net = residual_net(ResidualConfig(**SIZES))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    grads: dict[str, list[Tensor]] = {"down": [], "up": []}
    outputs: list[Tensor] = []  # the largest gradients that the layer itself receives

    def watch(_: nn.Module, __: object, y: Tensor) -> None:
        y.register_hook(lambda grad: outputs.append(grad.abs().max()))

    net.get_submodule("blocks.0.down").register_forward_hook(watch)
    with TINY(net, optimizer) as stress:
        for step in (0, 1, 3, 4):
            stress.begin(step)
            optimizer.zero_grad()
            net(torch.ones(4, 8)).sum().backward()
            for name, found in grads.items():
                found.append(net.get_submodule(f"blocks.0.{name}").weight.grad.clone())
            optimizer.step()
    assert [float(found / outputs[0]) for found in outputs] == [1, 2**-20, 2**-20, 1]
    assert all(torch.equal(grad, found[0]) for found in grads.values() for grad in found)


def test_a_gain_doubles_up_to_its_limit() -> None:
    calm, stressed = (Training(factory, steps=8).seen["blocks.1.down"] for factory in (Stress, DRIFT))
    assert [float((a / b).nanmean()) for a, b in zip(stressed, calm, strict=True)] == [1, 1, 2, 2, 4, 4, 4, 4]


def test_gate_and_up_are_aligned_and_grow() -> None:
    net = residual_net(ResidualConfig(**SIZES, gated=True))
    with GATE(net, torch.optim.SGD(net.parameters(), lr=0.1)) as stress:
        lengths = []
        for step in range(4):
            stress.begin(step)
            gate, up = (net.get_submodule(f"blocks.1.{name}").weight[3] for name in ("gate", "up"))
            assert torch.equal(gate, up)
            lengths.append(float(gate.detach().norm()))
    assert lengths == pytest.approx([1, 4, 16, 32])


def test_a_spike_multiplies_the_rate_of_its_steps_only() -> None:
    weight = nn.Parameter(torch.zeros(1))
    model = nn.Module()
    optimizer = torch.optim.SGD([weight], lr=1.0)
    moved = []
    with SPIKE(model, optimizer) as stress:
        for step in range(4):
            stress.begin(step)
            before = float(weight.detach())
            weight.grad = -torch.ones(1)
            optimizer.step()
            moved.append(float(weight.detach()) - before)
            assert optimizer.param_groups[0]["lr"] == 1.0
    assert moved == [1, 5, 5, 1]


@pytest.mark.parametrize("factory", [OUTLIER, TINY, DRIFT, GATE, SPIKE])
def test_all_hooks_are_gone_after_the_steps_also_after_an_exception(factory: Factory) -> None:
    net = residual_net(ResidualConfig(**SIZES, gated=True))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def hooks() -> int:
        of_modules = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())
        of_modules += sum(len(p._backward_hooks or ()) for p in net.parameters())
        return of_modules + len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)

    def interrupted() -> None:
        with factory(net, optimizer):
            assert hooks() > 0
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        interrupted()
    assert hooks() == 0


def test_a_layer_that_is_missing_leaves_no_hook_behind() -> None:
    net = residual_net(ResidualConfig(**SIZES))
    stress = DriftingGain(net, torch.optim.SGD(net.parameters()), first="blocks.0.up", second="gone", every=1, bits=1)
    with pytest.raises(AttributeError, match="gone"):
        stress.__enter__()
    assert not net.blocks[0].up._forward_hooks
