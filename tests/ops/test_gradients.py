"""Norms and unscaling against NumPy-style references in float64."""

import math

import pytest
import torch

from deepseek_mp.ops import gradients


def params_with(*grads):
    params = []
    for grad in grads:
        param = torch.nn.Parameter(torch.zeros(grad.shape, dtype=grad.dtype))
        param.grad = grad
        params.append(param)
    return params


def reference_norm(grads):
    return math.sqrt(sum(float(g.detach().to(torch.complex128).abs().square().sum()) for g in grads))


@pytest.mark.parametrize("dtypes", [["float32"], ["bfloat16", "float32"], ["float16"], ["float64"], ["complex64"]])
def test_norm_matches_float64_for_every_mix_of_dtypes(dtypes):
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(7, 3, generator=generator).to(getattr(torch, d)) for d in dtypes for _ in range(2)]
    norm = gradients.l2_norm(gradients.gradient_views(params_with(*grads)))
    assert float(norm) == pytest.approx(reference_norm(grads), rel=1e-6)
    assert norm.dtype == (torch.float64 if dtypes == ["float64"] else torch.float32)


def test_norm_of_half_precision_gradients_does_not_overflow():
    grads = [torch.full((4,), 60000.0, dtype=torch.float16)]
    assert float(gradients.l2_norm(grads)) == pytest.approx(120000.0)
    assert torch.isinf(torch.linalg.vector_norm(grads[0]))  # what a norm in the gradient's own dtype gives


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_element_anywhere_makes_the_norm_non_finite(bad):
    for position in range(3):
        grads = [torch.ones(5), torch.ones(2, 2), torch.ones(3)]
        grads[position].view(-1)[-1] = bad
        assert not math.isfinite(float(gradients.l2_norm(grads)))


def test_largest_magnitude_sees_negative_values_and_nan_and_ignores_empty_gradients():
    assert float(gradients.largest_magnitude([torch.tensor([1.0, -7.0]), torch.empty(0)])) == 7.0
    assert math.isnan(float(gradients.largest_magnitude([torch.ones(2), torch.tensor([float("nan")])])))
    assert float(gradients.largest_magnitude([torch.empty(0)])) == 0.0


def test_sparse_duplicates_that_overflow_only_when_summed_are_seen():
    embedding = torch.nn.Embedding(2, 1, sparse=True)
    values = torch.tensor([[3e38], [3e38]])
    embedding.weight.grad = torch.sparse_coo_tensor(torch.tensor([[0, 0]]), values, (2, 1))
    views = gradients.gradient_views([embedding.weight])
    assert not math.isfinite(float(gradients.l2_norm(views)))


def test_multiply_changes_the_gradients_themselves_sparse_and_complex_too():
    embedding = torch.nn.Embedding(3, 2, sparse=True)
    embedding(torch.tensor([1, 1, 2])).sum().backward()
    dense, complex_ = params_with(torch.full((2,), 8.0), torch.full((2,), 8.0 + 4.0j))
    gradients.multiply_(gradients.gradient_views([embedding.weight, dense, complex_]), torch.tensor(0.25))
    assert embedding.weight.grad.to_dense().tolist() == [[0.0, 0.0], [0.5, 0.5], [0.25, 0.25]]
    assert dense.grad.tolist() == [2.0, 2.0]
    assert complex_.grad.tolist() == [2 + 1j, 2 + 1j]


def test_parameters_without_gradient_are_left_out():
    with_grad, without = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    with_grad.grad = torch.ones(1)
    assert len(gradients.gradient_views([without, with_grad])) == 1


def test_ratios_to_the_second_moment_by_their_definition():
    grads, moments = [torch.randn(4, 3), torch.randn(2, 2)], [torch.rand(4, 3), torch.zeros(2, 2)]
    grads[1][0] = 0.0
    kept = [moment.clone() for moment in moments]
    found = gradients.moment_ratios([g * 8 for g in grads], moments, beta=0.9, eps=1e-3, divisor=torch.tensor(8.0))
    for ratio, g, v in zip(found.tolist(), grads, kept, strict=True):
        after = (0.9 * v + 0.1 * g.square()).clamp_min(1e-6)
        assert ratio == pytest.approx(float((g.square() / after).sum().sqrt()), rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(moments, kept, strict=True))


def test_norms_are_one_number_for_each_gradient():
    found = gradients.norms([torch.tensor([3.0, 4.0]), torch.tensor([-7.0]).half()])
    assert found.tolist() == [5.0, 7.0]


@pytest.mark.parametrize("order", [2.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_gradients_on_a_cpu_by_rows(monkeypatch, order, dtype):
    monkeypatch.setattr(gradients, "LARGE", 1000)
    monkeypatch.setattr(gradients, "ROWS", 7)
    grads = [torch.randn(1000), torch.randn(43, 41), torch.randn(5), torch.randn(40, 50).t(), torch.randn(1400)]
    grads = [grad.to(dtype) for grad in grads]
    found = gradients.norms(grads, order)
    expected = torch.stack([torch.linalg.vector_norm(grad.double(), order).float() for grad in grads])
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, expected)
    for bad in (math.nan, math.inf):
        grads[1][42, 40] = bad
        assert gradients.norms(grads, order).isfinite().tolist() == [True, False, True, True, True]
