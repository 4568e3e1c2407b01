"""What tests of whole runs share: a small model, a trainer for it, batches, and how two runs are compared."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn

from deepseek_mp import MixedPrecisionTrainer
from deepseek_mp.precision import RECIPES


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def make(mode="fp32", model=None, **options):
    options = {"loss_scale_policy": 64.0, "optimizer": sgd, "device": "cpu", "emulate": True} | options
    return MixedPrecisionTrainer(net() if model is None else model, mode, **options)


def by_chance(name):
    """The recipe of that name with output gradients rounded stochastically."""
    recipe = RECIPES[name]
    sides = {role: getattr(recipe, role) for role in ("dgrad", "wgrad")}
    changed = {role: replace(side, left=replace(side.left, rounding="stochastic")) for role, side in sides.items()}
    return replace(recipe, name=f"{name}_by_chance", **changed)


INPUTS = torch.randn(22, 4, generator=torch.Generator().manual_seed(1))
LABELS = INPUTS[:, :3].argmax(dim=1)


def batches(count=5, bad=()):
    made = [(INPUTS[4 * i : 4 * i + 4], LABELS[4 * i : 4 * i + 4]) for i in range(count)]
    return [(x * math.nan, y) if index in bad else (x, y) for index, (x, y) in enumerate(made)]


def same_models(one, two):
    return all(torch.equal(v, two.model.state_dict()[name]) for name, v in one.model.state_dict().items())


def accuracy(output, target):
    return (output.argmax(dim=1) == target).float().mean()
