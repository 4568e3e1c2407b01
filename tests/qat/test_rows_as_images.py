"""INT8 convolutions of rows are those of images for the compiler: any layer may stand behind one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deepseek_mp.qat import convert, prepare
from deepseek_mp.qat.rows_as_images import rows_as_images

aten = torch.ops.aten


class Rows(nn.Module):
    """Strides, groups and dilation; shortcuts, gates, and activations that only kernels of images have."""

    def __init__(self):
        super().__init__()
        self.into = nn.Conv1d(4, 8, 4, stride=2, padding=1)
        self.wide = nn.Conv1d(8, 8, 3, padding=2, dilation=2, groups=2)
        self.gated, self.out = nn.Conv1d(8, 16, 3, padding=1, bias=False), nn.Conv1d(8, 3, 1)

    def forward(self, x):
        x = F.silu(self.into(x))
        x = x + F.relu6(self.wide(x))
        return self.out(x + F.glu(self.gated(x), 1))


@pytest.fixture(scope="module")
def converted():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 12)
    return convert(prepare(Rows().eval(), x)), x


@pytest.mark.parametrize("behind", [torch.add, lambda y, _: F.silu(y)], ids=["shortcut", "SiLU"])
def test_a_shortcut_and_activations_behind_padded_rows_are_compiled(behind):
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv1d(2, 2, 3, padding=1)

        def forward(self, x):
            return behind(self.layer(x), x)

    torch.manual_seed(0)
    x = torch.randn(2, 2, 6)
    int8 = convert(prepare(One().eval(), x))
    torch.testing.assert_close(int8(x), int8.reference(x), atol=0.02, rtol=0.02)


def test_all_become_images_and_give_the_same(converted):
    int8, x = converted
    graph = int8._program.module(check_guards=False)
    rows_as_images(graph)
    assert not graph.graph.find_nodes(op="call_function", target=aten.conv1d.default)
    assert len(graph.graph.find_nodes(op="call_function", target=aten.conv2d.default)) == 4
    torch.testing.assert_close(graph(x), int8.reference(x), atol=0.02, rtol=0.02)


def test_between_convolutions_in_a_chain_images_stay_images():
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Conv1d(4, 4, 3), nn.ReLU(), nn.Conv1d(4, 4, 3), nn.SiLU(), nn.Conv1d(4, 2, 3))
    x = torch.randn(2, 4, 9)
    graph = convert(prepare(chain.eval(), x)).graph
    expected = graph(x)
    rows_as_images(graph)
    assert len(graph.graph.find_nodes(op="call_function", target=aten.unsqueeze.default)) == 1
    assert len(graph.graph.find_nodes(op="call_function", target=aten.squeeze.dim)) == 1
    torch.testing.assert_close(graph(x), expected, atol=0.02, rtol=0.02)


def test_a_convolution_in_fp32_and_samples_without_a_batch():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.Conv1d(4, 2, 3))
    x = torch.randn(4, 9)  # four channels, which the exporter may take for samples
    graph = convert(prepare(layers.eval(), x, keep=["1"])).graph
    expected = graph(x)
    rows_as_images(graph)
    assert len(graph.graph.find_nodes(op="call_function", target=aten.conv1d.default)) == 1
    torch.testing.assert_close(graph(x), expected, atol=0.02, rtol=0.02)
