"""Ranges ignore what is not finite, follow torchao's otherwise, and rounding lets bad numbers be seen."""

from __future__ import annotations

import math

import pytest
import torch
from torchao.quantization.pt2e import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver

from deepseek_mp.qat.observers import FiniteFakeQuantize, FiniteRange, FiniteRangePerChannel

BAD = (math.nan, math.inf, -math.inf)


def ranges(kind, batches, **options):
    observer = kind(averaging_constant=0.25, **options)
    for batch in batches:
        observer(batch)
    return observer.min_val, observer.max_val, *observer.calculate_qparams()


PER_TENSOR = {"dtype": torch.uint8, "quant_min": 0, "quant_max": 255}
PER_CHANNEL = {"dtype": torch.int8, "quant_min": -128, "quant_max": 127, "qscheme": torch.per_channel_symmetric}
KINDS = [
    (FiniteRange, MovingAverageMinMaxObserver, PER_TENSOR),
    (FiniteRangePerChannel, MovingAveragePerChannelMinMaxObserver, PER_CHANNEL | {"ch_axis": 1}),
]


@pytest.mark.parametrize(("ours", "theirs", "options"), KINDS)
def test_finite_batches_have_the_ranges_of_torchao(ours, theirs, options):
    batches = [torch.randn(5, 3, 4) * i for i in (1, 4, 2)]
    for one, other in zip(ranges(ours, batches, **options), ranges(theirs, batches, **options), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(("ours", "theirs", "options"), KINDS)
def test_values_that_are_not_finite_are_passed_over(ours, theirs, options, bad):
    batches = [torch.randn(5, 3, 4) for _ in range(3)]
    spoilt = batches[1].clone()
    spoilt[0, 0, 0] = bad
    batches[1][0, 0, 0] = 0  # not an extreme one, so that the ranges are the same
    clean = ranges(ours, batches, **options)
    batches[1] = spoilt
    for one, other in zip(ranges(ours, batches, **options), clean, strict=True):
        assert torch.equal(one, other)
    observer = theirs(**options)
    for batch in batches:
        observer(batch)
    assert not (observer.min_val.isfinite().all() and observer.max_val.isfinite().all())  # why these are ours


def test_a_batch_without_a_finite_value_changes_nothing():
    batches = [torch.randn(6), torch.full((6,), math.nan), torch.empty(0)]
    for one, other in zip(
        ranges(FiniteRange, batches, **PER_TENSOR), ranges(FiniteRange, batches[:1], **PER_TENSOR), strict=True
    ):
        assert torch.equal(one, other)


def quantiser(share=0.01):
    return FiniteFakeQuantize(observer=FiniteRange, averaging_constant=share, **PER_TENSOR)


def test_the_range_is_observed_in_training_only_unless_it_is_that_of_the_moment():
    narrow, wide = torch.tensor([0.0, 1.0]), torch.tensor([0.0, 10.0])
    for share, moved in ((0.01, False), (1.0, True)):
        module = quantiser(share)
        module(narrow)
        before = module.scale.clone()
        module.eval()(wide)
        assert torch.equal(module.scale, before) is not moved


def test_gradients_pass_straight_through_inside_of_the_range_and_bad_numbers_stay():
    module = quantiser()
    module(torch.tensor([-1.0, 1.0]))
    module.eval()
    x = torch.tensor([0.3, -0.9, 5.0], requires_grad=True)
    out = module(x)
    out.sum().backward()
    assert x.grad.tolist() == [1, 1, 0]
    assert torch.equal(out / module.scale, (out / module.scale).round())
    assert torch.equal(module(torch.tensor(BAD)).nan_to_num(7), torch.tensor(BAD).nan_to_num(7))


def straightened(x, scale, zero_point, low, high):
    """With rounding as the identity for autograd: the gradients of LSQ (Esser et al., 2020), unscaled."""
    ratio = x / scale + zero_point
    return ((ratio + (ratio.round() - ratio).detach()).clamp(low, high) - zero_point) * scale


@pytest.mark.parametrize("shift", [0.4, -0.7])
def test_a_learned_step_is_a_share_of_the_observed_one_with_the_gradients_of_lsq(shift):
    x, given = torch.randn(6, 20), torch.randn(6, 20)
    by_channel = FiniteFakeQuantize(observer=FiniteRangePerChannel, averaging_constant=1.0, **PER_CHANNEL)
    for module, numel in ((quantiser(), 20), (by_channel, 20)):
        module(x)
        plain = module(x)
        module.learn_step()
        assert torch.equal(module(x), plain)
        with torch.no_grad():
            module.log_step.fill_(shift)
        one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
        module.eval()(one).backward(given)
        used = (module.scale * math.exp(shift)).requires_grad_()
        wide = used if used.numel() == 1 else used[:, None]
        observer = module.activation_post_process
        zero = module.zero_point if used.numel() == 1 else module.zero_point[:, None]
        straightened(two, wide, zero, observer.quant_min, observer.quant_max).backward(given)
        torch.testing.assert_close(one.grad, two.grad)
        expected = used.grad * used.detach() / math.sqrt(numel * observer.quant_max)
        torch.testing.assert_close(module.log_step.grad, expected)
        torch.testing.assert_close(module.calculate_qparams()[0].flatten(), used.detach().flatten())


def test_a_range_that_two_tensors_share_has_steps_to_learn():
    quantise = FiniteFakeQuantize(observer=FiniteRange, quant_min=0, quant_max=255)
    quantise(torch.randn(4, 3))
    quantise.learn_step()
    x = torch.randn(4, 3, requires_grad=True)
    (quantise(x).relu() + quantise(2 * x)).sum().backward()
    assert x.grad is not None
    assert quantise.log_step.grad is not None
