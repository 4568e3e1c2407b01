"""What the monitor says where this PyTorch lacks a function it would use."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from deepseek_mp.monitor import PrecisionMonitor, internals
from deepseek_mp.precision import Reason


def test_this_pytorch_has_them_all() -> None:
    assert internals.BACKWARD
    assert internals.REGIONS
    assert internals.OPEN_ENDED
    assert internals.OP_LISTS
    assert internals.FUNC


def test_without_node_numbers_the_backward_has_no_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internals, "BACKWARD", False)
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    with PrecisionMonitor(model) as monitor:
        model(torch.ones(1, 2)).sum().backward()
        usage = monitor.log_precision_usage()
    assert usage.layers["0"]["addmm"]["fp32"].forward == 1
    assert usage.layers[""]["tanh_backward"]["fp32"].backward == 1
    assert any("which layer" in note for note in usage.notes)


def test_without_the_callers_state_the_region_is_not_known_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is that of the modules around; only what switches it off in between is not told apart."""
    monkeypatch.setattr(internals, "REGIONS", False)
    model = nn.Sequential(nn.Embedding(3, 2), nn.LayerNorm(2))
    with PrecisionMonitor(model) as monitor, torch.autocast("cpu", torch.bfloat16):
        model(torch.tensor([1]))
        usage = monitor.log_precision_usage()
    assert {(fallback.op, fallback.reason) for fallback in usage.fallbacks} == {
        ("embedding", Reason.FOLLOWS_INPUT),
        ("native_layer_norm", Reason.FOLLOWS_INPUT),
    }


def test_without_the_dispatch_stack_only_sample_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internals, "OPEN_ENDED", False)
    model = nn.Linear(2, 2)
    with PrecisionMonitor(model, sample_every=1) as monitor:
        model(torch.ones(1, 2))
        first = monitor.log_precision_usage()
        with monitor.sample():
            model(torch.ones(1, 2))
        second = monitor.log_precision_usage()
    assert (first.steps, first.sampled_steps) == (1, 0)
    assert "inside `with monitor.sample()` only" in first.notes[0]
    assert second.ops["addmm"]["fp32"].forward == 1


class Passes(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


def test_a_mode_goes_under_the_others_and_is_taken_from_there() -> None:
    lowest = Passes()
    with Passes() as first:
        internals.push_lowest(lowest)
        with Passes() as second:
            stack = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
            assert stack == [lowest, first, second]
            internals.remove_mode(lowest)
            internals.remove_mode(lowest)
            assert torch.utils._python_dispatch._get_current_dispatch_mode_stack() == [first, second]
    assert torch._C._len_torch_dispatch_stack() == 0
    assert torch.ones(2).add(1).tolist() == [2, 2]


def test_kernels_of_autocast_are_those_of_the_device() -> None:
    assert "softmax" in internals.autocast_kernels("cuda")
    assert "softmax" not in internals.autocast_kernels("cpu")
    assert {"mm", "mse_loss"} <= internals.autocast_kernels("cuda") & internals.autocast_kernels("cpu")


def test_a_traced_model_runs_nothing() -> None:
    model = nn.Linear(2, 2)
    with PrecisionMonitor(model, sample_every=1) as monitor:
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert internals.only_traced()
            model(torch.ones(1, 2))
            with monitor.sample():
                model(torch.ones(1, 2))
        usage = monitor.log_precision_usage()
    assert usage.counts == ()
    assert usage.sampled_steps == 0


def test_transforms_of_torch_func_are_noticed() -> None:
    seen: list[bool] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(internals.is_transformed())
        return x.sum()

    function(torch.ones(2))
    torch.func.vmap(function)(torch.ones(2, 2))
    torch.func.grad(function)(torch.ones(2))
    assert seen == [False, True, True]
    assert not internals.is_transformed()


def test_a_recorded_graph_is_noticed_where_the_accelerator_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        captures = True

        @classmethod
        def is_current_stream_capturing(cls) -> bool:
            return cls.captures

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("meta"))
    monkeypatch.setattr(torch, "get_device_module", lambda device: Device)
    assert internals.is_captured()
    Device.captures = False
    assert not internals.is_captured()
    monkeypatch.setattr(torch, "get_device_module", lambda device: object)  # Apple GPUs have none
    assert not internals.is_captured()
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert not internals.is_captured()


def test_an_accelerator_without_a_driver_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build of PyTorch for CUDA names it on every machine, and fails on those without."""

    def current(check_available: bool = False) -> torch.device | None:
        return None if check_available else torch.device("meta")

    class Device:
        @staticmethod
        def is_current_stream_capturing() -> bool:
            raise RuntimeError("no driver")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
    monkeypatch.setattr(torch, "get_device_module", lambda device: Device)
    assert not internals.is_captured()
