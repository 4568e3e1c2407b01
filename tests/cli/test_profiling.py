"""What a question leads to: seeds, budgets, emulation, and an interrupt that keeps what was measured."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer import Exit

from deepseek_mp import ProfileReport
from deepseek_mp.cli.profile_question import Question
from deepseek_mp.cli.profiling import answer
from deepseek_mp.errors import ConfigError
from deepseek_mp.profiler import MetricReport

ASKED = Question(
    recipes=("bf16", "row"),
    budget=1e-3,
    noise_budget=0.05,
    batches=3,
    verify=0,
    by_role=False,
    emulate=True,
    timed=False,
    data=True,
    resume=None,
    device="cpu",
    seed=0,
)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A process started in the background ignores interrupts, and Python then leaves them ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def profiled(question: Question) -> ProfileReport:
    report = answer("net.py:job", question).report
    assert isinstance(report, ProfileReport)
    return report


def test_the_seed_makes_the_weights(net: Path) -> None:
    first, again, other = (profiled(replace(ASKED, seed=seed)) for seed in (1, 1, 2))
    assert first.to_json() == again.to_json()
    assert first.loss != other.loss


def test_the_report_recommends_within_the_budgets_asked_for(net: Path) -> None:
    tight = answer("net.py:job", replace(ASKED, budget=1e-9))
    assert isinstance(tight.report, ProfileReport)
    assert tight.report.budget is not None
    assert (tight.report.budget.loss, tight.report.budget.noise) == (1e-9, 0.05)
    assert {unit["recommended"] for unit in tight.report.values()} <= {"fp32", "bf16"}
    assert {unit["recommended"] for unit in profiled(ASKED).values()} >= {"row"}


def test_what_the_device_lacks_is_chosen_only_where_asked_for(net: Path) -> None:
    found = profiled(replace(ASKED, emulate=False))
    if "row" not in found.native:
        assert "row" not in {unit["recommended"] for unit in found.values()}


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("resume", "said"), [(Path("part.json"), "goes on from part.json"), (None, "nothing is kept")])
def test_an_interrupt_says_what_is_kept(
    net: Path, resume: Path | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = net.read_text().replace("Batches(at=5)", "Batches(at=10)")
    net.write_text(text)
    question = replace(ASKED, batches=12, resume=resume)
    with pytest.raises(Exit, match=r"^130$"):
        answer("net.py:interrupted", question)
    assert f"deepseek-mp: interrupted; {'the same command ' if resume else ''}{said}" in capsys.readouterr().err
    if resume is not None:
        net.write_text(text.replace("Batches(at=10)", "Batches()"))
        rest = answer("net.py:interrupted", question).report
        assert isinstance(rest, ProfileReport)
        assert rest.batches == 12


def test_a_metric_finds_the_model_where_its_function_left_it(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("moved")

    monkeypatch.setattr("torch.nn.Module.to", refuse)
    report = answer("net.py:metric", Question(recipes=("fp32", "bf16"))).report
    assert isinstance(report, MetricReport)
    assert report.error <= 1e-5


def test_options_that_a_metric_would_ignore_are_refused(net: Path) -> None:
    question = Question(verify=1, budget=0.5, resume=Path("part.json"), by_role=True, data=False)
    with pytest.raises(ConfigError, match="--budget, --verify, --by-role, --no-data, --resume for a target"):
        answer("net.py:metric", question)


def test_a_model_without_values_is_refused(net: Path) -> None:
    net.write_text(net.read_text().replace("return network(), Batches()", 'return network().to("meta"), Batches()'))
    with pytest.raises(ConfigError, match="a model on the meta device"):
        answer("net.py:job", ASKED)
