"""A profile as text that fits a terminal, and stays short for hundreds of layers.

Units whose names differ in indices only, and for which the same was found, share a row; a number that is not the same
in all of them is written as lowest..highest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from deepseek_mp.precision import Role
from deepseek_mp.precision.planning import origin_of
from deepseek_mp.precision.trade import number
from deepseek_mp.profiler.unit_profile import FAMILIES, UnitProfile, largest_loss, riskiest
from deepseek_mp.report.amounts import counted, seconds, size
from deepseek_mp.report.group import Group, Key, grouped, merged
from deepseek_mp.report.layers import Choice
from deepseek_mp.report.reasons import choice_groups
from deepseek_mp.report.table import listing, paragraph, table, tables
from deepseek_mp.report.text import INDENT, assemble

if TYPE_CHECKING:
    from deepseek_mp.profiler.report import ProfileReport

WIDTH = 120
"""Characters a line, where nothing says how wide the terminal is."""
RISKIEST = 5
MIB = 2**20


def render_profile(report: ProfileReport, width: int = WIDTH) -> str:
    """The profile in lines of at most `width` characters, where words and numbers allow it."""
    inner = width - len(INDENT)
    analysed = {name: unit for name, unit in report.items() if unit["not_analysed"] is None}
    left_out = {name: unit for name, unit in report.items() if unit["not_analysed"] is not None}
    kind = "relative rise of the loss" if report.basis == "batches" else "relative error energy of outputs"
    sections = [
        ("", listing(_basis(report), inner)),
        ("units", [*paragraph(f"Predicted {kind}, by format; emulated.", inner), *_numbers(analysed, report, inner)]),
        ("the units that mind most", _riskiest(analysed, inner)),
        ("recommended", _reasons(analysed, lambda unit: unit["reason"], inner)),
        ("not possible", _not_possible(analysed, inner)),
        ("not analysed", _reasons(left_out, lambda unit: unit["not_analysed"], inner)),
        ("all units together", [*listing(_totals(report), inner), *_notes(report, inner)]),
        ("predicted and true relative changes of the loss", _verification(report, inner)),
    ]
    return assemble(f"profile of {counted(len(report), 'unit')}", sections)


def _basis(report: ProfileReport) -> list[tuple[str, str]]:
    if report.basis != "batches":
        return [("seen", "no data: weights and shapes only, so nothing is said of the loss")]
    seen = "1 batch" if report.batches == 1 else f"{report.batches} batches"
    return [
        ("seen", f"{seen}, mean loss {report.loss:.5g}"),
        ("left out", "; ".join(report.skipped)),
        ("base", f"{report.base}, in which units run that nothing else is recommended for"),
    ]


def _groups(units: Mapping[str, UnitProfile], reason: Callable[[UnitProfile], str]) -> list[Group]:
    """Units with one recipe and one reason, but for the numbers in it; keys as of `choice_groups`."""
    choices = [
        Choice(step=0, layer=name, role=None, old="", new=unit["recommended"], reason="", detail=reason(unit))
        for name, unit in units.items()
    ]
    return choice_groups(choices)


def _alike(units: Mapping[str, UnitProfile]) -> list[Group]:
    """Units of one kind and size with one recipe."""
    keyed = [(name, (unit["kind"], str(unit.get("shape")), unit["recommended"])) for name, unit in units.items()]
    return merged(grouped(keyed))


def _numbers(units: Mapping[str, UnitProfile], report: ProfileReport, width: int) -> list[str]:
    families = [family for family in FAMILIES if any(f"{family}_loss" in unit for unit in units.values())]
    what = "loss" if report.basis == "batches" else "error"
    timed = list(dict.fromkeys(name for unit in units.values() for name in unit.get("milliseconds", {})))
    columns: list[tuple[str, Callable[[UnitProfile], float | None]]] = [
        *((f"{family} {what}", _getter(f"{family}_loss")) for family in families),
        ("noise", lambda unit: unit.get("spent", {}).get("noise")),
        *((f"{name} ms", _timed(name)) for name in timed),
        ("saved MiB", lambda unit: _saved(unit, report.base)),
    ]
    rows = []
    for group in _alike(units):
        members = [units[name] for name in group.layers]
        cells = [between(value(unit) for unit in members) for _, value in columns]
        rows.append((group.pattern, _several(group.layers), *cells, members[0]["recommended"]))
    heading = ("unit", "layers", *(title for title, _ in columns), "recommended")
    return tables(heading, rows, width, repeated=2)


def _getter(key: str) -> Callable[[UnitProfile], float | None]:
    return lambda unit: unit.get(key)


def _timed(recipe: str) -> Callable[[UnitProfile], float | None]:
    return lambda unit: unit.get("milliseconds", {}).get(recipe)


def between(values: Iterable[float | None]) -> str:
    """A number in two or three digits, of several that differ the lowest and the highest; infinite: overflow."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, high = (number(end) if math.isfinite(end) else "overflow" for end in (min(known), max(known)))
    return low if low == high else f"{low}..{high}"


def _several(layers: Sequence[str]) -> str:
    return str(len(layers)) if len(layers) > 1 else ""


def _saved(unit: UnitProfile, base: str) -> float | None:
    """MiB that the recommended recipe keeps less for backward than the base does; None where nothing changes."""
    kept_in = origin_of(unit["recommended"], Role.WGRAD, base)
    saved = unit.get("saved_bytes", {}).get(kept_in)
    return None if kept_in == base or saved is None else saved / MIB


def _riskiest(units: Mapping[str, UnitProfile], width: int) -> list[str]:
    """Rows of the units with the largest predicted loss, where a table of groups does not name them."""
    if all(len(group.layers) == 1 for group in _alike(units)):
        return []
    rows = []
    for name in riskiest(units, RISKIEST):
        recipe, loss = largest_loss(units[name])
        rows.append((name, recipe, number(loss)))
    return table(("unit", "recipe", "loss"), rows, width)


def _reasons(units: Mapping[str, UnitProfile], reason: Callable[[UnitProfile], str], width: int) -> list[str]:
    """Rows of the units that have a recipe for one reason."""
    rows: dict[Key, list[Group]] = {}
    for group in _groups(units, reason):
        rows.setdefault(group.key, []).append(group)
    cells = [
        (", ".join(group.pattern for group in some), _several([n for g in some for n in g.layers]), key[2], key[4])
        for key, some in rows.items()
    ]
    return table(("unit", "layers", "recipe", "why"), cells, width)


def _not_possible(units: Mapping[str, UnitProfile], width: int) -> list[str]:
    """Rows of recipes that some units cannot run in."""
    reasons: dict[str, dict[str, str]] = {}
    for name, unit in units.items():
        for recipe, values in unit.get("recipes", {}).items():
            if "macs" in unit and values["not_taken"]:
                reasons.setdefault(recipe, {})[name] = values["not_taken"]
    keyed = [(name, (recipe, why)) for recipe, found in reasons.items() for name, why in found.items()]
    rows = [(group.pattern, _several(group.layers), *group.key) for group in merged(grouped(keyed))]
    return table(("unit", "layers", "recipe", "why not"), rows, width)


def _totals(report: ProfileReport) -> list[tuple[str, str]]:
    spent = [unit["spent"] for unit in report.values() if "spent" in unit]
    if report.budget is None or not spent:
        return []
    sums = {key: math.fsum(one[key] for one in spent) for key in ("loss", "noise", "seconds")}
    limits = {"loss": report.budget.loss, "noise": report.budget.noise}
    entries = [
        (name, f"{number(sums[name])} predicted, of {number(limit)} allowed ({100 * sums[name] / limit:.3g} %)")
        for name, limit in limits.items()
    ]
    times = [
        f"{seconds(report.step_seconds(name))} in {name}" for name in dict.fromkeys(("fp32", report.base)) if spent
    ]
    measured = sum(one["measured"] for one in spent)
    guessed = len(spent) - measured
    how = f"measured in {counted(measured, 'unit')}" if measured else ""
    guess = f"guessed from widths of formats, not measured, in {counted(guessed, 'unit')}" if guessed else ""
    entries.append(
        (
            "time of a step's units",
            f"{seconds(sums['seconds'])} as recommended, {', '.join(times)}; {', '.join(filter(None, (how, guess)))}",
        )
    )
    saved = math.fsum(_saved(unit, report.base) or 0.0 for unit in report.values())
    if saved:
        entries.append(
            ("kept for backward", f"{size(abs(saved) * MIB)} {'less' if saved > 0 else 'more'} than in {report.base}")
        )
    return entries


def _notes(report: ProfileReport, width: int) -> list[str]:
    lacking = [name for name in report.recipes if name not in report.native]
    if report.basis != "batches" or not lacking:
        return []
    names = ", ".join(lacking)
    text = f"The device does not multiply {names}: chosen only where asked for, with guessed times."
    return paragraph(text, width)


def _verification(report: ProfileReport, width: int) -> list[str]:
    found, loss = report.verification, report.loss
    if found is None or not loss:
        return []
    batch = "batches held out" if found.held_out else "the last batch of the estimate"
    rank = "none, too few" if found.rank_correlation is None else f"{found.rank_correlation:.2f}"
    text = (
        f"{found.pairs} pairs of unit and recipe on {batch}; in {found.plain} the true change is more than batches "
        f"scatter. Rank correlation of predicted changes and sizes of true ones: {rank}"
    )
    rows = []
    for name, unit in report.items():
        for recipe, change in unit.get("true_change", {}).items():
            error = unit["true_error"][recipe]
            scatter = "" if error is None else number(error / loss)
            rows.append((name, recipe, between([unit["recipes"][recipe]["loss"]]), number(change / loss), scatter))
    heading = ("unit", "recipe", "predicted", "true", "its standard error")
    return [*paragraph(text, width), *table(heading, rows, width)]
