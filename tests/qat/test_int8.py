"""The INT8 model: what its compiled code calls, its file, and what it refuses."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from deepseek_mp.errors import BatchError, CheckpointError, ConfigError
from deepseek_mp.programs import write
from deepseek_mp.qat import Int8Model, convert, prepare
from deepseek_mp.qat.int8 import DECISIONS

LOAD = """
import sys, torch
from deepseek_mp.qat import Int8Model
x, expected = torch.load(sys.argv[2])
assert torch.equal(Int8Model.load(sys.argv[1]).reference(x), expected)
assert "torchao" not in sys.modules
"""


def test_the_file_gives_the_same_bits_in_a_fresh_process_without_torchao(simulated, example, tmp_path):
    int8 = convert(simulated)
    expected = int8.reference(example)
    int8.save(tmp_path / "model.pt2")
    loaded = Int8Model.load(tmp_path / "model.pt2")
    assert torch.equal(loaded.reference(example), expected)
    assert loaded.reference(example[:3]).shape == (3, 10)
    assert loaded.decisions == int8.decisions
    assert loaded.signature == int8.signature
    assert [decision.layer for decision in loaded.not_converted] == ["last"]
    torch.save((example, expected), tmp_path / "data.pt")
    code = [sys.executable, "-c", LOAD, str(tmp_path / "model.pt2"), str(tmp_path / "data.pt")]
    done = subprocess.run(code, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_program_of_another_origin_is_refused(tmp_path):
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.randn(2, 2),))
    torch.export.save(program, tmp_path / "other.pt2")
    with pytest.raises(CheckpointError, match=r"other\.pt2', without decisions\.json"):
        Int8Model.load(tmp_path / "other.pt2")


@pytest.mark.skipif(not all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))), reason="needs onnx and its runtime")
def test_an_onnx_file_has_integers_and_gives_the_outputs_of_the_graph(simulated, example, tmp_path):
    import onnx
    import onnxruntime

    int8 = convert(simulated)
    int8.export_onnx(tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("QuantizeLinear") == 4
    assert kinds.count("DequantizeLinear") == 8  # of four inputs, and four weights
    stored = {tuple(tensor.dims) for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    assert {(16, 8), (8, 1, 3, 3), (8, 8, 3, 3), (8, 8, 3)} <= stored
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 3, 8):
        found = session.run(None, {"x": example[:count].numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(found), int8.reference(example[:count]), rtol=1e-3, atol=1e-3)


def test_training_is_refused(simulated):
    int8 = convert(simulated)
    with pytest.raises(ConfigError, match="of a model in INT8"):
        int8.train()
    assert int8.eval() is int8


@pytest.mark.stress
def test_compiled_it_calls_int8_kernels_and_gives_the_outputs_of_the_graph(simulated, example, tmp_path):
    from torch._inductor.utils import run_and_get_code

    int8 = convert(simulated)
    out, code = run_and_get_code(int8, example)
    text = "".join(code)
    assert text.count("onednn.qconv") >= 3
    assert text.count("onednn.qlinear") >= 1
    torch.testing.assert_close(out, int8.reference(example), atol=2e-2, rtol=1e-2)
    assert not torch._inductor.config.freezing
    int8.save(tmp_path / "model.pt2")
    assert torch.equal(Int8Model.load(tmp_path / "model.pt2")(example), out)
    torch.testing.assert_close(int8(example[:3]), int8.reference(example[:3]), atol=2e-2, rtol=1e-2)


def test_under_autocast_the_reference_is_what_the_graph_says(simulated, example):
    int8 = convert(simulated)
    expected = int8.reference(example)
    with torch.autocast("cpu"):
        assert torch.equal(int8.reference(example), expected)


def test_inputs_of_other_dtypes_and_sizes_are_refused_before_anything_is_compiled(simulated, example):
    int8 = convert(simulated)
    for call in (int8, int8.reference):
        with pytest.raises(BatchError, match=r"input x, float64 \[8, 1, 6, 6\]\. Allowed: x float32"):
            call(example.double())
        with pytest.raises(BatchError, match=r"float32 \[8, 1, 6, 7\]"):
            call(torch.zeros(8, 1, 6, 7))
    assert torch.equal(int8.reference(x=example), int8.reference(example))


def test_a_file_knows_which_inputs_it_takes(simulated, example, tmp_path):
    int8 = convert(simulated)
    int8.save(tmp_path / "model.pt2")
    loaded = Int8Model.load(tmp_path / "model.pt2")
    assert loaded.signature == int8.signature
    with pytest.raises(BatchError, match="int64"):
        loaded.reference(example.long())


@pytest.mark.parametrize("about", [3, [], {"decisions": []}, {"decisions": 1, "signature": {}}])
def test_a_file_that_says_something_else_is_refused(simulated, about, tmp_path):
    write(tmp_path / "model.pt2", convert(simulated)._program, {DECISIONS: about})
    with pytest.raises(CheckpointError, match=r"decisions\.json is damaged"):
        Int8Model.load(tmp_path / "model.pt2")


@pytest.mark.parametrize("how", [pickle.dumps, copy.copy])
def test_it_cannot_be_pickled_and_says_what_to_do(simulated, how):
    with pytest.raises(ConfigError, match=r"an Int8Model to be pickled .* Call save\(path\), and Int8Model.load"):
        how(convert(simulated))


def test_a_deep_copy_shares_nothing_and_gives_the_same(simulated, example):
    int8 = convert(simulated)
    found = copy.deepcopy(int8)
    assert torch.equal(found.reference(example), int8.reference(example))
    shared = {tensor.data_ptr() for tensor in int8.buffers() if tensor.nbytes}
    assert shared.isdisjoint(tensor.data_ptr() for tensor in found.buffers() if tensor.nbytes)


def test_it_is_neither_cast_nor_moved(simulated, example):
    int8 = convert(simulated)
    expected = int8.reference(example)
    assert torch.equal(int8.cpu().float().reference(example), expected)
    for change in (int8.half, int8.double, lambda: int8.to("meta")):
        with pytest.raises(ConfigError, match=r"an Int8Model to be in torch\.float\d+ on \w+"):
            change()
    assert torch.equal(int8.reference(example), expected)


@pytest.mark.stress
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_any_number_are_taken(channels):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3, padding=1),
        nn.Flatten(),
        nn.Linear(512, 4),
    )
    int8 = convert(prepare(model, torch.randn(8, channels, 8, 8)).eval())
    for size in (8, 5, 1, 20, 64, 5):
        x = torch.randn(size, channels, 8, 8)
        torch.testing.assert_close(int8(x), int8.reference(x), atol=0.02, rtol=0.02)
