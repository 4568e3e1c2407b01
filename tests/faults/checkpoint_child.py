"""Run as a program by the checkpoint fault tests: what must die, or meet a full disk, does so here.

    checkpoint_child.py kill_loop ROOT KILLS SEED    SIGKILL at random moments of a save
    checkpoint_child.py kill_points ROOT             SIGKILL before each operation of a save
    checkpoint_child.py limits ROOT                  a save that meets a file-size limit; torch.save
                                                     that meets one, or is killed while it overwrites

Each saver is a fork of this process, so that a hundred of them cost one import of torch. The result
is one line of JSON; anything wrong is an exception and a non-zero exit.
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deepseek_mp.errors import CheckpointError
from deepseek_mp.trainer.checkpoint import Snapshot, newest_checkpoint, read_checkpoint, write_checkpoint

BIG, SMALL = 1 << 18, 64
"""Elements a tensor: big enough for a kill to land inside a write, small enough to repeat often."""


def snapshot(step: int, generation: int, size: int) -> Snapshot:
    """Every value in it says which save it is from, so that a mixture of two is noticed."""
    mark = float(generation)
    tensors = {
        "model": {"a": torch.full((size,), mark), "b": torch.full((3, 5), mark).t()},
        "optimizer": {"exp_avg": torch.full((size,), mark), "step": torch.tensor(mark)},
        "ema": {"a": torch.full((size,), mark, dtype=torch.float64)},
    }
    return Snapshot(step=step, tensors=tensors, state={"generation": generation, "step": step})


def check(path: Path) -> int:
    """The generation of a checkpoint, all of whose parts agree on it."""
    found = read_checkpoint(path)
    generation = found.state["generation"]
    assert found.state["step"] == found.step
    assert found.tensors.keys() == {"model", "optimizer", "ema"}
    for tensors in found.tensors.values():
        for tensor in tensors.values():
            assert torch.all(tensor == generation), (path, generation)
    return int(generation)


def forked(action: Callable[[], object]) -> int:
    """Run `action` in a child, and return its process id."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except BaseException as error:  # noqa: BLE001 - a fork must never return into the parent's code
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
        os._exit(0)
    return pid


def was_killed(pid: int) -> bool:
    """Wait for a child: True if SIGKILL ended it, False if it finished."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the save failed"
    return False


def phase(root: Path) -> str:
    """How far a killed save had come, from what it left behind."""
    hidden = [path for path in root.iterdir() if path.name.startswith(".")]
    kinds = sorted({path.name.split(".")[2].split("-")[0] for path in hidden})
    files = sum(len(list(path.iterdir())) for path in hidden if ".tmp-" in path.name)
    return f"{'+'.join(kinds)} {files}" if kinds else "nothing hidden"


def kill_loop(root: str, kills: str, seed: str) -> dict[str, Any]:
    """SIGKILL savers at random moments until `kills` of them died saving; check all after each."""
    where, draw, wanted = Path(root), random.Random(int(seed)), int(kills)
    write_checkpoint(where, snapshot(0, 0, BIG))
    phases: Counter[str] = Counter()
    span, step, durable, died, generation = 0.05, 0, 0, 0, 0
    while died < wanted:
        generation += 1
        step += draw.random() < 0.6  # otherwise a step that may be there already is written again
        new = snapshot(step, generation, BIG)
        pid = forked(partial(write_checkpoint, where, new, keep=2))
        time.sleep(draw.uniform(0, span))
        os.kill(pid, signal.SIGKILL)
        killed = was_killed(pid)
        died += killed
        # Keeps the range of moments as long as a save takes here, whatever this machine does meanwhile.
        span = span * 1.05 if killed else span * 0.8
        phases[phase(where)] += killed
        found = newest_checkpoint(where)
        assert found is not None, f"no checkpoint left: {sorted(os.listdir(where))}"
        now = check(found)
        assert now in ((durable, generation) if killed else (generation,)), (durable, now, generation)
        durable = now
    return {"kills": died, "saves": generation, "phases": dict(phases)}


def die_at(moment: int) -> None:
    """SIGKILL this process just before the `moment`-th operation that changes the disk."""
    seen = 0

    def point() -> None:
        nonlocal seen
        seen += 1
        if seen == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        creates = event == "open" and set(arguments[1] or "") & set("wxa+")
        if creates or event in {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}:
            point()

    fsync = os.fsync

    def synced(descriptor: int) -> None:
        point()
        fsync(descriptor)

    os.fsync = synced
    sys.addaudithook(audit)


def kill_points(root: str) -> dict[str, Any]:
    """Die before each operation of a save, one after the other; then the next save must clear up."""
    base, scene = Path(root) / "base", Path(root) / "scene"
    points: dict[str, int] = {}
    for case, steps, saved in (("first", [], 1), ("new", [1, 2], 3), ("replace", [1, 2], 2)):
        shutil.rmtree(base, ignore_errors=True)
        base.mkdir(parents=True)
        for generation, step in enumerate(steps, start=1):
            write_checkpoint(base, snapshot(step, generation, SMALL))
        before, moment, killed = len(steps), 0, True
        while killed:
            moment += 1
            shutil.rmtree(scene, ignore_errors=True)
            shutil.copytree(base, scene)

            def save(moment: int = moment, saved: int = saved) -> None:
                die_at(moment)
                write_checkpoint(scene, snapshot(saved, 9, SMALL), keep=2)

            killed = was_killed(forked(save))
            found = newest_checkpoint(scene)
            assert (found is None) <= (killed and before == 0), (case, moment)
            if found is not None:
                assert check(found) in ((before, 9) if killed else (9,)), (case, moment)
            write_checkpoint(scene, snapshot(20, 20, SMALL), keep=2)
            left = sorted(os.listdir(scene))
            assert not [name for name in left if name.startswith(".")], (case, moment, left)
            assert len(left) == 2 or before == 0, (case, moment, left)
            assert {check(scene / name) for name in left} <= {1, 2, 9, 20}
        points[case] = moment - 1
    return points


class KillingFile:
    """A file that ends the process with SIGKILL once `limit` bytes were written."""

    def __init__(self, path: str, limit: int) -> None:
        self.file = Path(path).open("wb", buffering=0)  # noqa: SIM115
        self.left = limit

    def write(self, data: bytes) -> int:
        self.left -= self.file.write(bytes(data)[: self.left])
        if self.left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return len(data)

    def flush(self) -> None:
        """Nothing is buffered."""


def file_limit(root: Path) -> dict[str, Any]:
    """Save what no longer fits under the limit, over a directory that holds a good checkpoint."""
    try:
        write_checkpoint(root, snapshot(2, 2, BIG))
    except CheckpointError as error:
        cause, newest = error.__cause__, newest_checkpoint(root)
        assert isinstance(cause, OSError)
        assert newest is not None
        left = sorted(os.listdir(root))
        code = errno.errorcode[cause.errno or 0]
        return {"error": str(error), "cause": code, "left": left, "generation": check(newest)}
    raise AssertionError("a file of 2 MB was written")


def torch_file_limit(path: str) -> dict[str, Any]:
    """torch.save what no longer fits under the limit, over a good file."""
    try:
        torch.save({"w": torch.zeros(BIG)}, path)
    except (RuntimeError, OSError) as error:
        return {"error": type(error).__name__}
    raise AssertionError("a file of 1 MB was written")


def limits(root: str) -> dict[str, Any]:
    """What becomes of something good when saving over it is killed, or meets a limit of 1 MB a file."""
    checkpoints, full, killed = Path(root) / "checkpoints", str(Path(root) / "full.pt"), str(Path(root) / "killed.pt")
    write_checkpoint(checkpoints, snapshot(1, 1, SMALL))
    for path in (full, killed):
        torch.save({"w": torch.ones(10)}, path)
    assert was_killed(forked(lambda: torch.save({"w": torch.zeros(BIG)}, KillingFile(killed, 500_000))))  # type: ignore[arg-type]
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    return {"checkpoint": file_limit(checkpoints), "torch": torch_file_limit(full)}


if __name__ == "__main__":
    torch.set_num_threads(1)  # a fork has none of its parent's threads
    command = {"kill_loop": kill_loop, "kill_points": kill_points, "limits": limits}[sys.argv[1]]
    print(json.dumps(command(*sys.argv[2:])))
