"""The page of benchmark results, docs/results.md, from the files in benchmarks/results.

`python tools/results_page.py` writes the page; with `--check` it writes nothing and fails when the page
is out of date.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from source_tree import ROOT

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
INTRODUCTION = """# Benchmark results

Written by `make results` from the files in `benchmarks/results`, which hold every number with the machine, the
versions and the arguments. Times are milliseconds per training step, medians with the quartiles in parentheses;
everything in one table ran in one command, unless a row names another commit. What is void or missed is
listed too."""

Json = Mapping[str, Any]
Row = Sequence[str]


def render(reports: Iterable[tuple[str, Json]]) -> str:
    """The page, from file names and what the files hold."""
    parts = [INTRODUCTION, *(_section(name, report) for name, report in reports)]
    return "\n\n".join(parts) + "\n"


def _section(name: str, report: Json) -> str:
    machine = report["machine"]
    where = machine["device_name"] if machine["device"] != "cpu" else machine["cpu"]
    versions = [f"torch {machine['torch']}", *(f"CUDA {machine[key]}" for key in ("cuda",) if machine.get(key))]
    facts = f"{where}, {', '.join(versions)}, {report['date'][:10]}, commit {report['commit'][:7]}"
    if report["arguments"].get("regional") or report["arguments"].get("compile") == "regional":
        facts += "; what is compiled, is compiled block by block"
    kind = report["benchmark"]
    tables = (_TABLES.get(kind) or _TABLES[kind.partition("-")[0]])(report)
    return "\n\n".join([f"## {Path(name).stem}", f"{facts}.", *(_table(table) for table in tables)])


def _auto_tables(report: Json) -> Iterator[list[Row]]:
    """One table: a row for each case, with the best of PyTorch's own modes beside `auto`."""
    rows: list[Row] = [("case", "FP32", "best of PyTorch's own", "`auto`", "chosen", "auto / best", "check")]
    for name, case in report["cases"].items():
        times, best = case["step_ms"], case["best_of_pytorch"]
        fp32 = _spread(times["fp32"]) if "fp32" in times else "-"
        peer = f"{_spread(times[best])} {best}"
        chosen = f"{case['choice']['format']} {case['choice']['memory_format']}"
        rows.append((_named(name, case), fp32, peer, _spread(times["auto"]), chosen, _spread(case["auto_over_best"]),
                     case["check"]))  # fmt: skip
    yield rows


def _inference_tables(report: Json) -> Iterator[list[Row]]:
    """For each case its arms, and what is demanded of them."""
    for name, case in report["cases"].items():
        rows: list[Row] = [(name, "ms", "p95 ms", "J", "J above idle", "weights MiB", "KL", "check")]
        for arm, result in case.get("arms", {}).items():
            spent, error = result.get("energy") or {}, result.get("error")
            time = _spread(result["ms"]) if "ms" in result else "-"
            numbers = [_number(result.get("p95_ms"), 3), _number(spent.get("joules"), 3)]
            numbers += [_number(spent.get("above_idle_joules"), 3), _number(result.get("weight_mib"))]
            rows.append((arm, time, *numbers, "-" if error is None else f"{error:.2g}", result["check"]))
        yield rows
        demands: list[Row] = [("demand", "ours", "peer", "value", "outcome")]
        demands += [
            (t["what"], t["ours"] or "-", t["peer"] or "-", _number(t["value"], 3), t["outcome"])
            for t in case.get("targets", ())
        ]
        yield demands


def _overhead_tables(report: Json) -> Iterator[list[Row]]:
    """One table: a row for each case, with the hand-written loop beside the trainer."""
    rows: list[Row] = [("case", "trainer", "hand-written", "ratio", "allowed", "host waits per step", "check")]
    for name, case in report["cases"].items():
        waits = case["host_waits_per_step"]
        rows.append((_named(name, case), _spread(case["trainer_ms"]), _spread(case["hand_ms"]),
                     _spread(case["ratio"]), f"{case['allowed_ratio']:g}",
                     "-" if waits is None else f"{waits['trainer']:g}", case["check"]))  # fmt: skip
    yield rows


def _fp8_tables(report: Json) -> Iterator[list[Row]]:
    """For each case its contenders, and what is demanded of them."""
    for case in report["cases"].values():
        rows: list[Row] = [("contender", "ms", "peak GiB", "J per step", "first step s", "warm-up s", "check")]
        for name, result in case["contenders"].items():
            numbers = [_number(result.get(key)) for key in ("peak_gib", "joules_per_step", "first_step_s", "warmup_s")]
            time = _spread(result["step_ms"]) if "step_ms" in result else "-"
            rows.append((name, time, *numbers, result["check"]))
        yield rows
        demands: list[Row] = [("demand", "contender", "value", "outcome")]
        demands += [
            (t["what"], t["contender"] or "-", _number(t["value"], 3), t["outcome"]) for t in case.get("targets", ())
        ]
        yield demands


def _offload_tables(report: Json) -> Iterator[list[Row]]:
    """The host's step by implementation; a row for each case, with its prediction; and what is demanded."""
    rows: list[Row] = [("case", "share offloaded", "ms", "predicted ms", "host step ms", "state GB", "check")]
    for name, case in report["cases"].items():
        if "host_ms" in case:
            own: list[Row] = [(f"AdamW on the host, {case['values']} values", "ms", "over fused", "check")]
            for made, ms in case["host_ms"].items():
                own.append((made, _spread(ms), _spread(case["ratio"][made]), case["check"]))
            yield own
        else:
            state = case.get("state_bytes")
            numbers = [_number(case.get(key), 2) for key in ("predicted_ms", "host_step_ms")]
            numbers.append(_number(None if state is None else state / 1e9, 2))
            time = _spread(case["step_ms"]) if "step_ms" in case else "-"
            rows.append((name, _number(case.get("share"), 2), time, *numbers, case["check"]))
    if len(rows) > 1:
        yield rows
    demands: list[Row] = [("demand", "case", "value", "outcome")]
    demands += [
        (t["what"], t["contender"], f"{t['value']:.3g}", t["outcome"]) for t in report["arguments"].get("targets", ())
    ]
    if len(demands) > 1:
        yield demands


def _switch_tables(report: Json) -> Iterator[list[Row]]:
    """One table: a row for each change of recipe, the conversion and the first step after it in seconds."""
    rows: list[Row] = [
        ("contender", "switch to", "apply s", "first step s", "later steps ms", "compilations", "outcome")
    ]
    for name, case in report["cases"].items():
        if "switches" not in case:
            rows.append((name, *["-"] * 5, case["check"]))
        for switch in case.get("switches", ()):
            seconds = [_number(switch[key], 3) for key in ("apply_s", "first_step_s")]
            steps, compilations = _spread(switch["step_ms"]), str(switch["compilations"])
            rows.append((name, switch["to"], *seconds, steps, compilations, switch["outcome"]))
    yield rows


def _fusions_tables(report: Json) -> Iterator[list[Row]]:
    """For each recipe the pass as it is, and without each of its fusions."""
    for recipe, case in report["cases"].items():
        rows: list[Row] = [(f"{recipe}, {case['case']}", "ms", "more ms", "peak GiB", "more GiB", "check")]
        for name, result in case["variants"].items():
            time = _spread(result["step_ms"]) if "step_ms" in result else "-"
            numbers = [_number(result.get(key), 2) for key in ("more_step_ms", "peak_gib", "more_peak_gib")]
            rows.append((name, time, *numbers, result["check"]))
        yield rows


def _kernels_tables(report: Json) -> Iterator[list[Row]]:
    """Rates of casts and products, and the shortest step that they allow."""
    rates: list[Row] = [("measured", "what", "rate")]
    floors: list[Row] = [("floor", "recipe", "ms", "products", "casts", "rest")]
    for name, case in report["cases"].items():
        for key, unit in (("gb_per_s", "GB/s"), ("tflops", "TFLOP/s")):
            rates += [(name, what, f"{_spread(spread)} {unit}") for what, spread in case.get(key, {}).items()]
        for recipe, floor in case.get("recipes", {}).items():
            parts = [_number(floor[f"{part}_ms"]) for part in ("floor", "products", "casts", "rest")]
            floors.append((name.removeprefix("floor "), recipe, *parts))
    yield rates
    yield floors


def _max_pool_tables(report: Json) -> Iterator[list[Row]]:
    """One table: a row for each direction of each pool by each implementation."""
    rows: list[Row] = [("pool", "by, direction", "ms", "GB/s", "check")]
    for name, case in report["cases"].items():
        for what, spread in case.get("ms", {}).items():
            rows.append((name, what, _spread(spread), _number(case["gb_per_s"][what], 0), case["check"]))
        rows += [(name, what, "-", "-", why) for what, why in case.get("failed", {}).items()]
    yield rows


def _bytes_tables(report: Json, what: str = "layer") -> Iterator[list[Row]]:
    """One table: a row for each case, `what` with its sizes, by each implementation."""
    rows: list[Row] = [(what, "by", "ms", "TB/s", "error", "check")]
    for name, case in report["cases"].items():
        for who, spread in case.get("ms", {}).items():
            rate, error = _number(case["tb_per_s"][who]), f"{case['error'][who]:.2g}"
            rows.append((name, who, _spread(spread), rate, error, case["check"]))
        rows += [(name, who, "-", "-", "-", why) for who, why in case.get("failed", {}).items()]
    yield rows


def _qat_tables(report: Json) -> Iterator[list[Row]]:
    """Times by batch, points by arm, and what was asked."""
    arms = ("fp32 eager", "fp32", "bf16", "bf16 graph", "torchao", "int8")
    times: list[Row] = [("case", "batch", *arms, "INT8 / torchao", "best BF16 / INT8")]
    points: list[Row] = [("case", "fp32", "torchao", "int8 calibrated", "int8 trained", "int8 trained, learned steps")]
    four: list[Row] = [("case", "fp32", "int4 rounded", "int4 trained", "int4 trained, learned steps")]
    asked: list[Row] = [("case", "asked", "found")]
    for name, case in report["cases"].items():
        for size, found in case.get("times", {}).items():
            ratios = (_spread(found["int8_over_torchao"]), _spread(found["bf16_over_int8"]))
            times.append((_named(name, case), size, *(_spread(found["ms"][arm]) for arm in arms), *ratios))
        means = case.get("accuracy", {}).get("mean")
        if means:
            table = four if "int4 rounded" in means else points
            table.append((_named(name, case), *(f"{means[arm]:.2f}" for arm in table[0][1:])))
        asked += [(_named(name, case), target, said) for target, said in case.get("targets", {}).items()]
        if case["check"] != "passed":
            asked.append((_named(name, case), "to run", case["check"]))
    yield from (table for table in (times, points, four, asked) if len(table) > 1)


def _attention_tables(report: Json) -> Iterator[list[Row]]:
    """One table: a row for each size and mask by each implementation."""
    return _bytes_tables(report, "attention")


def _stress_tables(report: Json) -> Iterator[list[Row]]:
    """One table: a row for each scenario, what each policy lost against FP32 in percent, broken ones in bold."""
    policies = list(dict.fromkeys(name for case in report["cases"].values() for name in case.get("policies", ())))
    rows: list[Row] = [("% over FP32's loss: weights in FP32 / as trained", *policies, "check")]
    for name, case in report["cases"].items():
        found = case.get("policies", {})
        rows.append((name, *(_survival(found[policy]) if policy in found else "-" for policy in policies),
                     case["check"]))  # fmt: skip
    yield rows


def _adaptive_tables(report: Json) -> Iterator[list[Row]]:
    """One table: a row for each arm, its losses against BF16's at the same seeds."""
    arms: dict[str, dict[str, Json]] = {}
    for name, case in report["cases"].items():
        arm, _, seed = name.partition(" seed ")
        arms.setdefault(arm, {})[seed] = case
    bf16 = {seed: case for seed, case in arms.get("bf16", {}).items() if "loss" in case}
    rows: list[Row] = [("arm", "% over BF16's loss, by seed", "mean", "ms", "times as fast as BF16", "peak GiB",
                        "J per step", "layers lowered at the end", "check")]  # fmt: skip
    for arm, cases in arms.items():
        done = {seed: case for seed, case in cases.items() if "loss" in case}
        checks = "; ".join(dict.fromkeys(case["check"] for case in cases.values()))
        paired = [seed for seed in done if seed in bf16]
        if not paired:
            rows.append((arm, *["-"] * 7, checks))
            continue
        gaps = [100 * (done[seed]["loss"] / bf16[seed]["loss"] - 1) for seed in paired]
        speeds = [bf16[seed]["ms"]["median"] / done[seed]["ms"]["median"] for seed in paired]
        joules = [case["joules"] / report["arguments"]["steps"] for case in done.values() if case["joules"] is not None]
        rows.append((
            arm,
            ", ".join(f"{gap:+.2f}" for gap in gaps),
            f"{mean(gaps):+.2f}",
            _spread(done[paired[0]]["ms"]),
            ", ".join(f"{speed:.3f}" for speed in speeds),
            _number(mean(case["peak_gib"] for case in done.values())),
            _number(mean(joules) if joules else None),
            ", ".join(str(len(case["lowered"])) for case in done.values()),
            checks,
        ))  # fmt: skip
    yield rows


def _live_tables(report: Json) -> Iterator[list[Row]]:
    """What looking costs: a probe of the controller, and a step whose statistics are sampled."""
    rows: list[Row] = [("case", "step ms", "extra ms", "once in steps", "share of the time", "layers it controls")]
    for name, case in report["cases"].items():
        for part in (name for name in ("probe", "statistics", "watched") if name in case):
            times, share = case[part], f"{case[f'{part}_share']:.2%}"
            controlled = str(case["controlled"]) if part == "probe" else ""
            often = str(case[f"{part}_every"])
            rows.append(
                (f"{name} {part}", _spread(times["step_ms"]), _spread(times["extra_ms"]), often, share, controlled)
            )
    yield rows


def _memory_tables(report: Json) -> Iterator[list[Row]]:
    """One table: a row for each arm of each case, what it takes and how that is to bf16 of PyTorch alone."""
    rows: list[Row] = [("case", "arm", "ms", "/ bf16", "peak MiB", "/ bf16", "reserved MiB", "reserved until warm",
                        "weights and optimizer", "check")]  # fmt: skip
    for name, case in report["cases"].items():
        for arm, result in case.get("arms", {}).items():
            if "step_ms" not in result:
                rows.append((name, arm, *["-"] * 7, result["check"]))
                continue
            against = case["over_bf16"].get(arm)
            slower, more = (_spread(against["step_ms"]), _number(against["peak_mib"], 3)) if against else ("-", "-")
            memory = [_number(result[key], 0) for key in ("reserved_mib", "start_reserved_mib", "resident_mib")]
            peak = _number(result["peak_mib"], 0)
            rows.append((name, arm, _spread(result["step_ms"]), slower, peak, more, *memory, result["check"]))
    yield rows


def _batch_size_tables(report: Json) -> Iterator[list[Row]]:
    """One table: a row for each arm of each case, the largest batch that fits and with what."""
    rows: list[Row] = [("case", "arm", "largest batch", "/ fp32", "with", "check")]
    for name, case in report["cases"].items():
        label = f"{_named(name, case)}, {case['gib']} GiB" if "gib" in case else name
        for arm, result in case.get("arms", {}).items():
            size = str(result.get("size", "-"))
            rows.append((label, arm, size, _number(result.get("times"), 2), ", ".join(result.get("measures", ())),
                         result["check"]))  # fmt: skip
    yield rows


def _memory_quality_tables(report: Json) -> Iterator[list[Row]]:
    """One table: a row for each arm of each task, with its losses and judgements, by seed."""
    arms: dict[tuple[str, str], dict[str, Json]] = {}
    for name, case in report["cases"].items():
        task, arm, _, seed = name.split()
        arms.setdefault((task, arm), {})[seed] = case
    rows: list[Row] = [("task", "arm", "final loss", "unseen loss", "% over BF16's", "mAP or accuracy", "check")]
    for (task, arm), cases in arms.items():
        base = arms.get((task, "bf16"), {})
        done = {seed: case for seed, case in cases.items() if case.get("final_loss") is not None}
        gaps = [100 * (case["unseen_loss"] / base[seed]["unseen_loss"] - 1) for seed, case in done.items()
                if base.get(seed, {}).get("unseen_loss")]  # fmt: skip
        rows.append((
            task,
            arm,
            ", ".join(f"{case['final_loss']:.4f}" for case in done.values()) or "-",
            ", ".join(f"{case['unseen_loss']:.4f}" for case in done.values()) or "-",
            ", ".join(f"{gap:+.2f}" for gap in gaps) or "-",
            ", ".join(f"{case['quality']:.3f}" for case in done.values()) or "-",
            "; ".join(dict.fromkeys(case["check"] for case in cases.values())),
        ))  # fmt: skip
    yield rows


def _survival(summary: Json) -> str:
    """Gap of the final weights in FP32, and in the policy's precision; in bold if it broke at most seeds."""
    finite = summary["finite"] == summary["seeds"]
    text = f"{100 * summary['gap']:+.2f} / {100 * summary['own_gap']:+.2f}" if finite else "not finite"
    return f"**{text}**" if 2 * summary["broken"] > summary["seeds"] else text


_TABLES = {
    "auto": _auto_tables,
    "batch-size": _batch_size_tables,
    "inference": _inference_tables,
    "overhead": _overhead_tables,
    "fp8": _fp8_tables,
    "adaptive": _adaptive_tables,
    "adaptive-overhead": _live_tables,
    "fp8-switch": _switch_tables,
    "offload": _offload_tables,
    "few-query-attention": _attention_tables,
    "fp8-fusions": _fusions_tables,
    "fp8-kernels": _kernels_tables,
    "max-pool": _max_pool_tables,
    "memory": _memory_tables,
    "memory-quality": _memory_quality_tables,
    "qat": _qat_tables,
    "stress": _stress_tables,
    "weight-only": _bytes_tables,
}
"""By a report's name, or by its first word."""


def _named(name: str, case: Json) -> str:
    return f"{name} (commit {case['commit'][:7]})" if "commit" in case else name


def _spread(spread: Json) -> str:
    return f"{spread['median']:.4g} ({spread['low']:.4g}-{spread['high']:.4g})"


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _table(rows: Sequence[Row]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def read(folder: Path = RESULTS) -> list[tuple[str, Json]]:
    """The files of the folder in the order of their names."""
    return [(path.name, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.json"))]


def main(arguments: Sequence[str], page: Path = PAGE, folder: Path = RESULTS) -> int:
    """Write the page, or with `--check` compare it; 1 if it is out of date."""
    if list(arguments) not in ([], ["--check"]):
        print(f"results_page.py got {' '.join(arguments)}. Allowed: nothing, or --check.", file=sys.stderr)
        return 2
    new = render(read(folder))
    if not arguments:
        page.write_text(new, encoding="utf-8")
    elif not page.exists() or page.read_text(encoding="utf-8") != new:
        print(f"{page.name} is out of date. Run `make results`.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
