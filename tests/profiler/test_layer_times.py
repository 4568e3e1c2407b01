"""Costs of units: what is counted, and what is timed."""

import torch
from torch import nn

from deepseek_mp.backends import capabilities
from deepseek_mp.precision import RECIPES
from deepseek_mp.profiler.layer_times import layer_costs

CPU = torch.device("cpu")


def costs(timed):
    layer = nn.Linear(8, 4)
    model, x = nn.Sequential(layer, nn.Linear(4, 8), layer), torch.randn(16, 8)
    asked = [RECIPES["bf16"], RECIPES["block"]]
    return layer_costs(
        model, lambda: model(x).sum(), asked, capabilities(CPU), CPU, timed=timed, progress=lambda share: None
    )


def test_a_unit_called_twice_counts_twice(monkeypatch, tmp_path):
    monkeypatch.setenv("DEEPSEEK_MP_CACHE", str(tmp_path))
    found = costs(timed=False)
    assert found.inputs == {"0": 2 * 16 * 8, "1": 16 * 4}
    assert found.macs["0"] > found.macs["1"]
    assert found.milliseconds == {}


def test_only_what_the_device_multiplies_is_timed(monkeypatch, tmp_path):
    monkeypatch.setenv("DEEPSEEK_MP_CACHE", str(tmp_path))
    found = costs(timed=True)
    native = {"fp32", "bf16"} if "bf16" in capabilities(CPU).matmul_formats else {"fp32"}
    assert set(found.milliseconds["0"]) == native
