"""A process for each part of the FP8 benchmark, with the arguments that all of them get."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from process import run_script

SCRIPT = Path(__file__).with_name("fp8.py")


def in_process(what: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """What `fp8.py` printed with the arguments `what` and those of `args` that each process gets; or why nothing."""
    passed = [*what, "--device", str(args.device), *["--small"] * args.small, *["--regional"] * args.regional]
    return run_script(SCRIPT, passed, limit=args.limit, keep_caches=args.keep_caches)
