"""A model that does something else in evaluation than its graph is prepared with a warning, and others without."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from deepseek_mp.qat import prepare

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class StochasticDepth(nn.Module):
    """Leaves out its layer for half of the samples, in training."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        y = self.layer(x)
        return x + (y * torch.empty(len(x), 1).bernoulli_(0.5) * 2 if self.training else y)


class MoreHeads(nn.Module):
    """Gives a second output in training."""

    def __init__(self):
        super().__init__()
        self.main, self.extra = nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x):
        return (self.main(x), self.extra(x)) if self.training else self.main(x)


class NeedsTargets(nn.Module):
    """Cannot be called with inputs alone in evaluation."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 2)

    def forward(self, x, targets=None):
        y = self.layer(x)
        return y if self.training else (y - targets).square().mean()


class Counts(nn.Module):
    """Dropout, noise in both modes, and state that each call changes."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 2))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.body(x + torch.randn_like(x)) * self.calls


@pytest.mark.parametrize("kind", [StochasticDepth, MoreHeads])
def test_code_that_asks_for_the_mode_is_warned_of(kind):
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=f"in INT8, {kind.__name__} will not give what the model passed gives") as said:
        prepare(kind(), X)
    assert [one.filename for one in said if "in INT8" in str(one.message)] == [__file__]


def test_dropout_noise_and_state_are_alike_and_leave_no_trace():
    torch.manual_seed(0)
    model = Counts()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="in evaluation and in INT8")
        simulated = prepare(model, X)
    assert simulated.graph.calls == 0
    assert simulated.training


def test_state_that_the_model_changes_in_training_alone_is_warned_of_by_name():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    model[0].weight.data = torch.diag(0.7 ** torch.arange(8.0))  # a few steps find its norm but for the last bits
    nn.utils.parametrizations.spectral_norm(model[0])
    with pytest.warns(UserWarning, match=r"each call of Sequential will change 0\.parametrizations\.weight\.0\._u"):
        prepare(model, X)
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(model, X)


def test_counts_of_norms_that_stay_out_of_a_pattern_are_no_such_state():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

        def forward(self, x):
            return self.norm(self.layer(self.norm(self.layer(x))))

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="in evaluation and in INT8")
        prepare(Twice().eval(), X)


def test_a_model_that_fails_in_evaluation_is_prepared_with_a_warning_that_says_how():
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"gives \(it fails there with the example inputs: TypeError: unsupp"):
        assert prepare(NeedsTargets(), X).training


def test_draws_of_accelerators_are_left_alone(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    monkeypatch.setattr(torch.xpu, "manual_seed_all", seeds.append)
    torch.manual_seed(0)
    assert len(seeds) > 0
    seeds.clear()
    prepare(nn.Linear(8, 2), X)
    assert seeds == []
