"""The first samples of a batch, as a batch of the same form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from deepseek_mp.nn import call as calls


def first_samples(batch: Any, count: int) -> Any:
    """The batch with its first samples alone: every tensor whose first dimension is the batch's is cut.

    Args:
        batch: as for `step`; tensors in tuples, lists and mappings, however deep. A packed sequence stays whole.
        count: from 1 to the number of samples.
    """
    size = calls.batch_size(calls.parse_batch(batch))

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[:count] if value.dim() and value.shape[0] == size else value
        if isinstance(value, Mapping):
            return {key: cut(item) for key, item in value.items()}
        if isinstance(value, tuple | list) and not isinstance(value, PackedSequence):
            items = [cut(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value

    return cut(batch)
