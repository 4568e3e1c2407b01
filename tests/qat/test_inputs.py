"""What an INT8 model takes: by place or by name, checked, and told in a microsecond where it is like the last call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deepseek_mp.errors import BatchError
from deepseek_mp.programs import Signature
from deepseek_mp.qat.inputs import Inputs

ROWS = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Masked(nn.Module):
    def forward(self, x, factor, *, masks):
        return x * factor * masks["a"] + masks["b"].view(-1, 1)


def inputs_of(model: nn.Module, args, kwargs=None) -> Inputs:
    free = {0: torch.export.Dim.AUTO}
    given = args + tuple((kwargs or {}).values())
    shapes = pytree.tree_map(lambda leaf: free if isinstance(leaf, Tensor) else None, given)
    program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    return Inputs(program, program.module(check_guards=False))


@pytest.fixture
def masked() -> Inputs:
    return inputs_of(Masked(), (ROWS, 3), {"masks": {"a": torch.ones(4, 1), "b": torch.ones(4)}})


@pytest.fixture
def plain() -> Inputs:
    return inputs_of(nn.Linear(8, 4), (ROWS,))


def test_arguments_by_name_and_by_place_come_as_they_were_exported(masked):
    masks = {"b": torch.ones(2), "a": torch.ones(2, 1)}
    for args, kwargs in (((ROWS[:2], 3), {"masks": masks}), ((), {"masks": masks, "factor": 3, "x": ROWS[:2]})):
        given, named = masked.as_exported(args, kwargs)
        assert given[0].shape == (2, 8)
        assert given[1] == 3
        assert list(named) == ["masks"]
        assert named["masks"]["a"] is masks["a"]
        assert named["masks"]["b"] is masks["b"]


def test_what_was_exported_by_name_is_not_taken_by_place():
    class Apart(nn.Module):
        def forward(self, x, other):
            return x - other

    inputs = inputs_of(Apart(), (), {"other": ROWS, "x": ROWS})
    with pytest.raises(BatchError, match=r"too many positional arguments.*Pass those, other and x by name"):
        inputs.check((ROWS, ROWS), {})


def test_a_tuple_in_the_place_of_a_list_comes_as_it_was_exported():
    class Sums(nn.Module):
        def forward(self, parts):
            return parts[0] + parts[1]

    inputs = inputs_of(Sums(), ([ROWS, ROWS],))
    (parts,), _ = inputs.as_exported(((ROWS, ROWS),), {})
    assert type(parts) is list


@pytest.mark.parametrize("count", [0, 1, 4, 9])
def test_every_batch_size_is_taken(plain, count):
    plain.check((torch.zeros(count, 8),), {})


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (ROWS.double(), r"input input, float64 \[4, 8\]\. Allowed: input float32 \[s\d+, 8\]; s\d+ from 0"),
        (ROWS.long(), r"int64 \[4, 8\]"),
        (ROWS.half(), r"float16 \[4, 8\]"),
        (ROWS[:, :7], r"float32 \[4, 7\]"),
        (ROWS[0], r"float32 \[8\]"),
        (ROWS[None], r"float32 \[1, 4, 8\]"),
        (None, r"input input, None"),
        ([1.0], r"inputs input\[0\]\. Allowed"),
    ],
)
def test_what_does_not_fit_is_refused_also_behind_a_call_that_does(plain, given, match):
    for _ in range(2):
        with pytest.raises(BatchError, match=match):
            plain.check((given,), {})
        plain.check((ROWS,), {})


@pytest.mark.parametrize(
    ("args", "kwargs", "match"),
    [
        ((), {}, "missing a required argument: 'input'.*Pass those, by place or by name"),
        ((ROWS, ROWS), {}, "too many positional arguments"),
        ((), {"x": ROWS}, "does not fit"),
    ],
)
def test_another_number_of_inputs_is_refused(plain, args, kwargs, match):
    with pytest.raises(BatchError, match=match):
        plain.check(args, kwargs)


def test_values_in_the_graph_and_sizes_that_belong_together_are_checked(masked):
    masks = {"a": torch.ones(4, 1), "b": torch.ones(4)}
    with pytest.raises(BatchError, match=r"input factor, 2\. Allowed: .*= 3, which is part of the graph"):
        masked.check((ROWS, 2), {"masks": masks})
    with pytest.raises(BatchError, match=r"input masks\['b'\], float32 \[2\]"):
        masked.check((ROWS, 3), {"masks": {**masks, "b": torch.ones(2)}})
    assert masked.signature.conditions
    assert Signature.from_json(masked.signature.to_json()) == masked.signature


def test_a_call_like_the_last_one_is_not_looked_at_again(plain, monkeypatch):
    plain.check((ROWS,), {})
    looks = []
    monkeypatch.setattr(plain, "as_exported", lambda args, kwargs: looks.append((args, kwargs)))
    plain.check((ROWS + 1,), {})
    assert looks == []
    plain.check((ROWS[:2],), {})
    assert len(looks) == 1


def test_a_first_size_that_the_code_needs_is_fixed():
    class Recurrent(nn.Module):
        """Of sequences first: the exporter unrolls it, so that their length is that of the example."""

        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(8, 4)

        def forward(self, x):
            return self.gru(x)[0]

    inputs = inputs_of(Recurrent(), (torch.randn(5, 2, 8),))
    inputs.check((torch.randn(5, 2, 8),), {})
    with pytest.raises(BatchError, match=r"float32 \[6, 2, 8\]"):
        inputs.check((torch.randn(6, 2, 8),), {})
