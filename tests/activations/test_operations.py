from __future__ import annotations

import torch
from torch.nn import functional as F

from deepseek_mp.activations.operations import TOLERANT, is_statistic, reads_sign


def test_what_rounding_may_ruin_is_not_tolerant():
    attention = "scaled_dot_product_attention"
    for name in ("div", "log", "pow", "sqrt", "amax", "cross_entropy", "mse_loss", "lerp", "hardswish", attention):
        assert name not in TOLERANT


def test_operations_that_read_a_sign_do_not_care_for_the_rest():
    for function in (F.relu, F.leaky_relu):
        assert reads_sign(function.__name__)
        x = torch.randn(64, requires_grad=True)
        y = x.detach().sign().requires_grad_()
        function(x).sum().backward()
        function(y).sum().backward()
        assert torch.equal(x.grad, y.grad)


def test_later_results_are_statistics_but_for_parts():
    assert is_statistic("NativeLayerNormBackward0", 1)
    assert not is_statistic("NativeLayerNormBackward0", 0)
    assert not is_statistic("UnbindBackward0", 2)
    assert is_statistic("RsqrtBackward0", 0)
    assert is_statistic("LogSoftmaxBackward0", 0)
    assert not is_statistic("SoftmaxBackward0", 0)
    assert not is_statistic("", 0)


def test_the_names_of_nodes_are_those_of_pytorch():
    x = torch.rand(4, 4, requires_grad=True) + 1
    for made in (x.rsqrt(), x.sqrt(), x.reciprocal(), x.log_softmax(1), x.var(), x.std(), x.tanh(), x.sigmoid()):
        assert is_statistic(made.grad_fn.name(), 0)
    assert not is_statistic(x.unbind(0)[2].grad_fn.name(), 2)
    assert not is_statistic(x.split(2)[1].grad_fn.name(), 1)
    assert not is_statistic(x.chunk(2)[1].grad_fn.name(), 1)
