"""The checkpoint's kill loop and bit flips in the numbers the project promises: 200 and 1000."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepseek_mp.errors import CheckpointError
from deepseek_mp.trainer.checkpoint import Snapshot, verify_checkpoint, write_checkpoint

CHILD = Path(__file__).parents[1] / "faults" / "checkpoint_child.py"

pytestmark = pytest.mark.stress


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("seed", [1, 2])
def test_two_hundred_kills_at_random_moments_of_a_save(tmp_path: Path, seed: int) -> None:
    done = subprocess.run(
        [sys.executable, str(CHILD), "kill_loop", str(tmp_path), "200", str(seed)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["kills"] == 200
    cut_short = {phase: count for phase, count in result["phases"].items() if phase.startswith("tmp")}
    assert sum(cut_short.values()) >= 40, result
    assert len(cut_short) >= 4, result


def test_a_thousand_bit_flips_are_all_noticed(tmp_path: Path) -> None:
    tensors = {"model": {"w": torch.randn(20, 30)}, "optimizer": {"exp_avg": torch.randn(600)}}
    path = write_checkpoint(tmp_path, Snapshot(step=1, tensors=tensors, state={"step": 1, "rates": [0.1] * 50}))
    files = sorted(path.iterdir())
    draw = random.Random(3)
    for _ in range(1000):
        file = draw.choice(files)
        good = file.read_bytes()
        bad = bytearray(good)
        position = draw.randrange(len(good) * 8)
        bad[position // 8] ^= 1 << position % 8
        file.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"corrupt|is of version"):
            verify_checkpoint(path)
        file.write_bytes(good)
    verify_checkpoint(path)
