"""The table of statistics."""

from __future__ import annotations

from deepseek_mp.monitor import LayerStatistics, TensorStatistics, Value
from deepseek_mp.monitor.layer_statistics import NOT_YET, SAMPLED
from deepseek_mp.monitor.statistics_table import statistics_table


def tensor(amax: float, error: float) -> TensorStatistics:
    return TensorStatistics(
        samples=1,
        spread={"amax": Value(0.0, amax), "kurtosis": Value(0.0, 3.1234)},
        errors={"in_use": {"by_row": Value(0.0, error)}},
    )


FULL = LayerStatistics(
    layer="body.0", status=SAMPLED, recipe="row",
    tensors={"input": tensor(12.345, 5.4e-4), "weight": tensor(1, 6e-4), "grad_output": tensor(1, 7e-4)},
    update={"ratio": Value(0, 1.2e-3), "grad_norm": Value(0, 0.5)},
)  # fmt: skip
PART = LayerStatistics(layer="", status=SAMPLED, recipe="fp32", tensors={"weight": tensor(1, 0.0)})
NONE = LayerStatistics(layer="head", status=NOT_YET)

TABLE = """\
statistics  recipe  max |x|  kurtosis  error x  error w  error dy  |dw|/|w|  |g|
--------------------------------------------------------------------------------
body.0      row        12.3      3.12  0.00054   0.0006    0.0007    0.0012  0.5
(model)     fp32          .         .        .        0         .         .    ."""


def test_means_of_the_layers_that_were_sampled() -> None:
    assert statistics_table({"body.0": FULL, "": PART, "head": NONE}, 30) == TABLE


def test_many_layers_are_cut_and_said_so() -> None:
    assert statistics_table({str(n): FULL for n in range(5)}, 2).endswith("... and 3 more layers")


def test_nothing_was_sampled() -> None:
    other = LayerStatistics(layer="mask", status=SAMPLED, non_finite={"output": 3})
    assert statistics_table({"head": NONE, "mask": other}, 30) == ""
