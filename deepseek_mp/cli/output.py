"""How results leave the program."""

from __future__ import annotations

import json
from typing import Any


def print_json(data: Any) -> None:
    """Print one JSON document on standard output; numbers that JSON lacks (NaN) are a defect and raise."""
    print(json.dumps(data, indent=1, allow_nan=False))
