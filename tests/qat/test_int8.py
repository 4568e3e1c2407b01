"""The INT8 model: what its compiled code calls, its file, and what it refuses."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from deepseek_mp.errors import ConfigError
from deepseek_mp.qat import Int8Model, convert

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
    assert [decision.layer for decision in loaded.not_converted] == ["last"]
    torch.save((example, expected), tmp_path / "data.pt")
    code = [sys.executable, "-c", LOAD, str(tmp_path / "model.pt2"), str(tmp_path / "data.pt")]
    done = subprocess.run(code, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_program_of_another_origin_is_refused(tmp_path):
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.randn(2, 2),))
    torch.export.save(program, tmp_path / "other.pt2")
    with pytest.raises(ConfigError, match="an exported program without decisions"):
        Int8Model.load(tmp_path / "other.pt2")


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
