"""Counters: exact from several threads, constant in memory."""

from __future__ import annotations

import threading

from deepseek_mp.monitor.counts import Count
from deepseek_mp.monitor.tally import Tally
from deepseek_mp.precision import Reason


def test_threads_lose_no_count() -> None:
    tally = Tally()

    def count() -> None:
        for _ in range(2000):
            tally.add("layer", "mm", "fp32", "backward", Reason.PINNED)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    usage = tally.usage()
    assert usage.ops["mm"]["fp32"] == Count(0, 8000)
    assert usage.fallbacks[0].count == 8000


def test_memory_does_not_grow_with_steps() -> None:
    tally = Tally()
    for step in range(100):
        tally.add("layer", "mm", "bf16", "forward")
        tally.note("said once")
        tally.steps(train=step % 2 == 0).seen += 1
    usage = tally.usage()
    assert len(usage.counts) == 1
    assert usage.notes == ("said once",)
    assert (usage.steps, usage.eval_steps) == (50, 50)
