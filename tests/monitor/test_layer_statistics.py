"""Values of a layer as JSON."""

from __future__ import annotations

import json
import math

from deepseek_mp.monitor import LayerStatistics, TensorStatistics, Value
from deepseek_mp.monitor.layer_statistics import NOT_YET, known


def test_json_holds_all_and_short_numbers() -> None:
    tensor = TensorStatistics(
        samples=3,
        spread={"amax": Value(1.23456789, 1.0)},
        errors={"in_use": {"bias": Value(-1e-7 / 3, None)}},
    )
    layer = LayerStatistics(
        layer="a.b", status="sampled", recipe="bf16", tensors={"input": tensor}, updates=2,
        update={"rms": Value(None, None)}, non_finite={"input": 4}, produced={"forward": 1},
    )  # fmt: skip
    assert json.loads(json.dumps(layer.to_json())) == {
        "layer": "a.b",
        "status": "sampled",
        "recipe": "bf16",
        "tensors": {
            "input": {
                "samples": 3,
                "spread": {"amax": {"last": 1.235, "mean": 1.0}},
                "errors": {"in_use": {"bias": {"last": -3.333e-08, "mean": None}}},
            }
        },
        "updates": 2,
        "update": {"rms": {"last": None, "mean": None}},
        "non_finite": {"input": 4},
        "produced": {"forward": 1},
    }


def test_what_was_not_sampled_is_absent() -> None:
    data = LayerStatistics(layer="a", status=NOT_YET).to_json()
    assert data["tensors"] == data["update"] == {}
    assert data["recipe"] is None


def test_nan_is_not_known() -> None:
    assert known(math.nan) is None
    assert known(math.inf) == math.inf
    assert known(0.0) == 0.0
