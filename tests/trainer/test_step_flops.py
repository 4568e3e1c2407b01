"""FLOPs of a step are the model's: what is computed again is not counted."""

from __future__ import annotations

import torch

from deepseek_mp.nn.again import computed_again
from deepseek_mp.trainer.step_flops import StepFlops


def test_what_is_computed_again_does_not_count():
    a, b = torch.ones(2, 3), torch.ones(3, 4)
    with StepFlops() as flops:
        a @ b
        with computed_again():
            again = a @ b
    assert flops.get_total_flops() == 2 * 2 * 3 * 4
    assert torch.equal(again, a @ b)
