"""The reference of cross entropy by rows: what is written over, and what is not a number."""

import torch
from torch.nn import functional as F

from deepseek_mp.ops.reference.cross_entropy import cross_entropy_rows


def test_fp32_logits_lend_their_memory():
    logits = torch.randn(4, 7)
    address = logits.data_ptr()
    losses, gradient = cross_entropy_rows(logits, torch.arange(4), 0.0, torch.ones(4))
    assert gradient.data_ptr() == address
    assert losses.shape == (4,)


def test_narrow_logits_are_computed_in_fp32():
    logits = (20 * torch.randn(3, 50)).bfloat16()
    expected = F.cross_entropy(logits.float(), torch.arange(3), reduction="none")
    torch.testing.assert_close(cross_entropy_rows(logits, torch.arange(3), 0.0, None)[0], expected)


def test_a_row_that_is_not_finite_spoils_no_other():
    logits = torch.randn(3, 5)
    logits[1, 2] = float("nan")
    losses, gradient = cross_entropy_rows(logits, torch.arange(3), 0.1, torch.ones(3))
    assert losses.isnan().tolist() == [False, True, False]
    assert gradient.isnan().any(1).tolist() == [False, True, False]
