import json
import math
from dataclasses import replace

import pytest

from deepseek_mp.errors import ConfigError, PlanError
from deepseek_mp.precision.storage import (
    StorageDecision,
    StorageFormat,
    StorageLimits,
    StorageReason,
    StorageState,
    UpdateFate,
    decide_storage,
)

FP32, KAHAN, SR = StorageFormat
GOOD = UpdateFate(lost=0.5, edq=0.4, edq_sr=1.0, edq_kahan=1.0, psi=2.0, ratio=1e-4)
NOISY = replace(GOOD, psi=50.0)
TINY = replace(NOISY, edq_kahan=0.9)
AT_ONCE = StorageLimits(in_a_row=1)


@pytest.mark.parametrize(
    ("fate", "format", "reason"),
    [
        (GOOD, SR, "noise_small"),
        (replace(GOOD, psi=20.0), KAHAN, "noise_large"),
        (NOISY, KAHAN, "noise_large"),
        (replace(GOOD, edq_sr=1.1), KAHAN, "noise_large"),
        (TINY, FP32, "updates_lost"),
        (replace(GOOD, kind="norm"), FP32, "kind_kept"),
        (replace(GOOD, kind="embedding"), FP32, "kind_kept"),
        (replace(GOOD, read_as="fp32"), FP32, "read_in_fp32"),
    ],
)
def test_auto_takes_the_smallest_format_that_keeps_the_updates(fate, format, reason):
    decision = decide_storage("fc", fate, limits=AT_ONCE)
    assert (decision.new, decision.reason) == (format, reason)


@pytest.mark.parametrize(
    ("fate", "format", "reason"),
    [
        (NOISY, SR, "small_updates"),
        (replace(NOISY, ratio=1e-3), FP32, "large_updates"),
        (replace(NOISY, edq_sr=0.9), KAHAN, "small_updates"),
        (replace(TINY, edq_sr=0.9), FP32, "updates_lost"),
        (replace(GOOD, kind="bias"), FP32, "kind_kept"),
    ],
)
def test_small_updates_lowers_layers_that_hardly_move(fate, format, reason):
    decision = decide_storage("fc", fate, limits=AT_ONCE, policy="small_updates")
    assert (decision.new, decision.reason) == (format, reason)


def decide_all(fates, state=None):
    formats = []
    state = state or StorageState()
    for fate in fates:
        decision = decide_storage("fc", fate, state)
        state = decision.state
        formats.append(decision.new)
    return formats


def test_a_smaller_format_is_taken_after_three_decisions():
    assert decide_all([GOOD, GOOD, GOOD]) == [FP32, FP32, SR]


def test_one_other_decision_starts_the_count_again():
    assert decide_all([GOOD, GOOD, TINY, GOOD, GOOD, GOOD]) == [FP32] * 5 + [SR]


def test_the_most_exact_of_the_formats_that_were_good_enough_is_taken():
    assert decide_all([GOOD, NOISY, GOOD]) == [FP32, FP32, KAHAN]


def test_a_more_exact_format_is_taken_at_once():
    assert decide_all([NOISY], StorageState(format=SR)) == [KAHAN]
    assert decide_all([TINY, GOOD], StorageState(format=SR)) == [FP32, FP32]


@pytest.mark.parametrize("unknown", [replace(GOOD, psi=math.nan), replace(GOOD, edq_kahan=math.inf)])
def test_a_weight_that_did_not_move_stays_as_it_is_stored(unknown):
    for format in StorageFormat:
        decision = decide_storage("fc", unknown, StorageState(format=format))
        assert (decision.new, decision.reason) == (format, StorageReason.NOT_MEASURED)
    assert decide_all([GOOD, GOOD, unknown, GOOD]) == [FP32] * 4


def test_waiting_says_what_would_do():
    decision = decide_storage("fc", GOOD)
    assert decision.reason is StorageReason.WAITING
    assert not decision.changes
    assert "bf16_sr would do (1 of 3 in a row)" in str(decision)


def test_a_decision_carries_its_evidence_through_json():
    decision = decide_storage("fc", replace(GOOD, edq=math.nan), limits=AT_ONCE)
    assert decision.changes
    assert decision.evidence["psi"] == 2.0
    assert "edq" not in decision.evidence  # JSON has no NaN
    assert StorageDecision.from_json(json.loads(json.dumps(decision.to_json()))) == decision
    waiting = decide_storage("fc", GOOD)
    assert StorageDecision.from_json(json.loads(json.dumps(waiting.to_json()))).state == waiting.state


def test_bytes_for_each_value():
    assert [format.weight_bytes for format in StorageFormat] == [4, 4, 2]
    assert [format.is_bf16 for format in StorageFormat] == [False, True, True]


def test_refuses_unknown_names_and_limits_out_of_range():
    with pytest.raises(ConfigError, match=r"unknown policy 'automatic'.*auto, small_updates"):
        decide_storage("fc", GOOD, policy="automatic")
    with pytest.raises(ConfigError, match="psi=0"):
        StorageLimits(psi=0)
    with pytest.raises(ConfigError, match=r"in_a_row=0\."):
        StorageLimits(in_a_row=0)
    with pytest.raises(PlanError, match="unknown storage format 'bf16'"):
        StorageState(format="bf16")
