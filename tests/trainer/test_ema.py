"""The average of the weights: its formula, its precision, and that the model gets its own weights back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepseek_mp.trainer.ema import WeightAverage


def model():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    made[0].bias.requires_grad_(False)
    return made


def change(module, value):
    with torch.no_grad():
        for param in module.parameters():
            param.fill_(value)


def test_it_starts_at_the_weights_and_moves_by_its_decay():
    module = model()
    average = WeightAverage(module, 0.9)
    first = {name: p.detach().clone() for name, p in module.named_parameters()}
    assert all(torch.equal(value, first[name]) for name, value in average.values.items())
    change(module, 2.0)
    average.update()
    average.update()
    for name, value in average.values.items():
        expected = 0.9 * (0.9 * first[name] + 0.1 * 2.0) + 0.1 * 2.0
        torch.testing.assert_close(value, expected)


def test_what_is_frozen_and_buffers_are_not_averaged():
    assert set(WeightAverage(model(), 0.9).values) == {"0.weight", "1.weight", "1.bias", "2.weight", "2.bias"}


def test_a_tied_weight_is_averaged_once():
    module = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4, bias=False))
    module[1].weight = module[0].weight
    assert list(WeightAverage(module, 0.9).values) == ["0.weight"]


def test_weights_of_16_bits_are_averaged_in_fp32():
    module = nn.Linear(2, 2).bfloat16()
    change(module, 0.0)
    average = WeightAverage(module, 0.999)
    change(module, 1.0)
    for _ in range(700):
        average.update()
    assert average.values["weight"].dtype == torch.float32
    torch.testing.assert_close(average.values["weight"], torch.full((2, 2), 1 - 0.999**700), rtol=1e-5, atol=0)
    assert WeightAverage(nn.Linear(2, 2).double(), 0.9).values["weight"].dtype == torch.float64


def test_the_model_holds_the_average_inside_and_its_own_weights_after():
    module = model()
    average = WeightAverage(module, 0.5)
    change(module, 4.0)
    average.update()
    own = {name: p.detach().clone() for name, p in module.named_parameters()}
    objects = [id(p) for p in module.parameters()]
    with average.applied():
        assert torch.equal(module[2].weight, average.values["2.weight"])
        assert not torch.equal(module[2].weight, own["2.weight"])
        assert torch.equal(module[0].bias, own["0.bias"])
    assert all(torch.equal(p, own[name]) for name, p in module.named_parameters())
    assert [id(p) for p in module.parameters()] == objects


def test_the_model_gets_its_weights_back_after_an_exception():
    module = model()
    average = WeightAverage(module, 0.5)
    change(module, 4.0)
    with pytest.raises(KeyboardInterrupt, match="stop"), average.applied():
        raise KeyboardInterrupt("stop")
    assert all(bool((p == 4.0).all()) for p in module.parameters())


def test_saved_values_are_copied_in():
    module = model()
    one, two = WeightAverage(module, 0.5), WeightAverage(module, 0.5)
    change(module, 4.0)
    one.update()
    two.load(one.values)
    change(module, 8.0)
    one.update()
    assert not torch.equal(one.values["2.weight"], two.values["2.weight"])
    two.update()
    assert all(torch.equal(value, two.values[name]) for name, value in one.values.items())


def test_what_is_unfrozen_later_is_averaged_from_its_first_step_on():
    module = model()
    average = WeightAverage(module, 0.5)
    module[0].bias.requires_grad_(True)
    change(module, 2.0)
    with average.applied():  # no step was made yet
        assert bool((module[0].bias == 2.0).all())
    average.update()
    change(module, 4.0)
    average.update()
    assert bool((average.values["0.bias"] == 3.0).all())
    with average.applied():
        assert bool((module[0].bias == 3.0).all())
    assert bool((module[0].bias == 4.0).all())


def test_what_is_frozen_later_stays_averaged():
    module = model()
    average = WeightAverage(module, 0.5)
    change(module, 2.0)
    module[2].weight.requires_grad_(False)
    before = average.values["2.weight"].clone()
    average.update()
    torch.testing.assert_close(average.values["2.weight"], 0.5 * before + 1.0)


def test_a_module_that_is_put_in_or_taken_out_later_comes_and_goes():
    module = model()
    average = WeightAverage(module, 0.5)
    module.append(nn.Linear(2, 2))
    change(module, 2.0)
    average.update()
    assert bool((average.values["3.weight"] == 2.0).all())
    del module[3]
    with average.applied():
        assert torch.equal(module[2].weight, average.values["2.weight"])
    average.update()
    assert "3.weight" not in average.values


def test_saved_values_say_what_is_averaged():
    module = model()
    average = WeightAverage(module, 0.5)
    module[0].bias.requires_grad_(True)
    change(module, 2.0)
    average.update()
    module[0].bias.requires_grad_(False)
    more, fewer = WeightAverage(module, 0.5), WeightAverage(module, 0.5)
    more.load(average.values)
    assert all(torch.equal(value, average.values[name]) for name, value in more.values.items())
    assert "0.bias" in more.values
    fewer.load({"2.weight": average.values["2.weight"]})
    assert list(fewer.values) == ["2.weight"]


def test_a_parameter_of_another_shape_under_the_same_name_has_an_average_of_its_own():
    module = model()
    average = WeightAverage(module, 0.5)
    change(module, 4.0)
    average.update()
    module[2] = nn.Linear(3, 5)
    change(module[2], 2.0)
    with average.applied():
        assert torch.equal(module[0].weight, average.values["0.weight"])
        assert torch.equal(module[2].weight, torch.full((5, 3), 2.0))
    average.update()
    change(module[2], 4.0)
    average.update()
    assert torch.equal(average.values["2.weight"], torch.full((5, 3), 3.0))
    with average.applied():
        assert torch.equal(module[2].weight, torch.full((5, 3), 3.0))
    assert torch.equal(module[2].weight, torch.full((5, 3), 4.0))
