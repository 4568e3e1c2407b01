"""`stepped`: what an optimizer has in place of a model's parameter."""

import torch
from fake_device import LateWorker, backward, offloaded, plain, same, small_model

from deepseek_mp.optim.offload.stepped import settle, stepped


def test_the_master_where_it_is_offloaded_and_else_the_parameter():
    model = small_model()
    optimizer, other = offloaded(model), torch.nn.Parameter(torch.ones(2))
    weight = model[0].weight
    assert stepped(optimizer, weight) is optimizer.master(weight) is not weight
    assert stepped(optimizer, other) is other
    assert stepped(plain(model), weight) is weight


def test_settling_brings_masters_to_the_last_step_before_the_next_one():
    model = small_model()
    optimizer = offloaded(model, mode="speculative", worker=LateWorker)
    backward(model)
    optimizer.step()
    before = [optimizer.master(p).detach().clone() for p in model.parameters()]
    backward(model)
    optimizer._mode._guesses[0].stepped.result()  # one chunk is ahead
    masters = [optimizer.master(p).detach() for p in model.parameters()]
    assert not same(before, masters)
    settle(optimizer)
    assert same(before, masters)
    settle(plain(model))
