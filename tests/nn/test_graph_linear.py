"""Joined products give what the layers give apart, bit for bit, and read the layers' own memory."""

import gc
import weakref

import pytest
import torch
from captured_graph import captured
from torch import nn
from torch.nn import functional as F

from deepseek_mp.inference.beside import lay_beside
from deepseek_mp.inference.linear_kinds import KINDS
from deepseek_mp.inference.quantised_linear import QuantisedLinear
from deepseek_mp.nn.graph_linear import join_products

BF16 = torch.bfloat16
K = 256


class Gated(nn.Module):
    """Three layers of one input, by the reference; sums of its small whole numbers are exact in any order."""

    def __init__(self, kind, bias=True, channels=(64, 32, 16)):
        super().__init__()
        self.a, self.b, self.c = (layer(kind, count, bias) for count in channels)

    def forward(self, x):
        return F.silu(self.a(x)[..., :16]) * self.b(x)[..., :16], self.c(x).view(-1), self.b(x).flatten()


def layer(kind, channels, bias):
    weight = torch.randint(-3, 4, (channels, K)).float()
    weight[:, :2] = torch.tensor([-3.0, 3.0])
    own = nn.Parameter(torch.randn(channels).to(BF16)) if bias else None
    return QuantisedLinear(KINDS[kind].keep(weight, ""), own, kind, BF16, "reference").eval()


def inputs(*shape):
    return torch.randint(-4, 5, (*shape, K)).to(BF16)


class Joining:
    """A backend that runs graphs as they are, joined."""

    def __init__(self):
        self.made = []

    def __call__(self, graph, given):
        made = join_products(graph, given)
        self.made.append(made)
        return graph.forward if made is None else made.taking_former(made.graph.forward)


def compiled(model):
    torch._dynamo.reset()
    backend = Joining()
    return torch.compile(model, backend=backend), backend


def equal(found, expected):
    return all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_outputs_are_the_same_bit_for_bit(kind, bias):
    model = Gated(kind, bias)
    lay_beside(model)
    run, backend = compiled(model)
    for shape in ((1, 1), (2, 3), (2, 5)):
        x = inputs(*shape)
        expected = model(x)
        found = run(x)
        assert equal(found, expected)
        assert all(one.stride() == two.stride() for one, two in zip(found, expected, strict=True))
    assert len(backend.made) == 2, "one row, and any number"
    for made in backend.made:
        products = [node for node in made.graph.graph.nodes if "linear" in str(node.target)]
        assert len(products) == 2, "the second call of b is of its own"
        (group,) = made.groups
        assert [q.data_ptr() for q in group] == [one.q.data_ptr() for one in (model.a, model.b, model.c)]


@torch.no_grad()
def test_laying_weights_beside_each_other_changes_no_value():
    for kind in KINDS:
        model, x = Gated(kind), inputs(3)
        before = model(x), {name: value.clone() for name, value in model.state_dict().items()}
        lay_beside(model)
        assert equal(model(x), before[0])
        assert all(torch.equal(value.float(), before[1][name].float()) for name, value in model.state_dict().items())


@torch.no_grad()
def test_joined_weights_are_the_layers_own_memory():
    model = Gated("int8_weights")
    lay_beside(model)
    run, backend = compiled(model)
    x = inputs(3)
    run(x)
    other = Gated("int8_weights")
    model.load_state_dict(other.state_dict())
    assert equal(run(x), other(x))
    assert len(backend.made) == 1


@torch.no_grad()
def test_weights_that_were_moved_apart_are_still_read():
    model = Gated("fp8_weights")
    lay_beside(model)
    run, backend = compiled(model)
    x = inputs(3)
    expected = run(x)
    model._apply(torch.clone)
    assert equal(run(x), expected)
    model.b.q.zero_()
    assert equal(run(x), model(x)), "also when they change after that"
    lay_beside(model)
    assert equal(run(x), model(x))
    assert len(backend.made) == 1


@torch.no_grad()
def test_neither_first_inputs_nor_weights_that_were_replaced_are_kept():
    model = Gated("int8_weights")
    lay_beside(model)
    run, backend = compiled(model)
    x = inputs(3)
    expected = run(x)
    backend.made.clear()
    gone = [weakref.ref(one) for one in (x, model.a.q, model.a.q.untyped_storage())]
    memory = model.a.q.untyped_storage()._weak_ref()
    again = x.clone()
    del x
    model._apply(torch.clone)
    gc.collect()
    assert [one() for one in gone] == [None, None, None]
    assert torch.UntypedStorage._expired(memory)
    torch.UntypedStorage._free_weak_ref(memory)
    assert equal(run(again), expected)


@torch.no_grad()
def test_layers_whose_weights_lie_apart_stay_apart():
    _, backend = both = compiled(Gated("fp8_weights"))
    both[0](inputs(3))
    assert backend.made == [None]


@torch.no_grad()
def test_only_neighbours_are_joined():
    """In memory a, b, c: where b is not read, a and c are no neighbours."""

    class Some(Gated):
        def forward(self, x):
            return self.a(x), self.c(x), self.b(x + 1)

    model = Some("int8_weights")
    lay_beside(model)
    run, backend = compiled(model)
    x = inputs(2)
    assert equal(run(x), model(x))
    assert backend.made == [None]


@torch.no_grad()
def test_another_order_of_calls_gives_every_layer_its_own():
    class Turned(Gated):
        def forward(self, x):
            return self.c(x), self.b(x), self.a(x)

    model = Turned("int4_weights")
    lay_beside(model)
    run, backend = compiled(model)
    x = inputs(2)
    assert equal(run(x), model(x))
    assert len(backend.made[0].groups[0]) == 3


@torch.no_grad()
def test_layers_called_with_two_inputs_are_joined_for_each_of_them():
    class Twice(Gated):
        def forward(self, x):
            y = x * 2
            return self.a(x), self.b(x), self.a(y), self.b(y)

    model = Twice("fp8_weights")
    lay_beside(model)
    run, backend = compiled(model)
    x = inputs(2)
    assert equal(run(x), model(x))
    (made,) = backend.made
    assert len(made.groups) == 2
    assert len(made.joined) == 3, "weight, scale and bias are the same inputs for both"


@torch.no_grad()
def test_what_is_written_in_place_in_between_is_seen():
    class Writing(Gated):
        def forward(self, x):
            y = x * 1
            one = self.a(y), self.b(y)
            y.mul_(2)
            return (*one, self.c(y))

    model = Writing("int8_weights")
    lay_beside(model)
    run, backend = compiled(model)
    x = inputs(2)
    assert equal(run(x), model(x))
    assert [len(group) for group in backend.made[0].groups] == [2]


@torch.no_grad()
def test_the_graph_that_was_given_stays_as_it_is():
    model = Gated("int8_weights")
    lay_beside(model)
    graph, given = captured(model, inputs(2))
    before = str(graph.graph)
    made = join_products(graph, given)
    assert str(graph.graph) == before
    assert graph.graph.owning_module is graph
    assert made.graph.meta == graph.meta
    assert vars(graph).keys() <= vars(made.graph).keys()
