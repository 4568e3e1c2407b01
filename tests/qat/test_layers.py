"""Each layer with a product has a decision, with the reason of those that stay in FP32."""

from __future__ import annotations

from torch import nn

from deepseek_mp.precision import Reason
from deepseek_mp.qat import prepare
from deepseek_mp.qat.layers import is_kept


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
