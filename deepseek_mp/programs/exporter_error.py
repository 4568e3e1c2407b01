"""What the exporter failed at, in one line: its own first line, and the line of the model's code."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

import torch

from deepseek_mp.errors import first_line

_OTHERS = tuple(f"{Path(file).parent}/" for file in (torch.__file__, Path(__file__).parent))
_STANDARD = f"{sysconfig.get_path('stdlib')}/"


def reason(error: Exception) -> str:
    """Type and first line of an error that was caught around an export, and where in the model's code it was raised."""
    first = first_line(error)
    chain: list[BaseException] = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None and before not in chain:
        chain.append(before)
    for one in chain:
        frames = [frame for frame in traceback.extract_tb(one.__traceback__) if _is_the_models(frame.filename)]
        if frames:
            return f"{first}; at {Path(frames[-1].filename).name}:{frames[-1].lineno}: {frames[-1].line}"
    return first


def _is_the_models(file: str) -> bool:
    standard = file.startswith(_STANDARD) and "site-packages" not in file
    return not (standard or file.startswith(("<", *_OTHERS)))
