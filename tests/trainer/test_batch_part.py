"""The first samples of a batch have its form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from deepseek_mp.nn.call import parse_batch
from deepseek_mp.trainer.batch_part import first_samples, part_of


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


def test_a_part_of_a_batch_keeps_its_form() -> None:
    labels = torch.arange(40)
    call = part_of(parse_batch({"input_ids": torch.arange(80).view(40, 2), "labels": labels, "flag": 3}), 0.25)
    assert call.kwargs["input_ids"].shape == (10, 2)
    assert call.kwargs["labels"] is call.target
    assert call.target.tolist() == list(range(10))
    assert call.kwargs["flag"] == 3
    assert part_of(parse_batch(torch.zeros(40, 3)), 0.1).args[0].shape == (8, 3)
    few = parse_batch(torch.zeros(5, 3))
    assert part_of(few, 0.1) is few


def test_targets_that_are_no_items_keep_the_whole_batch() -> None:
    x, target = torch.randn(16, 4, 32), torch.randint(0, 8, (64,))
    whole = parse_batch((x, target))
    assert part_of(whole, 0.1) is whole


@dataclass
class Words:
    ids: torch.Tensor
    name: str = "words"


def test_the_first_samples_of_a_dataclass_are_cut_too() -> None:
    words, target = first_samples(({"words": Words(torch.arange(6))}, torch.arange(6)), 2)
    assert isinstance(words["words"], Words)
    assert (words["words"].ids.tolist(), target.tolist()) == ([0, 1], [0, 1])
