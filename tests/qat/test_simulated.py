"""The simulated model follows its mode as the original does, and can observe without rounding."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from deepseek_mp.qat import calibrate, convert, prepare


def test_observing_it_computes_as_the_original_in_evaluation_and_its_mode_comes_back(simulated, model, example):
    simulated.train()
    with simulated.observing():
        torch.testing.assert_close(simulated(example), model.eval()(example))
    assert simulated.training
    assert all(quantiser.fake_quant_enabled for quantiser in simulated.quantisers())


def test_rounded_it_is_near_the_original_and_not_the_same(simulated, model, example):
    rounded, exact = simulated.eval()(example), model.eval()(example)
    error = (rounded - exact).norm() / exact.norm()
    assert 0 < error < 0.05


def test_evaluation_leaves_no_trace_and_training_does(simulated, example):
    def state():
        return {name: value.clone() for name, value in simulated.state_dict().items()}

    simulated.eval()(example)  # brings the ranges of the weights up to date
    before = state()
    simulated(example * 3)
    assert all(torch.equal(value, before[name]) for name, value in state().items())
    simulated.train()(example * 3)
    changed = {name.rpartition(".")[2] for name, value in state().items() if not torch.equal(value, before[name])}
    assert {"running_mean", "running_var", "num_batches_tracked", "scale", "max_val"} <= changed


def test_frozen_norms_keep_their_statistics_in_training(simulated, example):
    simulated.train().norms_frozen = True
    before = simulated.graph.stem.get_submodule("1").running_mean.clone()
    simulated(example)
    assert torch.equal(simulated.graph.stem.get_submodule("1").running_mean, before)
    simulated.norms_frozen = False
    simulated(example)
    assert not torch.equal(simulated.graph.stem.get_submodule("1").running_mean, before)


def test_any_batch_size_runs_and_every_parameter_gets_a_gradient(simulated, example):
    for size in (1, 3, 8):
        assert simulated.train()(example[:size]).shape == (size, 10)
    simulated(example).sum().backward()
    assert all(param.grad is not None for param in simulated.parameters())


def test_labels_that_the_original_does_not_take_are_left_out(simulated, example):
    assert simulated(example, labels=torch.zeros(8)).shape == (8, 10)


def test_a_copy_in_evaluation_says_nothing_of_pytorch_s_containers(simulated):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        simulated.evaluated()


class Counting(nn.Module):
    """A layer, and state that every forward changes."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return self.layer(x) + self.calls


def test_observing_leaves_the_models_own_state_as_it_was():
    model, x = Counting(), torch.randn(4, 4)
    simulated = prepare(model, x)
    assert simulated.graph.calls == model.calls == 0
    simulated(x)
    calibrate(simulated, [(x, x), (x, x)])
    assert simulated.graph.calls == 1
    assert convert(simulated).graph.calls == 1
