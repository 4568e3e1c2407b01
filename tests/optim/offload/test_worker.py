"""`ThreadWorker`: one thread, in order, without gradients, and errors where the result is asked for."""

import threading
import time

import pytest
import torch

from deepseek_mp.optim.offload.worker import ThreadWorker, finish


def test_tasks_run_in_order_on_one_other_thread():
    worker, seen = ThreadWorker(), []
    futures = [worker.submit(lambda n: seen.append((n, threading.get_ident())), n) for n in range(20)]
    futures[-1].result()
    assert [number for number, _ in seen] == list(range(20))
    assert {thread for _, thread in seen} != {threading.get_ident()}
    assert len({thread for _, thread in seen}) == 1


def test_tasks_have_no_gradients():
    assert ThreadWorker().submit(torch.is_grad_enabled).result() is False
    assert torch.is_grad_enabled()


def test_an_error_comes_with_the_result():
    def fail():
        raise RuntimeError("no luck")

    future = ThreadWorker().submit(fail)
    with pytest.raises(RuntimeError, match="no luck"):
        future.result()


def test_all_that_a_worker_was_given_can_be_waited_for():
    worker, seen = ThreadWorker(), []
    worker.submit(lambda: 1 / 0)
    worker.submit(lambda: (time.sleep(0.02), seen.append(1)))
    finish(worker)
    assert seen == [1]
