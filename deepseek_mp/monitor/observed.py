"""What is observed of a model: its layers and modules, what they are rounded to, and where the numbers go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from deepseek_mp import backends
from deepseek_mp.monitor.sampling import Sampling
from deepseek_mp.monitor.sides import Sides, what_if
from deepseek_mp.monitor.store import Copies, Layout, Parts, Store
from deepseek_mp.monitor.subjects import Subject, subjects_of
from deepseek_mp.monitor.taps import layer_names
from deepseek_mp.precision import Recipe


@dataclass(frozen=True, kw_only=True)
class Observed:
    """Made once, when the model is first sampled: it is where it trains by then."""

    subjects: Sequence[Subject]
    modules: Sequence[str]
    """Names of all modules, in the order of their places in the store."""
    places: dict[nn.Module, int]
    asked: dict[str, Sides]
    """Formats and recipes one asks about, by name."""
    store: Store
    copies: Copies
    recipes: dict[int, Recipe] = field(default_factory=dict)
    """What each subject was last seen to run in."""

    @classmethod
    def of(cls, model: nn.Module, sampling: Sampling) -> Observed:
        """What there is to observe of a model."""
        subjects, names = subjects_of(model), layer_names(model)[0]
        places = {module: place for place, module in enumerate(model.modules())}
        parameter = next(model.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        asked = what_if(sampling.formats, backends.capabilities(device))
        layout = Layout(units=len(subjects), ways=1 + len(asked), modules=len(places))
        store = Store(layout, device, sampling.decay)
        return cls(
            subjects=subjects,
            modules=[names[id(module)] for module in places],
            places=places,
            asked=asked,
            store=store,
            copies=Copies(store.flat),
        )

    def ran_in(self, subject: Subject, recipe: Recipe) -> None:
        """A layer is about to be measured; if it runs in another recipe than before, its past is forgotten."""
        if self.recipes.setdefault(subject.index, recipe) != recipe:
            self.store.forget(subject.index)
            self.recipes[subject.index] = recipe

    def parts(self, host: torch.Tensor) -> Parts:
        """The parts of a copy of the store."""
        return self.store.layout.parts(host)
