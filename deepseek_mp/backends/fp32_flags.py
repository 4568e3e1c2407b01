"""The hidden flags that decide what an FP32 product really is, set and restored exactly.

PyTorch has two interfaces. The new one, `fp32_precision`, is a tree: an operation's flag follows
its library's flag, which follows the global one, unless it was written itself. The old one
(`allow_tf32`, `set_float32_matmul_precision`) writes into the same store and keeps a copy of its
own; reading it raises RuntimeError when the two disagree. So this module

- saves and restores through the new interface only, and restores "follows its parent" as such, not
  as the value it happened to have;
- sets cuDNN's flags at their parent where it can: from PyTorch 2.13 their default (TF32 unless a
  parent says otherwise) cannot be written back once an operation's own flag was touched;
- keeps the old copy for matrix products readable while a region is open, because the autotuner of
  `torch.compile` and other libraries read it. If the user's own mixture makes it unreadable, it is
  left alone;
- keeps the old copy for cuDNN readable as well (`torch.backends.cudnn.flags` reads it), unless that
  would touch such a default: it is written together with the flags of convolutions and RNNs alone.
  Exporting, which reads it too, goes through `exporting_flags`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

FOLLOW = "none"
"""Value of a flag that was not written and follows its parent."""


def _assign(undo: ExitStack, owner: Any, value: Any, *, name: str = "fp32_precision", back: Any) -> None:
    """Set an attribute now, and to `back` when the region ends."""
    undo.callback(setattr, owner, name, back)
    setattr(owner, name, value)


def _written(flag: Any, parent: Any, parent_written: str) -> str:
    """What was written to a flag itself: FOLLOW when its value only comes from its parent."""
    value: str = flag.fp32_precision
    if value == FOLLOW or value != parent.fp32_precision:
        return value
    probe = "ieee" if value != "ieee" else "tf32"
    parent.fp32_precision = probe
    try:
        follows = flag.fp32_precision == probe
    finally:
        parent.fp32_precision = parent_written
    return FOLLOW if follows else value


def _old_copy_to_write(mode: str, cpu_matmul: Any) -> str | None:
    """The old interface's copy if it should be rewritten for `mode`, else None.

    It is left alone when it agrees, when the user mixed the interfaces and it cannot be read, and
    when rewriting it would make it unreadable: it covers the CPU's matrix products as well, and
    'highest' beside a fast one there is such a mixture.
    """
    try:
        old = torch.get_float32_matmul_precision()
    except RuntimeError:
        return None
    agrees = (old == "highest") == (mode == "ieee")
    cpu_is_fast = cpu_matmul.fp32_precision in ("tf32", "bf16")
    return None if agrees or (mode == "ieee" and cpu_is_fast) else old


def _stored(operation: Any, library_written: str) -> str | None:
    """What was written to an operation of cuDNN; None: nothing yet, and its default cannot be written back."""
    backends: Any = torch.backends
    everything = backends.fp32_precision
    try:
        backends.fp32_precision = backends.cudnn.fp32_precision = FOLLOW
        alone: str = operation.fp32_precision
        backends.cudnn.fp32_precision = "ieee" if alone == "tf32" else "tf32"
        stays = operation.fp32_precision == alone
    finally:
        backends.cudnn.fp32_precision = library_written
        backends.fp32_precision = everything
    return alone if stays or alone == FOLLOW else None


def _old_copy_of_cudnn(conv: Any, rnn: Any) -> bool:
    """The old interface's copy, whatever else makes it unreadable; writes to both flags."""
    guess = conv.fp32_precision == "tf32"
    conv.fp32_precision = rnn.fp32_precision = "tf32" if guess else "ieee"
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:  # it disagrees with the two
        return not guess


def _operations(undo: ExitStack, mode: str) -> None:
    """cuDNN's convolutions and RNNs run in `mode`, to which their parent was set, until the region ends."""
    cudnn: Any = torch.backends.cudnn
    operations = (cudnn.conv, cudnn.rnn)
    stored = [_stored(operation, mode) for operation in operations]
    if None in stored:
        for operation in operations:
            if operation.fp32_precision != mode:
                _assign(undo, operation, mode, back=operation.fp32_precision)
        return
    for operation, back in zip(operations, stored, strict=True):
        undo.callback(setattr, operation, "fp32_precision", back)
    undo.callback(setattr, cudnn, "allow_tf32", _old_copy_of_cudnn(*operations))
    cudnn.allow_tf32 = mode == "tf32"  # False makes the two follow their parent


@contextmanager
def cuda_fp32(mode: str) -> Iterator[None]:
    """FP32 matrix products, convolutions and RNNs of CUDA or ROCm run in `mode` ('ieee' or 'tf32')."""
    backends: Any = torch.backends
    library, matmul, cpu_matmul = backends.cudnn, backends.cuda.matmul, backends.mkldnn.matmul
    everything = backends.fp32_precision
    written = _written(library, backends, everything)
    with ExitStack() as undo:
        cpu_written = _written(cpu_matmul, backends, everything)
        undo.callback(setattr, cpu_matmul, "fp32_precision", cpu_written)
        undo.callback(setattr, matmul, "fp32_precision", _written(matmul, library, written))
        old = _old_copy_to_write(mode, cpu_matmul)
        if old is not None:
            undo.callback(torch.set_float32_matmul_precision, old)
            torch.set_float32_matmul_precision("highest" if mode == "ieee" else "high")
            cpu_matmul.fp32_precision = cpu_written  # the old interface writes it too
        _assign(undo, library, mode, back=written)
        matmul.fp32_precision = mode
        _operations(undo, mode)
        yield


@contextmanager
def onednn_fp32(mode: str) -> Iterator[None]:
    """FP32 matrix products, convolutions and RNNs of oneDNN on a CPU run in `mode` ('ieee')."""
    backends: Any = torch.backends
    everything = backends.fp32_precision
    with ExitStack() as undo:
        for operation in (backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn):
            _assign(undo, operation, mode, back=_written(operation, backends, everything))
        yield


def cuda_mode(product: str) -> str:
    """How CUDA computes FP32 matrix products ('matmul'), convolutions ('conv') or RNNs ('rnn') now."""
    backends: Any = torch.backends
    flags = {"matmul": backends.cuda.matmul, "conv": backends.cudnn.conv, "rnn": backends.cudnn.rnn}
    return _effective(flags[product])


def onednn_mode(product: str) -> str:
    """How oneDNN computes FP32 matrix products ('matmul'), convolutions ('conv') or RNNs ('rnn') now."""
    backends: Any = torch.backends
    flags = {"matmul": backends.mkldnn.matmul, "conv": backends.mkldnn.conv, "rnn": backends.mkldnn.rnn}
    return _effective(flags[product])


def _effective(flag: Any) -> str:
    value: str = flag.fp32_precision
    return "ieee" if value == FOLLOW else value


@contextmanager
def flag(owner: Any, name: str, value: bool) -> Iterator[None]:
    """An attribute has `value` inside the region and what it had before after it."""
    with ExitStack() as undo:
        _assign(undo, owner, value, name=name, back=getattr(owner, name))
        yield
