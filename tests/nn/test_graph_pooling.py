"""Pools in captured graphs: ours in their place give PyTorch's numbers, and pools that do not suit stay."""

from __future__ import annotations

import pytest
import torch
from pool_cases import CASES, inputs, same
from torch import fx, nn
from torch._functorch import config as partitioner
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from deepseek_mp.nn.graph_pooling import replace_pools

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Compiled:
    """`torch.compile` with the pools replaced, and the graph parted as Inductor parts it; counts the pools."""

    def __init__(self, function, *, dynamic=None, backend="aot_eager_decomp_partition"):
        torch._dynamo.reset()
        self.replaced, self.graphs = 0, []
        self.parting = torch._dynamo.lookup_backend(backend)
        self.call = torch.compile(function, backend=self._backend, dynamic=dynamic, fullgraph=True)

    def _backend(self, graph, example_inputs):
        for part in graph.modules():
            if isinstance(part, fx.GraphModule):
                self.replaced += replace_pools(part, lambda device, dtype: "reference")
                part.graph.lint()
        self.graphs.append(graph)
        return self.parting(graph, example_inputs)


def result(call, x, g=None):
    """The output, and the gradient of x."""
    x = x.detach().requires_grad_()
    y = call(x)
    if g is None:
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    (gradient,) = torch.autograd.grad(y, x, g)
    return y.detach(), gradient


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [name for name in CASES if name != "no image"])
def test_values_and_gradients_stay(case, dtype):
    _, kernel, stride, padding, ceil_mode = CASES[case]

    def pooled(x):
        return F.max_pool2d(x * 2, kernel, stride, padding, ceil_mode=ceil_mode).neg()

    x = inputs(case, dtype)
    compiled = Compiled(pooled)
    y, gradient = result(compiled.call, x)
    assert compiled.replaced == 1
    expected, _ = result(pooled, x)
    assert same(y, expected)
    assert y.stride() == expected.stride()
    # PyTorch's own 16-bit pools round each of the sums.
    _, wide = result(lambda x: pooled(x.float()).to(dtype), x)
    assert same(gradient, wide)
    assert gradient.stride() == x.stride()


class Spellings(nn.Module):
    """The ways to call for one pool each."""

    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool2d(2, ceil_mode=True)

    def forward(self, x):
        one, two = self.pool(x), torch.max_pool2d(x, (2, 2), ceil_mode=True)
        return one + 2 * two + 3 * F.max_pool2d(input=x, kernel_size=2, stride=(2, 2), ceil_mode=True)


def channels_last(*shape, **options):
    return torch.randn(*shape, **options).to(memory_format=torch.channels_last)


def test_all_ways_to_call_a_pool():
    model, x = Spellings(), channels_last(2, 8, 5, 7)
    compiled = Compiled(model)
    for found, expected in zip(result(compiled.call, x), result(model, x), strict=True):
        torch.testing.assert_close(found, expected)
    assert compiled.replaced == 3


STAYING = {
    "contiguous": (lambda x: F.max_pool2d(x.contiguous(), 2), (2, 8, 6, 6)),
    "three dimensions": (lambda x: F.max_pool2d(x[0], 2), (2, 8, 6, 6)),
    "few channels": (lambda x: F.max_pool2d(x, 2), (2, 3, 6, 6)),
    "dilation": (lambda x: F.max_pool2d(x, 2, dilation=2), (2, 8, 6, 6)),
    "indices": (lambda x: F.max_pool2d(x, 2, return_indices=True)[0], (2, 8, 6, 6)),
    "a kernel of many cells": (lambda x: F.max_pool2d(x, 17), (2, 8, 17, 17)),
}


@pytest.mark.parametrize("case", STAYING)
def test_pools_that_stay(case):
    function, shape = STAYING[case]
    x, compiled = channels_last(*shape), Compiled(function)
    for found, expected in zip(result(compiled.call, x), result(function, x), strict=True):
        assert same(found, expected)
    assert compiled.replaced == 0


def test_a_pool_that_only_evaluates_stays():
    x = channels_last(2, 8, 6, 6)
    compiled = Compiled(lambda x: F.max_pool2d(x, 2))
    with torch.no_grad():
        compiled.call(x.requires_grad_())
    assert compiled.replaced == 0


def test_pools_without_an_implementation_stay():
    torch._dynamo.reset()
    replaced = []

    def backend(graph, _inputs):
        replaced.append(replace_pools(graph))
        return graph.forward

    torch.compile(lambda x: F.max_pool2d(x, 2), backend=backend)(channels_last(2, 8, 6, 6).requires_grad_())
    assert replaced == [0]  # a CPU has no kernel


def test_sizes_that_change_compile_once():
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.MaxPool2d(3, 2, 1)).to(memory_format=torch.channels_last)
    compiled = Compiled(model, dynamic=True)
    for batch, height, width in (
        (2, 9, 10),
        (3, 11, 12),
        (4, 7, 16),
    ):  # PyTorch 2.11 asks whether they divide by strides
        x = channels_last(batch, 8, height, width)
        for found, expected in zip(result(compiled.call, x), result(model, x), strict=True):
            torch.testing.assert_close(found, expected)
    assert compiled.replaced == len(compiled.graphs) == 1


class Block(nn.Module):
    """Pools in a row as detectors have them, around a product."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(8, 16, 1), nn.Conv2d(64, 8, 1)

    def forward(self, x):
        pooled = [F.silu(self.one(x))]
        for _ in range(3):
            pooled.append(F.max_pool2d(pooled[-1], 5, 1, 2))
        return self.two(torch.cat(pooled, 1))


@pytest.mark.parametrize("budget", [1.0, 0.5, 0.1, 0.0])
def test_pools_in_a_row_under_any_budget(budget):
    model, x = Block().to(memory_format=torch.channels_last), channels_last(2, 8, 10, 10)
    expected = result(model, x)
    saved = []
    with (
        partitioner.patch(activation_memory_budget=budget),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.dtype) or t, lambda t: t),
    ):
        compiled = Compiled(model)
        found = result(compiled.call, x)
    assert compiled.replaced == 3
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    if budget == 1.0:
        assert saved.count(torch.uint8) == 3  # one byte for each output is kept, and no index
        assert torch.int64 not in saved


def test_pools_of_checkpointed_regions():
    def function(x):
        return checkpoint(lambda x: F.max_pool2d(x.sin(), 3, 2, 1).cos(), x, use_reentrant=False)

    x, compiled = channels_last(2, 8, 9, 9), Compiled(function)
    for found, expected in zip(result(compiled.call, x), result(function, x), strict=True):
        torch.testing.assert_close(found, expected)
    assert compiled.replaced == 1


def test_inductor_takes_the_op_as_it_is():
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(16, 8, 1)
    )
    model, x = model.to(memory_format=torch.channels_last), channels_last(2, 8, 20, 20)
    expected = result(model, x)
    with partitioner.patch(activation_memory_budget=0.4):
        compiled = Compiled(model, backend="inductor")
        found = result(compiled.call, x)
    assert compiled.replaced == 1
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
