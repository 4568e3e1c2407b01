"""What the tests of offloading share: a step of the host that fails, and crews of one thread."""

import pytest
import torch

from deepseek_mp.optim.offload import rule


class FailingStep:
    """Lets AdamW fail in the middle of a chunk, after it has changed something."""

    def __init__(self, monkeypatch):
        self._patch, self._real = monkeypatch, rule.step

    def arm(self, *, after):
        calls = iter(range(1000))

        def step(group, weights, grads, moments, counters):
            if next(calls) < after:
                self._real(group, weights, grads, moments, counters)
                return
            weights[0].mul_(3.0)
            moments[0][0].add_(1.0)
            raise RuntimeError("the host's step failed")

        self._patch.setattr(rule, "step", step)

    def undo(self):
        self._patch.setattr(rule, "step", self._real)


@pytest.fixture
def failing_step(monkeypatch):
    return FailingStep(monkeypatch)


@pytest.fixture
def one_thread():
    """Of each crew, so that chunks are stepped one after the other on any machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
