"""What is computed beside the model has no gradients and is told apart, on its thread only."""

from __future__ import annotations

import threading

import pytest
import torch

from deepseek_mp.ops.own_work import is_own_work, own_work


def test_inside_there_are_no_gradients_and_outside_nothing_has_changed() -> None:
    x = torch.ones(2, requires_grad=True)
    with own_work():
        with own_work():
            assert not (x * 2).requires_grad
        assert is_own_work()
    assert not is_own_work()
    assert (x * 2).requires_grad


def test_an_error_ends_it() -> None:
    with pytest.raises(ValueError, match="inside"), own_work():
        raise ValueError("inside")
    assert not is_own_work()


def test_other_threads_are_not_marked() -> None:
    seen: list[bool] = []
    with own_work():
        thread = threading.Thread(target=lambda: seen.append(is_own_work()))
        thread.start()
        thread.join()
    assert seen == [False]
