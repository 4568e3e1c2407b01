import torch
from torch import nn

from deepseek_mp.optim import AdamW, Footprint, footprint, set_storage
from deepseek_mp.precision.storage import StorageFormat

SIZE = 1000


def test_bytes_for_each_value_by_storage():
    """AdamW: two FP32 moments, besides the weight and what it lacks; the step counter is the 4 bytes more."""
    weights = [nn.Parameter(torch.randn(SIZE)) for _ in StorageFormat]
    optimizer = AdamW(weights)
    for weight, format in zip(weights, StorageFormat, strict=True):
        set_storage(optimizer, weight, format)
        weight.grad = torch.ones_like(weight, dtype=torch.float32)
    optimizer.step()
    optimizer.zero_grad()
    assert footprint(optimizer) == {
        StorageFormat.FP32: Footprint(values=SIZE, weights=4 * SIZE, state=8 * SIZE + 4),
        StorageFormat.BF16_KAHAN: Footprint(values=SIZE, weights=2 * SIZE, state=(2 + 8) * SIZE + 4),
        StorageFormat.BF16_SR: Footprint(values=SIZE, weights=2 * SIZE, state=8 * SIZE + 4),
    }


def test_gradients_count_while_they_are_there():
    weight = nn.Parameter(torch.randn(SIZE).bfloat16())
    optimizer = AdamW([weight])
    weight.grad = torch.ones_like(weight, dtype=torch.float32)
    assert footprint(optimizer)[StorageFormat.BF16_KAHAN].gradients == 4 * SIZE
    assert footprint(optimizer)[StorageFormat.BF16_KAHAN].total == 6 * SIZE
