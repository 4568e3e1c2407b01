"""The pass over the joint graph: equal casts become one, activations move into casts, and the numbers stay."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition, nop
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch._inductor.decomposition import select_decomp_table
from torch.nn import functional as F

from deepseek_mp import precision
from deepseek_mp.nn import apply
from deepseek_mp.nn.delayed import scales_of
from deepseek_mp.nn.graph_casts import casts_of
from deepseek_mp.nn.joint_graph import FuseProducers
from deepseek_mp.ops import sources
from deepseek_mp.trainer.graph_backend import inductor

WIDTH, HIDDEN, ROWS = 128, 256, 256
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
RECIPES = ["block", "delayed"]


class Gated(nn.Module):
    """A gated feed-forward layer after a norm, around a shortcut."""

    def __init__(self, activation="silu", *, swapped=False):
        super().__init__()
        self.activation, self.swapped = ACTIVATIONS[activation], swapped
        self.norm = nn.RMSNorm(WIDTH)
        self.gate = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        normed = self.norm(x)
        gate, up = self.activation(self.gate(normed)), self.up(normed)
        return x + self.down(up * gate if self.swapped else gate * up)


class Plain(nn.Module):
    """Two layers with an activation between them."""

    def __init__(self, activation="gelu"):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.one, self.two = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        return self.two(self.activation(self.one(x)))


class TwoReaders(Plain):
    """Whose activation somebody else multiplies with too: it has to be stored."""

    def __init__(self):
        super().__init__()
        self.three = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x):
        hidden = self.activation(self.one(x))
        return self.two(hidden) + hidden.float() @ self.three.weight.t().float()


def compiled(model, *, fuse=FuseProducers, before=None):
    """The model in compiled form, with Inductor's decompositions, and the joint graphs that will have been made.

    The list `before` gets the ops of each graph as they were before the pass.
    """
    graphs = []

    def partition(joint, inputs, **options):
        if before is not None:
            before.append(ops(joint.graph))
        fuse()(joint.graph)
        joint.graph.lint()
        joint.recompile()
        graphs.append(joint.graph)
        return min_cut_rematerialization_partition(joint, inputs, **options)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=nop, bw_compiler=nop, partition_fn=partition, decompositions=select_decomp_table)
    return torch.compile(model, backend=backend), graphs


def ops(graph):
    """How often each op of ours is called."""
    calls = [node for node in graph.nodes if node.op == "call_function"]
    called = [node.args[0] if node.target is auto_functionalized_v2 else node.target for node in calls]
    return Counter(op.name().split("::")[1] for op in called if getattr(op, "namespace", "") == "deepseek_mp")


def make(kind, recipe, *arguments, **options):
    torch.manual_seed(0)
    model = nn.Sequential(kind(*arguments, **options), nn.Linear(WIDTH, 16))
    apply(model, recipe, emulate=True)
    return model


def trained(model, call, steps=2, *, region=True):
    """Outputs and gradients of some steps, and the state of delayed scales."""
    generator, found = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        x = torch.randn(ROWS, WIDTH, generator=generator).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=region):
            y = call(x)
        y.float().square().sum().backward()
        found.append([y.float(), x.grad, *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
        for scales in scales_of(model):
            scales.update()
    return found


def assert_as_exact(ours, theirs, exact):
    """FP8 rounds some values the other way where a BF16 rounding before it is left out: no worse, but not the same."""
    for steps in zip(ours, theirs, exact, strict=True):
        for a, b, c in zip(*steps, strict=True):
            assert (a - c).norm() <= 1.15 * (b - c).norm() + 0.003 * c.norm()


def both_ways(kind, recipe, *arguments, **options):
    """Ops of the pass's graph and of the one before, and the sources in it, after comparing with eager code."""
    model, other, exact = (make(kind, name, *arguments, **options) for name in (recipe, recipe, "fp32"))
    before = []
    call, graphs = compiled(model, before=before)
    assert_as_exact(trained(model, call), trained(other, other), trained(exact, exact, region=False))
    assert len(graphs) == 1
    return ops(graphs[0]), before[0], sources_of(graphs[0])


def sources_of(graph):
    """The names of sources and activations that calls of ours have for an argument."""
    values = [value for node in graph.nodes for value in (*node.args, *node.kwargs.values())]
    return {value for value in values if isinstance(value, str) and value in sources.SOURCES}


@pytest.mark.parametrize(
    ("recipe", "activation", "swapped"),
    [
        *[("block", activation, False) for activation in ACTIVATIONS],
        ("block", "silu", True),
        ("delayed", "silu", False),
    ],
)
def test_a_gate_and_its_gradients_are_computed_inside_the_casts(recipe, activation, swapped):
    fused, before, named = both_ways(Gated, recipe, activation, swapped=swapped)
    delayed = "_delayed" * (recipe == "delayed")
    assert before[f"quantise{delayed}"] == 3 + 3 + 3  # of each layer: input, weight, gradient
    assert fused[f"quantise_made{delayed}"] == 1
    assert fused[f"quantise_gate_grads{delayed}"] == 1
    assert fused[f"quantise{delayed}"] == 1 + 3 + 1  # the input of gate and up, weights, the gradient of down
    assert fused["product"] == before["product"]
    assert named == {f"{activation}_gate", activation}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_transposed_product_of_a_gate_is_made_in_backward_and_not_kept(recipe):
    model = make(Gated, recipe)
    call, graphs = compiled(model)
    trained(model, call, steps=1)
    (value,) = [node for node in graphs[0].nodes if "silu_gate" in (*node.args, *node.kwargs.values())]
    schema = op_of(value)._schema.arguments
    settings = dict(zip([argument.name for argument in schema], value.args, strict=False)) | value.kwargs
    assert (settings["rows"], settings["columns"]) == (True, False)
    (grads,) = [node for node in graphs[0].nodes if "gate_grads" in str(op_of(node))]
    assert grads.kwargs["value_format"] == "fp8_e4m3"
    hidden = [size for size in kept_sizes(model, call) if size == ROWS * HIDDEN]
    assert len(hidden) == 2  # gate and up


def op_of(node):
    return node.args[0] if node.target is auto_functionalized_v2 else node.target


def kept_sizes(model, call):
    """Elements of the tensors that are kept for the backward."""
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        call(torch.randn(ROWS, WIDTH))
    return sizes


@pytest.mark.parametrize(
    ("recipe", "activation"), [*[("block", activation) for activation in ACTIVATIONS], ("delayed", "gelu")]
)
def test_an_activation_and_its_gradient_are_computed_inside_the_casts(recipe, activation):
    fused, before, named = both_ways(Plain, recipe, activation)
    delayed = "_delayed" * (recipe == "delayed")
    assert before[f"quantise{delayed}"] == 6
    assert fused[f"quantise_made{delayed}"] == 2
    assert fused[f"quantise{delayed}"] == 4
    assert named == {activation, f"{activation}_grad"}


def test_an_activation_that_is_stored_anyway_is_read():
    """And its gradient, which is a sum over the readers, is none of an activation alone."""
    fused, before, _ = both_ways(TwoReaders, "block")
    assert fused == before


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_norm_hands_over_bf16_and_weights_stay_fp32(recipe):
    model = make(Gated, recipe)
    call, graphs = compiled(model)
    trained(model, call, steps=1)
    types = [cast.x.meta["val"].dtype for cast in casts_of(graphs[0])]
    assert Counter(types) == {torch.bfloat16: 1 + 1, torch.float32: 3}  # the norm and a gradient; weights


class Chain(nn.Module):
    """What stands between the layers is no activation."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        return self.two(torch.sin(self.one(x)) * 2)


def test_what_is_no_activation_stays_as_it_is():
    fused, before, _ = both_ways(Chain, "block")
    assert fused == before


class Shared(nn.Module):
    """Three layers of one input, one of which is a view of it."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        x = x * 2
        return self.q(x) + self.k(x.view(-1, WIDTH)).view(x.shape) + self.v(x)


@pytest.mark.parametrize("recipe", RECIPES)
def test_layers_of_one_input_quantise_it_once(recipe):
    fused, before, _ = both_ways(Shared, recipe)
    name = "quantise" + "_delayed" * (recipe == "delayed")
    assert before[name] == 9
    assert fused[name] == 1 + 3 + 1  # their gradients are one tensor too


def by_chance(*roles):
    """The recipe block with output gradients rounded stochastically in these products."""
    recipe = precision.RECIPES["block"]
    sides = {role: recipe.role(precision.Role(role)) for role in roles}
    changed = {role: replace(side, left=replace(side.left, rounding="stochastic")) for role, side in sides.items()}
    return replace(recipe, name="by_chance", **changed)


@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_stochastic_casts_stay_as_they_are(activation):
    fused, before, named = both_ways(Gated, by_chance("dgrad", "wgrad"), activation)
    assert before["quantise"] == 9
    assert fused["quantise_made"] == 1  # in the forward, where casts are to the nearest
    assert fused["quantise_gate_grads"] == 0
    assert fused["quantise"] == 1 + 3 + 3
    assert named == {f"{activation}_gate"}


def test_a_tensor_that_a_stochastic_cast_reads_is_stored_for_other_casts_too():
    fused, before, named = both_ways(Gated, by_chance("dgrad"))
    assert before["quantise"] == 12  # two of each gradient
    assert fused["quantise"] == 1 + 3 + 6
    assert named == {"silu_gate"}


def test_stochastic_casts_of_one_tensor_stay_two():
    fused, before, _ = both_ways(Shared, by_chance("dgrad", "wgrad"))
    assert before["quantise"] == 9
    assert fused["quantise"] == 1 + 3 + 3


def test_inductor_repeats_stochastic_rounding_under_the_same_seed():
    model = make(Gated, by_chance("dgrad", "wgrad"))
    torch._dynamo.reset()
    call = torch.compile(model, backend=inductor)
    gradients = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        gradients.append(trained(model, call, steps=1)[0][1])
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[0], gradients[2])
    assert (gradients[0] - gradients[2]).norm() < 0.2 * gradients[0].norm()
    torch._dynamo.reset()


def test_only_the_first_layer_notes_the_maximum_of_a_shared_input():
    model = make(Shared, "delayed")
    call, _ = compiled(model)
    trained(model, call)
    (scales,) = scales_of(model)
    tops = dict(zip(scales.units, scales.top.view(-1, 3), strict=True))
    assert tops["0.q"][0] > 0
    assert tops["0.k"][0] == tops["0.v"][0] == 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_inductor_takes_what_the_pass_makes(recipe):
    """It lowers calls of ops of ours by what the graph says of them, which the pass has to say of its own too."""
    model, other = make(Gated, recipe), make(Gated, recipe)
    torch._dynamo.reset()
    ours = trained(model, torch.compile(model, backend=inductor))
    exact = make(Gated, "fp32")
    assert_as_exact(ours, trained(other, other), trained(exact, exact, region=False))
    torch._dynamo.reset()


def test_the_pass_is_known_to_the_compilers_cache_by_its_text():
    assert FuseProducers().uuid() == FuseProducers().uuid()
    assert FuseProducers().uuid()


LEFT_OUT = {
    "share": (lambda self, graph: None, {"quantise": 1}),
    "recognise": (lambda self, graph: [], {"quantise": 3, "quantise_made": -1, "quantise_gate_grads": -1}),
    "pair": (lambda self, made: [], {"quantise_made": 2, "quantise_gate_grads": -1}),
    "narrow": (lambda self, graph: None, {}),
}


@pytest.mark.parametrize("fusion", LEFT_OUT)
def test_a_subclass_leaves_one_fusion_out(fusion):
    instead, more = LEFT_OUT[fusion]
    found = []
    for fuse in (FuseProducers, type("Without", (FuseProducers,), {fusion: instead})):
        model = make(Gated, "block")
        call, graphs = compiled(model, fuse=fuse)
        trained(model, call, steps=1)
        wide = sum(cast.x.meta["val"].dtype == torch.float32 for cast in casts_of(graphs[0]))
        found.append((ops(graphs[0]), wide))
    (complete, wide), (without, wide_without) = found
    names = complete | without
    assert {name: without[name] - complete[name] for name in names if without[name] != complete[name]} == more
    assert (wide_without > wide) == (fusion == "narrow")


@pytest.mark.parametrize("kind", [Gated, Plain])
def test_evaluation_is_compiled_the_same_way(kind):
    """A graph without a backward is not a joint one; Inductor gives it to the pass alike."""
    model = make(kind, "block")
    x = torch.randn(ROWS, WIDTH)
    torch._dynamo.reset()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        found = torch.compile(model, backend="aot_eager")(x)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


class Function(nn.Module):
    """`down(f(gate(x), up(x)))`."""

    def __init__(self, f):
        super().__init__()
        self.f = f
        self.gate, self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        return self.down(self.f(self.gate(x), self.up(x)))


NEARLY = {
    "clipped far out": lambda g, u: F.silu(g) * u.clamp(min=-7),
    "bent elsewhere": lambda g, u: F.silu(g) * (u - F.relu(u - 7)),
    "relu with a lid": lambda g, u: torch.where(g > 6.0, 6.0, g.relu()) * u,
    "relu6": lambda g, u: F.relu6(g) * u,
    "a clamp, whose slope at zero is one": lambda g, u: g.clamp(min=0) * u,
    "whole numbers": lambda g, u: F.silu(g) * (u + (u.to(torch.int32).to(u.dtype) - u).detach()),
    "eight bits": lambda g, u: F.silu(g) * (u + (u.to(torch.float8_e4m3fn).to(u.dtype) - u).detach()),
}


@pytest.mark.parametrize("f", NEARLY)
def test_what_is_nearly_an_activation_is_none(f):
    model = make(Function, "block", NEARLY[f])
    call, graphs = compiled(model)
    trained(model, call, steps=1)
    made = [node.args[1] for node in graphs[0].nodes if node.target is torch.ops.deepseek_mp.quantise_made.default]
    assert made in ([], ["silu_gate"])  # the gradient to up may be silu(g) times one
    assert ops(graphs[0])["quantise_gate_grads"] == 0
    forward = [cast for cast in casts_of(graphs[0]) if cast.x.meta["val"].shape[-1] == HIDDEN]
    assert len(forward) + len(made) == 4  # the weight of down, its input, and the gradients to gate and up


def several(kind, calls):
    def forward(self, x):
        for _ in range(calls):
            x = self.layer(x)
        return x

    return type(kind.__name__ + "Twice", (nn.Module,), {
        "__init__": lambda self: (nn.Module.__init__(self), setattr(self, "layer", kind()))[0], "forward": forward,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "kind", "calls"), [("delayed", Gated, 2), ("delayed", Plain, 3), ("block", Gated, 2)]
)
def test_layers_that_are_called_several_times(recipe, kind, calls):
    """Under delayed scaling each of their casts raises what the one before it has raised."""
    both_ways(several(kind, calls), recipe)


class OneGate(nn.Module):
    """Gate and up are one layer."""

    def __init__(self):
        super().__init__()
        self.gate, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.gate(x.flip(0)))


class Triplet(nn.Module):
    """An encoder of three inputs."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return torch.cat([self.two(F.silu(self.one(part))) for part in (x, x * 2, x.flip(1))])


@pytest.mark.parametrize("kind", [OneGate, Triplet])
def test_one_layer_for_several_tensors(kind):
    both_ways(kind, "delayed")


@pytest.mark.parametrize(("recipe", "lead"), [("block", ()), ("delayed", (2,))])
def test_sizes_that_change(recipe, lead):
    model, other = make(Gated, recipe), make(Gated, recipe)
    call, graphs = compiled(model)
    for rows in (64, 32, 96):
        x = torch.randn(*lead, rows, WIDTH)
        with torch.autocast("cpu", torch.bfloat16):
            y, expected = call(x), other(x)
        y.float().sum().backward()
        expected.float().sum().backward()
        assert (y - expected).norm() <= 0.05 * expected.norm()
    assert len(graphs) <= 3
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 0.15 * b.grad.norm()
