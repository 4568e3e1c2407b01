"""Each layer with a product has a decision, with the reason of those that stay in FP32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepseek_mp.precision import Reason
from deepseek_mp.qat import convert, prepare
from deepseek_mp.qat.layers import APART, is_kept


def test_all_kinds_are_in_int8_but_what_is_kept(simulated):
    found = {decision.layer: (decision.new, decision.reason) for decision in simulated.decisions}
    int8 = ("int8", Reason.REQUESTED)
    assert found.pop("last") == ("fp32", Reason.PINNED)
    assert found == dict.fromkeys(["stem.0", "conv", "row", "hidden"], int8)


def test_what_has_no_kernel_or_is_not_called_says_so(example):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.unused, self.out = nn.ConvTranspose2d(1, 2, 3), nn.Linear(2, 2), nn.Linear(8, 3)

        def forward(self, x):
            return self.out(self.out(self.up(x))[..., :1].expand(-1, -1, -1, 8))

    found = {decision.layer: decision for decision in prepare(Mixed(), example).decisions}
    assert found["out"].new == "int8"
    assert (found["up"].reason, found["up"].detail) == (Reason.NO_KERNEL, "ConvTranspose2d has no INT8 kernel here")
    assert found["unused"].reason is Reason.NOT_CONTROLLABLE


def test_a_kept_module_keeps_what_is_in_it_and_nothing_of_a_like_name():
    assert is_kept("stem.0", ["stem"])
    assert not is_kept("stem2", ["stem"])


class Scaled(nn.Linear):
    """A layer whose weight is made in its forward."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight * x.mean())


def test_the_decision_says_that_a_weight_is_computed_in_every_call():
    found = {
        one.layer: one for one in prepare(nn.Sequential(nn.Linear(4, 4), Scaled(4, 4)), torch.rand(4, 4)).decisions
    }
    assert (found["0"].new, found["1"].new) == ("int8", "fp32")
    assert found["1"].detail.startswith("its weight is computed in every call")


class Computed(nn.Module):
    """A weight from an input, from state that calls write to, or from random numbers."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.first, self.last = kind, nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("gain", torch.ones(1))

    def forward(self, x):
        if self.kind == "written":
            self.gain.add_(0.01)
        factor = {"input": x.mean(), "written": self.gain, "random": torch.rand(4, 4)}[self.kind]
        return nn.functional.linear(torch.relu(self.first(x)), self.last.weight * factor)


@pytest.mark.parametrize("kind", ["input", "written", "random"])
def test_a_weight_that_is_computed_in_every_call_stays_in_fp32(kind):
    int8 = convert(prepare(Computed(kind).eval(), torch.rand(4, 4)))
    outputs = int8(torch.rand(3, 4))
    assert outputs.shape == (3, 4)
    assert outputs.isfinite().all()
    quantised = [node for node in int8.graph.graph.nodes if "dequantize_per_channel" in str(node.target)]
    assert len(quantised) == 1


def test_weights_with_dropout_of_their_own_are_quantised():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(4, 4)

        def forward(self, x):
            return self.last(x) + nn.functional.linear(x, nn.functional.dropout(self.last.weight, 0.5, self.training))

    int8, x = convert(prepare(Dropped().eval(), torch.rand(4, 4))), torch.rand(3, 4)
    quantised = [node for node in int8.graph.graph.nodes if "dequantize_per_channel" in str(node.target)]
    assert len(quantised) == 2
    torch.testing.assert_close(int8(x), int8.reference(x), rtol=1e-2, atol=1e-2)


class Cast(nn.Module):
    """A layer where autocast is on, and one in a branch."""

    def __init__(self):
        super().__init__()
        self.cast, self.branch, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = self.cast(x)
        return self.last(torch.cond(x.sum() > 0, lambda z: self.branch(z), lambda z: z + 1, (y.float(),)))


def test_layers_in_graphs_of_their_own_say_so():
    found = {one.layer: one for one in prepare(Cast(), torch.rand(4, 4)).decisions}
    assert found["last"].new == "int8"
    assert (found["cast"].new, found["cast"].reason, found["cast"].detail) == ("fp32", Reason.NO_KERNEL, APART)
    assert (found["branch"].new, found["branch"].reason) == ("fp32", Reason.NOT_CONTROLLABLE)
    assert "in a branch" in found["branch"].detail
