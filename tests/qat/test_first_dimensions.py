"""For sizes of which the model's code asks, its INT8 form is refused where the answer would be another."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepseek_mp.errors import BatchError
from deepseek_mp.qat import convert, prepare
from deepseek_mp.qat.first_dimensions import free_sizes_of


class BySize(nn.Module):
    """Does something else with few samples than with many, and with three `others`."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, others, x):
        y = self.layer(x) if 3 <= x.shape[0] <= 5 else -self.layer(x)
        return y, others * 2 if others.shape[0] == 3 else others


def test_sizes_for_which_the_model_does_something_else_stay_refused():
    torch.manual_seed(0)
    int8 = convert(prepare(BySize(), {"x": torch.randn(4, 8), "others": torch.randn(3, 2)}))
    assert int8.reference(x=torch.randn(5, 8), others=torch.randn(3, 2))[0].shape == (5, 8)
    for size, others in ((6, 3), (2, 3), (4, 4)):
        with pytest.raises(BatchError, match="from 3 to 5"):
            int8.reference(x=torch.randn(size, 8), others=torch.randn(others, 2))


class Nested(nn.Module):
    def forward(self, pair, *, scale, factor):
        return pair[0] * scale * factor, pair[1]["rows"]


def test_sizes_are_in_the_structure_of_the_arguments_and_in_the_order_asked_for():
    args, kwargs = (([torch.randn(4, 2), {"rows": torch.randn(3)}]),), {"scale": torch.randn(4, 1), "factor": 2.0}
    auto = {0: torch.export.Dim.AUTO}
    sizes = {"pair": [auto, {"rows": auto}], "scale": auto, "factor": None}
    program = torch.export.export(Nested(), args, kwargs, dynamic_shapes=sizes)
    (pair,), named = free_sizes_of(program, ["factor", "scale"])
    assert list(named) == ["factor", "scale"]
    assert named["factor"] is None
    assert [list(one) for one in (pair[0], pair[1]["rows"], named["scale"])] == [[0]] * 3
