"""`SyncStep`: the order of a step, and what is left out of it."""

import torch
from fake_device import FakeLanes, backward, offloaded, small_model

from deepseek_mp.optim.offload import rule


def test_chunks_go_up_one_by_one_in_the_order_of_forward(monkeypatch):
    lanes, model = FakeLanes(), small_model()
    optimizer = offloaded(model, lanes, chunk_bytes=4)
    backward(model)
    lanes.events.clear()
    real = rule.step

    def step(group, weights, *rest):
        names = [name for name, p in model.named_parameters() if optimizer.master(p) is weights[0]]
        lanes.events.append(f"step {names[0]}")
        real(group, weights, *rest)

    monkeypatch.setattr(rule, "step", step)
    optimizer.step()
    names = [name for name, _ in model.named_parameters()]
    assert lanes.events == [word for i, name in enumerate(names) for word in (f"step {name}", f"up {i}")]


def test_masters_are_not_changed_before_they_have_arrived(monkeypatch):
    """FP32 masters are sent from where they are, and nothing else waits when no forward lies between two steps."""
    lanes, model = FakeLanes(), small_model()
    optimizer = offloaded(model, lanes, chunk_bytes=4)
    monkeypatch.setattr(rule, "step", lambda *_: lanes.events.append("step"))
    for _ in range(2):
        lanes.events.clear()
        for p in model.parameters():
            optimizer.master(p).grad = torch.ones_like(p)
        optimizer.step()
    expected = [word for i in range(8) for word in (f"land up {i}", "step", f"up {8 + i}")]
    assert lanes.events == expected


def test_a_chunk_without_gradients_is_left_alone():
    lanes, model = FakeLanes(), small_model()
    optimizer = offloaded(model, lanes, chunk_bytes=4)
    model[0].requires_grad_(False)
    backward(model)
    optimizer.step()
    assert sum(event.startswith("up") for event in lanes.events) == 6
    assert optimizer.master(model[0].weight) not in optimizer.state
