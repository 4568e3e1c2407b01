"""Which tensors the kernel that counts infinities and NaN reads, and by which bits it tells them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from deepseek_mp.errors import ConfigError
from deepseek_mp.ops import non_finite as module
from deepseek_mp.ops.choose import non_finite_of
from deepseek_mp.ops.non_finite import BITS, is_gapless, non_finite
from deepseek_mp.ops.reference import non_finite as reference

NAN = float("nan")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The implementations that run, in their order, on a device that has the kernel; plain PyTorch stands for it."""
    names: list[str] = []

    def implementation(name: str):
        names.append(name)
        return reference.non_finite

    monkeypatch.setattr(module, "has_kernels", lambda device: True)
    monkeypatch.setattr(module, "_kernel_runs", lambda device: True)
    monkeypatch.setattr(module, "non_finite_of", implementation)
    return names


def test_the_number_has_no_history():
    found = non_finite(torch.tensor([1.0, NAN], requires_grad=True))
    assert found == 1
    assert not found.requires_grad


@pytest.mark.parametrize("dtype", [dtype for dtype in BITS if dtype.itemsize < 4])
def test_the_bits_tell_what_the_values_are(dtype):
    """Of every code there is."""
    integers, mask, pattern = BITS[dtype]
    codes = torch.arange(256**dtype.itemsize).to(integers)
    assert torch.equal((codes & mask) == pattern, ~codes.view(dtype).float().isfinite())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bits_of_wide_types(dtype):
    info = torch.finfo(dtype)
    values = [0.0, -0.0, 1.0, info.max, -info.max, info.tiny, info.tiny / 4, float("inf"), -float("inf"), NAN, -NAN]
    x = torch.tensor(values, dtype=dtype)
    integers, mask, pattern = BITS[dtype]
    assert torch.equal((x.view(integers) & mask) == pattern, ~x.isfinite())


@pytest.mark.parametrize("dtype", BITS)
def test_plain_tensors_are_for_the_kernel(taken, dtype):
    non_finite(torch.zeros(2, 3).to(dtype))
    non_finite(nn.Parameter(torch.zeros(2, 3)))
    non_finite(torch.zeros(0, 3))
    assert taken == ["triton"] * 3


def test_without_a_kernel_there_is_none(taken, monkeypatch):
    monkeypatch.setattr(module, "_kernel_runs", lambda device: False)
    assert non_finite(torch.tensor([NAN])) == 1
    monkeypatch.setattr(module, "has_kernels", lambda device: False)
    monkeypatch.setattr(module, "_kernel_runs", lambda device: pytest.fail("tried where there is nothing to try"))
    assert non_finite(torch.tensor([NAN])) == 1
    assert taken == ["reference"] * 2


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(4, 4)[:, ::2],
        torch.zeros(4, 1).expand(4, 4),
        torch.zeros(1, dtype=torch.complex64).conj().imag,
    ],
    ids=["complex", "gaps", "expanded", "negation put off"],
)
def test_what_the_kernel_does_not_read_is_for_pytorch(taken, x):
    assert non_finite(x) == 0
    assert taken == ["reference"]


def test_other_kinds_of_tensors_are_for_pytorch(taken, monkeypatch):
    class Other(Tensor):
        pass

    monkeypatch.setattr(module, "_kernel_runs", lambda device: pytest.fail("tried on a tensor that is not there"))
    non_finite(torch.zeros(3).as_subclass(Other))
    with FakeTensorMode():
        assert non_finite(torch.zeros(3)).shape == ()
    assert taken == ["reference"] * 2


def test_a_meta_tensor_launches_nothing():
    assert non_finite(torch.zeros(3, device="meta")).is_meta


def test_transforms_are_for_pytorch(taken):
    def bad_values(x: Tensor) -> Tensor:
        return non_finite(x) + non_finite(torch.zeros(2))

    x = torch.tensor([[1.0, NAN], [2.0, 3.0]])
    assert torch.func.vmap(bad_values)(x).tolist() == [1.0, 0.0]
    assert set(taken) == {"reference"}


def test_compiled_code_traces_pytorch_s_operations(taken, monkeypatch):
    monkeypatch.setattr(module, "peek_interpreter_stack", lambda: None)
    monkeypatch.setattr(module, "_kernel_runs", lambda device: pytest.fail("tried while code is traced"))
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    assert torch.compile(lambda x: non_finite(2 * x), backend=keep, fullgraph=True)(torch.tensor([1.0, NAN])) == 1
    assert len(graphs) == 1
    assert taken == ["reference"]


def test_while_a_graph_is_recorded_no_kernel_is_loaded(taken, monkeypatch):
    monkeypatch.setattr(module, "is_capturing", lambda device: True)
    monkeypatch.setattr(module, "_kernel_runs", lambda device: pytest.fail("tried while a graph is recorded"))
    assert non_finite(torch.tensor([NAN])) == 1
    assert taken == ["reference"]


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (torch.zeros(()), True),
        (torch.zeros(0, 3), True),
        (torch.zeros(2, 3, 4), True),
        (torch.zeros(2, 3, 4).permute(2, 0, 1), True),
        (torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last), True),
        (torch.zeros(6, 4)[2:4], True),
        (torch.zeros(2, 1, 3).transpose(0, 1).expand(1, 2, 3), True),
        (torch.zeros(1, 7).expand(1, 7).t(), True),
        (torch.zeros(24).as_strided((4, 1, 6), (1, 9, 4)), True),
        (torch.zeros(4, 6)[:, :3], False),
        (torch.zeros(4, 6)[::2], False),
        (torch.zeros(6)[::2], False),
        (torch.zeros(1).expand(3), False),
        (torch.zeros(4, 1).expand(4, 3), False),
        (torch.zeros(9).as_strided((3, 3), (2, 1)), False),
        (torch.zeros(9).as_strided((2, 2), (1, 1)), False),
    ],
)
def test_gaps_and_overlaps(x, expected):
    assert is_gapless(x) is expected


def test_an_implementation_that_is_not_there():
    with pytest.raises(ConfigError, match="implementation 'native' of non_finite"):
        non_finite_of("native")
