"""The floating model computes what the trained one does without rounding, with BatchNorms folded."""

from __future__ import annotations

import pytest
import torch

from deepseek_mp.qat import FloatingModel, compiled
from deepseek_mp.qat.modes import norms_of


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_outputs_are_those_of_the_weights_unrounded(simulated, example, monkeypatch, dtype, tolerance):
    monkeypatch.setattr(compiled, "inductor_compile", lambda graph, inputs: graph)
    floating = FloatingModel(simulated.eval(), dtype)
    with simulated.observing():
        expected = simulated(example)
    found = floating(example)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    assert norms_of(floating.graph.graph) == []
    assert {tensor.dtype for tensor in floating.graph.parameters()} == {dtype}
    assert not [node for node in floating.graph.graph.nodes if node.op == "call_module"]
    assert floating(example[:3]).shape == (3, 10)


def test_the_simulation_stays_as_it_is(simulated, example):
    simulated.eval()
    before = simulated(example)
    FloatingModel(simulated, torch.bfloat16)
    assert torch.equal(simulated(example), before)
