"""How much of an optimizer to offload, by measured rates: all that is predicted to cost little time.

Needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.optim.offload.schedule import CHUNK_BYTES, Rates, Work, check_member, chunks, predict, split


def free_within(
    sizes: Sequence[int],
    rates: Rates,
    work: Work,
    *,
    slower: float = 1.1,
    bytes_per_value: int = 14,
    chunk_bytes: int = CHUNK_BYTES,
) -> int:
    """The most device memory to free, in bytes, for a step of at most `slower` times that with nothing offloaded.

    The times are those of `predict`. The result is for `OffloadSettings.free_bytes`.

    Args:
        sizes: values of each parameter, in the order of execution.
        rates: from `calibrate`.
        work: of a step; its `device_step` is what a step on the device takes, which offloading saves.
        slower: 1.1 allows a step 10 % more time; from 1.
        bytes_per_value: that an offloaded value frees: 14 of a BF16 model, 12 of an FP32 model.
        chunk_bytes: as in `OffloadSettings`.

    Raises:
        ConfigError: a `slower` below 1, or the mode 'delayed', which is not offered for a part.
    """
    check_member("mode", work.mode, ("sync", "speculative", "immediate"))
    if not slower >= 1:
        raise ConfigError(explain(f"slower={slower!r}", "1 or more", "Pass 1.1 to allow a step 10 % more time"))
    parts = chunks(sizes, limit_bytes=chunk_bytes)
    allowed = slower * (work.forward_backward + work.device_step)
    freed = most = 0
    for part in parts:
        freed += part.values * bytes_per_value
        placed = split(parts, free_bytes=freed, bytes_per_value=bytes_per_value)
        if predict(placed, rates, work).total <= allowed:
            most = freed
    return most
