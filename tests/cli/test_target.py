"""What a target may return, and what is said of everything else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from deepseek_mp.cli.target import load_target
from deepseek_mp.errors import ConfigError

HEAD = "from torch import nn\nmodel, loader = nn.Linear(2, 2), [1]\n"


def test_a_tuple_and_a_mapping(write: Callable[[str, str], Path]) -> None:
    write("net.py", f"{HEAD}def a(): return model, loader, None\ndef b(): return {{'model': model, 'metric': len}}")
    whole, part = load_target("net.py:a"), load_target("net:b")
    assert isinstance(whole.model, nn.Linear)
    assert (whole.loader, whole.loss_fn, whole.by_metric) == ([1], None, False)
    assert part.by_metric
    assert part.needed("metric", "this") is len
    with pytest.raises(ConfigError, match="a target without tolerance, which a metric needs"):
        part.needed("tolerance", "a metric")


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ("model, loader", "returned a tuple of 2. Allowed: a mapping with the keys"),
        ("model", "returned a value of type Linear"),
        ("None", "returned a value of type NoneType"),
        ("{'modell': model}", "returned the key 'modell'. .*Did you mean 'model'"),
        ("{'model': 3}", "returned a value of type int as model"),
        ("{'loader': loader}", "returned no model"),
        ("{'model': model, 'metric': 3}", "returned metric=3"),
        ("nn.Linear(2)", r"raised TypeError: .*out_features.* \(net\.py line 3: def f\(\): return nn\.Linear"),
    ],
)
def test_what_is_wrong_is_said(write: Callable[[str, str], Path], returned: str, expected: str) -> None:
    write("net.py", f"{HEAD}def f(): return {returned}\n")
    with pytest.raises(ConfigError, match=f"^net.py:f {expected}"):
        load_target("net.py:f")


@pytest.mark.parametrize("text", ["net.py", "net", ":f", "net.py:", ""])
def test_a_target_names_a_place_and_a_function(text: str) -> None:
    with pytest.raises(ConfigError, match=r"Name the function, as in train\.py:setup"):
        load_target(text)
