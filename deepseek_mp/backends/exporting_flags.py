"""Exporting neither reads nor writes the flags that decide what an FP32 product is.

`torch.export` turns cuDNN and oneDNN off while it traces, by a function that saves and writes back
all flags of the library. Of the FP32 ones it reads the old interface, which raises RuntimeError
where a flag was set through the new one (see `fp32_flags`), and it writes to flags that nobody had
written, which then follow their parents no more. A trace computes nothing, so they can stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def fp32_flags_left_alone() -> Iterator[None]:
    """A region for `torch.export` and what else decomposes an exported program."""
    libraries: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.mkldnn)
    former = [library.set_flags for library in libraries]
    try:
        for library in libraries:
            library.set_flags = _only_enabled(library, library.set_flags)
        yield
    finally:
        for library, function in zip(libraries, former, strict=True):
            library.set_flags = function


def _only_enabled(library: Any, whole: Any) -> Any:
    """The library's `set_flags`; asked for `enabled` alone, as the exporter asks, it looks at nothing else."""

    def set_flags(*given: Any, **named: Any) -> Any:
        if named or len(given) != 1:
            return whole(*given, **named)
        was = (library.enabled,)
        vars(type(library))["enabled"].setter(*given)  # as the whole function does: also after disable_global_flags()
        return was

    return set_flags
