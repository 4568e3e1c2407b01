"""Inputs with another number of samples."""

from __future__ import annotations

import pytest
import torch

from deepseek_mp.programs.samples import with_samples


@pytest.mark.parametrize("size", [0, 1, 3, 7])
def test_the_samples_come_again_and_again(size):
    x = torch.arange(6).view(2, 3)
    found = with_samples(x, 1, size)
    assert found.shape == (2, size)
    assert found[1].tolist() == [3, 4, 5, 3, 4, 5, 3][:size]
