"""The kernel for cross entropy by rows: two passes over the logits, the second of which writes their gradient there."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["V"])
def cross_entropy_kernel(
    logits, labels, factors, losses, V, row_stride, smoothing, GRADIENT: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss of row `program_id(0)` of logits [R, V]; with GRADIENT its gradient, times a factor, in their place.

    Each lane of the first pass has a maximum and a sum of exponentials of its own, since a maximum of all lanes in
    every turn would have the lanes wait for each other.
    """
    row = tl.program_id(0).to(tl.int64)
    place = logits + row * row_stride
    label = tl.load(labels + row)
    # A label that is no class makes the row NaN: it must not be read from another's memory.
    wanted = tl.load(place + label, mask=(label >= 0) & (label < V), other=float("nan")).to(tl.float32)
    most = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    plain = tl.zeros([BLOCK], dtype=tl.float32)
    for block in range(BLOCKS):
        k = block * BLOCK + tl.arange(0, BLOCK)
        inside = k < V
        z = tl.load(place + k, mask=inside, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(most, z)
        # Where all are -inf so far, a difference would be NaN.
        base = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(most - base) + tl.exp(z - base)
        most = larger
        plain += tl.where(inside, z, 0.0)
    top = tl.max(most)
    base = tl.where(top == float("-inf"), 0.0, top)
    whole = tl.sum(total * tl.exp(most - base))
    count = V.to(tl.float32)
    spread = tl.where(smoothing > 0.0, smoothing * (tl.sum(plain) / count), 0.0)
    tl.store(losses + row, tl.log(whole) + base - (1.0 - smoothing) * wanted - spread)
    if GRADIENT:
        factor = tl.load(factors + row)
        factor = tl.where(wanted == wanted, factor, float("nan"))
        for block in range(BLOCKS):
            k = block * BLOCK + tl.arange(0, BLOCK)
            inside = k < V
            z = tl.load(place + k, mask=inside, other=float("-inf")).to(tl.float32)
            share = tl.exp(z - base) / whole - smoothing / count - tl.where(k == label, 1.0 - smoothing, 0.0)
            tl.store(place + k, (factor * share).to(logits.dtype.element_ty), mask=inside)
