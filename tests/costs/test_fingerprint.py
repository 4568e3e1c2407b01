"""What changes the key under which a result is kept, and what does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from deepseek_mp.backends import capabilities
from deepseek_mp.costs.fingerprint import environment, first_inputs, model_digest
from deepseek_mp.nn import apply

CPU = torch.device("cpu")


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def test_values_and_conversion_do_not_change_the_digest() -> None:
    one, two = net(), net()
    apply(two, "fp32")
    assert model_digest(one) == model_digest(two)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.append(nn.ReLU()),
        lambda model: model[0].requires_grad_(False),
        lambda model: model.eval(),
        lambda model: model.double(),
        lambda model: model.__setitem__(1, nn.GELU()),
        lambda model: model.__setitem__(0, nn.Linear(4, 4, bias=False)),
    ],
)
def test_structure_changes_the_digest(change: Callable[[nn.Module], object]) -> None:
    model = net()
    change(model)
    assert model_digest(model) != model_digest(net())


def test_the_inputs_are_seen_without_running_the_model() -> None:
    model = net()
    ran: list[str] = []
    model[0].register_forward_hook(lambda *_: ran.append("ran"))
    seen = {first_inputs(model, lambda rows=rows: model(torch.ones(rows, 4)).sum()) for rows in (2, 2, 3)}
    assert len(seen) == 2
    assert ran == []
    assert not model._forward_pre_hooks


def test_a_handler_of_the_user_does_not_keep_the_stop() -> None:
    model = net()
    caught: list[Exception] = []

    def run() -> Tensor:
        try:
            return model(torch.ones(2, 4)).sum()
        except Exception as error:  # noqa: BLE001 - what a careless training script does
            caught.append(error)
            return torch.zeros(())

    assert "[2, 4]" in first_inputs(model, run)
    assert caught == []


def test_a_loss_that_does_not_call_the_model_has_no_inputs() -> None:
    model = net()
    assert first_inputs(model, lambda: model[0].weight.sum()) == ""


def test_errors_before_the_model_propagate_and_leave_no_hook() -> None:
    model = net()
    with pytest.raises(ZeroDivisionError, match="division"):
        first_inputs(model, lambda: 1 / 0)
    assert not model._forward_pre_hooks


def test_the_environment_names_device_and_versions() -> None:
    found = environment(CPU, capabilities(CPU))
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert {"backend", "device", "package", "build"} <= set(found)
