"""The library's product of rows in FP8 against the reference, in eager and in compiled code."""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from deepseek_mp.ops.fp8_linear import _native_is_right, fp8_linear
from deepseek_mp.ops.native import fp8_linear as module
from deepseek_mp.ops.native.fp8_linear import plain, plain_row_cast
from deepseek_mp.ops.schema import quantise
from deepseek_mp.ops.weight_only import quantised_weight

BF16 = torch.bfloat16
HAS = _native_is_right(torch.device("cpu"), BF16)
needs_product = pytest.mark.skipif(not HAS, reason="this PyTorch has no product of FP8 with row scales on a CPU")


def test_rows_in_plain_ops_are_those_of_the_reference():
    x = torch.randn(7, 96) * 10 ** (torch.rand(7, 1) * 40 - 20)
    x[1, 3], x[2, 5], x[3], x[4] = torch.nan, torch.inf, 0.0, 1e-42
    values, scale = plain_row_cast(x)
    expected, expected_scale, _, _ = quantise(x, "fp8_e4m3", "row", False, True, False, "reference")
    assert torch.equal(scale[:, 0].nan_to_num(-1.0), expected_scale[:7].nan_to_num(-1.0))
    torch.testing.assert_close(values.float(), expected[:7].float(), rtol=2**-3, atol=2**-9, equal_nan=True)
    assert float((values.float() != expected[:7].float())[3:].float().mean()) < 0.01  # last bits of an inverse


@needs_product
@pytest.mark.parametrize("rows", [0, 1, 2, 16, 17])
@pytest.mark.parametrize("bias", [None, BF16, torch.float32])
def test_it_is_the_reference_rounded(rows, bias):
    q, scale = quantised_weight(torch.randn(48, 160), "fp8")
    b = None if bias is None else torch.randn(48).to(bias)
    x = torch.randn(rows, 160).to(BF16)
    expected = fp8_linear(x.float(), q, scale, b, implementation="reference")
    for found in (fp8_linear(x, q, scale, b, implementation="native"), plain(x, q, scale, b)):
        assert found.dtype is BF16
        torch.testing.assert_close(found.float(), expected, rtol=2**-6, atol=2**-6)


@needs_product
@pytest.mark.parametrize("rows", [0, 1, 17])
def test_rows_that_the_kernel_added_are_dropped(rows, monkeypatch):
    def cast(x):
        return quantise(x, "fp8_e4m3", "row", False, True, False, "reference")[:2]

    monkeypatch.setattr(module, "has_kernels", lambda device: True)
    monkeypatch.setattr(module, "row_cast_of", lambda name: cast)
    q, scale = quantised_weight(torch.randn(48, 160), "fp8")
    x = torch.randn(160, rows).to(BF16).t()
    found = fp8_linear(x, q, scale, None, implementation="native")
    assert found.shape == (rows, 48)
    torch.testing.assert_close(found.float(), plain(x, q, scale, None).float(), rtol=2**-6, atol=2**-6)


@needs_product
def test_what_is_not_finite_stays_so_in_its_row():
    q, scale = quantised_weight(torch.randn(32, 64), "fp8")
    x = torch.randn(4, 64).to(BF16)
    x[1, 5], x[2, 7] = torch.nan, -torch.inf
    found = fp8_linear(x, q, scale, None, implementation="native")
    assert found.isfinite().all(1).tolist() == [True, False, False, True]
    assert not found[1:3].isfinite().any()


@needs_product
def test_compiled_code_consists_of_plain_ops():
    q, scale = quantised_weight(torch.randn(32, 64), "fp8")
    seen = []

    def watched(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    def layer(x):
        return fp8_linear(x.relu(), q, scale, None, implementation="native")

    x = torch.randn(5, 64).to(BF16)
    backend = aot_autograd(fw_compiler=watched)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend=backend, fullgraph=True)(x), layer(x))
    assert any("_scaled_mm" in name for name in seen)
    assert not any("fp8_linear" in name for name in seen)


@needs_product
@pytest.mark.stress
@pytest.mark.parametrize("rows", [1, 5])
def test_the_compiler_makes_the_same_of_it(rows):
    q, scale = quantised_weight(torch.randn(32, 64), "fp8")
    x = torch.randn(rows, 64).to(BF16)
    compiled = torch.compile(lambda x: fp8_linear(x.relu(), q, scale, None, implementation="native"), fullgraph=True)
    expected = fp8_linear(x.relu(), q, scale, None, implementation="native")
    torch.testing.assert_close(compiled(x), expected, rtol=2**-5, atol=2**-5)
