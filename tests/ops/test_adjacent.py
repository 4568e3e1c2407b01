"""Tensors beside each other are one without a copy, and nothing else is taken for that."""

import copy
import io
import pickle

import pytest
import torch

from deepseek_mp.ops.adjacent import Part, laid_out, together

PARTS = {
    "rows": (0, [torch.randn(4, 8), torch.randn(16, 8), torch.randn(4, 8)]),
    "columns": (1, [torch.randn(3, 4), torch.randn(3, 2)]),
    "a vector's parts": (0, [torch.randn(4), torch.randn(5)]),
    "FP8": (0, [torch.randn(4, 8).to(torch.float8_e4m3fn), torch.randn(2, 8).to(torch.float8_e4m3fn)]),
    "parameters": (0, [torch.nn.Parameter(torch.randn(4)), torch.nn.Parameter(torch.randn(4))]),
}


@pytest.mark.parametrize("name", PARTS)
def test_what_is_laid_out_is_one_view_of_all(name):
    dim, parts = PARTS[name]
    laid = laid_out(parts, dim)
    assert all(torch.equal(own.float(), part.float()) for own, part in zip(laid, parts, strict=True))
    whole = together(laid, dim)
    assert torch.equal(whole.float(), torch.cat([part.float() for part in parts], dim))
    assert whole.data_ptr() == laid[0].data_ptr()
    assert not whole.requires_grad
    laid[1].copy_(torch.zeros_like(laid[1]))
    assert not whole.narrow(dim, parts[0].shape[dim], parts[1].shape[dim]).float().any()


def test_a_part_of_what_was_laid_out_is_one_too():
    laid = laid_out([torch.randn(2, 4), torch.randn(3, 4), torch.randn(5, 4)], 0)
    assert torch.equal(together(laid[1:], 0), torch.cat(laid[1:]))


LAID = laid_out([torch.randn(4, 8) for _ in range(3)], 0)
APART = {
    "memories of their own": [torch.randn(4, 8), torch.randn(4, 8)],
    "another order": [LAID[1], LAID[0]],
    "a gap": [LAID[0], LAID[2]],
    "the same twice": [LAID[0], LAID[0]],
    "another width": [LAID[0], LAID[1][:, :4]],
    "another dtype": [LAID[0], LAID[1].view(torch.int32)],
    "other dimensions": [LAID[0], LAID[1].flatten()],
    "another order in memory": [LAID[0], LAID[1].t()],
}


@pytest.mark.parametrize("name", APART)
def test_tensors_that_do_not_follow_each_other_are_not_one(name):
    assert together(APART[name], 0) is None


def _saved(given):
    file = io.BytesIO()
    torch.save(given, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda given: pickle.loads(pickle.dumps(given)), "torch.save": _saved}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [name for name in PARTS if name != "parameters"])
def test_copies_of_parts_have_their_memory_once_and_lie_beside_each_other(name, way):
    dim, parts = PARTS[name]
    laid = laid_out(parts, dim)
    made = [part.tensor() for part in WAYS[way]([Part.of(part) for part in laid])]
    assert all(torch.equal(own.float(), part.float()) for own, part in zip(made, parts, strict=True))
    assert all(own.dtype is part.dtype and own.stride() == part.stride() for own, part in zip(made, laid, strict=True))
    whole = together(made, dim)
    assert whole is not None
    assert whole.untyped_storage().nbytes() == whole.nbytes
    made[0].copy_(torch.zeros_like(made[0]))
    assert laid[0].float().any()


def test_only_parts_of_more_are_taken_as_such():
    alone = torch.randn(4, 8)
    parameter = torch.nn.Parameter(torch.randn(8)[:4])
    assert Part.of(alone) is alone
    assert Part.of(parameter) is parameter
    left, right = laid_out([alone, alone], 0)
    assert Part.of(left) is not left
    first, second = Part.of(left), Part.of(right)
    assert first.memory is second.memory
    assert first.memory.data_ptr() == left.data_ptr()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz])
def test_fp8_alone_in_its_memory_is_copied_and_pickled_too(dtype, way):
    alone = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).to(dtype).t()
    found = WAYS[way](Part.of(alone)).tensor()
    assert (found.dtype, found.stride()) == (dtype, alone.stride())
    assert torch.equal(found.float(), alone.float())
    assert found.data_ptr() != alone.data_ptr()
