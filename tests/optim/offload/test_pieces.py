"""Pieces of what the host has: they cover every value once, and add up what has arrived without writing it."""

import pytest
import torch
from torch import nn

from deepseek_mp.optim.offload.pieces import MULTIPLE, Slot, blocks


def slot(values, *, group=0, wire=torch.float32):
    def zeros(dtype=torch.float32):
        return torch.zeros(values, dtype=dtype)

    master = nn.Parameter(zeros())
    return Slot(
        parameter=nn.Parameter(zeros()),
        master=master,
        group=group,
        total=zeros(),
        spare=zeros(),
        wire=zeros(wire),
        sending=master,
        moments=(zeros(), zeros()),
        before=None,
    )


@pytest.mark.parametrize("most", [1, 7, 16, 1000])
def test_each_value_is_in_one_piece(most):
    slots = [slot(n, group=n == 33) for n in (5, 40, 3, 3, 33, 0, 16)]
    found = list(blocks(slots, most))
    for block in found:
        assert {piece.slot.group for piece in block.pieces} == {block.group}
        assert len(block.pieces) == 1 or sum(piece.master.numel() for piece in block.pieces) <= most
        for piece in block.pieces:
            piece.master.add_(1.0)
    assert all(torch.equal(one.master, torch.ones_like(one.master)) for one in slots)


@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("earlier", [False, True])
def test_what_has_arrived_and_what_was_before_are_added_in_other_memory(wire, earlier):
    one = slot(50, wire=wire)
    one.wire.copy_(torch.randn(50))
    before = torch.randn(50) if earlier else None
    kept = one.wire.clone(), None if before is None else before.clone()
    room = torch.empty(20)
    (first, second, _) = (piece for block in blocks([one], 20) for piece in block.pieces)
    for piece, part in ((first, slice(0, 20)), (second, slice(20, 40))):
        expected = one.wire[part].float() + (before[part] if earlier else 0.0)
        assert torch.equal(piece.summed(room, before), expected)
    assert torch.equal(one.wire, kept[0])
    assert before is None or torch.equal(before, kept[1])


@pytest.mark.parametrize(
    ("values", "most", "teams", "parts"),
    [
        (16 * MULTIPLE, 4 * MULTIPLE, 4, [4] * 4),
        (11 * MULTIPLE, 2 * MULTIPLE, 4, [2, 2, 2, 2, 2, 1]),  # parts are no smaller than MULTIPLE
        (50 * MULTIPLE, 4 * MULTIPLE, 4, [4] * 12 + [2]),
        (45 * MULTIPLE, 4 * MULTIPLE, 4, [4] * 11 + [1]),
        (13 * MULTIPLE, 12 * MULTIPLE, 4, [4, 4, 4, 1]),
        (13 * MULTIPLE, 12 * MULTIPLE, 1, [7, 6]),
    ],
)
def test_a_large_parameter_is_shared_out_evenly(values, most, teams, parts):
    found = [piece for block in blocks([slot(values)], most, teams) for piece in block.pieces]
    assert [piece.master.numel() / MULTIPLE for piece in found] == parts


def test_values_of_what_gradients_are_added_up_in_are_found_and_those_of_others_made():
    one = slot(50)
    (_, second, _) = (piece for block in blocks([one], 20) for piece in block.pieces)
    one.total, one.spare = one.spare, one.total  # as a step does that hands its gradients over
    other = torch.randn(50)
    for tensor in (one.total, one.spare, other):
        tensor.copy_(torch.randn(50))
        assert torch.equal(second.of(tensor), tensor[20:40])
    assert second.of(one.total) is second.of(one.total)


@pytest.mark.parametrize("transposed", [True, False])
def test_values_that_were_put_into_a_gradient_through_data_are_found(transposed):
    one = slot(49)
    one.total = one.total.view(7, 7)
    (_, second, _) = (piece for block in blocks([one], 20) for piece in block.pieces)
    one.total.copy_(torch.randn(7, 7))
    one.total.data = one.total.data.t() if transposed else torch.randn(7, 7)
    assert torch.equal(second.of(one.total), one.total.reshape(-1)[20:40])
