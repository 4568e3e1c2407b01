"""Where an operation ran: the layer in the forward, and the layer whose backward it is.

**Forward.** Hooks keep a stack of the modules that are running; the innermost is the layer.

**Backward.** Autograd numbers its nodes as the forward makes them. Each change of layer (or of what
the layer's operations fell back for) is marked with the number of the first node it holds for, so
the node that the backward evaluates is found by bisection. A step of a model of 1000 modules makes
some thousands of marks; they are dropped with the step.

Numbers are counted per thread. The nodes of a usual step are all made on the thread that ran the
forward, but a recomputation with gradients on inside the backward (reentrant checkpointing) makes
nodes on the thread that runs the backward, on an accelerator another one. So each thread has its own
marks, and those of a nested backward are looked up on the thread where it runs.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from deepseek_mp.monitor import internals
from deepseek_mp.monitor.classify import format_name
from deepseek_mp.precision import Reason


@dataclass(frozen=True, slots=True)
class Place:
    """A layer, and why its operation there ran wide (None if it did not fall back)."""

    layer: str = ""
    reason: Reason | None = None


OUTSIDE = Place()


@dataclass(frozen=True, slots=True)
class Frame:
    """A module that is running. `in_region`: it, or one around it, was entered with 16-bit autocast on."""

    module: int
    layer: str
    in_region: bool


@dataclass(slots=True)
class Track:
    """One thread's position: the modules running on it and the marks of the nodes made on it."""

    stack: list[Frame] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    last_node: int = -1
    recomputed_in: int = internals.NO_TASK
    """The backward in which modules first ran again on this thread."""

    @property
    def frame(self) -> Frame | None:
        return self.stack[-1] if self.stack else None

    def mark(self, start: int, place: Place) -> None:
        """Nodes numbered from `start` on belong to `place`, until the next mark."""
        if self.starts and self.starts[-1] >= start:
            self.places[-1] = place
        elif not self.places or self.places[-1] != place:
            self.starts.append(start)
            self.places.append(place)

    def mark_operation(self, place: Place) -> None:
        """The node made last belongs to `place`, if no operation was seen since it was made.

        An operation without gradient makes no node; then the last one is an earlier operation's.
        """
        node = internals.next_node() - 1
        if node > self.last_node and (not self.starts or node >= self.starts[-1]):
            self.last_node = node
            self.mark(node, place)

    def find(self, node: int) -> Place:
        index = bisect_right(self.starts, node) - 1
        return self.places[index] if index >= 0 else OUTSIDE


class Places:
    """Positions of all threads during one sampled step."""

    def __init__(self, layers: Mapping[int, str], parameters: Mapping[int, str], device_types: Collection[str]) -> None:
        """`layers` and `parameters`: id of each module and parameter -> its layer's name."""
        self._layers, self._parameters, self._device_types = layers, parameters, device_types
        self._owner = threading.get_ident()
        self._tracks: dict[int, Track] = {self._owner: Track()}

    @property
    def here(self) -> Track:
        """This thread's position."""
        return self._tracks.setdefault(threading.get_ident(), Track())

    def enter(self, module: nn.Module) -> None:
        """A module's forward begins. Modules that are not the model's own leave the position as it is."""
        layer = self._layers.get(id(module))
        if layer is None:
            return
        track = self.here
        around = track.frame is not None and track.frame.in_region
        here = any(is_narrow(internals.autocast_type(device_type)) for device_type in self._device_types)
        track.stack.append(Frame(id(module), layer, around or here))
        track.mark(internals.next_node(), Place(layer))
        if track.recomputed_in == internals.NO_TASK:
            track.recomputed_in = internals.backward_task()

    def leave(self, module: nn.Module) -> None:
        """A module's forward ended, or raised."""
        track = self.here
        inner = [frame.module for frame in track.stack]
        if id(module) not in inner:
            return
        del track.stack[len(inner) - 1 - inner[::-1].index(id(module)) :]
        track.mark(internals.next_node(), Place(track.frame.layer if track.frame else ""))

    def new_backward(self) -> None:
        """A backward is about to start from outside: no thread is inside a recomputation any more."""
        for track in self._tracks.values():
            track.recomputed_in = internals.NO_TASK

    def of_node(self, node: Any) -> Place:
        """The place in the forward that made the autograd node, or the layer of the parameter it accumulates into."""
        if type(node).__name__ == "AccumulateGrad":
            return Place(self._parameters.get(id(node.variable), ""))
        here = self.here
        task = internals.backward_task()
        nested = here.recomputed_in not in (internals.NO_TASK, task)
        track = here if nested else self._tracks[self._owner]
        return track.find(internals.node_number(node))


def is_narrow(dtype: torch.dtype | None) -> bool:
    """Whether autocast to this type is a 16-bit region."""
    return dtype is not None and format_name(dtype) in ("bf16", "fp16")
