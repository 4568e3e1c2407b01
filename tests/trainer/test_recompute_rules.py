"""What may be computed again: nothing that draws random numbers; and what is not fused has its price."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._functorch import partitioners
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

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
