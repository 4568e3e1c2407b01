"""A `RunDifference` as text that fits a terminal."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

from deepseek_mp.report import amounts
from deepseek_mp.report.alarm_tables import DIFFERENCE_HEADING, alarm_difference_rows
from deepseek_mp.report.amounts import counted, percent, value
from deepseek_mp.report.curve import spaced
from deepseek_mp.report.difference import MovedDecision, RunDifference, numbers_of
from deepseek_mp.report.group import WHOLE, Key, grouped, merged
from deepseek_mp.report.layers import ROLES
from deepseek_mp.report.parting import LAST, Parting, Point, relative
from deepseek_mp.report.products import LayerDifference
from deepseek_mp.report.reasons import CHOICE_HEADING, choice_rows
from deepseek_mp.report.settings import as_text
from deepseek_mp.report.statistics import StatisticDifference
from deepseek_mp.report.storage import StorageDifference
from deepseek_mp.report.table import listing, paragraph, table
from deepseek_mp.report.text import INDENT, POINTS, SKIPPED_HEADING, assemble, shortened, skipped_rows

SHOWN: dict[str, tuple[str, Callable[[float | None], str]]] = {
    "steps": ("steps", value),
    "steps_applied": ("steps applied", value),
    "steps_skipped": ("steps not applied", value),
    "last_loss": (f"loss, last {LAST} applied steps", value),
    "lowest_loss": ("lowest loss", value),
    "last_scale": ("loss scale at the end", value),
    "scale_changes": ("changes of the loss scale", value),
    "seconds_per_step": ("time per step, median", amounts.seconds),
    "samples_per_second": ("samples per second", value),
    "flop_utilisation": ("share of the device's peak", value),
    "peak_memory_bytes": ("peak memory", amounts.size),
    "joules_per_step": ("energy per step", amounts.energy),
    "alarms": ("alarms", value),
    "budget_scale": ("share of live precision's budgets", value),
}
"""How the numbers of a whole run are called and written."""
SERIES_NAMES = {"loss": "loss", "grad_norm": "gradient norm", "scale": "loss scale"}
LONGEST_SETTING = 200
SHOWN_LAYERS = 3
"""Layers of one statistic."""
STATISTIC_ROWS = 24
"""Rows for all statistics together."""


def render_difference(difference: RunDifference, width: int = 100) -> str:
    """The comparison in lines of at most `width` characters, where words and numbers allow it."""
    inner = width - len(INDENT)
    storage = ("parameter", "parameters", "A", "B")
    alarms = alarm_difference_rows(difference.alarms)
    precision = ("layer", "layers", "role", "A", "B", "operands in A", "operands in B")
    sections = [
        ("", listing([("A", difference.a.path), ("B", difference.b.path)], inner)),
        ("settings that differ", table(("", "A", "B"), _settings(difference), inner)),
        ("precision that differs, at the end", table(precision, precision_rows(difference.layers), inner)),
        ("storage of weights that differs, at the end", table(storage, storage_rows(difference.storage), inner)),
        ("decisions that only A has", _choices(difference, "a", inner)),
        ("decisions that only B has", _choices(difference, "b", inner)),
        ("decisions of both, at different steps", _moved(difference.moved, inner)),
        ("where they part", listing(_partings(difference), inner)),
        ("loss by step", _losses(difference, inner)),
        ("the whole runs", table(("", "A", "B", "B to A"), _numbers(difference), inner)),
        ("alarms that differ", shortened(DIFFERENCE_HEADING, alarms, inner, "alarm")),
        ("medians of statistics that differ most", _statistics(difference, inner)),
        ("steps that only A did not apply", table(SKIPPED_HEADING, skipped_rows(difference.skipped_a), inner)),
        ("steps that only B did not apply", table(SKIPPED_HEADING, skipped_rows(difference.skipped_b), inner)),
        ("notes", [line for note in _notes(difference) for line in paragraph(f"- {note}", inner)]),
    ]
    return assemble("two runs, A and B", sections)


def precision_rows(layers: Iterable[LayerDifference]) -> list[Key]:
    """Rows of layers, their number, role, both recipes and, where not all roles differ alike, both products."""
    by_layer: dict[str, list[LayerDifference]] = {}
    for found in layers:
        by_layer.setdefault(found.layer, []).append(found)
    keyed: list[tuple[str, Key]] = []
    for layer, some in by_layer.items():
        if len(some) == len(ROLES) and len({(found.a, found.b) for found in some}) == 1:
            keyed.append((layer, ("", some[0].a, some[0].b, "", "")))
        else:
            keyed += [(layer, (found.role, found.a, found.b, found.product_a, found.product_b)) for found in some]
    return [(group.pattern, str(len(group.layers)), *group.key) for group in merged(grouped(keyed))]


def storage_rows(differences: Iterable[StorageDifference]) -> list[Key]:
    """Rows of parameters, their number, and both storages."""
    groups = merged(grouped((found.parameter, found.formats) for found in differences))
    return [(group.pattern, str(len(group.layers)), *group.key) for group in groups]


def _statistic_rows(found: StatisticDifference, tolerance: float) -> list[Key]:
    """A row for each of the layers that differ most; the statistic is named in the first."""
    shown = [pair for pair in found.most[:SHOWN_LAYERS] if pair.apart > tolerance]
    names = [(found.statistic, f"{found.beyond} of {found.compared}"), *[("", "")] * (len(shown) - 1)]
    return [
        (*name, pair.layer or WHOLE, value(pair.a, 4), value(pair.b, 4), percent(relative(pair.a, pair.b)))
        for name, pair in zip(names, shown, strict=True)
    ]


def _settings(difference: RunDifference) -> list[Key]:
    return [(name, _clipped(a), _clipped(b)) for name, a, b in difference.settings]


def _clipped(setting: object) -> str:
    text = as_text(setting)
    return text if len(text) <= LONGEST_SETTING else f"{text[:LONGEST_SETTING]}..."


def _choices(difference: RunDifference, run: str, width: int) -> list[str]:
    """The decisions of one run only, in the order they were taken."""
    choices = difference.decisions_a if run == "a" else difference.decisions_b
    return table(CHOICE_HEADING, choice_rows(sorted(choices, key=lambda choice: choice.step), by_step=True), width)


def _moved(moved: Sequence[MovedDecision], width: int) -> list[str]:
    keyed = [
        (m.choice.layer, (m.choice.role or "", m.choice.new, m.choice.reason, str(m.choice.step), str(m.step_b)))
        for m in moved
    ]
    rows = [(group.pattern, str(len(group.layers)), *group.key) for group in merged(grouped(keyed))]
    return table(("layer", "layers", "role", "recipe", "reason", "step in A", "step in B"), rows, width)


def _partings(difference: RunDifference) -> list[tuple[str, str]]:
    found = [(SERIES_NAMES[name], parting) for name, parting in difference.series.items()]
    series = [(name, _parting(parting, difference.tolerance)) for name, parting in found]
    return [*series, ("statistics", _shares(difference))]


def _shares(difference: RunDifference) -> str:
    """How many statistics of how many layers are apart."""
    if not difference.statistics:
        return ""
    layers = max(found.compared for found in difference.statistics)
    beyond = sum(found.beyond > 0 for found in difference.statistics)
    of_both = f"{counted(len(difference.statistics), 'statistic')} of up to {counted(layers, 'layer')}"
    return f"{of_both} compared; medians are more than {100 * difference.tolerance:.3g} % apart in {beyond}"


def _statistics(difference: RunDifference, width: int) -> list[str]:
    """Of each statistic that differs the layers that differ most, as long as there are rows."""
    blocks = [_statistic_rows(found, difference.tolerance) for found in difference.statistics if found.beyond]
    told = bisect_right(list(accumulate(map(len, blocks))), STATISTIC_ROWS)
    rows = [row for block in blocks[:told] for row in block]
    lines, more = table(("statistic", "layers", "most in", "A", "B", "B to A"), rows, width), len(blocks) - told
    return [*lines, f"... and {counted(more, 'more statistic')}"] if more > 0 else lines


def _parting(parting: Parting, tolerance: float) -> str:
    """One series in words."""
    if not parting.compared:
        return "no step has it in both" if parting.only_a or parting.only_b else ""
    shared = f"{counted(parting.compared, 'shared step')}"
    if parting.first_unequal is None:
        return f"equal in {shared}"
    parts = [f"first differs at {_point(parting.first_unequal)}"]
    limit = f"{100 * tolerance:.3g} %"
    if parting.first_beyond is None:
        parts.append(f"never by more than {limit} in {shared}")
    else:
        first = _point(parting.first_beyond)
        parts.append(f"by more than {limit} first at {first}, in {parting.beyond} of {shared}")
    if parting.largest is not None and parting.largest != parting.first_unequal:
        parts.append(f"most at {_point(parting.largest)}")
    if parting.final is not None:
        final = parting.final
        parts.append(f"mean of the last {min(LAST, parting.compared)}: {value(final.a)} and {value(final.b)} "
                     f"({percent(final.relative)})")  # fmt: skip
    return "; ".join(parts)


def _point(point: Point) -> str:
    return f"step {point.step} ({value(point.a)} and {value(point.b)}, {percent(point.relative)})"


def _losses(difference: RunDifference, width: int) -> list[str]:
    a, b = (run.history.series(lambda step: step.loss) for run in (difference.a, difference.b))
    shared = sorted(a.keys() & b.keys())
    steps = [shared[place] for place in spaced(len(shared), POINTS)]
    rows = [(str(step), value(a[step]), value(b[step]), percent(relative(a[step], b[step]))) for step in steps]
    return table(("step", "A", "B", "B to A"), rows, width)


def _numbers(difference: RunDifference) -> list[Key]:
    rows: list[Key] = []
    for name, a, b in numbers_of(difference.a, difference.b):
        title, write = SHOWN.get(name, (name, value))
        if a is not None or b is not None:
            change = "" if a is None or b is None else percent(relative(a, b))
            rows.append((title, write(a), write(b), change))
    return rows


def _notes(difference: RunDifference) -> list[str]:
    loss = difference.series["loss"]
    lengths = [f"{name} has {counted(more, 'step')} with a loss that the other lacks" for name, more in
               (("A", loss.only_a), ("B", loss.only_b)) if more]  # fmt: skip
    of_runs = [f"{name}: {note}" for name, run in (("A", difference.a), ("B", difference.b)) for note in run.notes]
    lacks = difference.without_statistics
    return [*lengths, *([f"{lacks} has no statistics by layer"] if lacks else []), *of_runs]
