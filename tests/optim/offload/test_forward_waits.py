"""`ForwardWaits`: who waits for what, and copies that wait for nothing."""

import copy
import pickle

import torch
from fake_device import FakeLanes, small_model

from deepseek_mp.optim.offload.forward_waits import ForwardWaits


def attached():
    lanes, model = FakeLanes(), small_model()
    waits = ForwardWaits(lanes)
    read = []
    chunks = [(parameter, number // 2) for number, parameter in enumerate(model.parameters())]
    waits.attach(model, chunks, reading=lambda: read.append(True))
    for chunk in range(4):
        target = torch.zeros(1)
        waits.sent(chunk, [lanes.up([target], [torch.ones(1)])])
    lanes.events.clear()
    return lanes, model, waits, read


def test_each_module_waits_once_for_its_own():
    lanes, model, _, _ = attached()
    model(torch.randn(2, 19))
    assert lanes.events == [f"wait up {number}" for number in range(4)]
    model(torch.randn(2, 19))
    assert len(lanes.events) == 4


def test_what_has_a_gradient_without_a_call_is_waited_for_first():
    lanes, model, waits, _ = attached()
    model[0](torch.randn(2, 19))
    waits.graded(model[4].weight)
    lanes.events.clear()
    model(torch.randn(2, 19))
    assert lanes.events[0] == "wait up 3"


def test_state_dict_waits_for_all():
    lanes, model, _, read = attached()
    model.state_dict()
    assert len(lanes.events) == 4
    assert read == [True]


def test_copies_wait_for_nothing_and_can_be_made():
    lanes, model, _, _ = attached()
    copy.deepcopy(model)(torch.randn(2, 19))
    pickle.loads(pickle.dumps(model))(torch.randn(2, 19))
    assert lanes.events == []


def test_detach_removes_the_hooks():
    lanes, model, waits, _ = attached()
    waits.detach()
    model(torch.randn(2, 19))
    model.state_dict()
    assert lanes.events == []
    waits.wait_all()
    assert len(lanes.events) == 4
