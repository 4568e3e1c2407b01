"""`ForwardWaits`: who waits for what, and copies that wait for nothing."""

import copy
import pickle

import pytest
import torch
from fake_device import FakeLanes, backward, offloaded, small_model
from torch import nn

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


def test_a_wait_that_was_interrupted_is_made_again(monkeypatch):
    lanes, model, _, _ = attached()

    def interrupt(mark):
        raise KeyboardInterrupt("pressed")

    with monkeypatch.context() as patch:
        patch.setattr(lanes, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt, match="pressed"):
            model(torch.randn(2, 19))
    model(torch.randn(2, 19))
    assert lanes.events == [f"wait up {number}" for number in range(4)]


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
    assert read


def test_the_state_of_a_part_is_read_after_its_weights_have_come():
    lanes, model, _, read = attached()
    model[2].state_dict()
    assert lanes.events
    assert read == [True]


@pytest.mark.parametrize("part", [False, True])
def test_what_is_loaded_is_not_replaced_by_weights_on_their_way(part):
    model = small_model()
    optimizer = offloaded(model)
    saved = copy.deepcopy(model[2].state_dict() if part else model.state_dict())
    backward(model)
    optimizer.step()
    loaded = model[2] if part else model
    loaded.load_state_dict(saved)
    optimizer.synchronize()
    assert all(torch.equal(value, saved[name]) for name, value in loaded.state_dict().items())


def test_a_model_that_reads_weights_otherwise_in_evaluation_waits_for_them():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small_model()

        def forward(self, x):
            if torch.is_grad_enabled():
                return self.inner(x)
            return nn.functional.linear(x, self.inner[0].weight, self.inner[0].bias)

    model = Net()
    optimizer = offloaded(model)
    backward(model)
    optimizer.step()
    batch = torch.randn(2, 19)
    with torch.no_grad():
        found = model(batch)
        optimizer.synchronize()
        assert torch.equal(found, model(batch))


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
