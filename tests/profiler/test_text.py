"""The text of a profile: short for hundreds of layers, in lines that fit, with every number it owes."""

import math

import pytest

from deepseek_mp import PrecisionPlan
from deepseek_mp.precision import Decision, Reason
from deepseek_mp.precision.allocation import Budget
from deepseek_mp.profiler.report import ProfileReport, Verification
from deepseek_mp.profiler.text import between, render_profile
from deepseek_mp.profiler.unit_profile import UnitProfile

ROLES = ("fprop", "dgrad", "wgrad")


def unit(loss, *, row=True, **values):
    recipes = {
        "row": {
            "loss": loss,
            "noise": dict.fromkeys(ROLES, 0.0),
            "taken": row,
            "not_taken": None if row else "its weight is [8, 30] and row takes multiples of 16",
        },
        "bf16": {"loss": loss / 100, "noise": dict.fromkeys(ROLES, 0.0), "taken": True, "not_taken": None},
    }
    own = {
        "kind": "Linear",
        "shape": [64, 64],
        "parameters": 4096,
        "macs": 10**6,
        "fp8_loss": loss,
        "bf16_loss": loss / 100,
        "not_analysed": None,
        "recommended": "bf16",
        "reason": "",
        "recipes": recipes,
        "milliseconds": {"fp32": 4.0, "bf16": 2.0, "row": 1.0},
        "saved_bytes": {"fp32": -(2**20), "bf16": 0, "row": 2**19},
    }
    return UnitProfile({**own, **values})


def report_of(units, **facts):
    own = {"basis": "batches", "base": "bf16", "recipes": ["bf16", "row"], "native": ["bf16", "row"], "loss": 2.0}
    return ProfileReport(units, batches=4, **{**own, **facts})


def with_plan(report, new, *, loss=1e-5, noise=1e-3, measured=True):
    decisions = tuple(
        Decision(
            layer=name,
            old="bf16",
            new=new,
            reason=Reason.ALLOCATED,
            detail=f"saves {(number + 1) // 2} ms",
            evidence={
                "loss": loss,
                "noise": noise,
                "seconds": 1e-3,
                "seconds_are": "measured" if measured else "guessed from the width of its formats",
            },
        )
        for number, name in enumerate(report, 1)
        if "macs" in report[name]
    )
    return report.with_plan(PrecisionPlan(base="bf16", decisions=decisions), budget=1e-3)


def words(text):
    return " ".join(text.split())


@pytest.mark.parametrize("width", [70, 90, 140])
def test_hundreds_of_units_are_a_few_rows_that_fit(width):
    units = {f"blocks.{i}.{part}": unit(1e-6 * (i + 1)) for i in range(100) for part in ("up", "down")}
    lines = render_profile(with_plan(report_of(units), "row"), width).splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) < 50
    text = words("\n".join(lines))
    assert text.count("blocks.*.{up, down} 200") >= 2  # its numbers, and its reason
    for fact in ("1e-6..1e-4", "1e-8..1e-6", "saves 1..100 ms"):
        assert fact in text


def test_units_in_other_recipes_or_of_other_sizes_have_rows_of_their_own():
    units = {f"blocks.{i}": unit(1e-6, recommended="row" if i % 2 else "bf16") for i in range(6)}
    units["blocks.6"] = unit(1e-6, shape=[64, 128])
    text = render_profile(report_of(units))
    for pattern in ("blocks.{0,2,4}", "blocks.{1,3,5}", "blocks.6"):
        assert f"  {pattern} " in text


def test_the_riskiest_are_named_where_a_row_hides_them():
    units = {f"blocks.{i}": unit(1e-3 if i == 4 else 1e-7) for i in range(9)}
    assert words("blocks.4 row 1e-3 blocks.0 row") in words(render_profile(report_of(units)))
    assert "mind most" not in render_profile(report_of({"a": unit(1e-3), "b": unit(1e-7, shape=[8, 8])}))


def test_totals_say_what_is_spent_and_what_was_guessed():
    text = words(render_profile(with_plan(report_of({"a": unit(1e-5), "b": unit(1e-5)}), "row")))
    assert "loss 2e-5 predicted, of 1e-3 allowed (2 %)" in text
    assert "noise 2e-3 predicted, of 0.05 allowed (4 %)" in text
    assert "2 ms as recommended, 8 ms in fp32, 4 ms in bf16; measured in 2 units" in text
    assert "kept for backward 1 MiB less than in bf16" in text
    assert "guessed" not in text
    guessed = words(render_profile(with_plan(report_of({"a": unit(1e-5), "b": unit(1e-5)}), "row", measured=False)))
    assert "guessed from widths of formats, not measured, in 2 units" in guessed


def test_a_mixture_keeps_what_its_weight_gradient_reads():
    report = report_of({"a": unit(1e-5)})
    assert "0.5 MiB less" not in words(render_profile(with_plan(report, "row[fprop]")))
    assert "512 KiB less" in words(render_profile(with_plan(report, "row[fprop+wgrad]")))
    assert "1 MiB more" in words(render_profile(with_plan(report, "fp32")))


def test_what_is_not_possible_or_not_analysed_has_its_reason():
    units = {
        "a": unit(1e-5, row=False),
        "lstm": UnitProfile({
            "kind": "LSTM", "parameters": 9, "shape": None, "recommended": "bf16", "reason": "not analysed: it was odd",
            "not_analysed": "it was odd",
        }),
    }  # fmt: skip
    text = words(render_profile(report_of(units, native=["bf16"], skipped=["batch 2: its loss is nan"])))
    assert "a row its weight is [8, 30] and row takes multiples of 16" in text
    assert "lstm bf16 it was odd" in text
    assert "The device does not multiply row" in text
    assert "left out batch 2: its loss is nan" in text


def test_an_overflow_is_a_word():
    assert between([None, 1e-5, math.inf]) == "1e-5..overflow"
    assert between([math.inf]) == "overflow"
    assert between([None]) == ""
    assert between([2.0, 2.0]) == "2"


def test_a_verification_stands_beside_the_predictions():
    units = {"a": unit(1e-4, true_change={"row": 4e-4, "bf16": 0.0}, true_error={"row": 2e-5, "bf16": None})}
    checked = Verification(pairs=2, plain=1, rank_correlation=None, held_out=False)
    text = words(render_profile(report_of(units, verification=checked)))
    assert "2 pairs of unit and recipe on the last batch of the estimate; in 1 the true change is more" in text
    assert "a row 1e-4 2e-4 1e-5" in text
    assert "a bf16 1e-6 0" in text


def test_budgets_survive_json():
    report = with_plan(report_of({"a": unit(1e-5)}), "row")
    again = ProfileReport.from_json(report.to_json())
    assert again.budget == Budget(loss=1e-3, noise=0.05)
    assert render_profile(again) == render_profile(report)
    assert report_of({"a": unit(1e-5)}).budget is None
