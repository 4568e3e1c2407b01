"""Lengths and widths of inputs may change in training where the graph computes with whatever it gets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from deepseek_mp.errors import BatchError
from deepseek_mp.qat import FloatingModel, convert, prepare
from deepseek_mp.qat.other_dimensions import with_free_dimensions


class Masked(nn.Module):
    """Of a text, the sum over those places that count."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x, mask):
        return (self.layer(x) * mask.unsqueeze(2)).sum(1)


class Skips(nn.Module):
    """Takes even widths only, as what halves and doubles them does."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 3, 3, stride=2, padding=1), nn.Upsample(scale_factor=2)

    def forward(self, x):
        return self.up(self.down(x)) + x


class Divides(nn.Module):
    """A mean, whose divisor the graph has from the example."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x):
        return self.layer(x).sum(1) / x.shape[1]


class Turns(nn.Module):
    """Another way for images that are not square, in which the graph cannot go."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        y = self.layer(x)
        return y if x.shape[2] == x.shape[3] else -y


def of_images():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def of_texts():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def check_taken(make, example, others):
    torch.manual_seed(0)
    model = make().eval()
    simulated = prepare(model, example)
    floating = FloatingModel(simulated, torch.float32)
    for other in others:
        torch.testing.assert_close(floating(*other), model(*other), rtol=1e-4, atol=1e-5)
        assert simulated(*other).shape == model(*other).shape
    return simulated


@pytest.mark.parametrize(
    ("make", "example", "others"),
    [
        (of_images, (4, 3, 8, 8), [(4, 3, 12, 12), (3, 3, 6, 9), (4, 3, 8, 8)]),
        (of_texts, (4, 5, 8), [(4, 7, 8), (2, 1, 8)]),
        (Skips, (4, 3, 8, 8), [(4, 3, 12, 6)]),
        (Turns, (4, 3, 8, 8), [(4, 3, 12, 12)]),
    ],
    ids=["images", "texts", "even widths", "square"],
)
def test_sizes_that_make_no_difference_may_change(make, example, others):
    simulated = check_taken(make, drawn(*example), [(drawn(*other),) for other in others])
    with pytest.raises(BatchError, match=r"Allowed: .* with sizes \[any, "):
        simulated(drawn(4, 4, *example[2:-1], 9))


def test_sizes_that_may_change_together_only_are_refused_alone():
    simulated = check_taken(Masked, (drawn(4, 5, 8), torch.ones(4, 5)), [(drawn(3, 7, 8), torch.ones(3, 7))])
    with pytest.raises(BatchError, match=r"x\.shape\[1\] == mask\.shape\[1\]"):
        simulated(drawn(4, 7, 8), torch.ones(4, 1))
    turned = check_taken(Turns, drawn(4, 3, 8, 8), [])
    with pytest.raises(BatchError, match=r"\.shape\[2\] == .*\.shape\[3\]"):
        turned(drawn(4, 3, 8, 12))


@pytest.mark.parametrize("other", [(4, 301, 8), (4, 8), (4, 300, 8, 8), None])
def test_a_size_that_is_in_the_graph_stays(other):
    simulated = check_taken(Divides, drawn(4, 300, 8), [(drawn(3, 300, 8),)])
    wrong = None if other is None else drawn(*other)  # of 301, nearly the same comes
    for form in (simulated, FloatingModel(simulated, torch.float32)):
        with pytest.raises(BatchError, match=r"input x, .*\. Allowed: x with sizes \[any, 300, 8\]\. Pass"):
            form(wrong)


def test_int8_takes_the_sizes_of_the_example():
    torch.manual_seed(0)
    int8 = convert(prepare(of_images().eval(), drawn(4, 3, 8, 8)))
    assert int8(drawn(2, 3, 8, 8)).shape == (2, 4)
    with pytest.raises(BatchError, match=r"\[4, 3, 12, 12\]"):
        int8(drawn(4, 3, 12, 12))


def test_sizes_are_tried_with_few_samples():
    torch.manual_seed(0)
    simulated, tried = prepare(of_images().eval(), drawn(6, 3, 8, 8)), []
    closed = replace(simulated.sizes, shapes=dict.fromkeys(simulated.sizes.shapes, (None, 3, 8, 8)))
    found = with_free_dimensions(
        closed, ((drawn(6, 3, 8, 8),), {}), {0: 6}, lambda args, _: tried.append(args[0].shape)
    )
    assert {shape[0] for shape in tried} == {2}
    assert found == closed  # nothing is opened where both fail
    assert found != simulated.sizes
