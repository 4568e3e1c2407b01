"""Every example is short, runs as a person would run it, and prints what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PROMISES = {
    "checkpoints.py": [r"continued run equals the uninterrupted one; 9 tensors in the plain model"],
    "fp8.py": [
        r"block: loss 0\.\d+\nbf16: loss 0\.\d+",
        r"0: bf16 \(pinned\)",
        r"2: block \((emulated|pinned|requested)\) quantise=\w+ product=\w+",
        r"4: bf16 \(shape\)",
        r"6: bf16 \(output_layer\)",
    ],
    "inference.py": [
        r"fp32 +0?\.?\d",
        r"taken: \S+, divergence \d\S* of 0\.001 nats",
        r"the same bits for 5 images: True",
        r"inputs: args\[0\] float32 \[s\d+, 3, 8, 8\]; s\d+ from 1\n",
        r"model\.hidden\.q: int8\nmodel\.head\.weight: bf16",
    ],
    "own_loop.py": [
        r"step 0: loss \d\.\d+, applied, norm \d+\.\d+",
        r"step 20: loss \d\.\d+, applied",
        r"Precision usage: 3 of 30 steps sampled",
        r"mm +fp32 +pinned",
    ],
    "profiler.py": [
        r"16 batches, mean loss 2\.\d+",
        r"in FP4 layer 2 would raise the loss by \d\.\de-0[34] of it",
        r"loss after training: 0\.\d+",
        r"\n2: (fp32|bf16|row|nvfp4), \S+ of the loss: ",
    ],
    "qat.py": [
        r"loss 0\.\d+",
        r"0: int8, .+\n4: int8, .+\n6: fp32, .+",
        r"accuracy in INT8, from the file: (0\.[89]|1\.)",  # one in four would be chance
    ],
    "train.py": [
        r"epoch 4: loss \d\.\d+, accuracy 0\.[3-9]",  # one in eight would be chance
        r"\(model\) fp32 -> (fp32|bf16)",
        r"1 fp32 -> fp32 \(pinned",
        r"Precision usage: 1 of \d+ steps sampled",
    ],
}


def test_every_example_has_a_promise():
    assert [path.name for path in EXAMPLES] == sorted(PROMISES)


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_under_60_lines(script):
    assert len(script.read_text().splitlines()) < 60


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.name)
def test_an_example_prints_what_it_promises_without_warnings_or_files(script, tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "DEEPSEEK_MP_CACHE": "off",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(script)],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for promise in PROMISES[script.name]:
        assert re.search(promise, done.stdout), f"{promise!r} not in\n{done.stdout}"
    assert list(tmp_path.iterdir()) == []
