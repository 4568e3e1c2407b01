"""A graph in another mode computes as the model does in that mode, and keeps its own."""

from __future__ import annotations

import torch
from torch import nn

from deepseek_mp.qat.modes import evaluate_norms, evaluate_others, forward_with, norms_of, on_its_own


def exported(model):
    return torch.export.export(model.train(), (torch.randn(4, 3),)).module(check_guards=False)


def test_on_its_own_regions_and_random_numbers_of_the_caller_are_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with torch.inference_mode(), torch.autocast("cpu"), on_its_own():
        made = nn.Linear(4, 4)
        assert made(torch.rand(2, 4)).dtype == torch.float32
        assert not made.weight.is_inference()
    assert torch.equal(torch.rand(3), expected)


def test_evaluation_keeps_eps_and_leaves_statistics_and_their_counter_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, eps=0.5, momentum=0.7), nn.Dropout(0.5))
    graph = exported(model)
    forward = forward_with(graph, evaluate_norms, evaluate_others)
    x, before = torch.randn(4, 3), {name: value.clone() for name, value in graph.state_dict().items()}
    assert torch.equal(forward(graph, x), model.eval()(x))
    assert all(torch.equal(value, before[name]) for name, value in graph.state_dict().items())
    graph(x)  # its own mode is still that of training
    assert graph.state_dict()["1.num_batches_tracked"] == 1


def test_with_frozen_norms_alone_dropout_goes_on():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    graph = exported(model)
    out = forward_with(graph, evaluate_norms)(graph, torch.ones(64, 3))
    assert (out == 0).any()
    assert graph.state_dict()["0.num_batches_tracked"] == 0


def test_dropout_inside_of_attention_stops_in_evaluation():
    model = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.5, batch_first=True)
    x = torch.randn(2, 3, 8)
    graph = torch.export.export(model.train(), (x,)).module(check_guards=False)
    forward = forward_with(graph, evaluate_norms, evaluate_others)
    torch.testing.assert_close(forward(graph, x), model.eval()(x))


def test_a_norm_without_statistics_is_left_in_its_mode():
    model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False))
    graph = exported(model)
    assert norms_of(graph.graph) == []
    x = torch.randn(4, 3)
    torch.testing.assert_close(forward_with(graph, evaluate_norms)(graph, x), model.eval()(x))


def test_an_instance_norm_uses_its_running_statistics_in_evaluation_where_it_has_some():
    torch.manual_seed(0)
    model = nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True, momentum=0.5), nn.InstanceNorm1d(3))
    x = torch.randn(4, 3, 5)
    graph = torch.export.export(model.train(), (x,)).module(check_guards=False)
    graph(x)
    model.load_state_dict(graph.state_dict())
    forward = forward_with(graph, evaluate_norms, evaluate_others)
    assert torch.equal(forward(graph, x), model.eval()(x))
