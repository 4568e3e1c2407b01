"""Served models as ONNX files: what ONNX Runtime computes, and in which formats the weights lie in the file."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from deepseek_mp.errors import ConfigError
from deepseek_mp.inference import Form, Served
from deepseek_mp.programs import onnx_export

CPU = torch.device("cpu")
needs_onnx = pytest.mark.skipif(
    not all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))), reason="needs onnx and its runtime"
)


class Net(nn.Module):
    """Two inputs, images and a scale; a layer for 8 bits with a bias, and one without."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.one, self.two = nn.Linear(256, 256), nn.Linear(256, 256, bias=False)

    def forward(self, images, *, scale):
        x = self.norm(self.conv(images)).relu().flatten(1)
        return {"logits": self.two(self.one(x).relu()) * scale}


def session(path):
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def inputs(count=4):
    return {"images": torch.randn(count, 3, 10, 10), "scale": torch.ones(count, 1)}


CASES = [
    (Form(folded=True, channels_last=True), 1e-5, {}),
    (Form(format="fp16"), 2e-3, {}),
    (Form(format="bf16"), 2e-2, {}),
    (Form(format="bf16", linear="int8_weights"), 2e-2, {"one.q": 3, "two.q": 3}),
    (Form(format="fp16", linear="int8_weights"), 2e-3, {"one.q": 3, "two.q": 3}),
    (Form(format="bf16", linear="fp8_weights"), 2e-2, {"one.q": 17, "two.q": 17}),
]


@needs_onnx
@pytest.mark.parametrize(("form", "close", "kept"), CASES, ids=lambda value: getattr(value, "name", ""))
def test_the_runtime_gives_the_outputs_and_the_file_has_the_weights_as_they_are(form, close, kept, tmp_path):
    import onnx

    torch.manual_seed(0)
    served, path = Served(Net(), form, CPU), tmp_path / "model.onnx"
    served.export_onnx(path, inputs())
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == onnx_export.OPSET
    eight = {tensor.name: tensor.data_type for tensor in model.graph.initializer if tensor.data_type in (2, 3, 17)}
    assert eight == {f"model.{name}": number for name, number in kept.items()}
    assert [node.op_type for node in model.graph.node].count("DequantizeLinear") == len(kept)
    assert 16 not in {tensor.data_type for tensor in model.graph.initializer}  # BF16 is widened
    running = session(path)
    assert [node.name for node in running.get_inputs()] == ["images", "scale"]
    for count in (1, 7):
        given = inputs(count)
        found = running.run(["logits"], {name: tensor.numpy() for name, tensor in given.items()})[0]
        torch.testing.assert_close(torch.from_numpy(found), served(**given)["logits"], rtol=close, atol=close)


@needs_onnx
def test_weights_in_8_bits_are_multiplied_as_the_op_says(tmp_path):
    """In FP32 with the widened weights, to the last bits: rounded nowhere else."""
    torch.manual_seed(0)
    served, x = Served(nn.Linear(256, 256), Form(format="bf16", linear="int8_weights"), CPU), torch.randn(5, 256)
    served.export_onnx(tmp_path / "model.onnx", x)
    found = session(tmp_path / "model.onnx").run(None, {"x": x.numpy()})[0]
    layer = served.model
    expected = nn.functional.linear(x, layer.q.float() * layer.scale[:, None], layer.bias.float())
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-5)


@needs_onnx
def test_bf16_stays_when_asked_for(tmp_path):
    import onnx

    served = Served(nn.Linear(3, 3), Form(format="bf16"), CPU)
    served.export_onnx(tmp_path / "model.onnx", torch.randn(2, 3), widen=False)
    kinds = {tensor.data_type for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert kinds == {onnx.TensorProto.BFLOAT16}


class Weighted(nn.Module):
    """A number between two tensors, and an output that is named as an input."""

    def forward(self, x, scale, offset):
        return {"x": x * scale - offset, "offset": offset}


@needs_onnx
@pytest.mark.parametrize("by_name", [False, True])
def test_names_are_those_of_the_tensors_and_no_output_has_that_of_an_input(by_name, tmp_path):
    import onnx

    path, x, offset = tmp_path / "model.onnx", torch.randn(3, 4), torch.randn(3, 4)
    given = {"x": x, "scale": 2.0, "offset": offset} if by_name else (x, 2.0, offset)
    Served(Weighted(), Form(), CPU).export_onnx(path, given)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    runtime = session(path)
    assert [one.name for one in runtime.get_outputs()] == ["output_x", "output_offset"]
    found = runtime.run(None, {"x": x.numpy(), "offset": offset.numpy()})
    assert torch.equal(torch.from_numpy(found[0]), x * 2 - offset)
    assert torch.equal(torch.from_numpy(found[1]), offset)


@needs_onnx
@pytest.mark.parametrize("widen", [True, False])
def test_the_file_has_the_state_of_now_and_the_model_keeps_it(widen, tmp_path):
    class Counts(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls.add_(1)
            return super().forward(x) + self.calls

    served, x = Served(Counts(), Form(), CPU), torch.randn(2, 3)
    served(x)
    served.export_onnx(tmp_path / "model.onnx", x, widen=widen)
    assert served.model.calls == 1
    running = session(tmp_path / "model.onnx")
    for _ in range(2):  # a file of ONNX has no state to go on from
        found = torch.from_numpy(running.run(None, {"x": x.numpy()})[0])
        served.model.calls.fill_(1)
        torch.testing.assert_close(found, served(x))


def test_what_cannot_be_exported_is_refused(monkeypatch, tmp_path):
    served = Served(nn.Linear(3, 3), Form(), CPU)
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="ONNX without onnx and onnxscript"):
        served.export_onnx(tmp_path / "model.onnx", torch.randn(2, 3))
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="without example inputs"):
        served.export_onnx(tmp_path / "model.onnx")
    with pytest.raises(ConfigError, match="a directory"):
        served.export_onnx(tmp_path, torch.randn(2, 3))


def test_widened_weights_stay_parameters_of_which_no_copies_are_kept():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight
            self.register_buffer("shift", torch.ones(3))

        def forward(self, x):
            return self.b(self.a(x)) + self.shift

    program = torch.export.export(Twice().bfloat16(), (torch.randn(2, 3).bfloat16(),))
    wide = onnx_export.widened(program)
    assert {str(tensor.dtype) for tensor in wide.state_dict().values()} == {"torch.float32"}
    assert sorted(dict(wide.named_parameters())) == ["a.bias", "a.weight", "b.bias"]
    assert list(dict(wide.named_buffers())) == ["shift"]
    assert wide.b.weight is wide.a.weight
