"""Results are lazy: nothing is read before someone asks."""

import pytest

from deepseek_mp.trainer.result import StepFacts, StepResult

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
