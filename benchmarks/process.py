"""A process for each part of a benchmark: started, killed when it is late, and its last line read.

Nothing that another part left on the device counts in it, and unless told otherwise compilers start with empty caches.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
ERROR_LINES = 40
"""Of what a failed script wrote last: enough of a traceback to see what called what failed."""


def run_script(script: Path, arguments: Sequence[str], *, limit: int, keep_caches: bool) -> dict[str, Any]:
    """The JSON object in the last line that the script printed, and its seconds; or why there is none.

    After `limit` seconds the process is killed.
    """
    command = [sys.executable, str(script.resolve()), *arguments]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=f"{script.stem}-") as caches:
        env = {**os.environ, "DEEPSEEK_MP_CACHE": "off"}  # a cold decision is part of what is measured
        if not keep_caches:
            env |= {name: str(Path(caches, name)) for name in CACHES}
        code, output, errors = _communicate(command, env, limit)
    result = _last_json(output)
    if code or result is None:
        why = f"killed after {limit} s" if code == -signal.SIGKILL else f"exit status {code}"
        result = {"check": f"failed: {why}", "error": errors.strip().splitlines()[-ERROR_LINES:]}
        print(*result["error"], sep="\n", file=sys.stderr)
    return {**result, "seconds": round(time.perf_counter() - start, 1)}


def _communicate(command: Sequence[str], env: Mapping[str, str], limit: int) -> tuple[int, str, str]:
    """Exit status and output; after `limit` seconds the process and the compilers it started are killed."""
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )
    try:
        output, errors = process.communicate(timeout=limit)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
    return process.returncode, output, errors


def _last_json(output: str) -> dict[str, Any] | None:
    """The last line that is a JSON object: libraries print before it."""
    lines = [line for line in output.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else None
