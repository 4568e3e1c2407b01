"""Learning rates as optimizers here take them."""

import pytest
import torch
from torch import nn

from deepseek_mp.errors import ConfigError
from deepseek_mp.optim import SGD, AdamW
from deepseek_mp.optim.rate import rate_of


def test_a_rate_is_a_number_or_a_tensor_without_dimensions():
    """Operations over lists take no others."""
    assert rate_of({"lr": 0.5}) == 0.5
    assert rate_of({"lr": torch.tensor([0.5])}) == 0.5
    assert rate_of({"lr": torch.ones(1, device="meta")}).shape == ()


@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_rates_of_several_numbers_are_refused(kind):
    weight = nn.Parameter(torch.zeros(2))
    for rate, words in ((torch.ones(2), r"lr of shape \[2\]"), (-1.0, "lr=-1.0")):
        with pytest.raises(ConfigError, match=words):
            kind([weight], lr=rate)
