"""Which blocks are computed again, on made-up numbers."""

from __future__ import annotations

import itertools
import random

import pytest

from deepseek_mp.activations.choice import BlockCost, ForwardCost, choose_blocks


def forward(*blocks, elsewhere=0):
    """A forward of blocks (ms, bytes saved, bytes of inputs), each with storages of its own."""
    sizes, costs = [elsewhere], []
    for number, (ms, saved, inputs) in enumerate(blocks):
        at = len(sizes)
        sizes += [saved, inputs]
        costs.append(BlockCost(name=f"b{number}", forward_ms=ms, saved=frozenset({at}), inputs=frozenset({at + 1})))
    return ForwardCost(sizes=tuple(sizes), elsewhere=frozenset({0}), blocks=tuple(costs))


def test_nothing_is_computed_again_within_the_budget():
    choice = choose_blocks(forward((1, 100, 10), (1, 100, 10)), 1.0)
    assert choice.recomputed == ()
    assert choice.bytes_before == choice.bytes_after == choice.bytes_allowed == 200
    assert choice.extra_ms == 0
    assert choice.is_within


def test_the_cheapest_by_byte_come_first():
    cost = forward((4, 100, 0), (1, 100, 0), (2, 100, 0))
    assert choose_blocks(cost, 0.7).recomputed == ("b1",)
    assert choose_blocks(cost, 0.4).recomputed == ("b1", "b2")
    assert choose_blocks(cost, 0.4).extra_ms == 3


def test_of_blocks_that_are_alike_the_first_come_first():
    cost = forward((1.04, 100, 0), (1.0, 100, 0), (1.02, 100, 0), (0.5, 100, 0))
    assert choose_blocks(cost, 0.5).recomputed == ("b0", "b3")


def test_what_turns_out_not_to_be_needed_is_dropped():
    # b0 frees most for its time, but b1, which has to come too, is enough alone.
    choice = choose_blocks(forward((1, 20, 0), (10, 150, 0)), 0.2)
    assert choice.recomputed == ("b1",)
    assert choice.bytes_after == 20


def test_a_budget_out_of_reach_takes_all_that_free_anything_and_says_how_far_it_got():
    choice = choose_blocks(forward((1, 100, 10), (1, 5, 10), elsewhere=50), 0.01)
    assert choice.recomputed == ("b0",)
    assert choice.bytes_before == 155
    assert choice.bytes_after == 65
    assert not choice.is_within


def test_a_block_with_an_obstacle_is_never_taken():
    cost = forward((1, 100, 0), (1, 100, 0))
    blocked = BlockCost(name="b0", forward_ms=1, saved=frozenset({1}), inputs=frozenset({2}), obstacle="it writes")
    cost = ForwardCost(sizes=cost.sizes, elsewhere=cost.elsewhere, blocks=(blocked, cost.blocks[1]))
    choice = choose_blocks(cost, 0.01)
    assert choice.recomputed == ("b1",)
    assert choice.blocks[0].obstacle == "it writes"


def test_bytes_that_somebody_else_keeps_are_not_freed():
    # Storage 1 is needed by both blocks and 2 outside too: one block alone frees only its own.
    blocks = (
        BlockCost(name="a", forward_ms=1, saved=frozenset({0, 1, 2}), inputs=frozenset()),
        BlockCost(name="b", forward_ms=1, saved=frozenset({1, 3}), inputs=frozenset()),
    )
    cost = ForwardCost(sizes=(8, 16, 32, 4), elsewhere=frozenset({2}), blocks=blocks)
    choice = choose_blocks(cost, 0.01)
    assert choice.bytes_before == 60
    assert [block.bytes_freed for block in choice.blocks] == [8, 4]
    assert choice.recomputed == ("a", "b")
    assert choice.bytes_after == 32


def test_an_input_that_is_kept_anyway_costs_nothing():
    block = BlockCost(name="a", forward_ms=1, saved=frozenset({0, 1}), inputs=frozenset({0, 2}))
    cost = ForwardCost(sizes=(10, 100, 50), elsewhere=frozenset({2}), blocks=(block,))
    assert choose_blocks(cost, 0.4).bytes_after == 60


def test_a_time_of_zero_is_allowed():
    assert choose_blocks(forward((0, 100, 0), (1, 100, 0)), 0.5).recomputed == ("b0",)


@pytest.mark.parametrize("seed", range(20))
def test_it_is_within_the_budget_wherever_any_choice_is_and_no_member_is_needless(seed):
    numbers = random.Random(seed)
    blocks = [(numbers.uniform(0.1, 5), numbers.randint(1, 100), numbers.randint(0, 20)) for _ in range(6)]
    cost = forward(*blocks, elsewhere=numbers.randint(0, 50))
    choice = choose_blocks(cost, numbers.uniform(0.2, 0.9))
    names = [block.name for block in cost.blocks]
    every = [again for size in range(7) for again in itertools.combinations(names, size)]
    reachable = min(cost.kept_bytes(again) for again in every)
    assert choice.bytes_after == cost.kept_bytes(choice.recomputed)
    if reachable <= choice.bytes_allowed:
        assert choice.is_within
        for name in choice.recomputed:
            assert cost.kept_bytes(set(choice.recomputed) - {name}) > choice.bytes_allowed
    else:
        assert choice.bytes_after == reachable


def test_it_can_be_written_down():
    choice = choose_blocks(forward((1, 100, 10), (2, 100, 10)), 0.6)
    assert choice.to_json() == {
        "bytes_before": 200,
        "bytes_after": 110,
        "bytes_allowed": 120,
        "blocks": [
            {"name": "b0", "recomputed": True, "forward_ms": 1, "bytes_freed": 90, "obstacle": ""},
            {"name": "b1", "recomputed": False, "forward_ms": 2, "bytes_freed": 90, "obstacle": ""},
        ],
    }
