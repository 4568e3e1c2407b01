"""Kinds of linear layers beside BF16: 1, 8, 64 and 512 rows of x, on the layers of a decoder of 7B weights.

    python benchmarks/weight_only.py
    python benchmarks/weight_only.py --small --device cpu     # to try the script
    python benchmarks/weight_only.py --compile                # what the compiler makes of it too; takes minutes

Each time is also given as TB/s of the bytes that whoever runs has to move (weight, scales, x and output), which counts
for few rows, and as TFLOP/s, which counts for many. A decoder's weights do not fit a GPU's cache, so calls go through
copies of the weight that are larger than it. On a GPU calls are recorded and replayed: the host's time does not count.
Of weights in 4 bits every implementation is timed that the device has. torchao's int8 layers are timed where it is
installed.

Nothing counts where ours is further than a rounding from the reference. `error` is the distance to the product with the
weight before it was rounded, relative to it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from harness import Report, Spread, arguments
from replayed import problem, times, turns
from torch import Tensor, nn
from torch.nn import functional as F

from deepseek_mp.backends import capabilities
from deepseek_mp.inference.linear_kinds import KINDS, Kept, LinearKind
from deepseek_mp.ops import int4_linear

SHAPES = {"attention": (4096, 4096), "q, k, v": (12288, 4096), "up": (11008, 4096), "down": (4096, 11008)}
"""Channels and width of a layer."""
ROWS = (1, 8, 64, 512)
ROUNDS_SMALL = 2
SMALLER = 16
ROUNDING = 4e-3
"""Norm of what rounding to BF16, twice, does to a result, relative to it: 2e-3 at most where errors are uniform."""

Layer = Callable[[Tensor], Tensor]


def main() -> int:
    cases = {f"{name}, {rows} rows": (*shape, rows) for name, shape in SHAPES.items() for rows in ROWS}
    args = arguments(__doc__ or "", list(cases), rounds=8)
    report = Report("weight-only", args.device, vars(args))
    rounds = ROUNDS_SMALL if args.small else args.rounds
    for name in args.cases or cases:
        channels, width, rows = cases[name]
        shape = (channels // SMALLER, width // SMALLER) if args.small else (channels, width)
        report.run(name, partial(measure, shape, rows, args.device, rounds, args.compile))
    return report.finish(args.out, table(report))


def measure(shape: tuple[int, int], rows: int, device: torch.device, rounds: int, compile: bool) -> dict[str, Any]:
    """Times of everyone for one layer, and whether ours is right."""
    weight = torch.randn(shape, device=device) * shape[1] ** -0.5
    x = torch.randn(rows, shape[1], device=device).to(torch.bfloat16)
    torch._dynamo.reset()  # noqa: SLF001 - each case is compiled for its own sizes
    bf16 = weight.to(torch.bfloat16)
    layers: dict[str, tuple[Layer, int]] = {"bf16": (turns(F.linear, [bf16]), bf16.nbytes)}
    checks: dict[str, float] = {}
    for kind, of in _kinds(device, shape):
        kept = of.keep(weight, "the weight")
        expected = of.linear(x.float(), kept, None, "reference")
        for name in _implementations(kind, device, x.dtype, shape):
            prepared = of.prepared(kept, name)
            bytes_ = sum(part.nbytes for part in prepared.values())
            ours = partial(_linear, of, list(prepared), name)
            layers[f"ours {kind} ({name})"] = turns(ours, list(prepared.values())), bytes_
            checks[f"{kind} ({name})"] = _distance(ours(x, *prepared.values()), expected.double())
            if compile and kind == "fp8":
                layers["compiled fp8"] = turns(_compiled(ours), list(prepared.values())), bytes_
        if compile and kind in ("int8_weights", "fp8_weights"):
            layers[f"compiled {kind}"] = turns(_compiled(_widened), [kept["q"], kept["scale"]]), kept["q"].nbytes
    failed = {"torchao int8": why} if (why := problem(lambda: layers.update(_torchao(bf16, compile)))) else {}
    found, broken = times({name: partial(layer, x) for name, (layer, _) in layers.items()}, device, rounds)
    exact = F.linear(x.double(), weight.double())
    ms = {name: Spread.of(values) for name, values in found.items()}
    moved = x.nbytes + 2 * rows * shape[0]
    wrong = [f"{kind} is off by {error:.2g}" for kind, error in checks.items() if not error <= ROUNDING]
    ran = [f"{name}: {why}" for name, why in broken.items() if name.startswith(("ours", "bf16"))]
    return {
        "shape": shape,
        "rows": rows,
        "ms": ms,
        "tb_per_s": {name: round((layers[name][1] + moved) / spread.median / 1e9, 3) for name, spread in ms.items()},
        "tflop_per_s": {
            name: round(2 * rows * shape[0] * shape[1] / spread.median / 1e9, 1) for name, spread in ms.items()
        },
        "error": {name: _distance(layers[name][0](x), exact) for name in ms},
        "failed": {**failed, **broken},
        "check": "; ".join([f"void: {why}" for why in wrong] + ran) or "passed",
    }


def _kinds(device: torch.device, shape: tuple[int, int]) -> list[tuple[str, LinearKind]]:
    """Those that the device multiplies, and that take a layer of this shape."""
    has = capabilities(device).matmul_formats
    fit = {name: kind for name, kind in KINDS.items() if not kind.why_not(*shape)}
    return [(name, kind) for name, kind in fit.items() if kind.needs is None or kind.needs in has]


def _implementations(kind: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> list[str]:
    """The one that is taken; of weights in 4 bits the library's too, where it is right."""
    first = KINDS[kind].fastest(device, dtype, *shape) or "reference"
    group = int4_linear.group_of(shape[1])
    also = kind == "int4_weights" and first == "triton" and group and int4_linear.has_native(device, shape[0], group)
    return [first, "native"] if also else [first]


def _linear(kind: LinearKind, names: list[str], implementation: str, x: Tensor, *parts: Tensor) -> Tensor:
    kept: Kept = dict(zip(names, parts, strict=True))
    return kind.linear(x, kept, None, implementation)


def _widened(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    return F.linear(x, q.to(x.dtype)) * scale.to(x.dtype)


def _compiled(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(run, dynamic=False, mode="max-autotune-no-cudagraphs")
    return compiled


def _torchao(weight: Tensor, compile: bool) -> dict[str, tuple[Layer, int]]:
    """torchao's int8 layer, which is meant to be compiled; it may be missing, or too young or old for this PyTorch."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    layer.weight.data = weight.clone()
    quantize_(layer, Int8WeightOnlyConfig())
    kept = layer.weight.detach()
    run = _compiled(F.linear) if compile else F.linear
    return {"torchao int8": (turns(run, [kept]), weight.numel() + 4 * len(weight))}


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def table(report: Report) -> list[tuple[str, ...]]:
    """A line for each time."""
    lines: list[tuple[str, ...]] = [("layer", "who", "ms", "TB/s", "TFLOP/s", "error")]
    for case, result in report.cases.items():
        for name, spread in result.get("ms", {}).items():
            error = f"{result['error'][name]:.2g}"
            lines.append(
                (
                    case,
                    name,
                    str(Spread(**spread)),
                    str(result["tb_per_s"][name]),
                    str(result["tflop_per_s"][name]),
                    error,
                )
            )
        for name, why in result.get("failed", {}).items():
            lines.append((case, name, "-", "-", "-", why))
    return lines


if __name__ == "__main__":
    sys.exit(main())
