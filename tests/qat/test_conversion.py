"""The converted graph computes what the simulated model does, with weights in 8 bits."""

from __future__ import annotations

import gc
import weakref
from unittest.mock import patch

import pytest
import torch
from torch import nn

from deepseek_mp.errors import ConfigError
from deepseek_mp.qat import convert, prepare
from deepseek_mp.qat.constants import fold_constants


def train_a_little(simulated, example):
    optimizer = torch.optim.SGD(simulated.parameters(), lr=0.05)
    simulated.train()
    for _ in range(3):
        simulated(example).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_outputs_are_those_of_the_simulation_after_training(simulated, example):
    train_a_little(simulated, example)
    int8 = convert(simulated)
    expected = simulated.eval()(example)
    # Sums in another order may round a value at the middle of two steps the other way.
    torch.testing.assert_close(int8.reference(example), expected, atol=2e-2, rtol=1e-2)
    scales = {name: value for name, value in int8.graph.state_dict().items() if "_scale_" in name}
    now = [quantiser.scale for quantiser in simulated.quantisers() if quantiser.is_per_channel]
    assert len(scales) == len(now)
    assert all(any(torch.equal(value, scale) for scale in now) for value in scales.values())


def test_weights_are_integers_and_the_simulation_can_be_trained_on(simulated, example):
    int8 = convert(simulated)
    stored = [t for t in int8.graph.state_dict().values() if t.dtype == torch.int8]
    assert len(stored) == 4
    train_a_little(simulated, example)
    torch.testing.assert_close(convert(simulated).reference(example), simulated.eval()(example), atol=2e-2, rtol=1e-2)
    assert not torch.allclose(int8.reference(example), simulated(example), atol=2e-2)


def test_without_onednn_it_is_refused(simulated, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="has no oneDNN"):
        convert(simulated)


def test_the_old_flags_of_fp32_products_are_not_read(simulated, monkeypatch):
    monkeypatch.delattr(torch._C, "_get_cudnn_allow_tf32")  # it raises where users write the new ones
    assert convert(simulated).decisions


def test_a_norm_without_statistics_makes_torchao_trace_no_patterns(monkeypatch):
    from torchao.quantization.pt2e import qat_utils

    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU())
    simulated, x = prepare(model, torch.randn(4, 1, 6, 6)), torch.randn(3, 1, 6, 6)
    traced = []
    monkeypatch.setattr(qat_utils, "_get_aten_graph_module_for_pattern", lambda *args, **_: traced.append(args))
    int8 = convert(simulated)
    assert traced == []
    torch.testing.assert_close(int8.reference(x), simulated.eval()(x), rtol=1e-4, atol=1e-4)


class Turned(nn.Module):
    """Weights of products that lie in memory by columns: as they are stored, as a part, or as they are computed."""

    def __init__(self):
        super().__init__()
        self.stored, self.last = nn.Linear(16, 16), nn.Linear(16, 16)
        self.stored.weight = nn.Parameter(torch.randn(16, 16).t())
        self.parts = nn.Parameter(torch.randn(16, 32))
        self.low, self.rank = nn.Parameter(torch.randn(16, 4)), nn.Parameter(torch.randn(4, 16))

    def forward(self, x):
        first, second = (part.t() for part in self.parts.chunk(2, 1))
        weights = (first, second, (self.low @ self.rank).t())
        return self.stored(x), *(nn.functional.linear(x, weight) for weight in weights), self.last(x)


def test_compiled_products_are_right_whose_weights_lie_by_columns():
    torch.manual_seed(0)
    model, x = Turned().eval(), torch.randn(4, 16)
    int8 = convert(prepare(model, x))
    for found, expected in zip(int8(x), int8.reference(x), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)
    floats = [tensor for tensor in int8.graph.state_dict().values() if tensor.is_floating_point()]
    assert all(tensor.dim() < 2 for tensor in floats)  # nothing that weights were computed from is held


def test_models_do_not_outlive_their_last_user():
    def prepared_and_converted():
        model = nn.Sequential(nn.Linear(8, 4), nn.ReLU())
        simulated, x = prepare(model, torch.randn(4, 8)), torch.randn(4, 8)
        with patch("deepseek_mp.qat.conversion.fold_constants", wraps=fold_constants) as seen:
            int8 = convert(simulated)
        int8(x)
        graphs = [simulated.graph, seen.call_args.args[0], int8.graph]
        return [weakref.ref(one) for one in (model, simulated, int8, *graphs)]

    references = prepared_and_converted()
    gc.collect()
    assert [reference() for reference in references] == [None] * 6


def ranges_of(int8):
    """Scales and zero points of activations, which are numbers in the graph."""
    found = (node for node in int8.graph.graph.nodes if ".quantize_per_tensor" in str(node.target))
    return [node.args[1:3] for node in found]


def test_conversion_in_training_mode_does_not_observe_the_example_once_more():
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    simulated = prepare(nn.Sequential(nn.Linear(8, 4)), x).train()
    simulated(x * 100)
    in_training = ranges_of(convert(simulated))
    assert in_training == ranges_of(convert(simulated.eval()))


@pytest.mark.parametrize(
    "region",
    [lambda: torch.inference_mode(), lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["inference", "16 bits"],
)
def test_regions_of_the_caller_change_neither_preparation_nor_conversion(region):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(4, 8)
    expected = convert(prepare(model, x)).reference(x)
    simulated = prepare(model, x)
    with region():
        inside, after = convert(prepare(model, x)), convert(simulated)
        trained = prepare(model, x)
    trained(x).sum().backward()
    assert torch.equal(inside.reference(x), expected)
    assert torch.equal(after.reference(x), expected)
