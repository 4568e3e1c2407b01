"""The buffer: means and counts by their formulas, and copies that come in order."""

from __future__ import annotations

from math import prod

import pytest
import torch

from deepseek_mp.monitor.store import UPDATE, WIDTH, Copies, Layout, Store, corrected

LAYOUT = Layout(units=3, ways=2, modules=5)
CPU = torch.device("cpu")


def store(decay: float = 0.5) -> Store:
    return Store(LAYOUT, CPU, decay)


def line(value: float) -> torch.Tensor:
    return torch.full((3, WIDTH), float(value))


def test_parts_are_views_of_one_buffer_and_cover_it() -> None:
    made = store()
    parts = made.parts
    pieces = (parts.last, parts.mean, parts.first, parts.count, parts.bad, parts.produced, parts.origin)
    assert [piece.shape for piece in pieces] == [torch.Size(shape) for shape in LAYOUT.shapes]
    assert LAYOUT.size == sum(prod(shape) for shape in LAYOUT.shapes) == made.flat.numel()
    made.flat.fill_(7)
    assert all((piece == 7).all() for piece in pieces)


def test_means_are_those_of_exponential_weights() -> None:
    made, values = store(decay=0.9), [1.0, 5.0, 2.0, 8.0]
    for value in values:
        made.add(1, 2, line(value))
    weights = [0.9**k for k in reversed(range(len(values)))]
    expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    count = made.parts.count[1, 2]
    assert count == 4
    assert corrected(made.parts.mean[1, 2], count, 0.9).tolist() == [[pytest.approx(expected)] * WIDTH] * 3
    assert float(made.corrected(1, 2, 0)) == pytest.approx(expected)
    assert (made.parts.last[1, 2] == 8).all()
    assert (made.parts.first[1, 2] == 1).all()


def test_other_layers_and_tensors_are_left_alone() -> None:
    made = store()
    made.add(1, 2, line(3))
    assert made.parts.count.sum() == 1
    assert made.parts.last.sum() == 3 * 3 * WIDTH
    assert made.corrected(0, 2, 0).isnan()


def test_a_sample_of_fewer_numbers_has_zeros_behind_it() -> None:
    made = store()
    made.add(1, UPDATE, line(3)[:1, :2])
    assert made.parts.last[1, UPDATE, 0].tolist() == [3.0] * 2 + [0.0] * (WIDTH - 2)
    assert made.parts.count[1, UPDATE] == 1


def test_an_invalid_sample_changes_nothing_even_if_it_is_nan() -> None:
    made = store()
    invalid, valid = torch.tensor(False), torch.tensor(True)
    made.add(0, UPDATE, line(float("nan"))[:1], valid=invalid)
    made.add(0, UPDATE, line(4)[:1], valid=valid)
    before = made.flat.clone()
    made.add(0, UPDATE, line(float("nan"))[:1], valid=invalid)
    assert torch.equal(made.flat, before)
    assert made.parts.count[0, UPDATE] == 1
    assert (made.parts.first[0, UPDATE, 0] == 4).all()
    assert not made.parts.first[0, UPDATE, 1:].any()  # rows that the sample did not have


def test_a_layer_begins_again() -> None:
    made = store()
    for unit in (0, 1):
        made.add(unit, 0, line(2))
    made.forget(0)
    assert made.parts.count[:, 0].tolist() == [0, 1, 0]
    made.add(0, 0, line(9))
    assert (made.parts.first[0, 0] == 9).all()


def test_copies_come_in_order_with_what_the_buffer_held_then() -> None:
    flat = torch.zeros(4)
    copies = Copies(flat)
    assert copies.possible
    assert copies.next() is None
    for value in (1.0, 2.0):
        flat.fill_(value)
        assert copies.start(value)
    flat.fill_(3)
    assert not copies.start(3.0)  # no memory is free: nothing is taken for it
    seen = []
    while (tag := copies.next()) is not None:
        seen.append((tag, copies.latest.tolist()))
    assert seen == [(1.0, [1.0] * 4), (2.0, [2.0] * 4)]
    assert copies.start(3.0)
    assert copies.next() == 3.0


class Event:
    """An event that ends when it is told to."""

    ended = False

    def record(self) -> None: ...

    def query(self) -> bool:
        return self.ended


def test_a_copy_under_way_is_not_waited_for() -> None:
    copies = Copies(torch.ones(2))
    first, second = Event(), Event()
    copies._events = [second, first]  # taken from the end
    copies.start("first")
    copies.start("second")
    second.ended = True
    assert copies.next() is None  # the first comes first
    first.ended = True
    assert copies.next() == "first"
    assert copies.next() == "second"
