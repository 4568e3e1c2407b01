"""A layer's result is added in INT8 models as the model adds it: to itself, with a factor, to other dtypes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from deepseek_mp.qat import convert, prepare
from deepseek_mp.qat.sums import double, spare_operands, spell_out


class Twice(nn.Module):
    def __init__(self, layer, in_place=False):
        super().__init__()
        self.layer, self.in_place = layer, in_place

    def forward(self, x):
        x = self.layer(x)
        if self.in_place:
            x += x
            return x
        return x + x


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    "build", [partial(nn.Linear, 4, 4), partial(nn.Conv2d, 4, 4, 1)], ids=["linear", "convolution"]
)
def test_what_a_layer_gives_is_added_to_itself(build, in_place):
    layer = build()
    model, x = Twice(layer, in_place).eval(), torch.randn(3, 4)
    x = x if isinstance(layer, nn.Linear) else x[..., None, None]
    expected = model(x)
    outputs = convert(prepare(model, x))(x)
    assert (outputs - expected).norm() < 0.05 * expected.norm()


def test_only_sums_of_one_tensor_with_itself_are_changed_and_they_have_the_same_bits():
    class Sums(nn.Module):
        def forward(self, x, y):
            return x + x, x + y, torch.add(x, x, alpha=3)

    x, y = torch.randn(5), torch.randn(5)
    graph = torch.export.export(Sums(), (x, y)).module(check_guards=False)
    expected = graph(x, y)
    double(graph)
    assert all(torch.equal(one, other) for one, other in zip(graph(x, y), expected, strict=True))
    assert len(graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)) == 1


class Beside(nn.Module):
    """A layer's result with something of it, or of another."""

    def __init__(self, layer, forward):
        super().__init__()
        self.layer, self.other, self.dropout = layer(), layer(), nn.Dropout(0.5)
        self.of = forward

    def forward(self, x):
        return self.of(self, x, self.layer(x))


@pytest.mark.parametrize("forward", [
    lambda model, x, y: y + model.dropout(y),
    lambda model, x, y: y + y.detach(),
    lambda model, x, y: torch.add(y, y, alpha=3),
    lambda model, x, y: torch.add(x, y, alpha=3),
    lambda model, x, y: torch.add(y, model.other(x), alpha=-2.5),
    lambda model, x, y: y.add_(x, alpha=3),
    lambda model, x, y: y + (x > 0),
    lambda model, x, y: y + x.argsort(),
    lambda model, x, y: y + x.double(),
    lambda model, x, y: y + torch.add(model.other(x), x, alpha=2),
    lambda model, x, y: y.relu() + x.tanh(),
    lambda model, x, y: x.tanh() + model.dropout(y.relu_()),
    lambda model, x, y: y.relu().add_(x.tanh()),
    lambda model, x, y: y.relu() + model.other(x),
    lambda model, x, y: y.relu() + model.other(x).relu(),
    lambda model, x, y: torch.nn.functional.gelu(y) + x.tanh(),
])  # fmt: skip
@pytest.mark.parametrize("dims", [2, 4])
def test_int8_kernels_add_what_the_model_adds(forward, dims):
    torch.manual_seed(0)
    model = Beside(lambda: nn.Linear(8, 8) if dims == 2 else nn.Conv2d(8, 8, 1), forward).eval()
    x = torch.randn(16, 8) if dims == 2 else torch.randn(4, 8, 2, 2)
    int8 = convert(prepare(model, x))
    torch.testing.assert_close(int8(x), int8.reference(x), rtol=1e-4, atol=1e-5)
    expected = model(x)
    assert (int8(x) - expected).norm() < 0.05 * expected.norm()


def test_a_mask_that_is_added_to_itself_stays_one():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            mask = x > 0
            mask = mask + mask
            return self.layer(x).masked_fill(mask, 0), mask

    model, x = Masked().eval(), torch.randn(3, 4)
    outputs, mask = convert(prepare(model, x))(x)
    assert mask.dtype is torch.bool
    assert torch.equal(outputs == 0, mask)


def test_in_training_a_sum_with_what_is_detached_or_dropped_out_stays_one():
    class Sums(nn.Module):
        def forward(self, x):
            return x + x.detach(), x + nn.functional.dropout(x, 0.5, True)

    graph = torch.export.export(Sums(), (torch.randn(5),)).module(check_guards=False)
    double(graph)
    assert not graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
    double(graph, inference=True)
    assert len(graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)) == 1


def test_sums_cast_and_multiply_beforehand():
    class Sums(nn.Module):
        def forward(self, x, n):
            return torch.add(x, x, alpha=3), torch.add(x, n, alpha=2), torch.add(n, n, alpha=2), x + x.double()

    given = torch.randn(5), torch.arange(5)
    graph = torch.export.export(Sums(), given).module(check_guards=False)
    expected = graph(*given)
    spell_out(graph)
    torch.testing.assert_close(graph(*given), expected)
    sums = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    assert [bool(node.kwargs) for node in sums] == [False, False, True, False]


@pytest.mark.parametrize("forward", [
    lambda model, x, y: y + x,
    lambda model, x, y: (y + x.view(-1).view(x.shape)).relu(),
    lambda model, x, y: y.relu() + x,
    lambda model, x, y: y.add_(x),
    lambda model, x, y: y + model.place,
    lambda model, x, y: model.place.detach() + y,
    lambda model, x, y: y + (2 * x[:1]).expand(x.shape),
    lambda model, x, y: y + model.place[:1].expand(x.shape),
])  # fmt: skip
def test_what_a_layers_result_is_added_to_is_not_written_to(forward):
    torch.manual_seed(0)
    model, x = Beside(lambda: nn.Linear(8, 8), forward).eval(), torch.randn(16, 8)
    model.register_buffer("place", torch.randn(16, 8))
    int8, before = convert(prepare(model, x)), x.clone()
    expected = int8.reference(x)
    for _ in range(2):
        torch.testing.assert_close(int8(x), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(x, before)


def test_only_sums_with_what_must_not_be_written_to_become_differences_and_they_have_the_same_bits():
    class Sums(nn.Module):
        def forward(self, x, y):
            z = x * y
            return z + x, x + y, z + y.exp(), x.view(-1) + z.view(-1), z + 1

    x, y = torch.randn(4, 5), torch.randn(4, 5)
    graph = torch.export.export(Sums(), (x, y)).module(check_guards=False)
    expected = graph(x, y)
    spare_operands(graph)
    assert all(torch.equal(one, other) for one, other in zip(graph(x, y), expected, strict=True))
    assert len(graph.graph.find_nodes(op="call_function", target=torch.ops.aten.sub.Tensor)) == 2


def test_a_layers_result_is_added_to_its_copy():
    class ToCopy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            y = self.layer(x)
            z = y.clone()
            z += y
            return z

    torch.manual_seed(0)
    x = torch.randn(4, 8)
    int8 = convert(prepare(ToCopy().eval(), x))
    torch.testing.assert_close(int8(x), int8.reference(x), rtol=1e-4, atol=1e-5)
