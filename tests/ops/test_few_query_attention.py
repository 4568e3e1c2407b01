"""Attention of few queries as an op: what the compiler is told of it, what it refuses, and where kernels are."""

from __future__ import annotations

import pytest
import torch
from attention_cases import CASES, Case, mask_of, operands
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from deepseek_mp.errors import ConfigError, ShapeError
from deepseek_mp.ops import choose
from deepseek_mp.ops import few_query_attention as module
from deepseek_mp.ops.choose import few_query_attention_of
from deepseek_mp.ops.few_query_attention import fastest, few_query_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("name", ["one query", "queries", "groups"])
def test_the_compiler_is_told_the_truth(name):
    given = operands(CASES[name], torch.float32)
    for kind in ("none", "tail", "added"):
        mask = mask_of(kind, CASES[name], torch.float32)
        torch.library.opcheck(torch.ops.deepseek_mp.few_query_attention, (*given, mask, 0.1, "reference"))


def test_its_operations_are_those_that_pytorch_counts():
    given = operands(Case(batch=3, heads=2, queries=4, wide=32), torch.float32)
    counts = []
    for call in (
        lambda: few_query_attention(*given, None, 0.1, implementation="reference"),
        lambda: F.scaled_dot_product_attention(*given),
    ):
        with FlopCounterMode(display=False) as mode:
            call()
        counts.append(mode.get_total_flops())
    assert counts[0] == 2 * 3 * 2 * 4 * 300 * (64 + 32)
    assert counts[1] in (0, counts[0])  # on a CPU some releases count nothing


def test_operands_that_do_not_belong_together():
    query, key, value = operands(Case(batch=2, heads=4, queries=3), torch.float32)
    for wrong in (
        (query[0], key, value, None),
        (query, key[:, :, :, :32], value, None),
        (query, key, value[:, :, :200], None),
        (query[:, :3], key, value, None),
        (query[:1], key, value, None),
        (query, key, value, torch.ones(299, dtype=torch.bool)),
        (query, key, value, torch.ones(2, 1, 300, dtype=torch.bool)),
        (query, key, value, torch.ones(1, 2, 4, 3, 300, dtype=torch.bool)),
    ):
        with pytest.raises(ShapeError, match="attention of"):
            few_query_attention(*wrong, 0.1, implementation="reference")
    for wrong, message in (
        ((query.double(), key, value, None), "attention in torch.float64"),
        ((query, key.half(), value, None), "torch.float32, torch.float16 and torch.float32"),
        ((query, key, value, torch.ones(300, dtype=torch.int32)), r"a mask in torch\.int32"),
    ):
        with pytest.raises(ConfigError, match=message):
            few_query_attention(*wrong, 0.1, implementation="reference")
    with pytest.raises(ConfigError, match="implementation 'native' of few_query_attention"):
        few_query_attention_of("native")


def test_kernels_are_taken_where_they_run(monkeypatch):
    monkeypatch.setattr(module, "_kernels_run", lambda device, dtype, width: device.type == "cuda")
    assert fastest(CUDA, torch.bfloat16, 128) == "triton"
    assert fastest(CUDA, torch.float16, 256) == "triton"
    assert fastest(CUDA, torch.float16, 257) is None
    assert fastest(CUDA, torch.float32, 128) is None
    assert fastest(CPU, torch.bfloat16, 128) is None


def test_a_cpu_has_no_kernels():
    assert fastest(CPU, torch.bfloat16, 64) is None


@pytest.mark.parametrize(("off", "found"), [(0.0, "triton"), (0.1, None)])
def test_kernels_that_give_other_numbers_are_not_used(monkeypatch, caplog, off, found):
    reference = module.few_query_attention_of("reference")

    def kernel(*given):
        return reference(*given) + off

    monkeypatch.setattr(module, "few_query_attention_of", lambda name: kernel if name == "triton" else reference)
    monkeypatch.setattr(choose, "has_kernels", lambda _: True)
    module._kernels_run.cache_clear()
    try:
        with torch.device("meta"):  # whatever a user has set as the default
            assert fastest(CPU, torch.bfloat16, 64) == found
    finally:
        module._kernels_run.cache_clear()
    assert ("other numbers" in caplog.text) == (found is None)
