"""Looks at the gradients of some layers' weights in every step of an optimizer, and never waits for the device.

One norm over all of the weights, and a few rows of those that Adam's second moment is asked about. The numbers are sent
to the host when the step is made and read when its outcome is, which is when they have arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deepseek_mp.controller.spikes import Gradient
from deepseek_mp.ops.gradients import moment_ratios, norms
from deepseek_mp.ops.host_copy import HostCopy
from deepseek_mp.ops.moved import moved
from deepseek_mp.optim.offload.stepped import settle, stepped
from deepseek_mp.optim.states import moment_rows

ROWS = 64
"""Rows of a weight that its second moment is compared on; they move on with every step."""
ALMOST = 0.999
"""One, but for rounding."""


@dataclass(frozen=True, kw_only=True)
class _Sent:
    """Numbers on their way, and what they are of."""

    names: list[str]
    compared: list[str]
    factors: list[float]
    """From what was sent of the moments to the RMS."""
    places: list[int]
    """Where the norms of those named are."""
    numbers: HostCopy


class GradientWatch:
    """A hook before the steps of an optimizer.

    Args:
        layers: whose weights are looked at, by name.
        lowered: the names of those that are also compared with Adam's second moment.
        steps: how many steps the optimizer has made.
        norms: parameters and the norms of their unscaled gradients, where somebody has computed them for this step.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        layers: Mapping[str, nn.Module],
        *,
        lowered: Callable[[], Collection[str]],
        steps: Callable[[], int],
        norms: Callable[[], tuple[Sequence[Tensor], Tensor] | None] = lambda: None,
    ) -> None:
        self._layers, self._lowered, self._steps, self._norms = layers, lowered, steps, norms
        self._sent: _Sent | None = None
        self.rate = 0.0
        """The highest learning rate of the last step, of those that are numbers: reading a tensor would wait."""
        self._handle = optimizer.register_step_pre_hook(self._look)

    def remove(self) -> None:
        """Look no more."""
        self._handle.remove()

    def read(self) -> dict[str, Gradient]:
        """By layer, of the step that was made last; nothing if it was none, or was read already."""
        sent, self._sent = self._sent, None
        if sent is None:
            return {}
        found, ratios = (part.tolist() for part in sent.numbers.tensors())
        norms = [found[place] for place in sent.places]
        rms = {name: ratio * factor for name, ratio, factor in zip(sent.compared, ratios, sent.factors, strict=True)}
        return {name: Gradient(norm=norm, rms=rms.get(name)) for name, norm in zip(sent.names, norms, strict=True)}

    @torch.no_grad()
    def _look(self, optimizer: Optimizer, *_: Any) -> None:
        rates = [group["lr"] for group in optimizer.param_groups]
        self.rate = max((float(rate) for rate in rates if not isinstance(rate, Tensor)), default=0.0)
        found = ((name, _trained(module, optimizer)) for name, module in self._layers.items())
        weights = {name: weight for name, weight in found if weight is not None}
        if not weights:
            return
        divisor = getattr(optimizer, "grad_scale", None)
        sizes, places = self._sizes(weights, divisor)
        compared, factors, ratios = self._compare(optimizer, weights, divisor)
        together = torch.cat([sizes[:0], *(moved(ratio, sizes.device) for ratio in ratios)])
        self._sent = _Sent(
            names=list(weights),
            compared=compared,
            factors=factors,
            places=places,
            numbers=HostCopy([sizes, together]),
        )

    def _sizes(self, weights: Mapping[str, Tensor], divisor: Tensor | None) -> tuple[Tensor, list[int]]:
        """Norms of unscaled gradients, those of the layers among them, and where these are."""
        known = self._norms()
        if known is not None:
            place = {id(parameter): number for number, parameter in enumerate(known[0])}
            places = [place[id(weight)] for weight in weights.values() if id(weight) in place]
            if len(places) == len(weights):
                return known[1], places
        sizes = norms([weight.grad for weight in weights.values() if weight.grad is not None])
        if divisor is not None:  # what a fused kernel will divide the gradients by
            sizes = sizes / moved(divisor, sizes.device)
        return sizes, list(range(len(weights)))

    def _compare(
        self, optimizer: Optimizer, weights: Mapping[str, Tensor], divisor: Tensor | None
    ) -> tuple[list[str], list[float], list[Tensor]]:
        """The lowered layers whose second moment has seen the steps that it spans, and what `moment_ratios` says."""
        names = {id(weights[name]): name for name in self._lowered() if name in weights}
        if names:
            settle(optimizer)
        step = self._steps() + 1
        compared: list[str] = []
        factors: list[float] = []
        ratios: list[Tensor] = []
        for group in optimizer.param_groups if names else []:
            beta = group["betas"][1] if "betas" in group else 1.0
            own = [p for p in group["params"] if id(p) in names and _has_moment(optimizer, p)]
            # Before, every gradient that begins to grow looks like a spike.
            if not own or step * (1 - beta) < ALMOST:
                continue
            parts = [_rows(p.grad, step).float() for p in own]
            moments = [_moment_rows(optimizer, p, step).float() for p in own]
            ratios.append(moment_ratios(parts, moments, beta=beta, eps=group.get("eps", 1e-8), divisor=divisor))
            compared += [names[id(p)] for p in own]
            factors += [((1 - beta**step) / part.numel()) ** 0.5 for part in parts]
        return compared, factors, ratios


def _trained(module: nn.Module, optimizer: Optimizer) -> Tensor | None:
    """The layer's weight, or what stands for it in the optimizer, if it has a gradient now."""
    own = module._parameters.get("weight")  # noqa: SLF001 - one that is computed is no parameter
    weight = None if own is None else stepped(optimizer, own)
    return None if weight is None or weight.grad is None or weight.grad.layout != torch.strided else weight


def _has_moment(optimizer: Optimizer, parameter: Tensor) -> bool:
    return moment_rows(optimizer.state.get(parameter, {}), "exp_avg_sq", parameter, 0, 1) is not None


def _moment_rows(optimizer: Optimizer, parameter: Tensor, step: int) -> Tensor:
    """Of the second moment, those that `_rows` gives of the gradient."""
    start = _first_row(parameter, step)
    found = moment_rows(optimizer.state[parameter], "exp_avg_sq", parameter, start, start + ROWS)
    assert found is not None, "only parameters with a second moment are compared"
    return found


def _rows(tensor: Tensor | None, step: int) -> Tensor:
    """Neighbouring rows, so that they are one piece of memory; others in the next step."""
    assert tensor is not None, "only weights with a gradient are looked at"
    start = _first_row(tensor, step)
    return tensor[start : start + ROWS]


def _first_row(tensor: Tensor, step: int) -> int:
    return step * ROWS % max(tensor.shape[0] - ROWS + 1, 1)
