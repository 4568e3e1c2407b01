import copy
import io
import pickle

import pytest
import torch
from torch import nn

from deepseek_mp.ops.storage_marks import mark_master, mark_storage, storage_of, take_gradients, unmark
from deepseek_mp.precision.storage import StorageFormat


def test_fp32_needs_no_mark_and_bf16_does():
    assert storage_of(torch.ones(1)) is StorageFormat.FP32
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    assert storage_of(weight) is None
    mark_storage(weight, StorageFormat.BF16_SR)
    assert storage_of(weight) is StorageFormat.BF16_SR
    mark_storage(weight, StorageFormat.FP32)
    assert storage_of(weight) is None
    assert storage_of(torch.ones(1, dtype=torch.float16)) is None


def saved_and_loaded(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file)


COPIES = [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value)), saved_and_loaded]


@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "pickle", "file"])
def test_a_mark_does_not_outlive_the_dtype_nor_go_along_with_a_copy(copied):
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    mark_storage(weight, StorageFormat.BF16_SR)
    assert storage_of(copied(weight)) is None
    assert storage_of(weight) is StorageFormat.BF16_SR
    weight.data = weight.data.half()
    assert storage_of(weight) is None


def test_bf16_with_a_master_is_looked_after_until_the_mark_is_taken_away():
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    mark_master(weight)
    assert storage_of(weight) is StorageFormat.FP32
    unmark(weight)
    assert storage_of(weight) is None
    half = nn.Parameter(torch.ones(1, dtype=torch.float16))
    mark_master(half)
    assert storage_of(half) is None


def test_gradients_are_fp32_only_where_several_add_up():
    weights = [nn.Parameter(torch.ones(2, dtype=dtype)) for dtype in [torch.bfloat16] * 3 + [torch.float32]]
    kept, mastered, unmarked, wide = weights
    mark_storage(kept, StorageFormat.BF16_KAHAN)
    mark_master(mastered)
    for add_up, expected in ((True, torch.float32), (False, torch.bfloat16)):
        take_gradients(weights, add_up=add_up)
        sum((2 * weight.float()).sum() for weight in weights).backward()
        assert kept.grad.dtype is expected
        assert (mastered.grad.dtype, unmarked.grad.dtype, wide.grad.dtype) == (torch.bfloat16,) * 2 + (torch.float32,)
        take_gradients(weights, add_up=not add_up)  # a gradient is there: nothing changes before the next
        kept.sum().backward()
        assert kept.grad.dtype is expected
        for weight in weights:
            weight.grad = None
