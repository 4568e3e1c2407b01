"""What stresses a model while it trains: hooks on layers and on the optimizer, all removed at the end.

Every stress but a higher learning rate changes nothing in exact arithmetic: what it adds or multiplies at one place
it takes back, in FP32, at another. FP32 therefore trains as if there were no stress, and what another policy
loses, it loses to its roundings.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class Stress:
    """Nothing yet; a subclass puts its hooks in place in `enter`. The loop says which step begins (`begin`).

    Example:
        with stress:
            for step, batch in enumerate(batches):
                stress.begin(step)
                trainer.step(batch)
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.step = 0
        self._hooks = ExitStack()

    def enter(self) -> None:
        """Put the hooks in place, through `keep`."""

    def begin(self, step: int) -> None:
        """Step `step`, from 0, is about to run; also one that will be skipped counts."""
        self.step = step

    def keep(self, handle: RemovableHandle) -> None:
        """Remove the hook when the context ends."""
        self._hooks.callback(handle.remove)

    def layer(self, name: str) -> nn.Linear:
        """The linear layer of that name."""
        layer = self.model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        return layer

    def __enter__(self) -> Stress:
        with self._hooks:
            self.enter()
            self._hooks = self._hooks.pop_all()  # in place until the context ends, unless `enter` raised
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()


class OutlierChannels(Stress):
    """From step `start` on, one in `every` channels of a layer's input is `factor` times as large.

    The layer's output loses again what these channels have too much: the sum of (factor - 1) x_j W_j, in FP32.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, *, layer: str, every: int, factor: float, start: int
    ) -> None:
        super().__init__(model, optimizer)
        self.name, self.factor, self.start = layer, factor, start
        self.channels = slice(every // 2, None, every)
        self._columns: Tensor | None = None

    def enter(self) -> None:
        layer = self.layer(self.name)
        self.keep(layer.register_forward_pre_hook(self._grow))
        self.keep(layer.register_forward_hook(self._take_back))

    def _grow(self, _: nn.Module, args: tuple[Any, ...]) -> Any:
        if self.step < self.start:
            return None
        x: Tensor = args[0]
        self._columns = x[..., self.channels]
        factors = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
        factors[self.channels] = self.factor
        return x * factors

    def _take_back(self, layer: nn.Module, _: Any, y: Tensor) -> Tensor | None:
        if self._columns is None:
            return None
        columns, self._columns = self._columns.float(), None
        assert isinstance(layer, nn.Linear)
        # No matrix product, which autocast would lower.
        excess = (columns.unsqueeze(-2) * layer.weight[:, self.channels].float()).sum(-1)
        return (y.float() - (self.factor - 1) * excess).to(y.dtype)


class TinyGradients(Stress):
    """In steps `start` to `end`, the gradient of a layer's output is 2**-`bits` times as large as it would be.

    What flows on to the layer's input is multiplied by 2**`bits`, in the type it has, and so is the weight's gradient.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, layer: str, bits: int, start: int, end: int) -> None:
        super().__init__(model, optimizer)
        self.name, self.factor, self.start, self.end = layer, 2.0**bits, start, end

    def enter(self) -> None:
        layer = self.layer(self.name)
        self.keep(layer.register_forward_pre_hook(lambda _, args: self._scaled(args[0], self.factor)))
        self.keep(layer.register_forward_hook(lambda _, __, y: self._scaled(y, 1 / self.factor)))
        self.keep(layer.weight.register_hook(lambda grad: grad * self.factor if self._active else grad))

    @property
    def _active(self) -> bool:
        return self.start <= self.step < self.end

    def _scaled(self, x: Tensor, factor: float) -> Tensor | None:
        if not self._active:
            return None
        scaled: Tensor = _ScaledGradient.apply(x, factor)  # type: ignore[no-untyped-call]
        return scaled


class DriftingGain(Stress):
    """What lies between two layers, with nothing but a ReLU in between, grows by a factor of two every `every` steps.

    The first layer's output is multiplied by a power of two and the second's is divided by it.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, *, first: str, second: str, every: int, bits: int
    ) -> None:
        super().__init__(model, optimizer)
        self.first, self.second, self.every, self.bits = first, second, every, bits

    def enter(self) -> None:
        self.keep(self.layer(self.first).register_forward_hook(lambda _, __, y: y * self._gain))
        self.keep(self.layer(self.second).register_forward_hook(lambda _, __, y: y / self._gain))

    @property
    def _gain(self) -> float:
        return 2.0 ** min(self.step // self.every, self.bits)


class AlignedGate(Stress):
    """A channel of a SwiGLU has equal weights in gate and up, which grow: its activation grows as their square.

    The channel's column of the down projection is zero and stays so: only the scales of others feel it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        block: str,
        channel: int,
        growth: float,
        limit: float,
    ) -> None:
        super().__init__(model, optimizer)
        self.block, self.channel, self.growth, self.limit = block, channel, growth, limit
        self._direction: Tensor | None = None

    def enter(self) -> None:
        gate, down = self.layer(f"{self.block}.gate"), self.layer(f"{self.block}.down")
        row = gate.weight.detach()[self.channel].float()
        self._direction = row / row.norm()
        with torch.no_grad():
            down.weight[:, self.channel] = 0
        self.keep(down.weight.register_hook(self._without_channel))

    @torch.no_grad()
    def begin(self, step: int) -> None:
        super().begin(step)
        assert self._direction is not None, "begin is called inside the context"
        row = self._direction * min(self.growth**step, self.limit)
        for name in ("gate", "up"):
            self.layer(f"{self.block}.{name}").weight[self.channel] = row

    def _without_channel(self, grad: Tensor) -> Tensor:
        kept = torch.ones(grad.shape[1], dtype=torch.bool, device=grad.device)
        kept[self.channel] = False
        return torch.where(kept, grad, 0.0)


class RateSpike(Stress):
    """In steps `start` to `end` the optimizer steps with `factor` times its learning rate."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, factor: float, start: int, end: int) -> None:
        super().__init__(model, optimizer)
        self.factor, self.start, self.end = factor, start, end
        self._rates: list[float] = []

    def enter(self) -> None:
        self.keep(self.optimizer.register_step_pre_hook(self._raise))
        self.keep(self.optimizer.register_step_post_hook(self._lower))

    def _raise(self, optimizer: Optimizer, *_: Any) -> None:
        self._rates = [group["lr"] for group in optimizer.param_groups]
        if self.start <= self.step < self.end:
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * self.factor

    def _lower(self, optimizer: Optimizer, *_: Any) -> None:
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate


class _ScaledGradient(Function):
    """x, with a gradient that is multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None
