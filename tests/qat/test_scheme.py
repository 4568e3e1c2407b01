"""The scheme: per-channel symmetric weights of the moment, per-tensor activations, layers of derived classes too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepseek_mp.qat import convert, prepare
from deepseek_mp.qat.scheme import configuration


def test_weights_are_by_channel_and_activations_by_tensor():
    config = configuration()
    weight, activation = config.weight, config.input_activation
    assert (weight.dtype, weight.qscheme, weight.ch_axis) == (torch.int8, torch.per_channel_symmetric, 0)
    assert (activation.dtype, activation.qscheme) == (torch.uint8, torch.per_tensor_affine)


def test_small_weights_have_all_of_their_bits():
    model = nn.Sequential(nn.Linear(8, 4))
    nn.init.uniform_(model[0].weight, -1e-4, 1e-4)
    simulated = prepare(model, torch.randn(4, 8))
    scales = [q.scale for q in simulated.quantisers() if q.is_per_channel]
    torch.testing.assert_close(scales[0], model[0].weight.detach().abs().amax(1) / 127.5)


def test_layers_of_derived_classes_are_quantised():
    class Wide(nn.Linear):
        pass

    class Image(nn.Conv2d):
        pass

    simulated = prepare(nn.Sequential(Image(1, 2, 3), nn.Flatten(), Wide(32, 3)), torch.randn(4, 1, 6, 6))
    assert [decision.new for decision in simulated.decisions] == ["int8", "int8"]


def rounded(simulated):
    """The operations whose results are rounded."""
    nodes = simulated.graph.graph.nodes
    return {str(node.args[0].target) for node in nodes if node.op == "call_module"}


def test_between_a_norm_and_its_activation_nothing_is_rounded(simulated):
    assert "aten.batch_norm.default" not in rounded(simulated)
    assert "aten.relu.default" in rounded(simulated)


def test_between_a_sum_with_a_shortcut_and_its_activation_nothing_is_rounded():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.last = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.Conv2d(1, 1, 1)

        def forward(self, x):
            return self.last(torch.relu(self.norm(self.conv(x)) + x))

    found = rounded(prepare(Residual(), torch.randn(2, 1, 3, 3)))
    assert "aten.relu.default" in found
    assert "aten.add.Tensor" not in found


def test_elementwise_products_are_left_alone():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.down(torch.sigmoid(self.gate(x)) * self.up(x))

    found = rounded(prepare(Gated(), torch.randn(4, 8)))
    assert "aten.mul.Tensor" in found  # the input of `down`
    assert not {"aten.sigmoid.default", "aten.linear.default"} & found


def test_a_convolution_before_a_norm_is_kept_too(model, example):
    simulated = prepare(model, example, keep=["stem.0", "conv"])
    assert {decision.layer for decision in simulated.decisions if decision.new == "fp32"} == {"stem.0", "conv"}
    with torch.no_grad():
        same = prepare(model, example, keep=["stem", "conv", "row", "hidden"])
        model.eval(), same.eval()
        assert torch.allclose(same.evaluated()(example), same(example), atol=1e-5)


class Loop(nn.Module):
    """A convolution and a BatchNorm that are called again."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x):
        for _ in range(2):
            x = torch.relu(self.norm(self.conv(x)))
        return self.last(x.flatten(1))


def hooked(change, *layers):
    """A model with a hook on its first layer that changes the result."""
    model = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    model[0].register_forward_hook(lambda _module, _inputs, output: change(output))
    return model


@pytest.mark.parametrize(
    "model",
    [
        Loop(),
        hooked(lambda output: output * 2, nn.Linear(4, 4)),
        hooked(lambda output: output + 1, nn.Linear(4, 4)),
        hooked(lambda output: output * 2, nn.Conv2d(4, 4, 1)),
        hooked(lambda output: output * 2, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),
        hooked(lambda output: output * 2, nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)),
    ],
)
def test_layers_that_are_called_again_or_have_hooks_are_quantised(model):
    first = next(model.children())
    x = torch.randn(4, 4) if isinstance(first, nn.Linear) else torch.randn(4, 4, 1, 1)
    simulated = prepare(model.eval(), x)
    assert {decision.new for decision in simulated.decisions} == {"int8"}
    with simulated.observing():
        torch.testing.assert_close(simulated(x), model(x))
    torch.testing.assert_close(convert(simulated).reference(x), simulated(x), rtol=1e-4, atol=1e-4)


class Shifted(nn.Module):
    """A layer with the sum of its result and a number behind it."""

    def __init__(self, layer, activation):
        super().__init__()
        self.layer, self.activation = layer, activation

    def forward(self, x):
        return self.activation(self.layer(x) + 1)


def with_hook_for_gradients():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model[0].register_full_backward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: Shifted(nn.Linear(4, 4), nn.Identity()), (3, 4)),
        (lambda: Shifted(nn.Linear(4, 4), nn.ReLU()), (3, 4)),
        (lambda: Shifted(nn.Conv2d(3, 4, 3), nn.ReLU()), (3, 3, 6, 6)),
        (with_hook_for_gradients, (3, 4)),
    ],
    ids=["sum", "sum, activation", "convolution", "hook"],
)
def test_layers_behind_which_torchao_finds_what_it_does_not_know_are_quantised(build, shape):
    model, x = build().eval(), torch.randn(shape)
    simulated = prepare(model, x)
    assert {decision.new for decision in simulated.decisions} == {"int8"}
    expected = model(x)
    assert (convert(simulated)(x) - expected).norm() < 0.05 * expected.norm()


class Joined(nn.Module):
    """Two convolutions side by side, the second with fifty times as large results."""

    def __init__(self):
        super().__init__()
        self.small, self.large, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            self.large.weight *= 50

    def forward(self, x):
        return self.last(torch.cat([self.small(x), self.large(x)], 1))


@pytest.mark.parametrize("pool", [nn.AvgPool2d(4), nn.AdaptiveAvgPool2d(1)])
def test_averages_have_a_range_of_their_own(pool):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(8, 16, 1), pool, nn.Conv2d(16, 4, 1)).eval(), torch.randn(4, 8, 8, 8)
    found, expected = prepare(model, x)(x), model(x)
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_what_is_joined_is_not_clipped_to_the_range_of_its_first_part():
    torch.manual_seed(0)
    model, x = Joined().eval(), torch.randn(4, 4, 3, 3)
    found, expected = prepare(model, x)(x), model(x)
    assert (found - expected).norm() < 0.05 * expected.norm()
