"""The kinds of linear layers: their names, and that what each keeps comes back from what implementations read."""

from __future__ import annotations

import pytest
import torch

from deepseek_mp.errors import ConfigError
from deepseek_mp.inference.form import LINEAR_KINDS
from deepseek_mp.inference.linear_kinds import KINDS

CPU = torch.device("cpu")


def test_forms_name_all_of_them():
    assert tuple(KINDS) == LINEAR_KINDS


@pytest.mark.parametrize("name", KINDS)
def test_what_is_kept_has_the_sizes_of_the_weight_and_comes_back(name):
    kind, weight = KINDS[name], torch.randn(48, 160)
    kept = kind.keep(weight, "head")
    assert kind.sizes(kept) == (48, 160)
    assert kind.why_not(48, 160) == ""
    assert kind.widened(kept).shape == weight.shape
    for implementation in {"reference", kind.fastest(CPU, torch.bfloat16, 48, 160) or "reference"}:
        prepared = kind.prepared(kept, implementation)
        back = kind.unprepared(prepared, implementation)
        assert list(back) == list(kept)
        assert all(torch.equal(back[part].float(), kept[part].float()) for part in kept)
        x = torch.randn(3, 160).to(torch.bfloat16)
        expected = kind.linear(x, kept, None, "reference")
        torch.testing.assert_close(kind.linear(x, prepared, None, implementation), expected, rtol=5e-2, atol=0.2)
    with pytest.raises(ConfigError, match="head with values that are not finite"):
        kind.keep(weight.fill_(torch.nan), "head")


def test_bits_of_a_weight():
    weight = torch.randn(64, 256)
    bits = {name: 8 * sum(part.nbytes for part in kind.keep(weight, "a").values()) / weight.numel() for name, kind in
            KINDS.items()}  # fmt: skip
    assert bits == {"int8_weights": 8.125, "fp8_weights": 8.125, "fp8": 8.125, "int4_weights": 4.25}


def test_fp8_is_for_devices_that_multiply_it():
    assert {name: kind.needs for name, kind in KINDS.items()} == {
        "int8_weights": None, "fp8_weights": "fp8_e4m3", "fp8": "fp8_e4m3", "int4_weights": None,
    }  # fmt: skip
