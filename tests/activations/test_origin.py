from __future__ import annotations

import torch
from torch import nn

from deepseek_mp.activations import ActivationSettings, SavedReason, compressed_activations
from deepseek_mp.activations.origin import Held, is_plain
from deepseek_mp.nn import convert
from deepseek_mp.nn.weight_casts import WeightCasts


def test_parameters_buffers_and_their_views_are_held():
    model = nn.BatchNorm1d(4)
    held = Held(model)
    assert held.has(model.weight)
    assert held.has(model.weight[1:].detach())
    assert held.has(model.running_mean.view(2, 2))
    assert held.has(nn.Parameter(torch.zeros(2)))  # of another module
    assert not held.has(torch.zeros(4))


def test_casts_and_layouts_of_a_parameter_are_known_by_their_history():
    model = nn.Linear(4, 3)
    held = Held(model)
    assert held.has_source(model.weight.bfloat16().t())
    assert held.has_source(model.weight[:2].bfloat16())
    assert held.has_source(model.weight.bfloat16().flatten().split([8, 4])[1].view(2, 2))
    assert held.has_source(model.weight * 2)
    assert not held.has_source(model.weight * torch.ones(3, 4, requires_grad=True))
    assert not held.has_source(nn.functional.embedding(torch.zeros(5, dtype=torch.long), model.weight))
    assert not held.has_source(model(torch.zeros(2, 4)))
    assert not held.has_source(torch.zeros(2, requires_grad=True).bfloat16())
    assert not held.has_source(torch.zeros(2))


def test_plain_tensors():
    class Own(torch.Tensor):
        pass

    assert is_plain(torch.zeros(1))
    assert is_plain(nn.Parameter(torch.zeros(1)))
    assert not is_plain(torch.zeros(1).as_subclass(Own))
    assert not is_plain(torch.zeros(2, 2).to_sparse())


def test_casts_that_the_trainer_makes_of_all_weights_are_known():
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))
    plan = convert(model, "bf16")
    casts = WeightCasts(model, torch.bfloat16)
    settings = ActivationSettings(min_bytes=1)
    with torch.autocast("cpu", torch.bfloat16), casts.lent(plan), compressed_activations(model, settings) as saved:
        model(torch.randn(512, 128, requires_grad=True))
    casts = [entry for entry in saved.record().saved if entry.reason is SavedReason.WEIGHT_CAST]
    assert sum(entry.tensors for entry in casts) == 2
