"""Arenas: shared out, pinned where that works, and pageable with the reason where not."""

from concurrent.futures import ThreadPoolExecutor

import pytest
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


@pytest.mark.parametrize("pin", [False, True])
def test_what_is_given_back_is_handed_out_again(pin, monkeypatch):
    monkeypatch.setattr(arena, "_pinned", lambda values, dtype: torch.ones(values, dtype=dtype))
    memory = arena.HostMemory()
    block = memory.take(8, torch.float32, pin=pin)
    block.flat.fill_(3.0)
    memory.give_back([block])
    assert memory.free_bytes == 32
    assert memory.take(9, torch.float32, pin=pin) is not block
    assert memory.take(8, torch.bfloat16, pin=pin) is not block
    assert memory.take(8, torch.float32, pin=not pin) is not block
    assert memory.take(8, torch.float32, pin=pin) is block
    assert block.flat.tolist() == [0.0] * 8
    assert memory.take(8, torch.float32, pin=pin) is not block


def test_memory_that_could_not_be_pinned_is_not_asked_for_again(monkeypatch):
    def refuse(values, dtype):
        raise RuntimeError("no")

    monkeypatch.setattr(arena, "_pinned", refuse)
    memory = arena.HostMemory()
    block = memory.take(8, torch.float32, pin=True)
    memory.give_back([block])
    assert memory.take(8, torch.float32, pin=True) is block


def test_scratch_is_of_one_thread():
    scratch = arena.Scratch()
    first = scratch.of(4)
    assert scratch.of(3).data_ptr() == first.data_ptr()
    with ThreadPoolExecutor(max_workers=1) as pool:
        assert pool.submit(lambda: scratch.of(4).data_ptr()).result() != first.data_ptr()
    assert scratch.of(100).numel() == 100


def test_scratch_of_many_sizes_keeps_few_views():
    scratch = arena.Scratch()
    scratch.of(5000)
    for values in range(5000):
        assert scratch.of(values).shape == (values,)
    assert len(scratch._parts) <= arena.VIEWS
    assert scratch.of(70).data_ptr() == scratch.of(5000).data_ptr()
    assert scratch.of(70) is scratch.of(70)


def test_large_blocks_are_equally_far_from_each_other():
    """Values of one parameter at distances of a few pages would slow the host's step down."""
    values = arena.HUGE_PAGE // 4 + 1
    blocks = [arena.allocate(values, dtype, pin=False).flat for dtype in (torch.float32, torch.float32, torch.bfloat16)]
    assert [block.data_ptr() % arena.HUGE_PAGE for block in blocks[:2]] == [0, 0]
    assert all(block.numel() == values and not block.any() for block in blocks)
    blocks[0].fill_(1.0)
    assert not blocks[1].any()
