"""What users may have written to PyTorch's hidden FP32 flags before, by either interface, and all that can be read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

B: Any = torch.backends


def old_then_new() -> None:
    torch.set_float32_matmul_precision("high")
    B.cuda.matmul.fp32_precision = "ieee"


def new_everywhere_and_here() -> None:
    B.fp32_precision = "tf32"
    B.cudnn.fp32_precision = "tf32"
    B.cuda.matmul.fp32_precision = "tf32"
    B.mkldnn.conv.fp32_precision = "tf32"


def new_for_both() -> None:
    B.cudnn.conv.fp32_precision = B.cudnn.rnn.fp32_precision = "ieee"


def old_twice() -> None:
    torch.set_float32_matmul_precision("high")
    B.cuda.matmul.allow_tf32 = False


def cudnn_then_both() -> None:
    B.cudnn.allow_tf32 = True
    new_for_both()


USERS: dict[str, Callable[[], None]] = {
    "wrote nothing": lambda: None,
    "old: matmul on": lambda: setattr(B.cuda.matmul, "allow_tf32", True),
    "old: matmul off": lambda: setattr(B.cuda.matmul, "allow_tf32", False),
    "old: high": lambda: torch.set_float32_matmul_precision("high"),
    "old: medium": lambda: torch.set_float32_matmul_precision("medium"),
    "old: cudnn off": lambda: setattr(B.cudnn, "allow_tf32", False),
    "old: cudnn on": lambda: setattr(B.cudnn, "allow_tf32", True),
    "new: all tf32": lambda: setattr(B, "fp32_precision", "tf32"),
    "new: all ieee": lambda: setattr(B, "fp32_precision", "ieee"),
    "new: cudnn ieee": lambda: setattr(B.cudnn, "fp32_precision", "ieee"),
    "new: matmul tf32": lambda: setattr(B.cuda.matmul, "fp32_precision", "tf32"),
    "new: conv ieee": lambda: setattr(B.cudnn.conv, "fp32_precision", "ieee"),
    "new: conv and rnn ieee": new_for_both,
    "new: conv none": lambda: setattr(B.cudnn.conv, "fp32_precision", "none"),
    "new: cpu matmul bf16": lambda: setattr(B.mkldnn.matmul, "fp32_precision", "bf16"),
    "new: everywhere and here": new_everywhere_and_here,
    "mixed: high, then matmul ieee": old_then_new,
    "mixed: high, then matmul off": old_twice,
    "mixed: cudnn on, then conv and rnn ieee": cudnn_then_both,
}


def read(owner: Any, name: str) -> str:
    try:
        return str(getattr(owner, name)() if name == "get_float32_matmul_precision" else getattr(owner, name))
    except RuntimeError:
        return "unreadable"


def state() -> list[str]:
    flags = [B, B.cudnn, B.mkldnn, B.cuda.matmul, B.cudnn.conv, B.cudnn.rnn]
    flags += [B.mkldnn.matmul, B.mkldnn.conv, B.mkldnn.rnn]
    old = [(B.cuda.matmul, "allow_tf32"), (B.cudnn, "allow_tf32"), (torch, "get_float32_matmul_precision")]
    return [read(flag, "fp32_precision") for flag in flags] + [read(*pair) for pair in old]


def state_and_reactions() -> list[list[str]]:
    """The flags, and how they follow when a parent changes later: which were written, which inherit."""
    seen = [state()]
    for value in ("ieee", "tf32"):
        B.fp32_precision = value
        seen.append(state())
    for value in ("ieee", "tf32"):
        B.cudnn.fp32_precision = value
        seen.append(state())
    return seen
