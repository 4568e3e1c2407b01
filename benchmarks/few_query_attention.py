"""Attention of one query over many keys, a token's step of a decoder with a cache: PyTorch's and ours.

    python benchmarks/few_query_attention.py
    python benchmarks/few_query_attention.py --small --device cpu     # to try the script

Heads of 128 values in BF16: 32 of them with keys of their own, or 8 key heads for 32. A mask lets all keys be seen, as
at the end of a static cache, or a quarter of them, as early in one. Not all of PyTorch's fused kernels take groups
beside a mask, so that with groups it is timed with repeated keys too, as many models do it.

TB/s are those of all keys and values that the query sees. Calls go through copies that are larger than a GPU's cache,
are recorded and replayed. Nothing counts where ours is further than a rounding from FP32. `error` is the distance to
that, relative to it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from harness import Report, Spread, arguments
from replayed import times, turns
from torch import Tensor
from torch.nn import functional as F

from deepseek_mp.ops.few_query_attention import fastest, few_query_attention

KEYS = (512, 1024, 4096, 16384)
HEADS = {"32 heads": (32, 32), "32 heads, 8 of keys": (32, 8)}
BATCHES = (1, 8)
WIDTH = 128
SCALE = WIDTH**-0.5
ROUNDS_SMALL = 2
SMALLER = 8
ROUNDING = 4e-3
"""Norm of what rounding to BF16, twice, does to a result, relative to it: 2e-3 at most where errors are uniform."""

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of query, keys and values."""


def main() -> int:
    cases = {
        f"{name}, batch {batch}, {keys} keys": (batch, *heads, keys)
        for name, heads in HEADS.items()
        for batch in BATCHES
        for keys in KEYS
    }
    args = arguments(__doc__ or "", list(cases), rounds=8)
    report = Report("few-query-attention", args.device, vars(args))
    rounds = ROUNDS_SMALL if args.small else args.rounds
    for name in args.cases or cases:
        batch, heads, shared, keys = cases[name]
        sizes = (batch, heads, shared, keys // SMALLER if args.small else keys)
        report.run(name, partial(measure, sizes, args.device, rounds))
    return report.finish(args.out, table(report))


def measure(sizes: tuple[int, int, int, int], device: torch.device, rounds: int) -> dict[str, Any]:
    """Times of everyone for one size, and whether ours is right."""
    batch, heads, shared, keys = sizes
    query = torch.randn(batch, heads, 1, WIDTH, device=device).to(torch.bfloat16)
    key, value = (torch.randn(batch, shared, keys, WIDTH, device=device).to(torch.bfloat16) for _ in range(2))
    masks = {"all": keys, "a quarter": keys // 4}
    ways: dict[str, tuple[Attention, int]] = {}
    for name, seen in masks.items():
        mask = (torch.arange(keys, device=device) < seen)[None, None, None]
        for who, way in _ways(mask, heads != shared, device).items():
            ways[f"{who}, mask of {name}"] = way, seen
    ways |= {f"{who}, no mask": (way, keys) for who, way in _ways(None, heads != shared, device).items()}
    calls = {name: partial(turns(way, [key, value]), query) for name, (way, _) in ways.items()}
    found, failed = times(calls, device, rounds)
    ms = {name: Spread.of(values) for name, values in found.items()}
    read = {name: 2 * 2 * batch * shared * ways[name][1] * WIDTH + 2 * query.nbytes for name in ms}
    error = {name: _distance(ways[name][0](query, key, value), _exact(query, key, value, ways[name][1])) for name in ms}
    wrong = [f"{name} is off by {off:.2g}" for name, off in error.items() if not off <= ROUNDING]
    broken = [f"{name}: {why}" for name, why in failed.items() if name.startswith("ours")]
    return {
        "sizes": sizes,
        "ms": ms,
        "tb_per_s": {name: round(read[name] / spread.median / 1e9, 3) for name, spread in ms.items()},
        "error": error,
        "failed": failed,
        "check": "; ".join([f"void: {why}" for why in wrong] + broken) or "passed",
    }


def _ways(mask: Tensor | None, grouped: bool, device: torch.device) -> dict[str, Attention]:
    def pytorch(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)

    def repeated(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        times = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(times, dim=1) for part in (key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        name = fastest(device, query.dtype, WIDTH) or "reference"
        return few_query_attention(query, key, value, mask, SCALE, implementation=name)

    return {"pytorch": pytorch, **({"pytorch repeated": repeated} if grouped else {}), "ours": ours}


def _exact(query: Tensor, key: Tensor, value: Tensor, seen: int) -> Tensor:
    key, value = (part[:, :, :seen].float() for part in (key, value))
    return F.scaled_dot_product_attention(query.float(), key, value, enable_gqa=True)


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def table(report: Report) -> list[tuple[str, ...]]:
    """A line for each time."""
    lines: list[tuple[str, ...]] = [("attention", "who", "ms", "TB/s", "error")]
    for case, result in report.cases.items():
        for name, spread in result.get("ms", {}).items():
            rate, error = str(result["tb_per_s"][name]), f"{result['error'][name]:.2g}"
            lines.append((case, name, str(Spread(**spread)), rate, error))
        lines += [(case, name, "-", "-", why) for name, why in result.get("failed", {}).items()]
    return lines


if __name__ == "__main__":
    sys.exit(main())
