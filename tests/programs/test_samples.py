"""Inputs with another number of samples."""

from __future__ import annotations

import pytest
import torch

from deepseek_mp.programs.samples import with_samples


@pytest.mark.parametrize("size", [0, 1, 3, 7])
def test_the_samples_come_again(size):
    x = torch.arange(6).view(2, 3)
    found = with_samples(x, 1, size)
    assert found.shape == (2, size)
    assert found[1, :3].tolist() == [3, 4, 5][:size]
    assert set(found[1].tolist()) <= {3, 4, 5}
    assert torch.equal(found, with_samples(x, 1, size))


@pytest.mark.parametrize("size", [5, 6, 7, 16])
def test_two_samples_are_not_the_same_when_they_are_turned_round_or_shifted(size):
    torch.manual_seed(size)  # draws of others do not matter
    found = with_samples(torch.arange(2), 0, size)
    assert not torch.equal(found, found.flip(0))
    assert not torch.equal(found[2:], found[:-2])
