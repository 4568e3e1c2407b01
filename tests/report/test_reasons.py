"""Many layers with one reason are one row, and their numbers a range."""

from __future__ import annotations

import pytest

from deepseek_mp.report.layers import Choice
from deepseek_mp.report.reasons import NUMBER, choice_rows, saturated_rows, why


def choice(
    layer: str, new: str = "bf16", *, step: int = 0, role: str | None = None, detail: str = "", **evidence: object
) -> Choice:
    return Choice(step=step, layer=layer, role=role, old="fp32", new=new, reason="r", detail=detail, evidence=evidence)


def test_evidence_of_equal_layers_is_a_range() -> None:
    given = [choice(f"blocks.{i}.up", bf16_ms=0.5 + i, kernel="triton") for i in range(3)]
    assert choice_rows(given) == [("", "blocks.*.up", "3", "", "fp32", "bf16", "r", "bf16_ms 0.5..2.5, kernel triton")]


def test_other_words_are_other_rows() -> None:
    given = [choice("blocks.0.up", detail="of [64, 64]"), choice("blocks.1.up", detail="because of [64, 64]")]
    assert [row[1] for row in choice_rows(given)] == ["blocks.0.up", "blocks.1.up"]


def test_shapes_that_differ_in_numbers_are_one_row_only_under_one_name() -> None:
    given = [
        choice("blocks.0.up", detail="its weight is [64, 256]"),
        choice("blocks.0.down", detail="its weight is [256, 64]"),
    ]
    assert [row[1] for row in choice_rows(given)] == ["blocks.0.up", "blocks.0.down"]


def test_no_row_of_several_layers_needs_no_number_of_layers() -> None:
    assert [row[2] for row in choice_rows([choice("a"), choice("b", "fp32")])] == ["", ""]


def test_steps_are_kept_apart_where_they_matter() -> None:
    given = [choice("a.0", step=3), choice("a.1", step=3), choice("a.0", "fp32", step=8)]
    assert [row[:3] for row in choice_rows(given, by_step=True)] == [("3", "a.*", "2"), ("8", "a.0", "1")]


def test_roles_are_kept_apart() -> None:
    given = [choice("a", role="fprop", detail="1 x"), choice("a", role="wgrad", detail="2 x")]
    assert [(row[3], row[-1]) for row in choice_rows(given)] == [("fprop", "1 x"), ("wgrad", "2 x")]


def test_saturated_tensors_are_counted() -> None:
    events = [choice("a.0", "delayed", step=step, role="dgrad") for step in (4, 5, 6, 9)]
    events += [choice("a.1", "delayed", step=2, role="dgrad")]
    assert saturated_rows(events) == [("a.0", "dgrad", "delayed", "4", "4-6,9"), ("a.1", "dgrad", "delayed", "1", "2")]


def test_detail_and_evidence_in_one_line() -> None:
    assert why(choice("a", detail="slower", fp32_ms=1.23456, failed={"bf16": "oom"}, from_cache=True)) == (
        'slower; fp32_ms 1.235, failed {"bf16": "oom"}, from_cache yes'
    )


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("step fp32 8.09 ms, bf16 1e-05 ms", "step fp32 # ms, bf16 # ms"),
        ("a 1x128 block of [192, 64]", "a 1x128 block of [#, #]"),
        ("follows layer4", "follows layer4"),
    ],
)
def test_numbers_are_those_that_stand_alone(text: str, masked: str) -> None:
    assert NUMBER.sub("#", text) == masked
