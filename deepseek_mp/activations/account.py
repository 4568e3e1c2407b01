"""The account of a forward under way: what was saved so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from deepseek_mp.activations.record import ActivationRecord, Pair, SavedActivations, SavedForm, SavedReason

_Kind = tuple[str, str, SavedForm, SavedReason]


@dataclass
class _Amount:
    tensors: int = 0
    before: int = 0
    after: int = 0


@dataclass
class Account:
    """What `compressed_activations` gives while it is in force; `record` may be asked for at any time."""

    _amounts: dict[_Kind, _Amount] = field(default_factory=dict)
    _pairs: list[Pair] = field(default_factory=list)

    def add(self, place: tuple[str, str], form: SavedForm, reason: SavedReason, *, before: int, after: int) -> None:
        """One more tensor, saved at a place: a module and an operation."""
        kind = *place, form, reason
        amount = self._amounts.get(kind)
        if amount is None:
            amount = self._amounts[kind] = _Amount()
        amount.tensors += 1
        amount.before += before
        amount.after += after

    def add_pair(self, pair: Pair) -> None:
        self._pairs.append(pair)

    def record(self) -> ActivationRecord:
        """What has been saved so far, as plain values."""
        saved = tuple(
            SavedActivations(
                module=module, operation=operation, form=form, reason=reason,
                tensors=amount.tensors, bytes_before=amount.before, bytes_after=amount.after,
            )
            for (module, operation, form, reason), amount in self._amounts.items()
        )  # fmt: skip
        return ActivationRecord(saved=saved, pairs=tuple(self._pairs))
