"""The first samples of a batch have its form."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from deepseek_mp.trainer.batch_part import first_samples


def test_every_form_of_a_batch_is_cut() -> None:
    x, y = torch.randn(6, 3), torch.arange(6)
    assert first_samples(x, 2).equal(x[:2])
    inputs, target = first_samples((x, y), 4)
    assert inputs.equal(x[:4])
    assert target.equal(y[:4])
    named: dict[str, Any] = first_samples({"input_ids": x, "labels": y, "scale": 2.0}, 1)
    assert {name: getattr(value, "shape", value) for name, value in named.items()} == {
        "input_ids": (1, 3), "labels": (1,), "scale": 2.0,
    }  # fmt: skip


def test_tensors_within_are_cut_and_those_that_are_no_samples_are_not() -> None:
    x, boxes, grid = torch.randn(6, 3), [torch.randn(6, 4), torch.randn(6)], torch.randn(3, 3)
    (inputs, target) = first_samples(({"x": x, "grid": grid, "step": torch.tensor(6)}, {"boxes": boxes}), 2)
    assert [inputs[name].shape for name in ("x", "grid", "step")] == [(2, 3), (3, 3), ()]
    assert [box.shape for box in target["boxes"]] == [(2, 4), (2,)]


class Pair(NamedTuple):
    inputs: Any
    target: Tensor


def test_containers_of_another_class_are_cut_and_packed_sequences_are_not() -> None:
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    cut = first_samples(Pair((torch.ones(4, 2), packed), torch.ones(4)), 2)
    assert isinstance(cut, Pair)
    assert cut.inputs[1] is packed
    assert (cut.inputs[0].shape, cut.target.shape) == ((2, 2), (2,))
