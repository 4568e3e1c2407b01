"""A report adds up, survives JSON, and prints as a table."""

from __future__ import annotations

import json
from dataclasses import replace

from deepseek_mp.monitor import Alarm, Count, Fallback, LayerStatistics, OpCount, TensorStatistics, Usage, Value, render
from deepseek_mp.precision import Reason


def row(layer: str, op: str, format: str, forward: int, backward: int) -> OpCount:
    return OpCount(layer=layer, op=op, format=format, count=Count(forward, backward))


USAGE = Usage(
    steps=100,
    sampled_steps=1,
    eval_steps=10,
    sampled_eval_steps=2,
    compiled_counted_eagerly=True,
    counts=(
        row("head", "addmm", "bf16", 1, 0),
        row("head", "cast", "bf16<-fp32", 3, 2),
        row("body", "addmm", "bf16", 2, 0),
        row("body", "addmm", "fp32", 1, 0),
        row("", "mse_loss", "fp32", 1, 0),
        row("", "mse_loss_backward", "fp32", 0, 1),
        row("body", "arange", "integer", 1, 0),
    ),
    fallbacks=(
        Fallback(layer="", op="mse_loss", phase="forward", format="fp32", reason=Reason.AUTOCAST_LIST, count=1),
        Fallback(layer="body", op="addmm", phase="forward", format="fp32", reason=Reason.PINNED, count=1),
        Fallback(layer="body", op="addmm", phase="backward", format="fp32", reason=Reason.PINNED, count=3),
    ),
    notes=("something to know",),
)


def test_sums_over_layers_operations_and_formats() -> None:
    assert USAGE.ops["addmm"] == {"bf16": Count(3, 0), "fp32": Count(1, 0)}
    assert list(USAGE.ops)[:2] == ["cast", "addmm"]  # the most frequent first
    assert USAGE.formats == {"bf16": Count(3, 0), "fp32": Count(2, 1), "integer": Count(1, 0)}  # without casts
    assert list(USAGE.layers) == ["head", "body", ""]
    assert USAGE.layers["body"]["addmm"]["fp32"].total == 1


def test_json_says_what_the_report_says() -> None:
    data = json.loads(json.dumps(USAGE.to_json()))
    assert data["ops"]["addmm"]["bf16"] == {"total": 3, "forward": 3, "backward": 0}
    assert data["layers"][""]["mse_loss_backward"]["fp32"] == {"total": 1, "forward": 0, "backward": 1}
    assert data["fallbacks"][0] == {
        "layer": "",
        "op": "mse_loss",
        "phase": "forward",
        "format": "fp32",
        "reason": "autocast_list",
        "count": 1,
    }
    assert (data["steps"], data["sampled_steps"], data["eval_steps"], data["sampled_eval_steps"]) == (100, 1, 10, 2)
    assert data["compiled_counted_eagerly"] is True
    assert data["notes"] == ["something to know"]


TABLE = """\
Precision usage: 1 of 100 steps sampled, 2 of 10 calls without gradients; compiled parts ran uncompiled on them. \
Counts: forward + backward.

operation           bf16   fp32  integer
----------------------------------------
addmm              3 + 0  1 + 0        .
arange                 .      .    1 + 0
mse_loss               .  1 + 0        .
mse_loss_backward      .  0 + 1        .
all                3 + 0  2 + 1    1 + 0

cast        count
-----------------
bf16<-fp32  3 + 2

layer     bf16   fp32  integer
------------------------------
head     1 + 0      .        .
body     2 + 0  1 + 0    1 + 0
(model)      .  1 + 1        .

fallback  format  reason         count  layers
-----------------------------------------------
addmm     fp32    pinned         1 + 3  body
mse_loss  fp32    autocast_list  1 + 0  (model)

note: something to know"""


def test_the_table() -> None:
    assert str(USAGE) == render(USAGE) == TABLE


ALARM = Alarm(step=7, layer="body", tensor="input", kind="mass", value=0.1, limit=0.005)
LAYER = LayerStatistics(
    layer="body",
    status="sampled",
    recipe="bf16",
    tensors={
        "weight": TensorStatistics(
            samples=1,
            spread={"amax": Value(1.0, 1.0), "kurtosis": Value(3.0, 3.0)},
            errors={"in_use": {"by_row": Value(1e-6, 2e-6)}},
        )
    },
)


def test_statistics_and_alarms_are_part_of_a_report() -> None:
    usage = replace(USAGE, statistics={"body": LAYER}, alarms=(ALARM,))
    data = json.loads(json.dumps(usage.to_json()))
    assert data["statistics"] == {"body": LAYER.to_json()}
    assert data["alarms"] == [ALARM.to_json()]
    text = str(usage)
    before, _, after = text.partition("\n\nstatistics  recipe")
    assert before + "\n\nnote: something to know" == TABLE
    assert "body        bf16" in after
    assert after.endswith("\n\nalarm: body, input: mass 0.1, limit 0.005 (step 7)\n\nnote: something to know")


def test_many_layers_are_cut_and_said_so() -> None:
    text = render(USAGE, layers=1)
    assert "\nhead " in text
    assert "\nbody " not in text
    assert "\n... and 2 more layers\n" in text


def test_a_fallback_of_many_layers_names_the_first() -> None:
    many = tuple(
        Fallback(layer=f"block.{n}", op="exp", phase="forward", format="fp32", reason=Reason.FOLLOWS_INPUT, count=2)
        for n in range(5)
    )
    usage = Usage(
        steps=1, sampled_steps=1, eval_steps=0, sampled_eval_steps=0, compiled_counted_eagerly=False,
        counts=(row("block.0", "exp", "fp32", 10, 0),), fallbacks=many,
    )  # fmt: skip
    assert "10 + 0  block.0, block.1, block.2 and 2 more" in str(usage)


def test_an_empty_report() -> None:
    usage = Usage(
        steps=5, sampled_steps=0, eval_steps=0, sampled_eval_steps=0, compiled_counted_eagerly=False,
        counts=(), fallbacks=(),
    )  # fmt: skip
    assert str(usage) == "Precision usage: 0 of 5 steps sampled. Counts: forward + backward."
    assert usage.formats == {}
