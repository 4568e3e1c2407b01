"""What may be computed again: nothing that draws random numbers; and what is not fused has its price."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._functorch import partitioners
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from deepseek_mp.trainer import recompute_costs
from deepseek_mp.trainer.graph_backend import backend
from deepseek_mp.trainer.recompute_rules import draws, rules

BUDGETS = [0.0, 0.3, 0.6]


def dropped(x, weights, shift):
    for weight in weights:
        x = F.dropout(F.gelu(x @ weight), 0.3)
    return F.dropout(F.gelu(x) + shift, 0.3)


def masks(budget):
    """Where the output is kept by the last dropout, and where its gradient is."""
    x, shift = torch.randn(64, 32, requires_grad=True), torch.full((64, 32), 3.0, requires_grad=True)
    weights = [torch.randn(32, 32, requires_grad=True) for _ in range(3)]
    y = torch.compile(dropped, backend=backend(budget))(x, weights, shift)
    y.sum().backward()
    return y != 0, shift.grad != 0


@pytest.mark.parametrize("budget", BUDGETS)
def test_gradients_are_of_the_masks_that_the_loss_had(backward, budget):
    kept, reached = masks(budget)
    assert 0.5 < kept.float().mean() < 0.9
    assert torch.equal(kept, reached)


@pytest.mark.stress
@pytest.mark.parametrize("budget", BUDGETS)
def test_the_same_in_code_of_inductor(budget):
    torch._dynamo.reset()
    kept, reached = masks(budget)
    assert torch.equal(kept, reached)
    torch._dynamo.reset()


class Bottleneck(nn.Module):
    """Of ResNet-50, with its in-place operations."""

    def __init__(self, channels):
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(n, m, size, padding=size // 2, bias=False)
            for n, m, size in ((4 * channels, channels, 1), (channels, channels, 3), (channels, 4 * channels, 1))
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (channels, channels, 4 * channels))

    def forward(self, x):
        y = x
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            y = norm(convolution(y))
            if norm is not self.norms[-1]:
                y = F.relu(y, inplace=True)
        y += x
        return F.relu(y, inplace=True)


@pytest.mark.parametrize("format", [torch.float32, torch.bfloat16])
def test_what_is_computed_again_has_the_bits_of_what_would_have_been_kept(backward, monkeypatch, format):
    """Convolutions, BatchNorms and pools: loss, gradients and statistics are those of the code that keeps all."""
    monkeypatch.setattr(recompute_costs, "LAUNCH_BYTES", 1.0)  # small as it is, work counts

    def trained(budget):
        torch.manual_seed(0)
        stem = (nn.Conv2d(3, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
        net = nn.Sequential(*stem, *(Bottleneck(8) for _ in range(3)), nn.Flatten(), nn.Linear(32 * 9 * 9, 5))
        net, x = net.to(memory_format=torch.channels_last), torch.randn(4, 3, 20, 20)
        run = torch.compile(net, backend=backend(budget))
        with torch.autocast("cpu", format, enabled=format is not torch.float32):
            loss = run(x.contiguous(memory_format=torch.channels_last)).float().square().mean()
        loss.backward()
        return [loss.detach(), *(p.grad for p in net.parameters()), *net.buffers()]

    kept = trained(None)
    assert "aten.convolution.default" not in backward
    again = trained(0.3)
    assert "aten.convolution.default" in backward
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))


def test_attention_draws_where_it_drops():
    def attention(x, p):
        return torch.ops.aten._scaled_dot_product_flash_attention(x, x, x, p)[0]

    def drawn(function):
        with FakeTensorMode():
            graph = make_fx(function)(torch.empty(1, 2, 8, 16, dtype=torch.bfloat16)).graph
        return {str(node.target): draws(node) for node in graph.nodes if node.op == "call_function"}

    assert drawn(lambda x: attention(x, 0.1))["aten._scaled_dot_product_flash_attention.default"]
    assert not drawn(lambda x: attention(x, 0.0))["aten._scaled_dot_product_flash_attention.default"]
    found = drawn(lambda x: torch.rand_like(x).exp())
    assert found == {"aten.rand_like.default": True, "aten.exp.default": False}


def test_what_must_be_kept_of_several_results_is_each_of_them(monkeypatch):
    """The partitioner names attention with dropout as a whole where it is all that there is to keep."""
    with FakeTensorMode():
        graph = make_fx(lambda x: torch.ops.aten.native_dropout(x, 0.5, True))(torch.empty(8)).graph
    argument, dropout = (node for node in graph.nodes if node.name in ("x_1", "native_dropout"))
    monkeypatch.setattr(partitioners, "choose_saved_values_set", lambda *_: [argument, dropout])
    with rules():
        saved = partitioners.choose_saved_values_set(graph, None, 0.5)
    assert saved == [argument, *dropout.users]
    assert len(saved) == 3


class Joined(nn.Module):
    """Concatenated activations of two layers, for two more: what joins them is no elementwise work."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(32, 256) for _ in range(2))
        self.last = nn.Linear(512, 32)

    def forward(self, x):
        return self.last(torch.cat([part(x).sin() for part in self.parts], 1).cos())


@pytest.mark.parametrize(("budget", "joined"), [(0.8, 0), (0.6, 1), (0.5, 2), (0.2, 4)])
def test_what_is_not_fused_is_computed_again_one_by_one(backward, budget, joined):
    model, x = nn.Sequential(*[Joined() for _ in range(4)]), torch.randn(512, 32)
    torch.compile(model, backend=backend(budget))(x).sum().backward()
    assert backward.count("aten.cat.default") == joined


def fail_inside():
    with rules():
        assert partitioners.get_default_op_list is not listed
        raise ArithmeticError("inside")


listed, choose = partitioners.get_default_op_list, partitioners.choose_saved_values_set


def test_the_rules_end_with_the_block_also_after_an_error():
    with pytest.raises(ArithmeticError, match="inside"):
        fail_inside()
    assert partitioners.get_default_op_list is listed
    assert partitioners.choose_saved_values_set is choose
