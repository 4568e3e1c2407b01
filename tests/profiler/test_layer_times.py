"""Costs of units: what is counted, and what is timed."""

import torch
from torch import nn

from deepseek_mp.backends import capabilities
from deepseek_mp.precision import RECIPES
from deepseek_mp.profiler.layer_times import kept_bytes, layer_costs

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


def test_bytes_kept_for_backward_are_those_of_wgrads_input():
    assert kept_bytes(RECIPES["fp32"], 10) == 40
    assert kept_bytes(RECIPES["bf16"], 10) == 20
    assert kept_bytes(RECIPES["block"], 10) == 10
    assert kept_bytes(RECIPES["row_gw_hp"], 10) == 20
