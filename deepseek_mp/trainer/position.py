"""Where training stands in its data, so that a resumed run sees exactly the batches that were left.

A loader with a `state_dict` keeps its own position. For any other, the random state at the start of
the epoch is kept: iterating again from it gives the same order, the batches already seen are
skipped, and the random state of the moment of the save is put back. A loader or sampler that draws
from a generator of its own has that generator saved too.

The same happens when a fit goes on where an earlier one of the same trainer stopped. If that one
ended with an exception, its batches since the last step are given again.
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from deepseek_mp.errors import LoaderError, explain
from deepseek_mp.trainer.rng import get_rng, rng_state, set_rng, set_rng_state

log = logging.getLogger("deepseek_mp")

State = tuple[dict[str, Tensor], dict[str, Any]]


def _generators(loader: Any) -> dict[str, torch.Generator]:
    """The generators that a loader and its samplers own, by where they hang."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders = {
        "loader": loader,
        "sampler": getattr(loader, "sampler", None),
        "batch_sampler": batch_sampler,
        "batch_sampler.sampler": getattr(batch_sampler, "sampler", None),
    }
    found = {place: getattr(holder, "generator", None) for place, holder in holders.items()}
    return {place: g for place, g in found.items() if isinstance(g, torch.Generator)}


def random_state(loader: Any, device: torch.device) -> State:
    """All random state that training on `loader` depends on: tensors and JSON values."""
    tensors, values = rng_state(device)
    own = {f"generator.{place}": g.get_state() for place, g in _generators(loader).items()}
    return {**tensors, **own}, values


def set_random_state(state: State, loader: Any, device: torch.device) -> None:
    """Put back what `random_state` returned."""
    tensors, values = state
    set_rng_state({k: t for k, t in tensors.items() if not k.startswith("generator.")}, values, device)
    for place, generator in _generators(loader).items():
        if f"generator.{place}" in tensors:
            generator.set_state(tensors[f"generator.{place}"])


def check_loader(loader: Any, name: str = "loader", *, optional: bool = False) -> None:
    """`LoaderError` for what cannot be iterated; None is allowed where the loader is optional."""
    if optional and loader is None:
        return
    if getattr(loader, "persistent_workers", False):
        log.warning("%s keeps its workers: their random state is not saved, so a resumed run sees another order", name)
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise LoaderError(explain(f"{name} {loader!r}", "an iterable of batches", "Pass a DataLoader, or a list"))


def length(loader: Any) -> int | None:
    """Batches per epoch, or None where the loader does not know (a DataLoader may have a `len` that fails)."""
    try:
        return len(loader)
    except TypeError:
        return None


def no_batch(epoch: int) -> LoaderError:
    """The error for a loader that gave nothing."""
    return LoaderError(
        explain(
            f"a loader that gave no batch in epoch {epoch}",
            "a loader that can be iterated once per epoch and has data",
            "Check the data set and drop_last; a generator is used up after one epoch",
        )
    )


def _this_moment(loader: Any, device: torch.device) -> Callable[[], None]:
    """The random state as a function that puts it back: some microseconds, cheap enough for every step."""
    python, states, numpy = random.getstate(), get_rng(device), sys.modules.get("numpy")
    array = None if numpy is None else numpy.random.get_state(legacy=False)
    own = [(generator, generator.get_state()) for generator in _generators(loader).values()]

    def put_back() -> None:
        random.setstate(python)
        set_rng(states, device)
        if numpy is not None:
            numpy.random.set_state(array)
        for generator, own_state in own:
            generator.set_state(own_state)

    return put_back


class LoaderPosition:
    """The epoch, the batch within it, and what is needed to get back there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.epoch = 0
        self.batch = 0
        """Batches of this epoch already consumed."""
        self._stepped = 0
        """Of these, the ones that an optimizer step was made from."""
        self._go_back: Callable[[], None] | None = None
        """Puts the random state back to where `_stepped` batches had been consumed."""
        self._loader: Any = None
        self._start: State | None = None
        self._resume: tuple[State, Any] | None = None

    def batches(self, loader: Any) -> Iterator[tuple[int, Any]]:
        """The (index, batch) pairs of this epoch that are left."""
        resumed = self._resume is not None
        yield from self._left(loader)
        if resumed and not self.batch:  # the state of a loader at the end of an epoch gives that end once
            yield from self._left(loader)

    def _left(self, loader: Any) -> Iterator[tuple[int, Any]]:
        iterator, self._loader = self._reopened(loader), loader
        self._go_back = _this_moment(loader, self._device) if self._stepped == self.batch else None
        for batch in iterator:
            self.batch += 1
            yield self.batch - 1, batch

    def _reopened(self, loader: Any) -> Iterator[Any]:
        """An iterator that gives what is left of the epoch."""
        resume, self._resume = self._resume, None
        if resume is None and self.batch:  # an earlier fit stopped here
            if isinstance(loader, Iterator):
                return loader  # a generator stands where it was left
            resume = rng_state(self._device), loader.state_dict() if hasattr(loader, "state_dict") else None
        now, loader_state = resume or (self._start, None)
        if loader_state is not None:
            loader.load_state_dict(loader_state)
        if not self.batch or now is None:
            if now is not None:
                set_random_state(now, loader, self._device)
            self._start = random_state(loader, self._device)
            return iter(loader)
        if loader_state is None and self._start is not None:
            set_random_state(self._start, loader, self._device)
        iterator: Iterator[Any] = iter(loader)  # draws numbers once more: those of now are put back below
        if loader_state is None:
            self._skip(iterator)
        set_random_state(now, loader, self._device)
        return iterator

    def _skip(self, iterator: Iterator[Any]) -> None:
        """Pass over the batches that were seen."""
        for done in range(self.batch):
            try:
                next(iterator)
            except StopIteration as error:
                raise LoaderError(
                    explain(
                        f"a loader that ended after {done} batches, while resuming behind batch {self.batch}",
                        "the loader of the run that was saved",
                        "Resume with the same data and batch size",
                    )
                ) from error

    def stepped(self, batch: int) -> None:
        """The optimizer has stepped on all batches of this epoch before number `batch`."""
        if self._stepped < batch <= self.batch:
            self._stepped = batch
            self._go_back = _this_moment(self._loader, self._device)

    def rewind(self, loader: Any) -> None:
        """Go back to the last step: what came after it was given up. A loader that keeps its own position cannot."""
        if hasattr(loader, "state_dict") or isinstance(loader, Iterator):
            return
        self.batch = min(self.batch, self._stepped)
        if self._start is not None and not self.batch:
            set_random_state(self._start, loader, self._device)
        elif self._go_back is not None:
            self._go_back()

    def next_epoch(self) -> None:
        """The epoch is complete."""
        self.epoch, self.batch, self._stepped = self.epoch + 1, 0, 0
        self._start = self._go_back = None

    def save(self, loader: Any | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and other values for a checkpoint; the loader's own state may hold tensors."""
        now_tensors, now_values = random_state(loader, self._device)
        tensors = {f"now.{k}": t for k, t in now_tensors.items()}
        values: dict[str, Any] = {"epoch": self.epoch, "batch": self.batch, "now": now_values, "start": None}
        if self._start is not None and self.batch:
            tensors |= {f"start.{k}": t for k, t in self._start[0].items()}
            values["start"] = self._start[1]
        values["loader"] = loader.state_dict() if hasattr(loader, "state_dict") else None  # type: ignore[union-attr]
        return tensors, values

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any], *, open_batches: int) -> None:
        """Take over a saved position and random state; the next `batches` continues from it.

        `open_batches` is the number of the batches seen that are in a window still open.
        """
        self.epoch, self.batch = values["epoch"], values["batch"]
        self._stepped = self.batch - open_batches
        self._start = None
        if values["start"] is not None:
            self._start = _part(tensors, "start."), values["start"]
        now = _part(tensors, "now."), values["now"]
        self._resume = now, values["loader"]
        set_random_state(now, None, self._device)


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
