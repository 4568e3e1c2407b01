"""Seeds on a device follow from a generator of Python's, and no two are equal."""

from __future__ import annotations

import random

import torch

from deepseek_mp.activations.seeds import MANY, Seeds

CPU = torch.device("cpu")


def drawn(seed, count):
    seeds = Seeds(random.Random(seed))
    return [seeds.next(CPU) for _ in range(count)]


def test_they_follow_from_the_generator_and_differ():
    one, again, other = (drawn(seed, 2 * MANY + 3) for seed in (1, 1, 2))
    numbers = [int(x) for x in one]
    assert numbers == [int(x) for x in again]
    assert len(set(numbers)) == len(numbers)
    assert not set(numbers) & {int(x) for x in other}


def test_they_are_what_a_cast_takes():
    for seed in drawn(3, 5):
        assert seed.shape == ()
        assert seed.dtype is torch.int64
        assert seed.storage_offset() % 2 == 0  # 16 bytes
