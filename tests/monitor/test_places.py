"""Marks on the numbers of autograd nodes, and the layers found by them."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from deepseek_mp.monitor import internals
from deepseek_mp.monitor.places import OUTSIDE, Place, Places, Track
from deepseek_mp.precision import Reason


def test_a_node_belongs_to_the_last_mark_before_it() -> None:
    track = Track()
    track.mark(10, Place("a"))
    track.mark(13, Place("b"))
    assert [track.find(node).layer for node in (10, 12, 13, 99)] == ["a", "a", "b", "b"]
    assert track.find(9) == OUTSIDE


def test_marks_that_say_nothing_new_take_no_memory() -> None:
    track = Track()
    for start in range(5):
        track.mark(start, Place("a"))
    track.mark(5, Place("b"))
    track.mark(5, Place("c"))  # entered and entered again before any node was made
    assert track.starts == [0, 5]
    assert track.find(5).layer == "c"


def test_only_the_first_operation_after_a_node_was_made_marks_it() -> None:
    x = torch.ones(2, requires_grad=True)
    track = Track()
    track.mark(internals.next_node(), Place("layer"))
    node = (x * 2).grad_fn
    track.mark_operation(Place("layer", Reason.AUTOCAST_LIST))
    track.mark_operation(Place("layer"))  # an operation that made no node
    assert track.find(internals.node_number(node)) == Place("layer", Reason.AUTOCAST_LIST)


def test_the_stack_of_modules() -> None:
    outer, inner, stranger = nn.Identity(), nn.Identity(), nn.Identity()
    places = Places({id(outer): "outer", id(inner): "outer.inner"}, {}, {"cpu"})
    places.enter(outer)
    places.enter(stranger)  # not the model's: its operations are the outer layer's
    assert places.here.frame is not None
    assert places.here.frame.layer == "outer"
    with torch.autocast("cpu", torch.bfloat16):
        places.enter(inner)
    assert places.here.frame.in_region
    places.leave(stranger)
    places.leave(outer)  # the inner one raised and did not say that it ended
    assert places.here.frame is None
    places.leave(outer)


def test_a_region_around_a_module_is_one_for_the_modules_in_it() -> None:
    outer, inner = nn.Identity(), nn.Identity()
    places = Places({id(outer): "outer", id(inner): "outer.inner"}, {}, {"cpu"})
    with torch.autocast("cpu", torch.bfloat16):
        places.enter(outer)
    places.enter(inner)
    assert [frame.in_region for frame in places.here.stack] == [True, True]


def test_each_thread_has_its_own_position() -> None:
    module = nn.Identity()
    places = Places({id(module): "layer"}, {}, {"cpu"})
    places.enter(module)
    seen: list[object] = []
    other = threading.Thread(target=lambda: seen.append(places.here.frame))
    other.start()
    other.join()
    assert seen == [None]
    assert places.here.frame is not None


def test_nodes_that_a_recomputation_makes_on_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd's threads number their nodes from zero again, so the numbers alone would be mistaken."""
    first, second = nn.Identity(), nn.Identity()
    places = Places({id(first): "first", id(second): "second"}, {}, {"cpu"})
    x = torch.ones(2, requires_grad=True)
    task = [internals.NO_TASK]
    monkeypatch.setattr(internals, "backward_task", lambda: task[0])
    places.enter(first)
    outer = (x * 2).grad_fn
    places.leave(first)

    def backward() -> None:
        task[0] = 7
        places.enter(second)  # a checkpoint runs its module again ...
        recomputed = (x * 2).grad_fn
        places.leave(second)
        task[0] = 8  # ... and a backward of its own through it
        found.append(places.of_node(recomputed).layer)
        task[0] = 7
        found.append(places.of_node(outer).layer)
        places.new_backward()
        task[0] = 9
        found.append(places.of_node(outer).layer)

    found: list[str] = []
    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert found == ["second", "first", "first"]


def test_a_gradient_is_accumulated_in_its_parameters_layer() -> None:
    parameter = nn.Parameter(torch.ones(2))
    places = Places({}, {id(parameter): "layer"}, {"cpu"})
    node = (parameter * 2).grad_fn.next_functions[0][0]
    assert places.of_node(node) == Place("layer")
