"""The GPT is causal, starts as a uniform guess, and learns."""

from __future__ import annotations

import math

import pytest
import torch

from deepseek_mp.errors import ConfigError
from deepseek_mp.workloads.gpt import Block, GPTConfig, byte_gpt, next_byte_loss

SMALL = GPTConfig(width=32, heads=2, layers=2, context=16)


def test_a_score_depends_on_no_later_byte() -> None:
    model = byte_gpt(SMALL)
    tokens = torch.randint(256, (2, 16))
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 256
    before, after = model(tokens), model(changed)
    assert before.shape == (2, 16, 256)
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:], atol=1e-3)


def test_a_score_depends_on_the_position_and_on_every_earlier_byte() -> None:
    model = byte_gpt(SMALL)
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    scores = model(tokens)
    assert not torch.allclose(scores[0, 0], scores[0, 5], atol=1e-4)
    first_changed = tokens.clone()
    first_changed[0, 0] = 7
    assert not torch.allclose(model(first_changed)[0, -1], scores[0, -1], atol=1e-5)


def test_the_first_loss_is_that_of_a_uniform_guess_and_it_falls() -> None:
    model = byte_gpt(SMALL)
    tokens = torch.arange(17).repeat(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = next_byte_loss(model(tokens[:, :-1]), tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(256), abs=0.1)
    assert losses[-1] < 0.5 * losses[0]


def test_the_head_is_the_embedding_only_where_tied() -> None:
    tied, untied = byte_gpt(SMALL), byte_gpt(GPTConfig(width=32, heads=2, layers=2, context=16, tied=False))
    assert tied.head.weight is tied.embedding.weight
    assert untied.head.weight is not untied.embedding.weight
    count = {m: sum(p.numel() for p in m.parameters()) for m in (tied, untied)}
    assert count[untied] - count[tied] == 256 * 32


def test_blocks_are_alike_and_in_one_list() -> None:
    model = byte_gpt(SMALL)
    assert [type(block) for block in model.blocks] == [Block, Block]
    shapes = [{name: p.shape for name, p in block.named_parameters()} for block in model.blocks]
    assert shapes[0] == shapes[1]


def test_the_seed_fixes_the_weights_and_leaves_the_callers_generator_alone() -> None:
    before = torch.get_rng_state()
    one, two, other = byte_gpt(SMALL), byte_gpt(SMALL), byte_gpt(SMALL, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.blocks[0].qkv.weight, two.blocks[0].qkv.weight)
    assert not torch.equal(one.blocks[0].qkv.weight, other.blocks[0].qkv.weight)


@pytest.mark.parametrize("sizes", [{"width": 30, "heads": 4}, {"layers": 0}, {"context": -1}])
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="width a multiple of heads"):
        GPTConfig(**sizes)
