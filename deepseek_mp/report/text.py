"""A `RunReport` as text that fits a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

from deepseek_mp.records import Attempt
from deepseek_mp.report import amounts
from deepseek_mp.report.alarm_tables import ALARM_HEADING, alarm_rows
from deepseek_mp.report.amounts import counted, value
from deepseek_mp.report.curve import BLOCKS, spaced, sparkline
from deepseek_mp.report.history import Step
from deepseek_mp.report.reasons import CHOICE_HEADING, SATURATED_HEADING, choice_rows, saturated_rows
from deepseek_mp.report.settings import CALLBACKS, as_text
from deepseek_mp.report.summary import LAST, RunReport
from deepseek_mp.report.table import listing, paragraph, table

POINTS = 9
"""Rows of the table of losses."""
SHOWN_ROWS = 12
"""Of tables that can be long: reasons of skipped steps, alarms."""
SHOWN_RUNS = 12
"""Runs of steps in a row that are listed for one reason."""
INDENT = "  "


def render_report(report: RunReport, width: int = 100, blocks: str = BLOCKS) -> str:
    """The report in lines of at most `width` characters, where words and numbers allow it."""
    inner = width - len(INDENT)
    sections = [
        ("", listing(_identity(report), inner)),
        ("attempts", _attempts(report, inner)),
        ("what it did", listing(_numbers(report), inner)),
        ("loss", _curve(report, inner, blocks)),
        ("skipped steps", _skipped(report.history.skipped, inner)),
        ("precision, at the end", table(CHOICE_HEADING, choice_rows(report.layers.in_force), inner)),
        ("precision that changed on the way", _changes(report, inner)),
        ("storage of weights, at the end", table(STORAGE_HEADING, choice_rows(report.layers.storage), inner)),
        ("alarms", shortened(ALARM_HEADING, alarm_rows(report.alarms), inner, "alarm")),
        ("tensors that outgrew their scale", table(SATURATED_HEADING, saturated_rows(report.layers.saturated), inner)),
        ("operations that ran in a wider format", _fallbacks(report, inner)),
        ("notes", [line for note in report.notes for line in paragraph(f"- {note}", inner)]),
    ]
    return assemble(f"run {report.path}", sections)


def render_outcome(report: RunReport, width: int = 100) -> str:
    """What a run did and in which precision, without its curve and settings: what is worth a look when it ends."""
    inner = width - len(INDENT)
    sections = [
        ("precision", table(CHOICE_HEADING, choice_rows(report.layers.in_force), inner)),
        ("skipped steps", _skipped(report.history.skipped, inner)),
        ("what it did", listing(_numbers(report), inner)),
    ]
    return assemble(f"run {report.path}", sections)


def assemble(title: str, sections: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Sections under their titles, indented; those without lines are left out."""
    parts = [title]
    for name, lines in sections:
        if lines:
            parts += [*(["", name] if name else []), *(f"{INDENT}{line}".rstrip() for line in lines)]
    return "\n".join(parts)


def named(settings: Mapping[str, object], names: Iterable[str]) -> str:
    """Some settings as `name value`, without the name of the group they stand in."""
    return ", ".join(f"{name.partition('.')[2] or name} {as_text(settings[name])}" for name in names)


def shortened(heading: Sequence[str], rows: Sequence[Sequence[str]], width: int, noun: str) -> list[str]:
    """A table of the first `SHOWN_ROWS` rows, and how many more there are."""
    lines, more = table(heading, rows[:SHOWN_ROWS], width), len(rows) - SHOWN_ROWS
    return [*lines, f"... and {counted(more, f'more {noun}')}"] if more > 0 else lines


def is_off(item: object) -> bool:
    """Whether a setting's value says that it is not used; 0 is a value."""
    return item is None or item is False or item in ([], "")


def skipped_rows(steps: Sequence[Step]) -> list[tuple[str, ...]]:
    """Rows of status, reason, first bad module, how many, and which steps; the most frequent first."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for step in steps:
        groups.setdefault((step.status, step.reason, step.first_bad_module or ""), []).append(step.step)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    return [(*key, str(len(at)), amounts.ranges(at, limit=SHOWN_RUNS)) for key, at in ordered]


STORAGE_HEADING = ("step", "parameter", "parameters", "role", "old", "new", "reason", "evidence")
SKIPPED_HEADING = ("status", "reason", "first bad module", "times", "steps")


def _identity(report: RunReport) -> list[tuple[str, str]]:
    known = report.settings
    parameters = known.get("parameters")
    model = [
        as_text(known["model"]) if "model" in known else "",
        f"{parameters:,} parameters" if isinstance(parameters, int) else "",
        as_text(known["optimizer"]) if "optimizer" in known else "",
    ]
    device = [as_text(known[name]) for name in ("device.torch", "device.device_name", "device.id") if name in known]
    told = ("versions.", "device.", "plan.", "model", "parameters", "optimizer", "config.precision_mode",
            f"{CALLBACKS}.")  # fmt: skip
    others = [name for name, item in known.items() if not name.startswith(told) and not is_off(item)]
    return [
        ("model", ", ".join(filter(None, model))),
        ("device", ", ".join(device)),
        ("versions", named(known, [name for name in known if name.startswith("versions.")])),
        ("asked for", named(known, [name for name in known if name.startswith("config.precision_mode")])),
        ("plan", named(known, [name for name in known if name.startswith("plan.") and not is_off(known[name])])),
        ("settings", named(known, others)),
        ("callbacks", _callbacks(known)),
    ]


def _callbacks(settings: Mapping[str, object]) -> str:
    """Each callback with its settings, those that are off left out."""
    shown: dict[str, list[str]] = {}
    for name, item in settings.items():
        group, _, rest = name.partition(".")
        if group == CALLBACKS and rest:
            callback, _, setting = rest.partition(".")
            shown.setdefault(callback, []).extend([f"{setting} {as_text(item)}"] if not is_off(item) else [])
    return "; ".join(f"{callback}: {', '.join(found)}" if found else callback for callback, found in shown.items())


def _attempts(report: RunReport, width: int) -> list[str]:
    """A row an attempt; one attempt that completed needs none."""
    if len(report.attempts) == 1 and report.attempts[0].outcome == "completed":
        return []
    rows = [
        (
            str(attempt.attempt),
            str(attempt.resume_step),
            str(report.attempt_steps.get(attempt.attempt, 0)),
            str(attempt.started).removesuffix("+00:00").replace("T", " "),
            _took(attempt),
            attempt.outcome or "did not end",
        )
        for attempt in report.attempts
    ]
    heading = ("attempt", "after step", "steps in force", "started (UTC)", "took", "outcome")
    changed = [
        (f"changed in attempt {number}", "; ".join(f"{name} {as_text(a)} -> {as_text(b)}" for name, a, b in settings))
        for number, settings in report.attempt_changes.items()
    ]
    return [*table(heading, rows, width), *listing(changed, width)]


def _took(attempt: Attempt) -> str:
    try:
        ended = datetime.fromisoformat(attempt.ended or "")
        return amounts.seconds((ended - datetime.fromisoformat(attempt.started)).total_seconds())
    except (ValueError, TypeError):
        return amounts.UNKNOWN


def _numbers(report: RunReport) -> list[tuple[str, str]]:
    if not report.steps:
        return []
    skipped = len(report.history.skipped)
    length = f"{counted(len(report.steps), 'step')}, {f'{skipped} of them not applied' if skipped else 'all applied'}"
    epochs = f"; {counted(len(report.history.epochs), 'epoch')}" if report.history.epochs else ""
    joules = report.joules_per_step
    return [
        ("length", length + epochs),
        ("loss", _losses(report)),
        ("validation", _validation(report)),
        ("loss scale", _scale(report)),
        ("time per step", "" if report.seconds_per_step is None else amounts.times(report.seconds_per_step)),
        ("throughput", _throughput(report)),
        ("peak memory", "" if report.peak_memory_bytes is None else amounts.size(report.peak_memory_bytes)),
        ("live precision", _live(report)),
        ("energy", "" if joules is None else f"{amounts.energy(report.joules)}, {amounts.energy(joules)} per step"),
    ]


def _losses(report: RunReport) -> str:
    if report.first_loss is None:
        return ""
    lowest = report.lowest_loss
    low = "" if lowest is None else f", lowest {value(lowest.loss)} at step {lowest.step}"
    return f"first {value(report.first_loss)}, mean of the last {LAST} applied steps {value(report.last_loss)}{low}"


def _validation(report: RunReport) -> str:
    found = report.history.validation
    return ", ".join(f"{name.removeprefix('val_')} {value(item)}" for name, item in found.items())


def _scale(report: RunReport) -> str:
    scale = report.scale
    if scale is None:
        return ""
    if not scale.changes:
        return f"{value(scale.first)} throughout"
    moved = f"{value(scale.first)} at first, {value(scale.last)} at the end"
    return f"{moved}, between {value(scale.low)} and {value(scale.high)}, changed {counted(scale.changes, 'time')}"


def _throughput(report: RunReport) -> str:
    speed, use = report.samples_per_second, report.flop_utilisation
    if speed is None:
        return ""
    used = "" if use is None else f", {100 * use.median:.3g} % of the device's peak"
    return f"{value(speed.median, 4)} samples/s{used}"


def _curve(report: RunReport, width: int, blocks: str) -> list[str]:
    """A line of blocks over the whole run, and the numbers at some steps."""
    steps = [step for step in report.steps if step.loss is not None]
    if not steps:
        return []
    rows = [
        (str(s.step), value(s.loss), value(s.grad_norm), value(s.lr, 4), value(s.scale), amounts.seconds(s.seconds))
        for s in (steps[place] for place in spaced(len(steps), POINTS))
    ]
    heading = ("step", "loss", "gradient norm", "learning rate", "loss scale", "time")
    losses = [step.loss for step in steps if step.loss is not None]
    return [sparkline(losses, min(width, 60), blocks), *table(heading, rows, width)]


def _skipped(steps: Sequence[Step], width: int) -> list[str]:
    return shortened(SKIPPED_HEADING, skipped_rows(steps), width, "reason")


def _live(report: RunReport) -> str:
    """What live precision has to say of itself: why it decides nothing, and what comparisons made of its budgets."""
    layers = report.layers
    parts = [f"off: {why}" for why in layers.adapt_off]
    if layers.budget_scale is not None:
        often = counted(len(layers.compared), "comparison")
        parts.append(f"{often} with FP32 changed its budgets, to {value(layers.budget_scale)} of what was set")
    return "; ".join(parts)


def _changes(report: RunReport, width: int) -> list[str]:
    return table(CHOICE_HEADING, choice_rows(report.layers.changes, by_step=True), width)


def _fallbacks(report: RunReport, width: int) -> list[str]:
    rows = [(*key, str(count)) for key, count in report.fallbacks.items()]
    return table(("operation", "format", "reason", "count"), rows, width)
