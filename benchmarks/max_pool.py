"""Max pooling: our kernels beside PyTorch's own and the compiler's, forward, and forward with backward.

    python benchmarks/max_pool.py
    python benchmarks/max_pool.py --small --device cpu     # to try the script

Each time is also given as GB/s of the bytes that our ops have to move, whoever runs: input, outputs and one byte of
offset for each in the forward; output gradients, offsets and input gradients in the backward. The backward's time is
that of both less that of the forward. `trainer` is code compiled by the trainer's backend, which has to be as fast as
`ours`. On a GPU calls are recorded and replayed, so that the host's time does not count; what fits a GPU's cache may be
found there.

Nothing counts where our values, offsets or gradients differ by a bit from those in plain PyTorch, or values from
PyTorch's own pool.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from harness import Report, Spread, arguments
from replayed import times
from torch import Tensor
from torch.nn import functional as F

from deepseek_mp.ops.max_pool import fastest, max_pool2d, max_pool2d_backward
from deepseek_mp.trainer.graph_backend import inductor

CASES = {
    "stem of ResNet-50": ((256, 64, 112, 112), ([3, 3], [2, 2], [1, 1], False)),
    "context of a detector": ((64, 256, 20, 20), ([5, 5], [1, 1], [2, 2], False)),
}
"""Input, and kernel, stride, padding and ceil_mode; in bf16, channels_last."""
ROUNDS_SMALL = 2
BYTES = "forward: x + values + offsets; backward: gradient + offsets + gradient of x"

Pool = Callable[[Tensor], Tensor]
Window = tuple[list[int], list[int], list[int], bool]


def main() -> int:
    args = arguments(__doc__ or "", list(CASES), rounds=8)
    report = Report("max-pool", args.device, vars(args))
    for case in args.cases or CASES:
        report.run(case, partial(measure, case, args.device, ROUNDS_SMALL if args.small else args.rounds, args.small))
    return report.finish(args.out, rows(report))


def measure(case: str, device: torch.device, rounds: int, small: bool) -> dict[str, Any]:
    """Times of everyone for one pool, and whether ours is right."""
    shape, window = CASES[case]
    if small:
        shape = (2, *shape[1:])
    x = torch.randn(shape, device=device).to(torch.bfloat16, memory_format=torch.channels_last).requires_grad_()
    implementation = fastest(device, x.dtype) or "reference"
    with torch.no_grad():  # a graph kept alive would tie the leaf to this stream, and no other could record
        values, offsets = max_pool2d(x, *window, implementation=implementation)
    g = torch.randn_like(values)
    problem = _differs(x.detach(), g, window, implementation)
    torch._dynamo.reset()  # noqa: SLF001 - each case is compiled for its own sizes

    def pytorch(x: Tensor) -> Tensor:
        return F.max_pool2d(x, *window[:3])

    pools: dict[str, Pool] = {
        "ours": lambda x: max_pool2d(x, *window, implementation=implementation)[0],
        "aten": pytorch,
        "compiled": torch.compile(pytorch, dynamic=False),
        "trainer": torch.compile(pytorch, dynamic=False, backend=inductor),
    }
    calls: dict[str, Callable[[], object]] = {}
    for name, pool in pools.items():
        calls[f"{name} forward"] = partial(pool, x)
        calls[f"{name} both"] = partial(_both, pool, x, g)
    found, failed = times(calls, device, rounds)
    moved = {
        "forward": x.nbytes + values.nbytes + offsets.nbytes,
        "backward": g.nbytes + offsets.nbytes + x.nbytes,
    }
    return {
        "shape": shape,
        "window": window,
        "implementation": implementation,
        "bytes": {"what": BYTES, **moved},
        "ms": (ms := _by_direction(found)),
        "gb_per_s": {name: round(moved[name.split()[-1]] / spread.median / 1e6, 1) for name, spread in ms.items()},
        "failed": failed,
        "check": problem or "; ".join(f"{name}: {why}" for name, why in failed.items()) or "passed",
    }


def _both(pool: Pool, x: Tensor, g: Tensor) -> Tensor:
    return torch.autograd.grad(pool(x), x, g)[0]


def _by_direction(found: dict[str, list[float]]) -> dict[str, Spread]:
    """Forward, and backward as what is left of both, round by round; at least a nanosecond."""
    spreads = {}
    for name in {key.rsplit(" ", 1)[0]: None for key in found}:
        forward, both = found.get(f"{name} forward"), found.get(f"{name} both")
        if forward and both:
            spreads[f"{name} forward"] = Spread.of(forward)
            spreads[f"{name} backward"] = Spread.of([max(b - f, 1e-6) for f, b in zip(forward, both, strict=True)])
    return spreads


def _differs(x: Tensor, g: Tensor, window: Window, implementation: str) -> str:
    """What is not equal to plain PyTorch, and to PyTorch's pool; empty if all is."""
    values, offsets = max_pool2d(x, *window, implementation=implementation)
    expected, named = max_pool2d(x, *window, implementation="reference")
    size = x.shape[2:]
    checks = {
        "values": torch.equal(values, expected) and torch.equal(values, F.max_pool2d(x, *window[:3])),
        "offsets": torch.equal(offsets, named),
        "gradient": torch.equal(
            max_pool2d_backward(g, offsets, size, *window, implementation=implementation),
            max_pool2d_backward(g, offsets, size, *window, implementation="reference"),
        ),
    }
    wrong = [name for name, right in checks.items() if not right]
    return f"void: {', '.join(wrong)} differ" if wrong else ""


def rows(report: Report) -> list[tuple[str, ...]]:
    """The table: a line for each time."""
    table: list[tuple[str, ...]] = [("pool", "who", "ms", "GB/s")]
    for case, result in report.cases.items():
        for name, spread in result.get("ms", {}).items():
            table.append((case, name, str(Spread(**spread)), str(result["gb_per_s"][name])))
        for name, why in result.get("failed", {}).items():
            table.append((case, name, "-", why))
    return table


if __name__ == "__main__":
    sys.exit(main())
