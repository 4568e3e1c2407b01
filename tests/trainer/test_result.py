"""Results are lazy, and numbers arrive on the host in the order they were sent."""

import pytest
import torch

from deepseek_mp.trainer.result import HostCopy, StepFacts, StepResult

FACTS = StepFacts(status="skipped", reason="the loss is nan", loss=2.0, scale=8.0, grad_norm=3.0, first_bad_module="fc")


def test_nothing_is_read_before_someone_asks():
    reads = []

    def read():
        reads.append(1)
        return FACTS

    result = StepResult(read)
    assert reads == []
    assert result.status == "skipped"
    assert reads == [1]


@pytest.mark.parametrize("name", ["status", "reason", "loss", "scale", "grad_norm", "first_bad_module"])
def test_every_field_of_the_facts_is_one_of_the_result(name):
    assert getattr(StepResult(lambda: FACTS), name) == getattr(FACTS, name)


def test_its_text_shows_the_facts():
    assert "reason='the loss is nan'" in repr(StepResult(lambda: FACTS))


def test_a_copy_is_of_the_moment_it_was_made():
    value, other = torch.tensor(1.5), torch.tensor(True)
    copy = HostCopy([value, other, torch.tensor(2**-14, dtype=torch.float64)])
    value.fill_(7.0)
    other.fill_(False)
    assert copy.read() == copy.read() == [1.5, 1.0, 2**-14]


def test_a_copy_keeps_non_finite_values_and_no_graph():
    loss = torch.tensor(float("nan"), requires_grad=True)
    read = HostCopy([loss, torch.tensor(float("inf"))]).read()
    assert read[0] != read[0]
    assert read[1] == float("inf")
