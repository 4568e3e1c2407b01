"""Ranges of what is quantised, from finite values only, and the fake quantisation that uses them.

They are torchao's classes, so that its passes take them for their own, with two differences. One batch with
a NaN or an infinity makes the ranges of torchao's observers NaN or infinite for ever; these pass over such
values. And fake quantisation turns a NaN into an integer, which would hide it from the check of the step;
here it comes out as it went in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization.pt2e import (
    FakeQuantize,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
)


class FiniteRange(MovingAverageMinMaxObserver):  # type: ignore[misc]
    """Moving averages of the smallest and the largest finite value of a tensor."""

    def forward(self, x_orig: Tensor) -> Tensor:
        """Take the tensor, of any shape, into account; returns it as it is."""
        if x_orig.numel():
            low, high = finite_range(x_orig.detach().flatten().to(self.min_val.dtype), dim=0)
            self.min_val.copy_(averaged(self.min_val, low, self.averaging_constant))
            self.max_val.copy_(averaged(self.max_val, high, self.averaging_constant))
        return x_orig


class FiniteRangePerChannel(MovingAveragePerChannelMinMaxObserver):  # type: ignore[misc]
    """The same for each index of the channel axis."""

    def forward(self, x_orig: Tensor) -> Tensor:
        """Take the tensor, of any shape with that axis, into account; returns it as it is."""
        if x_orig.numel():
            channels = x_orig.detach().transpose(0, self.ch_axis).flatten(1).to(self.min_val.dtype)
            low, high = finite_range(channels, dim=1)
            if self.min_val.shape != low.shape:
                self.min_val.resize_(low.shape).fill_(torch.inf)
                self.max_val.resize_(high.shape).fill_(-torch.inf)
            self.min_val.copy_(averaged(self.min_val, low, self.averaging_constant))
            self.max_val.copy_(averaged(self.max_val, high, self.averaging_constant))
        return x_orig


class FiniteFakeQuantize(FakeQuantize):  # type: ignore[misc]
    """Rounds to the integers of a range and back; the gradient passes straight through inside of the range.

    The range is observed in training mode. With an averaging constant of 1 (weights) it is that of the tensor at
    hand, in every mode.
    """

    log_step: nn.Parameter | None
    """Logarithms of what the steps of the observed range are multiplied by, where that is learned."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_parameter("log_step", None)

    def learn_step(self) -> None:
        """Let the steps be learned, with the gradients of LSQ (see `straight_through`), from those of now on."""
        self.register_parameter("log_step", nn.Parameter(torch.zeros_like(self.scale)))

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, for the conversion."""
        scale, zero_point = self.activation_post_process.calculate_qparams()
        return self._learned(scale).detach(), zero_point

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803 - the name in torchao
        observer = self.activation_post_process
        if bool(self.observer_enabled) and (self.training or observer.averaging_constant == 1):
            observer(X)
            scale, zero_point = observer.calculate_qparams()
            if self.scale.shape != scale.shape:
                self.scale.resize_(scale.shape)
                self.zero_point.resize_(zero_point.shape)
            self.scale.copy_(scale)
            self.zero_point.copy_(zero_point)
        if not bool(self.fake_quant_enabled):
            return X
        return torch.where(torch.isfinite(X), self._rounded(X, observer.quant_min, observer.quant_max), X)

    def _rounded(self, x: Tensor, low: int, high: int) -> Tensor:
        rounding: Any = torch  # whose stubs say float for the scales of channels
        scale, zero_point = self._learned(self.scale), self.zero_point
        made: Tensor
        if self.log_step is None:
            if self.is_per_channel:
                made = rounding.fake_quantize_per_channel_affine(x, scale, zero_point, self.ch_axis, low, high)
            else:
                made = rounding.fake_quantize_per_tensor_affine(x, scale, zero_point, low, high)
            return made
        share = x.shape[self.ch_axis] if self.is_per_channel else x.shape[0]  # channels, or samples
        factor = (max(1, x.numel() // max(1, share)) * high) ** -0.5
        zero_point = zero_point.to(scale.dtype)
        if self.is_per_channel:
            learnable = rounding._fake_quantize_learnable_per_channel_affine  # noqa: SLF001 - it has no public name
            made = learnable(x, scale, zero_point, self.ch_axis, low, high, factor)
        else:
            learnable = rounding._fake_quantize_learnable_per_tensor_affine  # noqa: SLF001 - nor has it
            made = learnable(x, scale, zero_point, low, high, factor)
        return made

    def _learned(self, scale: Tensor) -> Tensor:
        # A copy: of a range that several tensors share the scale changes again before the backward.
        return scale if self.log_step is None else scale.clone() * self.log_step.exp()


def finite_range(values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest finite value along `dim`; inf and -inf where there is none."""
    finite = torch.isfinite(values)
    low = torch.where(finite, values, torch.inf).amin(dim)
    high = torch.where(finite, values, -torch.inf).amax(dim)
    return low, high


def averaged(average: Tensor, value: Tensor, share: float) -> Tensor:
    """The moving average with `value` taken in: `value` itself at first, the average where `value` is not finite."""
    moved = torch.where(torch.isfinite(average), torch.lerp(average, value, share), value)
    return torch.where(torch.isfinite(value), moved, average)
