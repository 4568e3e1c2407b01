"""ONNX files of programs: names, sizes on the disk, and what has no form there."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from deepseek_mp.errors import ConfigError
from deepseek_mp.inference.quantised_embedding import QuantisedEmbedding
from deepseek_mp.programs import export_onnx, exported, onnx_export, widened

needs_onnx = pytest.mark.skipif(
    not all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))), reason="needs onnx and its runtime"
)


class Net(nn.Module):
    """A tuple and a dict in, nested containers out; in BF16 inside, with a tie."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(3, 3).bfloat16()
        self.two = nn.Linear(3, 3, bias=False).bfloat16()
        self.two.weight = self.one.weight

    def forward(self, args, kwargs):
        x = self.two(self.one(args[0].bfloat16())).float() * kwargs["by"]
        return {"logits": x, "more": [x.argmax(-1)]}


def program(module=None):
    given = (torch.randn(4, 3),), {"by": torch.ones(4, 1)}
    return exported(Net() if module is None else module, *given).program


@needs_onnx
def test_the_old_flags_of_fp32_products_are_not_read(monkeypatch, tmp_path):
    made = program()
    monkeypatch.delattr(torch._C, "_get_cudnn_allow_tf32")  # it raises where users write the new ones
    export_onnx(tmp_path / "model.onnx", made)


def test_without_onnx_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(ConfigError, match=r"ONNX without onnxscript\. .*pip install 'deepseek-mp\[onnx\]'"):
        export_onnx(tmp_path / "model.onnx", program())


def test_importing_the_package_imports_no_onnx():
    assert "deepseek_mp.programs.onnx_export" in sys.modules
    assert "onnxscript" not in vars(onnx_export)


def test_widened_it_is_fp32_the_ties_stay_and_the_program_too():
    kept = program()
    before = {name: tensor.clone() for name, tensor in kept.state_dict.items()}
    wide = widened(kept)
    assert {tensor.dtype for tensor in wide.state_dict().values()} == {torch.float32}
    assert len({tensor.data_ptr() for tensor in wide.state_dict().values()}) == 2
    assert all(kept.state_dict[name].dtype is torch.bfloat16 for name in before)
    assert all(torch.equal(kept.state_dict[name], tensor) for name, tensor in before.items())
    x, by = torch.randn(4, 3), torch.ones(4, 1)
    state = {name: tensor.float() for name, tensor in before.items()}
    weight, bias = (next(tensor for name, tensor in state.items() if end in name) for end in ("weight", "bias"))
    expected = nn.functional.linear(nn.functional.linear(x, weight, bias), weight)
    torch.testing.assert_close(wide((x,), {"by": by})["logits"], expected, rtol=1e-6, atol=1e-6)


def test_an_operation_of_ours_without_a_form_is_refused_by_name(monkeypatch):
    class Ours(nn.Module):
        def forward(self, args, kwargs):
            q, scale = torch.zeros(2, 3, dtype=torch.int8), torch.ones(2)
            return torch.ops.deepseek_mp.weight_only_linear(args[0], q, scale, None, "reference") * kwargs["by"]

    kept = program(Ours())
    onnx_export.check_operations(kept)
    monkeypatch.setattr(onnx_export, "_WEIGHT_ONLY", None)
    with pytest.raises(ConfigError, match=r"deepseek_mp\.weight_only_linear in a program for ONNX\. Allowed: linear"):
        onnx_export.check_operations(kept)


@needs_onnx
def test_names_are_those_given_and_those_of_the_outputs(tmp_path):
    import onnxruntime

    export_onnx(tmp_path / "model.onnx", program(widened(program())), inputs=["x", "by"])
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert [node.name for node in session.get_inputs()] == ["x", "by"]
    assert [node.name for node in session.get_outputs()] == ["logits", "more_0"]
    found = session.run(None, {"x": torch.ones(2, 3).numpy(), "by": torch.ones(2, 1).numpy()})
    assert found[0].shape == (2, 3)


@needs_onnx
def test_large_tensors_lie_beside_the_file(tmp_path, monkeypatch):
    import onnx

    monkeypatch.setattr(onnx_export, "LARGEST", 0)
    export_onnx(tmp_path / "model.onnx", program())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    onnx.checker.check_model(tmp_path / "model.onnx")


@needs_onnx
def test_what_has_no_form_in_onnx_is_refused_by_name_and_leaves_no_file(tmp_path):
    class Odd(nn.Module):
        def forward(self, args, kwargs):
            return torch.linalg.svdvals(args[0]) * kwargs["by"]

    with pytest.raises(ConfigError, match=r"no form in ONNX \(.*linalg"):
        export_onnx(tmp_path / "model.onnx", program(Odd()))
    with pytest.raises(ConfigError, match="a directory"):
        export_onnx(tmp_path, program())
    assert list(tmp_path.iterdir()) == []


class Beside(nn.Module):
    """Something else before and behind its scores."""

    def __init__(self, other):
        super().__init__()
        self.linear, self.other = nn.Linear(3, 3), other

    def forward(self, args, kwargs):
        return {"loss": self.other, "logits": self.linear(args[0]) * kwargs["by"]}


@pytest.mark.parametrize("other", [3, 0.5, True])
def test_what_is_no_tensor_among_the_outputs_is_refused_by_name(monkeypatch, tmp_path, other):
    monkeypatch.setattr(onnx_export, "require_onnx", lambda: None)
    made = program(Beside(other))
    with pytest.raises(ConfigError, match=rf"output 'loss' = {other!r} in a program for ONNX\. Allowed: tensors\."):
        export_onnx(tmp_path / "net.onnx", made)


@needs_onnx
def test_a_none_among_the_outputs_is_left_out_with_its_name(tmp_path):
    import onnx

    export_onnx(tmp_path / "net.onnx", program(Beside(None)))
    assert [one.name for one in onnx.load(tmp_path / "net.onnx").graph.output] == ["logits"]


def test_a_table_in_fp8_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(onnx_export, "require_onnx", lambda: None)
    table = torch.randn(8, 4).to(torch.float8_e4m3fn)
    made = torch.export.export(QuantisedEmbedding(table, torch.ones(8), torch.float32), (torch.tensor([1, 2]),))
    with pytest.raises(ConfigError, match="a table in float8_e4m3fn in a program for ONNX"):
        export_onnx(tmp_path / "net.onnx", made)
