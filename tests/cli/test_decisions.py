"""Decisions are told while a fit runs, and not after it."""

from __future__ import annotations

import pytest

from deepseek_mp.cli.decisions import told
from deepseek_mp.trainer.recording import decided


def test_each_decision_is_a_line_as_long_as_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with told():
        decided.info("step %d: %s", 4, "head bf16 -> row")
        assert capsys.readouterr().err == "deepseek-mp: step 4: head bf16 -> row\n"
    decided.info("step %d: %s", 5, "head row -> bf16")
    assert capsys.readouterr().err == ""
    assert decided.handlers == []
