"""How a report is put together of its parts."""

import pytest

from deepseek_mp.profiler.assemble import with_recommendations, with_verification
from deepseek_mp.profiler.report import ProfileReport
from deepseek_mp.profiler.unit_profile import UnitProfile, riskiest
from deepseek_mp.profiler.verification import TrueChange

ROLES = ("fprop", "dgrad", "wgrad")


def unit(row, **values):
    recipes = {
        "row": {"loss": row, "noise": dict.fromkeys(ROLES, 0.0), "taken": True},
        "bf16": {"loss": 0.0, "noise": dict.fromkeys(ROLES, 0.0), "taken": True},
    }
    own = {"kind": "Linear", "macs": 10, "not_analysed": None, "recommended": "bf16", "reason": ""}
    return UnitProfile({**own, "recipes": recipes, "milliseconds": {"fp32": 4, "bf16": 2, "row": 1}, **values})


@pytest.fixture
def report():
    units = {"safe": unit(1e-6), "risky": unit(0.5), "wild": unit(float("inf"))}
    return ProfileReport(units, basis="batches", base="bf16", recipes=["bf16", "row"], native=["bf16", "row"], loss=1.0)


def test_what_is_recommended_is_what_the_solver_chose(report):
    made = with_recommendations(report)
    assert [made[name]["recommended"] for name in made] == ["row", "bf16", "bf16"]
    assert "its loss is infinite" in made["wild"]["reason"]
    assert report["safe"]["recommended"] == "bf16"


def test_what_the_device_lacks_is_not_recommended(report):
    report.native = ("bf16",)
    assert {unit["recommended"] for unit in with_recommendations(report).values()} == {"bf16"}


def test_the_riskiest_come_first_and_an_overflow_is_no_number_to_verify(report):
    assert riskiest(report, 2) == ["risky", "safe"]


def test_true_changes_stand_beside_predictions(report):
    plain, none = TrueChange(0.4, 0.1), TrueChange(0.0, 0.1)
    changes = {"safe": {"row": TrueChange(-2e-6, None), "bf16": none}, "risky": {"row": plain, "bf16": none}}
    made = with_verification(report, changes, held_out=True)
    assert (made.verification.pairs, made.verification.plain) == (4, 1)
    assert made.verification.rank_correlation == pytest.approx(1.0)
    assert (made["risky"]["true_change"]["row"], made["risky"]["true_error"]["row"]) == (0.4, 0.1)
    assert report.verification is None
