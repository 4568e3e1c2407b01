from __future__ import annotations

import pytest

from deepseek_mp.activations import ActivationSettings
from deepseek_mp.errors import ConfigError
from deepseek_mp.precision import Rounding


def test_what_is_not_allowed_is_refused():
    for values, message in (
        ({"min_bytes": 0}, "min_bytes=0"),
        ({"group": 64}, "group=64. Allowed: 32, 128"),
        ({"rounding": "up"}, "rounding='up'. Allowed: nearest, stochastic"),
        ({"keep": "head"}, "keep='head'"),
        ({"keep": None}, "keep=None. Allowed: a tuple of globs"),
        ({"keep": iter(["head"])}, "keep=<list_iterator"),
        ({"seed": -1}, "seed=-1"),
    ):
        with pytest.raises(ConfigError, match=message):
            ActivationSettings(**values)


def test_a_rounding_may_be_named_and_patterns_be_a_list():
    settings = ActivationSettings(rounding="nearest", keep=["head"])
    assert settings.rounding is Rounding.NEAREST
    assert settings.keep == ("head",)


def test_patterns_cover_what_is_inside_a_module():
    settings = ActivationSettings(keep=("blocks.0", "*.norm*"))
    assert settings.keeps("blocks.0")
    assert settings.keeps("blocks.0.up")
    assert settings.keeps("blocks.1.norm2")
    assert not settings.keeps("blocks.1.up")
    assert not settings.keeps("")
