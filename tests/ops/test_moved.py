"""`moved`: who waits for a copy between devices."""

import pytest
import torch

from deepseek_mp.ops.moved import moved


class Recorded:
    def to(self, device, *, non_blocking):
        return device, non_blocking


@pytest.mark.parametrize(("device", "asynchronous"), [("cpu", False), ("cuda", True), ("meta", True)])
def test_only_the_host_waits(device, asynchronous):
    assert moved(Recorded(), torch.device(device)) == (torch.device(device), asynchronous)


def test_a_tensor_where_it_should_be_is_not_copied():
    tensor = torch.ones(3)
    assert moved(tensor, torch.device("cpu")) is tensor
