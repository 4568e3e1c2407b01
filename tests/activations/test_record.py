from __future__ import annotations

import json

from deepseek_mp.activations import ActivationRecord, Pair, SavedActivations, SavedForm, SavedReason


def saved(module: str, form: SavedForm, before: int, after: int) -> SavedActivations:
    return SavedActivations(
        module=module, operation="linear", form=form, reason=SavedReason.COMPRESSED,
        tensors=1, bytes_before=before, bytes_after=after,
    )  # fmt: skip


def test_sums_by_module_and_form_with_the_largest_first():
    record = ActivationRecord(
        saved=(
            saved("a", SavedForm.FP8, 400, 100),
            saved("b", SavedForm.KEPT, 900, 900),
            saved("a", SavedForm.KEPT, 4, 4),
        ),
        pairs=(),
    )
    assert (record.bytes_before, record.bytes_after) == (1304, 1004)
    assert list(record.by_module().items()) == [("b", (900, 900)), ("a", (404, 104))]
    assert record.by_form() == {"kept": (904, 904), "fp8": (400, 100)}


def test_a_record_is_json():
    pair = Pair(module="norm", recomputed=False, reason="the BatchNorm is not in training mode")
    record = ActivationRecord(saved=(saved("a", SavedForm.FP8, 400, 100),), pairs=(pair,))
    read = json.loads(json.dumps(record.to_json()))
    assert read["bytes_after"] == 100
    assert read["saved"] == [
        {"module": "a", "operation": "linear", "form": "fp8", "reason": "compressed", "tensors": 1,
         "bytes_before": 400, "bytes_after": 100}
    ]  # fmt: skip
    assert read["pairs"][0]["recomputed"] is False
