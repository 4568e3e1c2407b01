"""Weights whose storage at the end of two runs differs, and no others."""

from __future__ import annotations

from deepseek_mp.report.layers import Choice
from deepseek_mp.report.storage import compare_storage


def stored(parameter: str, new: str, step: int = 3) -> Choice:
    return Choice(step=step, layer=parameter, role=None, old="fp32", new=new, reason="noise_small")


def test_only_storages_that_differ_at_the_end_are_told() -> None:
    a = [stored("same", "bf16_sr"), stored("other", "bf16_sr"), stored("mine", "bf16_kahan")]
    b = [stored("same", "bf16_sr", step=9), stored("other", "bf16_kahan"), stored("theirs", "bf16_sr")]
    found = compare_storage(a, b)
    assert [(difference.parameter, *difference.formats) for difference in found] == [
        ("other", "bf16_sr", "bf16_kahan"),
        ("mine", "bf16_kahan", "(no decision)"),
        ("theirs", "(no decision)", "bf16_sr"),
    ]
    assert found[2].to_json() == {"parameter": "theirs", "a": None, "b": b[2].to_json()}
