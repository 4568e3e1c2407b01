"""The time of computing a value again: operations or bytes, whichever takes longer, and a launch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._functorch import config as partitioner
from torch._functorch import partitioners
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from deepseek_mp.trainer.graph_backend import backend, inductor
from deepseek_mp.trainer.recompute_costs import FLOPS_PER_BYTE, LAUNCH_BYTES, Roofline

aten = torch.ops.aten


def costs(function, *shapes, dtype=torch.bfloat16):
    """The time of each call in a graph, by what it calls; a target called twice has that of the last call."""
    with FakeTensorMode():
        graph = make_fx(function)(*[torch.empty(shape, dtype=dtype) for shape in shapes]).graph
        return {node.target: Roofline()(node) - LAUNCH_BYTES for node in graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_product_takes_the_slower_of_its_operations_and_its_bytes(dtype):
    size = dtype.itemsize
    wide = costs(torch.mm, (8192, 4096), (4096, 8192), dtype=dtype)[aten.mm.default]
    assert wide == 2 * 8192 * 4096 * 8192 / FLOPS_PER_BYTE[size]
    narrow = costs(torch.mm, (8192, 4), (4, 512), dtype=dtype)[aten.mm.default]
    assert narrow == size * (8192 * 4 + 4 * 512 + 8192 * 512)


def test_few_operations_on_many_bytes_take_longer_than_more_on_few():
    vectors = costs(torch.bmm, (4096, 1, 512), (4096, 512, 512))[aten.bmm.default]
    matrix = costs(torch.mm, (4096, 1024), (1024, 512))[aten.mm.default]
    assert vectors > 50 * matrix
    assert 2 * 4096 * 512 * 512 < 2 * 4096 * 1024 * 512


def test_a_reduction_reads_what_lies_in_memory_and_not_what_is_computed_on_the_way():
    found = costs(lambda x, y: (x.float() * y.float()).exp().sum(0), (4096, 512), (4096, 512))
    assert found[aten.sum.dim_IntList] == 2 * 2 * 4096 * 512 + 4 * 512
    behind = costs(lambda x, y: (torch.mm(x, y) + 1).float().sum(0), (4096, 4096), (4096, 512))
    assert behind[aten.sum.dim_IntList] == 2 * 4096 * 512 + 4 * 512


def test_another_reduction_is_not_made_again_for_a_reduction():
    found = costs(lambda x: (x - x.sum(0)).exp().sum(1), (4096, 512))
    assert found[aten.sum.dim_IntList] == 2 * (4096 * 512 + 512 + 4096)


def test_an_argument_that_nothing_else_stores_is_made_for_a_product():
    size, weight = 2 * 4096 * 64, 2 * 64 * 64
    alone = costs(lambda x, y: torch.mm(x.exp(), y), (4096, 64), (64, 64))
    assert alone[aten.mm.default] == 4 * size + weight  # read, written, read by the product that is written

    def gradient_too(x, y):
        z = x.exp()
        return torch.mm(z, y), torch.bmm(z.t()[None], x[None])

    shared = costs(gradient_too, (4096, 64), (64, 64))
    assert shared[aten.mm.default] == 2 * size + weight


def convolutions():
    sizes = [(3, 16), (16, 64), (64, 16), (16, 32)]
    layers = [(nn.Conv2d(i, o, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()) for i, o in sizes]
    return nn.Sequential(*[part for layer in layers for part in layer])


def test_statistics_are_not_taken_again_beside_a_product_that_is(backward):
    x = torch.randn(8, 3, 64, 64)
    torch.compile(convolutions(), backend=backend(0.4))(x).sum().backward()
    assert sum("aten.convolution.default" in name for name in backward) in (1, 2)
    assert not any("var_mean" in name for name in backward)


def test_by_operations_they_all_are(backward):
    """What this is for: if it fails, PyTorch does better now."""
    x = torch.randn(8, 3, 64, 64)
    with partitioner.patch(activation_memory_budget=0.4):
        torch.compile(convolutions(), backend=inductor)(x).sum().backward()
    assert sum("var_mean" in name for name in backward) == 4


def test_a_callers_own_estimator_keeps_its_place(backward):
    class Nothing(Roofline):
        def __call__(self, node):
            asked.append(node)
            return 1.0

    asked = []
    with partitioner.patch(activation_memory_budget_runtime_estimator=Nothing()):
        torch.compile(convolutions(), backend=backend(0.4))(torch.randn(8, 3, 64, 64)).sum()
    assert asked


def test_without_a_budget_nothing_is_estimated_and_after_an_error_nothing_is_left(backward, monkeypatch):
    asked = []

    def broken(estimator, node):
        asked.append(node)
        raise ArithmeticError("no time")

    listed = partitioners.get_default_op_list
    monkeypatch.setattr(Roofline, "__call__", broken)
    model, x = convolutions(), torch.randn(8, 3, 64, 64)
    torch.compile(model, backend=backend(None))(x).sum().backward()
    assert not asked
    torch._dynamo.reset()
    with pytest.raises(Exception, match="no time"):
        torch.compile(model, backend=backend(0.4))(x)
    assert partitioner.activation_memory_budget_runtime_estimator == "flops"
    assert partitioner.activation_memory_budget == 1.0
    assert partitioners.get_default_op_list is listed
