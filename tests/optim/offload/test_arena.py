"""Arenas: shared out, pinned where that works, and pageable with the reason where not."""

import torch

from deepseek_mp.optim.offload import arena


def test_parts_share_the_memory():
    block = arena.allocate(10, torch.float32, pin=False)
    first, second = block.parts([torch.Size([2, 3]), torch.Size([4])])
    first.fill_(1.0)
    second.fill_(2.0)
    assert block.flat.tolist() == [1.0] * 6 + [2.0] * 4
    assert (block.pinned, block.refused) == (False, None)


def test_pinning_that_fails_is_recorded(monkeypatch):
    def refuse(values, dtype):
        raise RuntimeError("no pinned memory today\nwith details")

    monkeypatch.setattr(arena, "_pinned", refuse)
    block = arena.allocate(3, torch.bfloat16, pin=True)
    assert (block.pinned, block.refused) == (False, "no pinned memory today")
    assert block.flat.tolist() == [0.0, 0.0, 0.0]


def test_pinned_memory_is_used_where_it_can_be_had(monkeypatch):
    monkeypatch.setattr(arena, "_pinned", lambda values, dtype: torch.ones(values, dtype=dtype))
    block = arena.allocate(2, torch.float32, pin=True)
    assert (block.pinned, block.refused, block.flat.tolist()) == (True, None, [0.0, 0.0])
