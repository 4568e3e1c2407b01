"""What every test gets: fixed seeds, no time limits from hypothesis, gpu tests skipped without one."""

from __future__ import annotations

import gc
import os
import random
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

# PyTorch's compiler else tries each of the processor's instruction sets: a C++ program for each where its cache
# is empty, and a process for each in every process that compiles. Set it to 0 for a C++ compiler that lacks them.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

GPU_TESTS = Path(__file__).parent / "gpu"
LEFT_BEHIND = 100_000
"""Objects that are worth it."""

if find_spec("hypothesis"):  # the gpu tests also run where only pytest is installed
    from hypothesis import settings

    # A shared machine may be slow at any moment, and a failure must come back when it is looked at.
    settings.register_profile("project", deadline=None, derandomize=True)
    settings.load_profile("project")


def pytest_collectstart() -> None:
    """What a file draws while it is imported does not depend on the files before it."""
    seed()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test in tests/gpu needs an accelerator, marked so or not."""
    for item in items:
        if item.path.is_relative_to(GPU_TESTS):
            item.add_marker(pytest.mark.gpu)


def pytest_collection_finish() -> None:
    """Let no garbage collection look again at what imports and collection made: it lives to the end.

    Those are millions of objects, and the package itself collects after each stage and trial. Without
    this a third of the time of some files goes there.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """The same for what the tests of a file have left behind, most of it in caches of PyTorch's compiler."""
    if nextitem is not None and nextitem.path != item.path and len(gc.get_objects()) > LEFT_BEHIND:
        gc.collect()
        gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs an accelerator, and say that it is what is missing."""
    if item.get_closest_marker("gpu") and not torch.accelerator.is_available():
        pytest.skip("no accelerator: torch.accelerator.is_available() is False here")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test draws the same numbers whatever ran before it."""
    seed()


def seed() -> None:
    random.seed(0)
    np.random.seed(0)  # the global generator is what code under test may use
    torch.manual_seed(0)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Print the total on a line of its own, after pytest's last line; workers have no reporter."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or config.option.collectonly:
        return
    count = {kind: len(reporter.stats.get(kind, ())) for kind in ("passed", "failed", "error", "skipped")}
    print(f"total: {count['passed']} passed, {count['failed'] + count['error']} failed, {count['skipped']} skipped")


@pytest.fixture(autouse=True)
def _no_timings_from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` neither finds timings that an earlier run left on this machine, nor leaves any."""
    monkeypatch.setenv("DEEPSEEK_MP_CACHE", "off")
