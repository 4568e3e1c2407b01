from __future__ import annotations

from deepseek_mp.activations import Pair, SavedForm, SavedReason
from deepseek_mp.activations.account import Account


def test_tensors_of_one_kind_are_added_up_and_others_are_not():
    account = Account()
    for _ in range(2):
        account.add(("a", "linear"), SavedForm.FP8, SavedReason.COMPRESSED, before=400, after=100)
    account.add(("a", "linear"), SavedForm.KEPT, SavedReason.SMALL, before=4, after=4)
    account.add_pair(Pair(module="norm", recomputed=True, reason=""))
    record = account.record()
    assert [(entry.tensors, entry.bytes_before, entry.bytes_after) for entry in record.saved] == [
        (2, 800, 200),
        (1, 4, 4),
    ]
    assert record.pairs[0].recomputed


def test_a_record_does_not_change_afterwards():
    account = Account()
    record = account.record()
    account.add(("a", "linear"), SavedForm.FP8, SavedReason.COMPRESSED, before=400, after=100)
    assert not record.saved
    assert account.record().saved
