"""Costs of units: what is counted, and what is timed."""

import torch
from torch import nn

from deepseek_mp.backends import capabilities
from deepseek_mp.costs import CostCache
from deepseek_mp.precision import RECIPES
from deepseek_mp.profiler.layer_times import layer_costs

CPU = torch.device("cpu")


def costs(timed, **options):
    layer = nn.Linear(8, 4)
    return costs_of(nn.Sequential(layer, nn.Linear(4, 8), layer), torch.randn(16, 8), timed=timed, **options)


def costs_of(model, x, **options):
    asked = [RECIPES["bf16"], RECIPES["block"]]
    options = {"timed": True, "progress": lambda share: None, **options}
    return layer_costs(model, lambda: model(x).sum(), asked, capabilities(CPU), CPU, **options)


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


def test_without_seconds_the_cache_is_all_there_is():
    cache = CostCache(disk=False)
    assert costs(timed=True, cache=cache, budget_s=0.0).milliseconds == {}
    timed = costs(timed=True, cache=cache).milliseconds
    assert timed
    assert costs(timed=True, cache=cache, budget_s=0.0).milliseconds == timed
    assert costs(timed=True, cache=cache, budget_s=0.0, kernels="reference").milliseconds == {}


def test_what_was_timed_is_found_again_by_the_next_process(monkeypatch, tmp_path):
    monkeypatch.setenv("DEEPSEEK_MP_CACHE", str(tmp_path))
    timed = costs(timed=True).milliseconds
    assert costs(timed=True, budget_s=0.0).milliseconds == timed


def test_times_in_another_memory_format_are_named_by_their_recipe():
    conv, x = nn.Sequential(nn.Conv2d(4, 8, 3)), torch.randn(2, 4, 6, 6)
    cache = CostCache(disk=False)
    found = costs_of(conv, x, cache=cache, memory_format="channels_last")
    assert "fp32" in found.milliseconds["0"]
    assert costs_of(conv, x, cache=cache, budget_s=0.0).milliseconds == {}
