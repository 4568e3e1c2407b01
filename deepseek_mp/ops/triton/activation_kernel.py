"""Activations and their slopes, inside kernels: what `ops.sources` names, for cheap on a GPU.

A cast is limited by instructions, and FP8 keeps four bits of a value. So exponentials and reciprocals are the
approximate ones of the hardware (relative error 1e-6), without a slower path for numbers below 1e-38.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deepseek_mp.ops.triton.cast_kernel import larger


@triton.jit
def _exp2(x, PTX: tl.constexpr):
    if PTX:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return tl.exp2(x)


@triton.jit
def _reciprocal(x, PTX: tl.constexpr):
    if PTX:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return 1.0 / x


@triton.jit
def _sigmoid(x, PTX: tl.constexpr):
    LOG2_E: tl.constexpr = 1.4426950408889634
    return _reciprocal(1.0 + _exp2(x * -LOG2_E, PTX), PTX)


@triton.jit
def _tanh_argument(x):
    """Twice what the tanh of gelu's approximation is taken of: (1 + tanh(u)) / 2 is the sigmoid of 2u."""
    return x * (1.5957691216057308 + 0.07135481282553506 * (x * x))


@triton.jit
def _normal(x, PTX: tl.constexpr):
    """The share of a normal distribution below x, and exp(-x**2 / 2).

    The share beyond |x| is exp(-x**2 / 2) times a polynomial in t = 1 / (1 + p |x|), the form of Abramowitz and
    Stegun's approximation 7.1.26 (Handbook of Mathematical Functions). Its coefficients are a fit of the relative
    error, 6e-7 at most up to |x| = 13, so that far below zero, where that share is small, it is as exact.
    """
    HALF_LOG2_E: tl.constexpr = 0.7213475204444817
    bell = _exp2(x * x * -HALF_LOG2_E, PTX)
    t = _reciprocal(1.0 + 0.26304372 * tl.abs(x), PTX)
    sum = 0.078633977 + t * (0.153114935 + t * (-0.083642520 + t * (0.209635816 + t * -0.070217639)))
    sum = t * (0.104774050 + t * (0.107701430 + t * sum))
    tail = sum * bell
    return tl.where(x < 0.0, tail, 1.0 - tail), bell


@triton.jit
def activation(x, ACTIVATION: tl.constexpr, PTX: tl.constexpr):
    """f(x), for a name of `ops.sources.ACTIVATIONS`."""
    if ACTIVATION == "relu":
        return larger(x, 0.0)
    if ACTIVATION == "silu":
        share = _sigmoid(x, PTX)
    elif ACTIVATION == "gelu_tanh":
        share = _sigmoid(_tanh_argument(x), PTX)
    else:
        share, _ = _normal(x, PTX)
    return x * share


@triton.jit
def times_slope(x, g, ACTIVATION: tl.constexpr, PTX: tl.constexpr):
    """f'(x) * g."""
    if ACTIVATION == "relu":
        return tl.where(x <= 0.0, 0.0, g)
    if ACTIVATION == "gelu":
        share, bell = _normal(x, PTX)
        return g * (share + x * (bell * 0.3989422804014327))
    if ACTIVATION == "silu":
        share = _sigmoid(x, PTX)
        return g * (share + x * share * (1.0 - share))
    share = _sigmoid(_tanh_argument(x), PTX)
    return g * (share + x * share * (1.0 - share) * (1.5957691216057308 + 0.21406443847660517 * (x * x)))


@triton.jit
def source_value(
    x, up, g, place, mask, ACTIVATION: tl.constexpr, GATE: tl.constexpr, GRAD: tl.constexpr, PTX: tl.constexpr
):
    """The values of a source at these places, fp32; zeros where the mask is not set. It reads what it is made of."""
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    if GRAD:
        factor = tl.load(g + place, mask=mask, other=0.0).to(tl.float32)
        if GATE:
            factor = factor * tl.load(up + place, mask=mask, other=0.0).to(tl.float32)
        return times_slope(value, factor, ACTIVATION, PTX)
    made = activation(value, ACTIVATION, PTX)
    if GATE:
        made = made * tl.load(up + place, mask=mask, other=0.0).to(tl.float32)
    return made
