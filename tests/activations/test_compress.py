from __future__ import annotations

import pytest
import torch

from deepseek_mp.activations.compress import is_dense, mask_bits, rounded, rounded_bytes, signs, two_valued
from deepseek_mp.ops.rounding import rounded as emulated
from deepseek_mp.precision import FORMATS, GRANULARITIES
from deepseek_mp.precision.recipe import OperandRecipe


def test_dense_means_each_place_once_and_no_gap():
    x = torch.zeros(4, 6, 5)
    assert is_dense(x)
    assert is_dense(x.permute(2, 0, 1))
    assert is_dense(x[1:3])
    assert is_dense(torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last))
    assert is_dense(torch.zeros(()))
    assert not is_dense(x[:, :3])
    assert not is_dense(torch.zeros(1, 5).expand(4, 5))
    assert not is_dense(torch.zeros(8).as_strided((3, 2), (1, 2)).as_strided((3, 3), (1, 1)))


@pytest.mark.parametrize("group", [32, 128])
def test_groups_are_rounded_as_the_recipe_of_that_granularity_says(group):
    x = torch.randn(300, 128) * torch.logspace(-4, 4, 300)[:, None]
    side = OperandRecipe(format=FORMATS["fp8_e4m3"], granularity=GRANULARITIES[f"1x{group}"], rule="current")
    assert torch.equal(rounded(x, group, None).restore(), emulated(x, side))


def test_what_is_left_of_the_last_group_is_exact():
    x = torch.randn(1000)
    restored = rounded(x, 128, 5).restore()
    assert torch.equal(restored[896:], x[896:])
    assert not torch.equal(restored[:896], x[:896])


def test_stochastic_rounding_follows_the_seed_and_is_right_on_average():
    x = torch.randn(64, 128)
    assert torch.equal(rounded(x, 128, 3).restore(), rounded(x, 128, 3).restore())
    draws = torch.stack([rounded(x, 128, seed).restore() for seed in range(200)])
    noise = (draws[0] - x).square().mean()
    assert (draws.mean(0) - x).square().mean() < 1.5 * noise / 200
    biased = torch.stack([rounded(x, 128, None).restore()] * 2).mean(0)
    assert (biased - x).square().mean() > 20 * noise / 200


@pytest.mark.parametrize("group", [32, 128])
def test_bytes_are_known_beforehand(group):
    for count in (group, 128 * 128, 128 * 128 + group, 300_000):
        rest = count % group * 4
        assert rounded(torch.randn(count), group, None).nbytes == rounded_bytes(count, group) + rest


def test_signs_go_the_way_of_the_backward_also_for_nan():
    x = torch.tensor([-1.0, 0.0, 2.0, float("nan"), float("inf")])
    g = torch.ones(5)
    for operation, backward in (
        ("relu", lambda saved: torch.ops.aten.threshold_backward(g, saved, 0)),
        ("leaky_relu", lambda saved: torch.ops.aten.leaky_relu_backward(g, saved, 0.1, False)),
    ):
        assert torch.equal(backward(signs(x, operation).restore()), backward(x))


def test_two_values_are_found_out():
    noise = torch.empty(1000).bernoulli_(0.7).div_(0.7)
    assert torch.equal(two_valued(noise).restore(), noise)
    noise[5] = 0.5
    assert two_valued(noise) is None
    assert two_valued(torch.zeros(100)) is None
    assert two_valued(-torch.ones(100)) is None


def test_a_mask_in_another_order_of_memory():
    mask = (torch.rand(30, 20) < 0.5).t()
    assert torch.equal(mask_bits(mask).restore(), mask)


def test_a_tensor_that_is_cast_in_pieces(monkeypatch):
    x = torch.randn(300, 128)
    whole = rounded(x, 128, None).restore()
    monkeypatch.setattr("deepseek_mp.activations.compress.CPU_PIECE", 128 * 128)
    monkeypatch.setattr("deepseek_mp.ops.reference.packing.PIECE", 64 * 128)
    in_pieces = rounded(x, 128, None)
    assert torch.equal(in_pieces.restore(), whole)
    assert in_pieces.nbytes == rounded_bytes(x.numel(), 128)
    equal = torch.randn(1, 128).expand(256, 128).contiguous()
    drawn = rounded(equal, 128, 1).restore()
    assert not torch.equal(drawn[:128], drawn[128:])  # each piece has numbers of its own
