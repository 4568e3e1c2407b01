"""An error of the exporter is told with the line of the model's code that it is about."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepseek_mp.errors import ConfigError
from deepseek_mp.programs import exported
from deepseek_mp.programs.exporter_error import reason


class Decides(nn.Module):
    def forward(self, args, kwargs):
        del kwargs
        return args[0] if args[0].sum() > 0 else -args[0]


def test_the_line_of_the_models_code_is_named():
    found = r"a Decides that .* cannot export \(\w+: .*; at test_exporter_error\.py:\d+: return args\[0\] if"
    with pytest.raises(ConfigError, match=found):
        exported(Decides(), (torch.randn(3, 2),), {})


def test_without_a_line_of_the_model_it_is_the_error_alone():
    assert reason(ValueError("one\ntwo")) == "ValueError: one"


def raises_again():
    try:
        raise KeyError("first")
    except KeyError as error:
        raise ValueError("second") from error


def test_the_line_is_looked_for_in_what_it_was_raised_from():
    with pytest.raises(ValueError, match="second") as caught:
        raises_again()
    bare = caught.value.with_traceback(None)
    assert reason(bare) == 'ValueError: second; at test_exporter_error.py:32: raise KeyError("first")'
