"""Formats are recorded for every tensor, and FP8 of one kind becomes that which a device has."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from deepseek_mp.errors import CheckpointError
from deepseek_mp.inference import Form, Served, load
from deepseek_mp.inference import stored_formats as module
from deepseek_mp.inference.archive import as_program
from deepseek_mp.inference.form import LINEAR_KINDS
from deepseek_mp.inference.stored_formats import adapt, check_formats, formats_of
from deepseek_mp.ops.fp8_kinds import to_kind
from deepseek_mp.ops.int4_linear import has_native
from deepseek_mp.programs import read

CPU = torch.device("cpu")
X = torch.randn(2, 256, generator=torch.Generator().manual_seed(1))


class Twice(nn.Module):
    """A layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(256, 256)

    def forward(self, x):
        return self.layer(self.layer(x))


class Asked(nn.Module):
    """A layer whose weight the forward reads beside calling it, as some ask it for the dtype; and a buffer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(256, 256)
        self.register_buffer("positions", torch.arange(256.0), persistent=False)

    def forward(self, x):
        return self.layer(x.to(self.layer.weight.dtype)) + (x + self.positions / 256) @ self.layer.weight


def served(linear="fp8_weights"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256, bias=False), nn.BatchNorm1d(256))
    return Served(model, Form(format="bf16", linear=linear), CPU)


def program_of(model):
    return as_program(model, X, (0,)).program


def device_with(monkeypatch, *formats):
    """As if every device had these formats; what is saved there has that kind of FP8."""
    monkeypatch.setattr(module, "capabilities", lambda _: SimpleNamespace(matmul_formats=frozenset(formats)))


def outputs(program):
    with torch.no_grad():
        return program.module(check_guards=False)((X,), {})


def test_every_tensor_has_its_format():
    found = formats_of(program_of(served()))
    assert found["model.0.q"] == {"format": "fp8_e4m3", "shape": [256, 256], "kind": "ocp", "scale": "model.0.scale"}
    assert found["model.0.scale"] == {"format": "fp32", "shape": [256]}
    assert found["model.0.bias"] == {"format": "bf16", "shape": [256]}
    assert found["model.2.num_batches_tracked"] == {"format": "int64", "shape": []}
    assert formats_of(program_of(served("int8_weights")))["model.1.q"]["format"] == "int8"


def test_bytes_with_scales_are_two_codes_of_int4():
    codes = torch.zeros(2, 3, dtype=torch.uint8)
    assert module._described(codes, "s") == {"format": "int4", "shape": [2, 3], "scale": "s"}
    assert module._described(codes, None) == {"format": "uint8", "shape": [2, 3]}


def test_fp8_of_the_other_kind_is_converted_with_its_scales(monkeypatch):
    program = program_of(served())
    before = {name: tensor.clone() for name, tensor in program.state_dict.items()}
    expected = outputs(program)
    device_with(monkeypatch, "bf16", "fp8_e4m3fnuz")
    adapt(program, CPU)
    assert formats_of(program)["model.0.q"]["kind"] == "fnuz"
    q, scale = to_kind(before["model.0.q"], before["model.0.scale"], "fnuz")
    assert torch.equal(program.state_dict["model.0.q"].view(torch.uint8), q.view(torch.uint8))
    assert torch.equal(program.state_dict["model.0.scale"], scale)
    assert torch.equal(outputs(program), expected)


def test_a_file_of_either_kind_gives_the_same_values_on_a_device_of_the_other(monkeypatch, tmp_path):
    model, path = served(), tmp_path / "model.pt2"
    expected = model(X)
    for layer in (model.model[0], model.model[1]):
        layer.q, layer.scale = to_kind(layer.q, layer.scale, "fnuz")
    assert torch.equal(model(X), expected)
    model.save(path, X)
    loaded = load(path, "cpu")
    assert {entry["kind"] for entry in loaded.formats.values() if "kind" in entry} == {"ocp"}
    assert torch.equal(loaded(X), expected)
    device_with(monkeypatch, "fp8_e4m3fnuz")
    same = load(path, "cpu")
    assert {entry["kind"] for entry in same.formats.values() if "kind" in entry} == {"fnuz"}
    assert torch.equal(same(X), expected)


@pytest.mark.parametrize("formats", [(), ("fp8_e4m3",), ("fp8_e4m3", "fp8_e4m3fnuz")])
def test_ocp_s_kind_stays_wherever_fnuz_is_not_the_only_one(monkeypatch, formats):
    program = program_of(served())
    q = program.state_dict["model.0.q"]
    device_with(monkeypatch, *formats)
    adapt(program, CPU)
    assert program.state_dict["model.0.q"] is q


def test_the_implementation_is_the_device_s_own(monkeypatch):
    program = program_of(served("int8_weights"))
    layers = program.graph.find_nodes(op="call_function", target=torch.ops.deepseek_mp.weight_only_linear.default)
    assert [node.args[4] for node in layers] == ["reference"] * 2
    asked = lambda device, dtype, format, width: f"{device}-{dtype}-{format}-{width}"  # noqa: E731
    monkeypatch.setattr(module.weight_only, "fastest", asked)
    adapt(program, CPU)
    assert [node.args[4] for node in layers] == ["cpu-torch.bfloat16-int8-256"] * 2


def test_products_in_fp8_stay_one_operation_and_get_the_device_s_own(monkeypatch):
    model = served("fp8")
    for layer in (model.model[0], model.model[1]):
        layer.implementation = "native"  # which a compiler, and so the exporter, sees through
    program = program_of(model)
    assert formats_of(program)["model.0.q"]["scale"] == "model.0.scale"
    layers = program.graph.find_nodes(op="call_function", target=torch.ops.deepseek_mp.fp8_linear.default)
    monkeypatch.setattr(module.fp8_linear, "fastest", lambda device, dtype, channels, width: f"{channels}x{width}")
    adapt(program, CPU)
    assert [node.args[4] for node in layers] == ["256x256"] * 2


@pytest.mark.parametrize("reads", ["reference", "native"])
def test_weights_in_4_bits_are_stored_as_every_device_reads_them(monkeypatch, tmp_path, reads):
    """Whatever the library's order is on this machine, it is not in the file."""
    torch.manual_seed(0)
    model, path = Served(Twice(), Form(format="bf16", linear="int4_weights"), CPU), tmp_path / "model.pt2"
    kept = model.model.layer.portable()
    expected = model(X)
    model.save(path, X)
    assert torch.equal(model(X), expected)
    stored = read(path, "served.json")[0].state_dict
    for name, tensor in kept.named_buffers():
        assert torch.equal(stored[f"model.layer.{name}"], tensor)
    monkeypatch.setattr(module.int4_linear, "fastest", lambda *_: None if reads == "reference" else reads)
    if reads == "native" and not has_native(CPU, 256, 128):
        pytest.skip("PyTorch has no product of BF16 and 4 bits for this CPU")
    found = load(path, "cpu")(X)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    assert reads == "reference" or torch.equal(found, expected)


@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_a_layer_whose_weight_the_forward_reads_too_gives_the_same_from_a_file(kind, tmp_path):
    torch.manual_seed(0)
    model, path = Served(Asked(), Form(format="bf16", linear=kind), CPU), tmp_path / "model.pt2"
    model.save(path, X)
    torch.testing.assert_close(load(path, "cpu")(X), model(X), rtol=2e-2, atol=2e-2)


def test_fp8_that_the_forward_reads_too_is_converted_for_both(monkeypatch):
    torch.manual_seed(0)
    program = program_of(Served(Asked(), Form(format="bf16", linear="fp8_weights"), CPU))
    expected = outputs(program)
    device_with(monkeypatch, "bf16", "fp8_e4m3fnuz")
    adapt(program, CPU)
    assert torch.equal(outputs(program), expected)


def test_weights_in_4_bits_in_the_order_of_a_machine_are_refused():
    program = program_of(served("int4_weights"))
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.deepseek_mp.int4_linear.default):
        node.update_arg(3, None)
    with pytest.raises(CheckpointError, match="in the order of the machine that saved them"):
        adapt(program, CPU)


def test_formats_other_than_said_are_refused():
    program = program_of(served())
    said = formats_of(program)
    check_formats(program, said)
    with pytest.raises(CheckpointError, match=r"tensor 'model\.0\.q', .*, said to be None"):
        check_formats(program, {name: entry for name, entry in said.items() if name != "model.0.q"})
    with pytest.raises(CheckpointError, match=r"tensor 'more', None, said to be"):
        check_formats(program, {**said, "more": {}})
