"""Regions that set what belongs to the whole process: threads share them, and the last one puts back what was there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

from deepseek_mp.backends import open_regions
from deepseek_mp.backends.open_regions import OpenRegions

SET: list[str] = []
"""What is set now, and what has been."""


@contextmanager
def setting(value: str) -> Iterator[None]:
    """As flags are set: what was there is read at the begin, and written at the end."""
    before = SET[-1]
    SET.append(value)
    try:
        yield
    finally:
        SET.append(before)


class Thread:
    """Stands for a thread that opens a region and closes it."""

    def __init__(self, regions: OpenRegions, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self._regions, self._number, self._patch = regions, number, monkeypatch
        self._open: list[AbstractContextManager[Any]] = []

    def enter(self, value: str) -> None:
        self._patch.setattr(open_regions, "get_ident", lambda: self._number)
        region = self._regions.region(value, lambda: setting(value))
        region.__enter__()
        self._open.append(region)

    def leave(self) -> None:
        self._patch.setattr(open_regions, "get_ident", lambda: self._number)
        self._open.pop().__exit__(None, None, None)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[Thread]:
    SET[:] = ["user's"]
    regions = OpenRegions()
    return [Thread(regions, number, monkeypatch) for number in range(3)]


def test_threads_in_one_setting_share_a_region_to_the_last(threads: list[Thread]) -> None:
    first, second, third = threads
    first.enter("ieee")
    second.enter("ieee")
    first.leave()
    third.enter("ieee")
    second.leave()
    assert SET == ["user's", "ieee"]
    third.leave()
    assert SET == ["user's", "ieee", "user's"]


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_whatever_the_order_of_the_ends_the_last_puts_back_what_was_there(
    threads: list[Thread], order: tuple[int, ...]
) -> None:
    for thread, value in zip(threads, ("ieee", "tf32", "ieee"), strict=True):
        thread.enter(value)
    for number in order:
        assert SET[-1] != "user's"
        threads[number].leave()
    assert SET[-1] == "user's"


def test_a_region_inside_one_of_the_same_thread_sets_it_again(threads: list[Thread]) -> None:
    thread, other, _ = threads
    thread.enter("ieee")
    SET.append("changed inside")
    thread.enter("ieee")
    other.enter("ieee")
    assert SET[-1] == "ieee"
    thread.leave()
    other.leave()
    assert SET[-1] == "changed inside"
    thread.leave()
    assert SET[-1] == "user's"


def test_what_cannot_be_set_is_no_open_region(threads: list[Thread]) -> None:
    regions = OpenRegions()

    def refused() -> AbstractContextManager[None]:
        raise ValueError("no such mode")

    region = regions.region("ieee", refused)
    with pytest.raises(ValueError, match="no such mode"):
        region.__enter__()
    with regions.region("ieee", lambda: setting("ieee")):
        assert SET[-1] == "ieee"
    assert SET[-1] == "user's"


def test_what_fails_while_it_is_set_is_no_open_region() -> None:
    SET[:] = ["user's"]
    regions = OpenRegions()

    @contextmanager
    def refused() -> Iterator[None]:
        with setting("ieee"):
            raise ValueError("no such mode")
        yield

    region = regions.region("ieee", refused)
    with pytest.raises(ValueError, match="no such mode"):
        region.__enter__()
    assert (SET[-1], regions._open) == ("user's", [])


def test_a_region_may_end_while_the_same_thread_begins_another() -> None:
    """As those of generators do that are collected, or of handlers of signals: wherever the thread is just then."""
    SET[:] = ["user's"]
    regions = OpenRegions()
    first = regions.region("ieee", lambda: setting("ieee"))
    first.__enter__()

    @contextmanager
    def collects() -> Iterator[None]:
        assert regions._lock.acquire(blocking=False), "it would wait for itself"
        regions._lock.release()
        with setting("tf32"):
            first.__exit__(None, None, None)
            yield

    with regions.region("tf32", collects):
        assert SET[-1] == "tf32"
    assert SET[-1] == "user's"
