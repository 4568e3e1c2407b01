"""What happens to each tensor that a forward saves: the choice of its form, and how it gets there."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from deepseek_mp.activations.account import Account
from deepseek_mp.activations.compress import (
    DEVICES,
    FLOATING,
    is_dense,
    mask_bits,
    rounded,
    rounded_bytes,
    signs,
    two_valued,
    without_autocast,
)
from deepseek_mp.activations.norm_relu import NormCall, Recomputed, argument, is_exact, norm_call
from deepseek_mp.activations.operations import NOT_POSITIVE_IF_STOPPED, TOLERANT, is_statistic, reads_sign
from deepseek_mp.activations.origin import Held, is_plain
from deepseek_mp.activations.places import Places
from deepseek_mp.activations.record import Pair, SavedForm, SavedReason
from deepseek_mp.activations.seeds import Seeds
from deepseek_mp.activations.settings import ActivationSettings
from deepseek_mp.activations.sharing import Entry, Key, Saved, key_of
from deepseek_mp.activations.stored import Kept, Stored
from deepseek_mp.ops.own_work import is_own_work, own_work
from deepseek_mp.precision import Rounding

_LARGEST_SEED = (1 << 63) - 1
_RECOMPUTED = SavedForm.RECOMPUTED, SavedReason.EXACT
_READS_NOTHING = frozenset({"__get__", "size", "dim", "stride", "is_contiguous", "register_hook"})
"""What may be asked of a BatchNorm's output before it goes on to a ReLU."""
_Place = tuple[str, str]
_Choice = tuple[SavedForm, SavedReason]


class _Input(NamedTuple):
    """The input of a BatchNorm that runs, held as it is until it is known whether a ReLU follows."""

    entry: Entry
    choice: _Choice
    """Its form if none does."""
    place: _Place


class _Norm(NamedTuple):
    """A BatchNorm that has run."""

    call: NormCall
    output: Key
    input: _Input | None
    module: str


class Session(TorchFunctionMode):
    """One forward on one thread. As a mode it knows which of PyTorch's functions runs: the outermost one called.

    Autograd keeps entries, which refer to nothing here.
    """

    def __init__(self, model: nn.Module, settings: ActivationSettings, number: int) -> None:
        super().__init__()
        self.account = Account()
        self._settings = settings
        self._held = Held(model)
        self._places = Places(model)
        self._saved = {form: Saved() for form in SavedForm}
        self._counted = Saved()
        self._random = random.Random(settings.seed << 64 | number)
        self._seeds = Seeds(self._random)
        self._operation = ""
        self._running: NormCall | None = None
        self._input: _Input | None = None
        self._norm: _Norm | None = None
        self._outputs: dict[Key, Recomputed] = {}

    def end(self) -> None:
        """Let go of tensors."""
        self._settle()
        self._outputs.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, and remember its name while it runs; but for what a monitor computes in between."""
        kwargs = kwargs or {}
        if is_own_work():
            return func(*args, **kwargs)
        before, self._operation = self._operation, getattr(func, "__name__", "")
        try:
            if not self._settings.recompute_norm_relu:
                return func(*args, **kwargs)
            return self._in_pairs(func, args, kwargs)
        finally:
            self._operation = before

    def pack(self, x: Tensor) -> Entry:
        """The entry that autograd keeps for a tensor."""
        place = self._places.current, self._operation
        if not is_plain(x):
            return self._enter(x, None, (SavedForm.KEPT, SavedReason.LAYOUT), place)
        if self._held.has(x):
            return Entry(Kept(x))
        if x.nbytes < self._settings.min_bytes:
            return self._enter(x, None, (SavedForm.KEPT, SavedReason.SMALL), place)
        key = key_of(x)
        if (recomputed := self._outputs.get(key)) is not None:
            return self._accounted(Entry(recomputed, key), _RECOMPUTED, place, before=x.nbytes)
        choice = self._choice(x, place)
        for form in (SavedForm.KEPT, choice[0]):
            if (entry := self._saved[form].find(key)) is not None:
                self.account.add(place, SavedForm.SHARED, SavedReason.SAVED_BEFORE, before=0, after=0)
                return entry
        if self._running is not None and not self._running.obstacle and key == key_of(self._running.x):
            self._input = _Input(Entry(Kept(x), key), choice, place)
            return self._input.entry
        return self._enter(x, key, choice, place)

    def _enter(self, x: Tensor, key: Key | None, choice: _Choice, place: _Place) -> Entry:
        stored, choice = self._brought_into(x, choice)
        return self._accounted(Entry(stored, key), choice, place, before=x.nbytes if is_plain(x) else stored.nbytes)

    def _accounted(self, entry: Entry, choice: _Choice, place: _Place, *, before: int) -> Entry:
        form, reason = choice
        if entry.key is not None:
            # The bytes of a tensor count once, also where it is held in two forms.
            before = 0 if self._counted.find(entry.key) else before
            self._counted.add(entry.key, entry)
            # Signs stand for the tensor in one operation only.
            if form is not SavedForm.BITS or not reads_sign(self._operation):
                self._saved[form].add(entry.key, entry)
        self.account.add(place, form, reason, before=before, after=entry.stored.nbytes)
        return entry

    def _choice(self, x: Tensor, place: _Place) -> _Choice:
        """The form of a large plain tensor that the model does not hold."""
        module, operation = place
        obstacle = self._obstacle(x, module)
        if obstacle is not None:
            return SavedForm.KEPT, obstacle
        if x.dtype is torch.bool or reads_sign(operation):
            return SavedForm.BITS, SavedReason.EXACT
        if not x.requires_grad:
            # On a CPU dropout multiplies by a tensor of two values.
            noise = operation == "dropout" and x.device.type == "cpu"
            return (SavedForm.BITS, SavedReason.EXACT) if noise else (SavedForm.KEPT, SavedReason.NO_GRADIENT)
        if is_statistic("" if x.grad_fn is None else x.grad_fn.name(), x.output_nr):
            return SavedForm.KEPT, SavedReason.STATISTIC
        if operation not in TOLERANT:
            return SavedForm.KEPT, SavedReason.OPERATION
        if rounded_bytes(x.numel(), self._settings.group) >= x.nbytes:
            return SavedForm.KEPT, SavedReason.SMALL
        return SavedForm.FP8, SavedReason.COMPRESSED

    def _obstacle(self, x: Tensor, module: str) -> SavedReason | None:
        """Why a tensor is left alone whatever saves it."""
        if self._settings.keeps(module):
            return SavedReason.ASKED
        if x.device.type not in DEVICES:
            return SavedReason.DEVICE
        if not is_dense(x):
            return SavedReason.LAYOUT
        if x.dtype is not torch.bool and x.dtype not in FLOATING:
            narrow = x.element_size() == 1 or not (x.is_floating_point() or x.is_complex())
            return SavedReason.NARROW if narrow else SavedReason.WIDE
        return SavedReason.WEIGHT_CAST if self._held.has_source(x) else None

    def _brought_into(self, x: Tensor, choice: _Choice) -> tuple[Stored, _Choice]:
        """The tensor in the form chosen, and that choice; kept as it is where the form turns out not to fit."""
        form, _ = choice
        if form is SavedForm.KEPT:
            return Kept(x), choice
        with own_work(), without_autocast(x.device):
            made = self._rounded(x) if form is SavedForm.FP8 else self._bits(x)
        return (Kept(x), (SavedForm.KEPT, SavedReason.NO_GRADIENT)) if made is None else (made, choice)

    def _rounded(self, x: Tensor) -> Stored:
        if self._settings.rounding is Rounding.NEAREST:
            return rounded(x, self._settings.group, None)
        on_cpu = x.device.type == "cpu"
        seed = self._random.randint(0, _LARGEST_SEED) if on_cpu else self._seeds.next(x.device)
        return rounded(x, self._settings.group, seed)

    def _bits(self, x: Tensor) -> Stored | None:
        if x.dtype is torch.bool:
            return mask_bits(x)
        return signs(x, self._operation) if reads_sign(self._operation) else two_valued(x)

    def _in_pairs(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the function, on the watch for a BatchNorm and for the ReLU that follows."""
        name = self._operation
        norm = self._norm
        follows = norm is not None and name in NOT_POSITIVE_IF_STOPPED and _is(argument(args, kwargs), norm.output)
        if not follows and name not in _READS_NOTHING:
            self._settle()
        if func is not F.batch_norm or not is_grad_enabled():
            output = func(*args, **kwargs)
            if follows and norm is not None:
                self._norm = None
                self._join(norm, output)
            return output
        self._running = norm_call(args, kwargs)
        try:
            output = func(*args, **kwargs)
            self._norm = _Norm(self._running, key_of(output), self._input, self._places.current)
        finally:
            self._running, self._input = None, None
        return output

    def _settle(self) -> None:
        """A BatchNorm has no ReLU behind it: its input gets the form of any other tensor."""
        norm, self._norm = self._norm, None
        if norm is not None:
            self._release(norm)

    def _release(self, norm: _Norm) -> None:
        if norm.input is None:
            return
        entry, choice, place = norm.input
        x = norm.call.x
        entry.stored, choice = self._brought_into(x, choice)
        self._accounted(entry, choice, place, before=x.nbytes)

    def _join(self, norm: _Norm, output: Tensor) -> None:
        """A ReLU has followed: its output is computed again if that is exact."""
        reason = norm.call.obstacle
        if not reason and norm.input is None:
            reason = "the input is small, or was saved in another form before"
        if norm.input is not None:
            recomputed = Recomputed(norm.input.entry.stored, norm.call)
            if is_exact(recomputed, output):
                choice = SavedForm.KEPT, SavedReason.RECOMPUTED_FROM
                self._accounted(norm.input.entry, choice, norm.input.place, before=norm.call.x.nbytes)
                self._outputs[key_of(output)] = recomputed
            else:
                reason = "the output computed again is not the same"
                self._release(norm)
        self.account.add_pair(Pair(module=norm.module, recomputed=not reason, reason=reason))


def _is(x: Any, key: Key) -> bool:
    return isinstance(x, Tensor) and is_plain(x) and key_of(x) == key
