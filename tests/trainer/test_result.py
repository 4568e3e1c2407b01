"""Results are lazy: nothing is read before someone asks."""

from dataclasses import fields, replace

import pytest

from deepseek_mp.precision import PrecisionPlan
from deepseek_mp.trainer.memory_report import MemoryLine, MemoryReport
from deepseek_mp.trainer.result import FitResult, StepFacts, StepResult

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


@pytest.mark.parametrize("name", [field.name for field in fields(StepFacts)])
def test_every_field_of_the_facts_is_one_of_the_result(name):
    assert getattr(StepResult(lambda: FACTS), name) == getattr(FACTS, name)


def test_its_text_shows_the_facts():
    assert "reason='the loss is nan'" in repr(StepResult(lambda: FACTS))


def test_what_was_taken_to_fit_into_memory_is_said_with_the_fit():
    plain = FitResult(epochs=1, steps_attempted=3, steps_applied=3, loss=0.5, plan=PrecisionPlan.of("bf16"))
    assert str(plain).endswith("base format bf16, 0.0 s")
    line = MemoryLine(name="states=8bit", taken=True, why="")
    report = MemoryReport(limit_bytes=2, before_bytes=3, after_bytes=1, lines=(line,))
    assert str(replace(plain, memory=report)).endswith("0.0 s, with states=8bit for its memory")
    assert str(replace(plain, memory=replace(report, lines=()))) == str(plain)
