"""`Crew`: every task is done once, on one core each; a failure ends the rest, and nobody is at work when it is raised."""

import threading
import time

import pytest
import torch

from deepseek_mp.optim.offload import crew as crew_module
from deepseek_mp.optim.offload.crew import Crew


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
    at_work, waits, real = [], [], crew_module.wait

    def task():
        at_work.append(1)
        time.sleep(0.02)
        at_work.pop()

    def wait(hands):
        waits.append(1)
        if len(waits) == 1:
            time.sleep(0.03)
            raise KeyboardInterrupt("pressed")
        return real(hands)

    monkeypatch.setattr(crew_module, "wait", wait)
    with pytest.raises(KeyboardInterrupt, match="pressed"):
        Crew(2).run([task] * 500)
    assert at_work == []
    assert len(waits) == 2


def test_jobs_are_worked_on_in_their_order():
    done = []
    crew = Crew(2)
    jobs = [crew.begin([lambda number=number: done.append(number)] * 20) for number in range(3)]
    for job in jobs:
        job.end()
    assert sorted(done) == [0] * 20 + [1] * 20 + [2] * 20
    assert done[0] == 0
    assert done[-1] == 2
