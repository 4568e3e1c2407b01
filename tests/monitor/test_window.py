"""Where a sampled step begins and ends in loops that are not ours, also when something goes wrong in them."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as global_hooks
from torch.optim import optimizer as optimizers

from deepseek_mp.monitor import PrecisionMonitor


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Every test ends with PyTorch as it was: no mode, no global hook, no optimizer hook."""
    torch.manual_seed(0)
    yield
    assert torch._C._len_torch_dispatch_stack() == 0
    assert not global_hooks._global_forward_hooks
    assert not global_hooks._global_forward_pre_hooks
    assert not optimizers._global_optimizer_pre_hooks
    assert not optimizers._global_optimizer_post_hooks


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 4))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 6), torch.randint(4, (3,))


def loss_of(model: nn.Module) -> Tensor:
    inputs, target = batch()
    return F.cross_entropy(model(inputs), target)


def test_gradient_accumulation_counts_each_forward_as_a_step() -> None:
    model = Mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with PrecisionMonitor(model, sample_every=1) as monitor:
        for _ in range(2):
            for _ in range(3):
                loss_of(model).backward()
            optimizer.step()
        usage = monitor.log_precision_usage()
    assert usage.steps == usage.sampled_steps == 6
    assert usage.ops["addmm"]["fp32"].forward == 12
    assert usage.layers["0"]["mm"]["fp32"].backward == 6  # the input needs no gradient


def test_two_forwards_before_one_backward_are_counted_whole() -> None:
    """As in a siamese network: the second call does not end the step."""
    model = Mlp()
    inputs, _ = batch()
    with PrecisionMonitor(model, sample_every=10) as monitor:
        (model(inputs) - model(inputs + 1)).square().sum().backward()
        usage = monitor.log_precision_usage()
    assert usage.steps == usage.sampled_steps == 2
    assert usage.layers["3"]["mm"]["fp32"].backward == 4


def test_a_loop_of_forwards_with_gradients_on_is_not_one_endless_step() -> None:
    model = nn.Linear(2, 2)
    with PrecisionMonitor(model, sample_every=1000) as monitor:
        for _ in range(100):
            model(torch.ones(1, 2))
        usage = monitor.log_precision_usage()
    assert (usage.steps, usage.sampled_steps) == (100, 64)
    assert usage.ops["addmm"]["fp32"].forward == 64


def test_operations_after_the_backward_are_not_the_models() -> None:
    model = Mlp()
    with PrecisionMonitor(model) as monitor:
        loss_of(model).backward()
        torch.ones(3).cosh()
        usage = monitor.log_precision_usage()
    assert "cosh" not in usage.ops


def test_nor_are_those_after_a_backward_from_a_given_gradient() -> None:
    model = Mlp()
    inputs, _ = batch()
    with PrecisionMonitor(model) as monitor:
        model(inputs).backward(torch.ones(3, 4))
        torch.ones(3).cosh()
        usage = monitor.log_precision_usage()
    assert usage.layers["0"]["mm"]["fp32"].backward == 1
    assert "cosh" not in usage.ops


def test_a_call_without_gradients_ends_with_the_call() -> None:
    model = Mlp()
    inputs, _ = batch()
    with PrecisionMonitor(model) as monitor, torch.no_grad():
        model(inputs).argmax()
        assert torch._C._len_torch_dispatch_stack() == 0
        usage = monitor.log_precision_usage()
    assert usage.ops["addmm"]["fp32"].forward == 2
    assert "argmax" not in usage.ops


def test_sampling_on_one_thread_leaves_another_alone() -> None:
    model = nn.Linear(2, 2)
    with PrecisionMonitor(model, sample_every=1) as monitor:
        loss = model(torch.ones(1, 2)).sum()
        other = threading.Thread(target=lambda: torch.ones(2).cosh())
        other.start()
        other.join()
        loss.backward()
        usage = monitor.log_precision_usage()
    assert "cosh" not in usage.ops
    assert usage.ops["addmm"]["fp32"].forward == 1


def test_a_forward_that_raises_ends_the_step() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("no")

    model = nn.Sequential(nn.Linear(2, 2), Fails())
    with PrecisionMonitor(model, sample_every=1) as monitor:
        for _ in range(2):
            with pytest.raises(ValueError, match="no"):
                model(torch.ones(1, 2))
            assert torch._C._len_torch_dispatch_stack() == 0
            torch.ones(2).cosh()
        usage = monitor.log_precision_usage()
    assert usage.ops["addmm"]["fp32"].forward == 2
    assert "cosh" not in usage.ops


def test_a_backward_that_raises_ends_the_step() -> None:
    model = Mlp()
    with PrecisionMonitor(model, sample_every=1) as monitor:
        loss = loss_of(model)
        loss.register_hook(_refuse)
        with pytest.raises(ArithmeticError, match="refused"):
            loss.backward()
        torch.ones(2).cosh()
        loss_of(model).backward()
        usage = monitor.log_precision_usage()
    assert usage.layers["0"]["mm"]["fp32"].backward == 1
    assert "cosh" not in usage.ops


def _refuse(grad: Tensor) -> None:
    raise ArithmeticError("refused")


def test_an_optimizer_that_steps_inside_the_backward() -> None:
    model = Mlp()
    steps = []
    for parameter in model.parameters():
        optimizer = torch.optim.SGD([parameter], lr=0.1, foreach=False)
        parameter.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: steps.append(optimizer.step()))
    with PrecisionMonitor(model, sample_every=1) as monitor:
        loss_of(model).backward()
        usage = monitor.log_precision_usage()
    assert len(steps) == 4
    assert usage.layers["0"]["mm"]["fp32"].backward == 1  # the last one of the backward
    assert "add_" not in usage.ops  # the optimizer's


def test_a_report_inside_the_backward_leaves_nothing_on_the_stack() -> None:
    model = Mlp()
    with PrecisionMonitor(model, sample_every=10) as monitor:
        reports = []
        loss = loss_of(model)
        loss.register_hook(lambda _: reports.append(monitor.log_precision_usage()))
        loss.backward()
        assert reports[0].ops["addmm"]["fp32"].forward == 2
        loss_of(model)
    assert torch._C._len_torch_dispatch_stack() == 0


def test_another_models_optimizer_ends_the_step_without_harm() -> None:
    model = Mlp()
    other = nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    with PrecisionMonitor(model) as monitor:
        loss = loss_of(model)
        torch.optim.SGD(other.parameters(), lr=0.1).step()
        loss.backward()
        assert monitor.log_precision_usage().ops["addmm"]["fp32"].backward == 0


def test_a_step_that_is_not_sampled_meets_one_hook() -> None:
    seen: list[tuple[int, ...]] = []

    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(
                (
                    torch._C._len_torch_dispatch_stack(),
                    len(global_hooks._global_forward_pre_hooks) + len(global_hooks._global_forward_hooks),
                    len(optimizers._global_optimizer_pre_hooks),
                    sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()),
                )
            )
            return x

    model = nn.Sequential(nn.Linear(2, 2), Looks())
    with PrecisionMonitor(model, sample_every=2):
        for _ in range(4):
            model(torch.ones(1, 2)).sum().backward()
    assert seen == [(1, 2, 1, 4), (0, 0, 0, 1)] * 2  # statistics hook modules
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())


def test_copies_and_pickles_of_the_model_are_not_watched() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with PrecisionMonitor(model, sample_every=1) as monitor:
        loss = model(torch.ones(1, 2)).sum()
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            other(torch.ones(1, 2))
        loss.backward()
        usage = monitor.log_precision_usage()
    assert usage.steps == 1


def test_a_model_that_is_called_inside_itself_is_one_step() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)
            self.again: list[nn.Module] = []

        def forward(self, x: Tensor, depth: int = 1) -> Tensor:
            x = self.inner(x)
            return self.again[0](x) if depth else x

    class Calls(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model(x, depth=0)

    model = Twice()
    model.again.append(Calls())
    with PrecisionMonitor(model, sample_every=1) as monitor:
        model(torch.ones(1, 2)).sum().backward()
        usage = monitor.log_precision_usage()
    assert usage.layers["inner"]["addmm"]["fp32"].forward == 2
    assert usage.sampled_steps == usage.steps == 1
