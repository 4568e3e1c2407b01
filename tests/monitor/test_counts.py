"""Counts by phase."""

from __future__ import annotations

from deepseek_mp.monitor.counts import Count


def test_counts_add_by_phase() -> None:
    total = Count(1, 2) + Count(10, 20)
    assert total == Count(forward=11, backward=22)
    assert total.total == 33
    assert total.to_json() == {"total": 33, "forward": 11, "backward": 22}
