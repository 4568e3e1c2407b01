"""The ResNet has the shapes it documents, uses its shortcuts, and learns the digits."""

from __future__ import annotations

import math

import pytest
import torch

from deepseek_mp.workloads.data import digits
from deepseek_mp.workloads.resnet import ResidualBlock, class_loss, small_resnet


@pytest.mark.parametrize(("channels_out", "stride"), [(4, 1), (8, 2)])
def test_a_block_is_its_shortcut_when_its_last_norm_is_zero(channels_out: int, stride: int) -> None:
    block = ResidualBlock(4, channels_out, stride).eval()
    torch.nn.init.zeros_(block.norm2.weight)
    image = torch.randn(2, 4, 8, 8)
    out = block(image)
    assert out.shape == (2, channels_out, 8 // stride, 8 // stride)
    torch.testing.assert_close(out, torch.relu(block.shortcut(image)))


def test_it_learns_the_digits_in_one_pass() -> None:
    model, data = small_resnet(width=8), digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    losses = []
    for images, labels in data.train:
        loss = class_loss(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(10), abs=0.5)
    assert losses[-1] < 0.5 * losses[0]


def test_the_seed_fixes_the_weights_and_leaves_the_callers_generator_alone() -> None:
    before = torch.get_rng_state()
    one, two, other = small_resnet(width=8), small_resnet(width=8), small_resnet(width=8, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.stem.weight, two.stem.weight)
    assert not torch.equal(one.stem.weight, other.stem.weight)


def test_the_loss_is_computed_in_fp32() -> None:
    scores = torch.randn(4, 10, dtype=torch.bfloat16)
    loss = class_loss(scores, torch.arange(4))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(scores.float(), torch.arange(4)))
