"""Values by layer, read from a copy of the store."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepseek_mp.monitor import Sampling
from deepseek_mp.monitor.layer_statistics import COMPILED, NOT_YET, SAMPLED
from deepseek_mp.monitor.observed import Observed
from deepseek_mp.monitor.store import UPDATE, WIDTH
from deepseek_mp.monitor.summary import summarise
from deepseek_mp.monitor.updates import UPDATE_FIELDS
from deepseek_mp.ops.statistics import ERROR_FIELDS, SPREAD_FIELDS
from deepseek_mp.precision import RECIPES


def observed() -> Observed:
    return Observed.of(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), Sampling(formats=("fp16",)))


def test_each_number_is_found_under_its_name() -> None:
    seen = observed()
    seen.ran_in(seen.subjects[1], RECIPES["bf16"])
    lines = torch.arange(3 * WIDTH, dtype=torch.float32).view(3, WIDTH)
    for scale in (1, 3):
        seen.store.add(1, 2, lines * scale)  # the output gradient
    seen.store.add(1, UPDATE, lines[:1] + 0.5)
    found = summarise(seen, seen.store.flat, is_compiled=False)
    layer = found["2"]
    assert (layer.layer, layer.status, layer.recipe, layer.updates) == ("2", SAMPLED, "bf16", 1)
    assert list(layer.tensors) == ["grad_output"]
    tensor = layer.tensors["grad_output"]
    assert tensor.samples == 2
    mean = (0.9 * 1 + 3) / 1.9  # with a decay of 0.9, per unit of the first
    for place, name in enumerate(SPREAD_FIELDS):
        assert tensor.spread[name].last == 3 * place
        assert tensor.spread[name].mean == pytest.approx(mean * place)
    assert list(tensor.errors) == ["in_use", "fp16"]
    for row, way in enumerate(tensor.errors, 1):
        assert {name: value.last for name, value in tensor.errors[way].items()} == {
            name: 3 * (row * WIDTH + place) for place, name in enumerate(ERROR_FIELDS)
        }
    assert {name: value.last for name, value in layer.update.items()} == {
        name: place + 0.5 for place, name in enumerate(UPDATE_FIELDS)
    }
    assert found["0"].status == NOT_YET
    assert not found["0"].tensors
    assert not found["0"].update


def test_what_is_not_known_is_none() -> None:
    seen = observed()
    seen.store.add(0, UPDATE, torch.full((1, WIDTH), float("nan")))
    value = summarise(seen, seen.store.flat, is_compiled=False)["0"].update["rms"]
    assert (value.last, value.mean) == (None, None)


def test_a_compiled_model_says_so_only_of_layers_that_were_not_sampled() -> None:
    seen = observed()
    seen.store.add(0, 1, torch.ones(1, WIDTH))
    found = summarise(seen, seen.store.flat, is_compiled=True)
    assert (found["0"].status, found["2"].status) == (SAMPLED, COMPILED)


def test_other_modules_appear_if_they_had_non_finite_values() -> None:
    seen = observed()
    assert list(summarise(seen, seen.store.flat, is_compiled=False)) == ["0", "2"]
    seen.store.parts.bad[seen.modules.index("1"), 1] = 7
    seen.store.parts.produced[seen.modules.index("1"), 0] = 2
    found = summarise(seen, seen.store.flat, is_compiled=False)
    assert list(found) == ["0", "2", "1"]
    assert found["1"].non_finite == {"input": 0, "output": 7, "grad_output": 0, "weight": 0}
    assert found["1"].produced == {"forward": 2, "backward": 0}
    assert found["1"].recipe is None
