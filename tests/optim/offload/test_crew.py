"""`Crew`: every task is done once, by a team of its own; after a failure or an interrupt nobody is at work."""

import subprocess
import sys
import threading
import time
from functools import partial

import pytest
import torch

from deepseek_mp.optim.offload.crew import Board, Crew


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("tasks", [0, 1, 2, 50])
def test_every_task_is_done_once_and_without_gradients(threads, tasks):
    done = []
    Crew(threads).run([lambda i=i: done.append((i, torch.is_grad_enabled())) for i in range(tasks)])
    assert sorted(done) == [(i, False) for i in range(tasks)]


def test_tasks_run_beside_each_other_each_on_one_core():
    meeting, found = threading.Barrier(3, timeout=10), []

    def task():
        meeting.wait()
        found.append(torch.get_num_threads())

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        Crew(3).run([task] * 3)
    finally:
        torch.set_num_threads(before)
    assert found == [1, 1, 1]


def test_an_interrupted_start_leaves_no_thread_and_may_be_repeated(monkeypatch):
    """At the end of the process all threads are waited for."""
    crew, real = Crew(3), threading.Barrier.wait

    def wait(barrier, timeout=None):
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt("pressed")
        return real(barrier, timeout)

    before = torch.get_num_threads()
    monkeypatch.setattr(threading.Barrier, "wait", wait)
    with pytest.raises(KeyboardInterrupt, match="pressed"):
        crew.run([int, int])
    monkeypatch.setattr(threading.Barrier, "wait", real)
    assert torch.get_num_threads() == before
    for thread in crew._board.threads:
        thread.join(10)
        assert not thread.is_alive()
    done = []
    crew.run([partial(done.append, number) for number in range(5)])
    assert sorted(done) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("threads", "teams", "width"), [(7, 7, 1), (8, 4, 2), (15, 5, 3), (32, 4, 8)])
def test_many_threads_work_in_few_teams(threads, teams, width):
    """Python lets one team at a time go on to its next operation."""
    meeting, found = threading.Barrier(teams, timeout=10), []

    def task():
        meeting.wait()
        found.append(torch.get_num_threads())

    crew = Crew(threads)
    crew.run([task] * teams)
    assert (crew.width, found) == (width, [width] * teams)


def test_the_cores_of_others_stay_as_they_are():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        crew = Crew()
        crew.run([lambda: None] * 2)
        later = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert (crew.threads, torch.get_num_threads(), later) == (2, 2, [2])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("error", [RuntimeError("out of luck"), KeyboardInterrupt("out of luck")])
def test_after_a_failure_no_task_is_begun(threads, error):
    done = []

    def task(number):
        if number == 4:
            raise error
        done.append(number)
        time.sleep(0.01)

    crew = Crew(threads)
    with pytest.raises(type(error), match="out of luck"):
        crew.run([lambda i=i: task(i) for i in range(100)])
    found = len(done)
    assert 4 <= found < 20
    crew.run([lambda: time.sleep(0.01)] * 4)
    assert len(done) == found


def test_who_is_interrupted_finds_nobody_at_work(monkeypatch):
    at_work, waits, real = [], [], Board.wait

    def task():
        at_work.append(1)
        time.sleep(0.02)
        at_work.pop()

    def wait(board, job):
        waits.append(1)
        if len(waits) == 1:
            time.sleep(0.03)
            raise KeyboardInterrupt("pressed")
        real(board, job)

    monkeypatch.setattr(Board, "wait", wait)
    with pytest.raises(KeyboardInterrupt, match="pressed"):
        Crew(2).run([task] * 500)
    assert (at_work, len(waits)) == ([], 2)


def test_what_is_done_beside_makes_room_for_jobs_and_can_be_given_up():
    crew, done, go = Crew(2), [], threading.Event()
    beside = crew.begin([go.wait, go.wait, *[lambda: done.append("beside")] * 50], beside=True)
    job = crew.begin([lambda: done.append("job")] * 3)
    go.set()
    job.end()
    beside.end()
    assert "beside" not in done[:2]
    assert done.count("beside") == 50
    stopped = threading.Event()
    beside = crew.begin([stopped.wait, stopped.wait, lambda: done.append("late")], beside=True)
    threading.Timer(0.05, stopped.set).start()
    beside.cancel()
    crew.run([lambda: None] * 4)
    assert "late" not in done
    assert beside.is_over


def test_threads_end_with_the_crew():
    before, crew = set(threading.enumerate()), Crew(2)
    crew.run([lambda: None] * 2)
    own = set(threading.enumerate()) - before
    assert len(own) == 2
    del crew
    for thread in own:
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_jobs_are_worked_on_in_their_order():
    done = []
    crew = Crew(2)
    jobs = [crew.begin([lambda number=number: done.append(number)] * 20) for number in range(3)]
    for job in jobs:
        job.end()
    assert sorted(done) == [0] * 20 + [1] * 20 + [2] * 20
    assert done[0] == 0
    assert done[-1] == 2


AT_WORK = """
import torch
from deepseek_mp.optim.offload.crew import Crew
a, b, crew = torch.ones(1 << 23), torch.ones(1 << 23), Crew(4)
job = crew.begin([lambda: b.copy_(a)] * 40)
"""


def test_python_ends_well_while_threads_are_at_work():
    ended = subprocess.run([sys.executable, "-c", AT_WORK], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
