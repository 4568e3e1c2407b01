"""Which products of a graph read the same values: also through reshapes, and not across what writes in place."""

import operator

import pytest
import torch
from captured_graph import captured
from torch.nn import functional as F

from deepseek_mp.nn.graph_products import same_input
from deepseek_mp.ops.int4_linear import int4_linear, int4_weight
from deepseek_mp.ops.weight_only import quantised_weight, weight_only_linear

X = torch.randn(3, 64)
(QA, SA), (QB, SB) = (quantised_weight(torch.randn(32, 64), "int8") for _ in range(2))
BIAS = torch.randn(32)


def a(x, bias=None):
    return weight_only_linear(x.reshape(-1, 64), QA, SA, bias, implementation="reference")


def b(x, bias=None):
    return weight_only_linear(x.reshape(-1, 64), QB, SB, bias, implementation="reference")


def written_by_item(y):
    one = a(y)
    y[0] = 1.0
    return one + b(y)


def sizes(function, *args):
    """Of groups with more than one product."""
    graph, _ = captured(function, *args)
    return [len(group) for group in same_input(graph.graph) if len(group) > 1]


SAME = {
    "the input": lambda x: a(x) + b(x),
    "what was computed": lambda x: (lambda y: a(y) + b(y))(x * 2),
    "between other operations": lambda x: F.silu(a(x)) * F.relu(b(x)),
    "three": lambda x: a(x) + b(x) + a(x),
    "both with a bias": lambda x: a(x, BIAS) + b(x, BIAS),
    "views in between": lambda x: a(x.view(3, 1, 64)) + b(x.view(3, 1, 64)),
}
OTHER = {
    "other values": lambda x: a(x) + b(x * 2),
    "other rows": lambda x: a(x.view(3, 64)) + b(x.view(64, 3).t()),
    "one with a bias": lambda x: a(x, BIAS) + b(x),
    "written to by a method": lambda x: (lambda y: a(y) + b(y.add_(1)) + y.sum())(x * 1),
    "written to through a view": lambda x: (lambda y: [a(y), y[0].zero_(), b(y)][::2])(x * 1),
    "written to by an operator": lambda x: (lambda y: [a(y), operator.iadd(y, 1), b(y)][::2])(x * 1),
    "written to by an item": lambda x: written_by_item(x * 1),
    "written to by a function": lambda x: (lambda y: [a(y), torch.relu_(y), b(y)][::2])(x * 1),
    "written to in place by an argument": lambda x: (lambda y: [a(y), F.relu(y, True), b(y)][::2])(x * 1),
    "written to in place by name": lambda x: (lambda y: [a(y), F.silu(y, inplace=True), b(y)][::2])(x * 1),
    "written to as an output": lambda x: (lambda y: [a(y), torch.add(y, 1, out=y), b(y)][::2])(x * 1),
    "written to by an operation": lambda x: (lambda y: [a(y), torch.ops.aten.add_.Tensor(y, y), b(y)][::2])(x * 1),
}


@pytest.mark.parametrize("name", SAME)
def test_products_of_the_same_values_are_found(name):
    assert sizes(SAME[name], X) == [3 if name == "three" else 2]


@pytest.mark.parametrize("name", OTHER)
def test_products_of_other_values_are_apart(name):
    assert sizes(OTHER[name], X) == []


def test_a_reshape_before_a_write_is_not_one_after_it():
    def function(x):
        y = (x * 1).t()
        before = y.reshape(-1, 64)  # a copy
        y.mul_(2)
        after = y.reshape(-1, 64)
        one = weight_only_linear(before, QA, SA, None, implementation="reference")
        return one + weight_only_linear(after, QB, SB, None, implementation="reference")

    assert sizes(function, X) == []


def test_what_writes_before_both_changes_nothing():
    def function(x):
        y = x * 1
        y.add_(1)
        return a(y) + b(y)

    assert sizes(function, X) == [2]


def test_weights_in_an_order_of_a_machine_are_left_out():
    q, scale, zero = int4_weight(torch.randn(32, 64))

    def function(x):
        return sum(int4_linear(x, q, scale, zero, None, implementation="reference") for _ in range(2))

    graph, _ = captured(function, X)
    assert [len(group) for group in same_input(graph.graph)] == [2]
    for node in graph.graph.nodes:
        if "int4_linear" in str(node.target):
            node.update_arg(3, None)
    assert list(same_input(graph.graph)) == []


def test_the_graph_of_an_exported_program_is_read_too():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("q", QA)
            self.register_buffer("scale", SA)

        def forward(self, x):
            one, two = (
                weight_only_linear(x.reshape(-1, 64), self.q, self.scale, None, implementation="reference")
                for _ in range(2)
            )
            return one + two

    program = torch.export.export(Model(), (X,))
    assert [len(group) for group in same_input(program.graph)] == [2]
