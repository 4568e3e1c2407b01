"""Where training stands in its data, so that a resumed run sees exactly the batches that were left.

A loader with a `state_dict` keeps its own position. For any other, the random state at the start of
the epoch is kept: iterating again from it gives the same order, the batches already seen are
skipped, and the random state of the moment of the save is put back. A loader or sampler that draws
from a generator of its own has that generator saved too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from deepseek_mp.errors import LoaderError, explain
from deepseek_mp.trainer.rng import rng_state, set_rng_state

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


class LoaderPosition:
    """The epoch, the batch within it, and what is needed to get back there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.epoch = 0
        self.batch = 0
        """Batches of this epoch already consumed."""
        self._start: State | None = None
        self._resume: tuple[State, Mapping[str, Any] | None] | None = None

    def batches(self, loader: Any) -> Iterator[tuple[int, Any]]:
        """The (index, batch) pairs of this epoch that are left."""
        resume, self._resume = self._resume, None
        first, skip = self.batch, 0
        if resume is not None and resume[1] is not None:
            loader.load_state_dict(resume[1])
            set_random_state(resume[0], loader, self._device)
        elif resume is not None and self._start is not None and first:
            set_random_state(self._start, loader, self._device)
            skip = first
        else:
            if resume is not None:
                set_random_state(resume[0], loader, self._device)
            self._start = random_state(loader, self._device)
        iterator = iter(loader)
        for done in range(skip):
            try:
                next(iterator)
            except StopIteration as error:
                raise LoaderError(
                    explain(
                        f"a loader that ended after {done} batches, while resuming behind batch {first}",
                        "the loader of the run that was saved",
                        "Resume with the same data and batch size",
                    )
                ) from error
        if skip and resume is not None:
            set_random_state(resume[0], loader, self._device)
        for batch in iterator:
            self.batch += 1
            yield self.batch - 1, batch

    def next_epoch(self) -> None:
        """The epoch is complete."""
        self.epoch, self.batch, self._start = self.epoch + 1, 0, None

    def save(self, loader: Any | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values for a checkpoint."""
        now_tensors, now_values = random_state(loader, self._device)
        tensors = {f"now.{k}": t for k, t in now_tensors.items()}
        values: dict[str, Any] = {"epoch": self.epoch, "batch": self.batch, "now": now_values, "start": None}
        if self._start is not None and self.batch:
            tensors |= {f"start.{k}": t for k, t in self._start[0].items()}
            values["start"] = self._start[1]
        stateful = loader is not None and self.batch and hasattr(loader, "state_dict")
        values["loader"] = loader.state_dict() if stateful else None  # type: ignore[union-attr]
        return tensors, values

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take over a saved position; the next `batches` continues from it."""
        self.epoch, self.batch = values["epoch"], values["batch"]
        self._start = None
        if values["start"] is not None:
            self._start = _part(tensors, "start."), values["start"]
        self._resume = (_part(tensors, "now."), values["now"]), values["loader"]


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
