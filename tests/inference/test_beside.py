"""Weights of layers that may read the same input lie beside each other, others do not, and no memory is added."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from deepseek_mp.costs.memory import distinct_bytes
from deepseek_mp.inference import Form, QuantisedLinear, Served, load
from deepseek_mp.inference.beside import lay_beside, lay_program_beside, lie_beside
from deepseek_mp.inference.linear_kinds import KINDS

CPU = torch.device("cpu")
FORM = Form(format="bf16", linear="fp8_weights")


class Llama(nn.Module):
    """Projections as that model has them."""

    def __init__(self, bias=False):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(256, 512, bias=bias), nn.Linear(256, 256), nn.Linear(256, 256, bias=bias)
        self.gate, self.up, self.down = nn.Linear(256, 768), nn.Linear(256, 768), nn.Linear(768, 256)

    def forward(self, x):
        mixed = self.q(x)[..., :256] * self.k(x) + self.v(x)
        return self.down(self.gate(mixed) * self.up(mixed))


def layers(model):
    return [part for part in model.modules() if isinstance(part, QuantisedLinear)]


def parts(model):
    return [*model.parameters(), *model.buffers()]


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_one_parent_kind_and_width_are_laid_together(kind):
    model = nn.Module()
    weights = {name: torch.randn(count, width) for name, count, width in (("a", 32, 64), ("b", 16, 64), ("c", 16, 128))}
    for name, weight in weights.items():
        bias = nn.Parameter(torch.randn(len(weight)))
        setattr(model, name, QuantisedLinear(KINDS[kind].keep(weight, ""), bias, kind, torch.bfloat16, "reference"))
    bias, before = model.b.bias, distinct_bytes(parts(model))
    assert not lie_beside(model, ["a", "b"])
    lay_beside(model)
    assert lie_beside(model, ["a", "b"])
    assert not lie_beside(model, ["b", "a"])
    assert not lie_beside(model, ["a", "c"])
    assert distinct_bytes(parts(model)) == before
    assert model.b.bias is bias
    assert isinstance(bias, nn.Parameter)


def test_served_models_are_laid_so_with_those_without_a_bias_apart():
    served = Served(Llama(), FORM, CPU)
    assert lie_beside(served.model, ["q", "v"])
    assert lie_beside(served.model, ["k", "gate", "up"])
    before = distinct_bytes(parts(served))
    alone = sum(part.numel() * part.element_size() for part in parts(served))
    assert before == alone


LEFT = {
    "a sequence, of which each reads the one before": lambda: nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)),
    "sizes that begin within 16 bytes": lambda: nn.ModuleList([nn.Linear(256, 257), nn.Linear(256, 257)]),
    "two parents": lambda: nn.Sequential(*(nn.Sequential(nn.Linear(256, 256)) for _ in range(2))),
}


@pytest.mark.parametrize("name", LEFT)
def test_others_stay_where_they_are(name):
    model = LEFT[name]()
    model.forward = lambda x: x
    made = layers(Served(model, FORM, CPU))
    assert len(made) == 2
    assert made[0].q.untyped_storage().data_ptr() != made[1].q.untyped_storage().data_ptr()


def test_an_order_of_a_machine_cannot_be_cut():
    served = Served(Llama(), Form(format="bf16", linear="int4_weights"), CPU)
    made = served.model.gate
    if made.implementation != "native":
        pytest.skip("this CPU has no product of weights in 4 bits")
    assert not made.channel_dims()
    assert made.q.untyped_storage().nbytes() == made.q.numel() * made.q.element_size()


def test_a_layer_in_two_places_is_laid_once():
    model = Llama()
    served = Served(model, FORM, CPU)
    served.model.again = nn.ModuleList([served.model.gate, served.model.up])
    served.model._apply(torch.clone)
    assert not lie_beside(served.model, ["k", "gate", "up"])
    lay_beside(served.model)
    assert lie_beside(served.model, ["k", "gate", "up"])
    before = [part.data_ptr() for part in parts(served)]
    lay_beside(served.model)
    assert [part.data_ptr() for part in parts(served)] == before, "what lies so stays"


def test_copies_and_states_keep_values_and_memory():
    served = Served(Llama(True), FORM, CPU)
    x = torch.randn(2, 256)
    expected, before = served(x), distinct_bytes(parts(served))
    made = copy.deepcopy(served)
    assert lie_beside(made.model, ["gate", "up"])
    assert distinct_bytes(parts(made)) == before
    file = io.BytesIO()
    torch.save(served.state_dict(), file)
    assert file.tell() < before * 1.1
    other = Served(Llama(True), FORM, CPU)
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
    assert lie_beside(other.model, ["gate", "up"])
    assert torch.equal(other(x), expected)


def test_files_hold_each_weight_once_and_are_laid_when_they_are_loaded(tmp_path):
    served = Served(Llama(), FORM, CPU)
    x = torch.randn(2, 256)
    served.save(tmp_path / "model.pt2", (x,))
    assert (tmp_path / "model.pt2").stat().st_size < distinct_bytes(parts(served)) + 60_000
    loaded = load(tmp_path / "model.pt2", CPU)
    assert torch.equal(loaded(x), served(x))
    state = loaded.graph.state_dict()
    assert _follow(state, "model.gate", "model.up")
    assert _follow(state, "model.q", "model.v")


def test_files_of_models_whose_weights_lie_apart_are_laid_when_they_are_loaded(tmp_path):
    served = Served(Llama(), FORM, CPU)
    served.model._apply(torch.clone)
    x = torch.randn(2, 256)
    served.save(tmp_path / "model.pt2", (x,))
    loaded = load(tmp_path / "model.pt2", CPU)
    assert torch.equal(loaded(x), served(x))
    state = loaded.graph.state_dict()
    assert _follow(state, "model.gate", "model.up")
    assert _follow(state, "model.q", "model.v")


def test_what_is_saved_of_a_layer_is_contiguous():
    model = nn.Module()
    for name in ("a", "b"):
        kept = KINDS["int4_weights"].keep(torch.randn(32, 256), name)
        setattr(model, name, QuantisedLinear(kept, None, "int4_weights", torch.bfloat16, "reference"))
    lay_beside(model)
    assert not model.a.scale.is_contiguous()
    assert all(part.is_contiguous() for part in model.a.portable().buffers())


@pytest.mark.parametrize("kind", KINDS)
def test_states_can_be_written_to_files_of_contiguous_tensors(kind, tmp_path):
    model = nn.Module()
    for name in ("a", "b"):
        kept = KINDS[kind].keep(torch.randn(32, 256), name)
        setattr(model, name, QuantisedLinear(kept, None, kind, torch.bfloat16, "reference"))
    lay_beside(model)
    save_file(model.state_dict(), tmp_path / "state.safetensors")
    found = load_file(tmp_path / "state.safetensors")
    assert all(torch.equal(found[name].float(), value.float()) for name, value in model.state_dict().items())
    before = distinct_bytes(parts(model))
    model.load_state_dict(found)
    assert lie_beside(model, ["a", "b"])
    assert distinct_bytes(parts(model)) == before


def test_programs_whose_weights_lie_apart_are_laid_by_what_their_graph_says():
    served = Served(Llama(), FORM, CPU)
    served.model._apply(torch.clone)
    program = torch.export.export(served.model, (torch.randn(2, 256).bfloat16(),))
    for value in program.state_dict.values():
        value.data = value.data.clone()
    x = torch.randn(2, 256).bfloat16()
    expected = program.module()(x)
    lay_program_beside(program)
    state = program.module().state_dict()
    assert _follow(state, "gate", "up")
    assert _follow(state, "q", "v")
    assert not _follow(state, "k", "gate")
    assert torch.equal(program.module()(x), expected)


def _follow(state, first, second):
    return all(
        state[f"{first}.{part}"].data_ptr() + state[f"{first}.{part}"].numel() * size
        == state[f"{second}.{part}"].data_ptr()
        for part, size in (("q", 1), ("scale", 4))
    )


class Again(nn.Module):
    """Two layers of one bias, one of them called twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(256, 256), nn.Linear(256, 256)
        self.b.bias = self.a.bias

    def forward(self, x):
        return self.a(x) + self.b(x) * self.a(x)


def test_what_is_shared_or_called_twice_is_kept_once(tmp_path):
    served, x = Served(Again(), FORM, CPU), torch.randn(2, 256)
    assert served.model.a.bias is served.model.b.bias
    assert _memory(served) == distinct_bytes(parts(served))
    before = [part.data_ptr() for part in parts(served)]
    lay_beside(served.model)
    assert [part.data_ptr() for part in parts(served)] == before
    served.save(tmp_path / "model.pt2", (x,))
    loaded = load(tmp_path / "model.pt2", CPU)
    assert torch.equal(loaded(x), served(x))
    assert _memory(loaded) == distinct_bytes(parts(loaded))


def _memory(model):
    """Bytes of whole memories, also of what nothing reads."""
    return sum({one.data_ptr(): one.nbytes() for one in (part.untyped_storage() for part in parts(model))}.values())


def test_copies_of_loaded_models_and_moved_ones_are_laid_again(tmp_path):
    x = torch.randn(2, 256)
    served = Served(Llama(True), FORM, CPU)
    served.save(tmp_path / "model.pt2", (x,))
    loaded = load(tmp_path / "model.pt2", CPU)
    expected, bytes = loaded(x), distinct_bytes(parts(loaded))
    made = copy.deepcopy(loaded)
    moved = loaded._apply(torch.clone)
    for model in (made, moved):
        assert torch.equal(model(x), expected)
        assert distinct_bytes(parts(model)) == bytes
        state = model.graph.state_dict()
        assert _follow(state, "model.gate", "model.up")
        up = state["model.up.bias"]
        assert state["model.gate.bias"].data_ptr() + up.numel() * up.element_size() == up.data_ptr()


@pytest.mark.parametrize("kind", KINDS)
def test_pickles_hold_each_weight_once(kind):
    model = nn.Module()
    model.experts = nn.ModuleList(
        QuantisedLinear(KINDS[kind].keep(torch.randn(32, 256), ""), None, kind, torch.bfloat16, "reference")
        for _ in range(16)
    )
    bytes = distinct_bytes(parts(model))
    apart = len(pickle.dumps(model))
    lay_beside(model)
    pickled = pickle.dumps(model)
    assert len(pickled) < apart
    for made in (pickle.loads(pickled), copy.deepcopy(model)):
        assert lie_beside(made, [f"experts.{at}" for at in range(16)])
        assert _memory(made) == bytes
        assert all(torch.equal(one.q, two.q) for one, two in zip(made.experts, model.experts, strict=True))
        assert torch.equal(made.experts[3].weight, model.experts[3].weight)
