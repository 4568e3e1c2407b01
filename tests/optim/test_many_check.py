"""A kernel for many parameters is compared with steps one by one before it is used on a device."""

import pytest
import torch
from torch import nn

from deepseek_mp.ops import choose
from deepseek_mp.optim import SGD, AdamW, adamw, many_check, sgd

GPU = torch.device("cuda:0")


@pytest.fixture
def trials(monkeypatch):
    """What a trial finds on a device that has kernels: by whether parameters were stepped together."""
    found = {True: [torch.ones(2)], False: [torch.ones(2)]}
    asked = []

    def stepped(kind, device, momentum, *, together):
        asked.append((kind, device, momentum, together))
        return found[together]

    monkeypatch.setattr(choose, "has_kernels", lambda _: True)
    monkeypatch.setattr(many_check, "stepped", stepped)
    many_check._tried.cache_clear()
    yield found, asked
    many_check._tried.cache_clear()


def optimizer(kind=AdamW):
    return kind([nn.Parameter(torch.zeros(2))], states="8bit", **({"momentum": 0.9} if kind is SGD else {}))


def test_equal_bits_are_right_and_tried_once_for_each_rule_and_device(trials):
    _, asked = trials
    for _ in range(2):
        assert many_check.is_right(optimizer(), GPU)
    assert asked == [(AdamW, GPU, False, False), (AdamW, GPU, False, True)]
    assert many_check.is_right(optimizer(SGD), GPU)
    assert asked[2:] == [(SGD, GPU, True, False), (SGD, GPU, True, True)]


def test_other_bits_are_not_and_it_is_said(trials, caplog):
    found, _ = trials
    found[True] = [torch.tensor([1.0, 1.0 + 2e-7])]
    assert not many_check.is_right(optimizer(), GPU)
    assert "AdamW on many parameters" in caplog.text
    assert "other numbers" in caplog.text


def test_a_kernel_that_does_not_run_is_not_right(monkeypatch, trials, caplog):
    def fails(*_, **__):
        raise RuntimeError("no such device")

    monkeypatch.setattr(many_check, "stepped", fails)
    assert not many_check.is_right(optimizer(), GPU)
    assert "no such device" in caplog.text


@pytest.mark.parametrize("kind", [AdamW, SGD])
@pytest.mark.parametrize("together", [True, False])
def test_a_trial_steps_as_it_is_told(monkeypatch, kind, together):
    given = []
    module, rule = (adamw, "adamw") if kind is AdamW else (sgd, "sgd")
    monkeypatch.setattr(module, f"fused_{rule}", lambda _: lambda *_: given.append("alone"))
    monkeypatch.setattr(module, f"{rule}_of_many", lambda _: lambda _: given.append("together"))
    tensors = many_check.stepped(kind, torch.device("cpu"), kind is SGD, together=together)
    assert set(given) == {"together" if together else "alone"}
    assert [list(tensor.shape) for tensor in tensors[:2]] == [list(shape) for shape in many_check.SHAPES]
    assert tensors[1].is_contiguous(memory_format=torch.channels_last)
    assert len(tensors) > 6


def test_a_trial_is_the_same_whatever_the_default_device_is(monkeypatch):
    monkeypatch.setattr(many_check, "SHAPES", ((64, 64),))
    expected = many_check.stepped(AdamW, torch.device("cpu"), False, together=True)
    with torch.device("meta"):
        found = many_check.stepped(AdamW, torch.device("cpu"), False, together=True)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
