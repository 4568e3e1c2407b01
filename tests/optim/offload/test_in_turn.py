"""`in_turn`: chunks are begun ahead, ended in order, and left by everybody after a failure."""

import pytest

from deepseek_mp.optim.offload.crew import Crew
from deepseek_mp.optim.offload.in_turn import AHEAD, in_turn


class Work:
    def __init__(self, number, events, fails):
        self.number, self.events, self.fails = number, events, fails

    def end(self):
        if self.number == self.fails:
            raise RuntimeError("out of luck")
        self.events.append(f"end {self.number}")

    def cancel(self):
        self.events.append(f"cancel {self.number}")


def run(numbers, *, threads, fails=None, done=()):
    events = []

    def begin(number):
        events.append(f"begin {number}")
        return None if number in done else Work(number, events, fails)

    try:
        in_turn(range(numbers), begin, lambda number: events.append(f"finish {number}"), Crew(threads))
    except RuntimeError as error:
        events.append(str(error))
    return events


def test_some_are_begun_before_the_first_is_waited_for():
    events = run(5, threads=2)
    assert events.index("end 0") == AHEAD + 1
    ended = [word for word in events if "begin" not in word]
    assert ended == [f"{do} {i}" for i in range(5) for do in ("end", "finish")]


def test_a_single_thread_has_nothing_to_gain():
    assert run(3, threads=1) == [f"{do} {i}" for i in range(3) for do in ("begin", "end", "finish")]


@pytest.mark.parametrize("threads", [1, 2])
def test_what_needs_no_work_is_finished_in_its_turn(threads):
    events = run(4, threads=threads, done=(1, 3))
    assert [word for word in events if "finish" in word] == [f"finish {i}" for i in range(4)]
    assert "end 1" not in events
    assert run(0, threads=threads) == []


def test_after_a_failure_what_is_under_way_is_cancelled():
    events = run(8, threads=2, fails=2)
    assert events[-AHEAD - 1 :] == [*(f"cancel {3 + i}" for i in range(AHEAD)), "out of luck"]
    assert "finish 1" in events
    assert "finish 2" not in events
