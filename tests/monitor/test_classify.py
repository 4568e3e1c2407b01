"""The rule that gives an operation its name and format, on the operations PyTorch really dispatches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from deepseek_mp.backends import math_mode
from deepseek_mp.monitor.classify import Ran, classify, computes, format_name, op_name
from deepseek_mp.monitor.classify import product as product_kind
from deepseek_mp.ops.schema import product, quantise, quantise_delayed


class Classified(TorchDispatchMode):
    """What `classify` says of each operation that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[Ran] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if computes(func):
            self.ran.append(classify(func, args, kwargs or {}, out))
        return out


def ran(function: Callable[[], Any]) -> list[Ran]:
    with Classified() as classified, torch.no_grad():
        function()
    return classified.ran


def named(function: Callable[[], Any]) -> list[tuple[str, str]]:
    return [(one.op, one.format) for one in ran(function)]


X32, X16, XH = torch.ones(4, 4), torch.ones(4, 4, dtype=torch.bfloat16), torch.ones(4, 4, dtype=torch.float16)
F8 = X32.to(torch.float8_e4m3fn)
IMAGE = torch.ones(1, 2, 4, 4)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda: X16 @ X16, [("mm", "bf16")]),
        (lambda: torch.addmm(X32[0], X32, X32), [("addmm", "fp32")]),
        (lambda: X32.double() @ X32.double(), [("cast", "fp64<-fp32")] * 2 + [("mm", "fp64")]),
        (lambda: F.conv2d(IMAGE, IMAGE), [("convolution", "fp32")]),
        (lambda: X16 + X32, [("add", "fp32")]),  # promoted
        (lambda: X16 * torch.tensor(2.0), [("mul", "bf16")]),  # a tensor without dimensions does not promote
        (lambda: torch.tensor(2.0) * torch.tensor(2.0), [("mul", "fp32")]),
        (lambda: X16.sum(dtype=torch.float32), [("sum", "fp32")]),  # sums in the wider format
        (lambda: X16.sum(), [("sum", "bf16")]),
        (lambda: F.layer_norm(X16, (4,), X32[0], X32[0]), [("native_layer_norm", "bf16")]),
        (lambda: X32.to(torch.bfloat16), [("cast", "bf16<-fp32")]),
        (lambda: XH.float(), [("cast", "fp32<-fp16")]),
        (lambda: F8.float(), [("cast", "fp32<-fp8_e4m3")]),
        (lambda: torch.empty(4, 4).copy_(X16), [("cast", "fp32<-bf16")]),
        (lambda: torch.empty(4, 4).copy_(X32), [("copy_", "fp32")]),
        (lambda: X32.bool().float(), [("cast", "integer<-fp32"), ("cast", "fp32<-integer")]),
        (lambda: torch.arange(3) + 1, [("arange", "integer"), ("add", "integer")]),
        (lambda: X32 > 0, [("gt", "fp32")]),
        (lambda: torch.gt(X16, torch.tensor(0.0)), [("gt", "bf16")]),
        (lambda: X16.argmax(), [("argmax", "bf16")]),
        (lambda: torch.randn(2), [("randn", "fp32")]),
        (lambda: torch.cat([X16, X16]), [("cat", "bf16")]),
        (lambda: torch._foreach_add([X32, X32], 1.0), [("_foreach_add", "fp32")]),
        (lambda: torch.fft.rfft(X32), [("_fft_r2c", "fp32")]),
        (lambda: torch.ones(2, dtype=torch.complex128) * 2, [("ones", "fp64"), ("mul", "fp64")]),
        (lambda: X16.mul_(1), [("mul_", "bf16")]),
    ],
)  # fmt: skip
def test_name_and_format(function: Callable[[], Any], expected: list[tuple[str, str]]) -> None:
    assert named(function) == expected


@pytest.mark.parametrize(
    "function",
    [
        lambda: X32.t().unsqueeze(0)[0].expand(4, 4),
        lambda: X32.detach().view(16).squeeze_(),
        lambda: torch.empty(3).new_empty(2),
        lambda: X32[0, 0].item(),
    ],
)
def test_what_computes_nothing_is_not_counted(function: Callable[[], Any]) -> None:
    assert ran(function) == []


@pytest.mark.parametrize(("mode", "format"), [("tf32", "tf32"), ("ieee", "fp32")])
def test_fp32_products_have_the_format_that_the_flags_give_them(
    mode: str, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def fp32_mode(device: torch.device, product: str) -> str:
        asked.append((device.type, product))
        return mode

    monkeypatch.setattr("deepseek_mp.monitor.classify.fp32_mode", fp32_mode)
    assert named(lambda: X32 @ X32) == [("mm", format)]
    assert named(lambda: F.conv2d(IMAGE, IMAGE)) == [("convolution", format)]
    assert named(lambda: X16 @ X16) == [("mm", "bf16")]
    assert named(lambda: X32.exp()) == [("exp", "fp32")]
    assert asked == [("cpu", "matmul"), ("cpu", "conv")]


@pytest.mark.gpu
def test_tf32_on_the_device() -> None:
    x, image = X32.cuda(), IMAGE.cuda()
    for mode, format in (("tf32", "tf32"), ("ieee", "fp32")):
        with math_mode("cuda", fp32=mode, search=False):
            assert named(lambda: x @ x) == [("mm", format)]
            assert named(lambda: F.conv2d(image, image)) == [("convolution", format)]
            assert named(lambda: F.scaled_dot_product_attention(image, image, image))[0][1] == "fp32"


def test_scaled_products_have_the_format_of_their_operands() -> None:
    left, right = F8.repeat(4, 4), F8.repeat(4, 4).t()
    scale = torch.tensor(1.0)
    out = named(lambda: torch._scaled_mm(left, right, scale, scale, out_dtype=torch.bfloat16))
    assert out == [("_scaled_mm", "fp8_e4m3")]


@pytest.mark.parametrize(
    ("format", "x", "cast"),
    [
        ("fp8_e4m3", X16, "fp8_e4m3<-bf16"),
        ("fp8_e4m3", X32, "fp8_e4m3<-fp32"),
        ("fp8_e5m2", XH, "fp8_e5m2<-fp16"),
        ("fp8_e4m3fnuz", X16, "fp8_e4m3fnuz<-bf16"),
    ],
)
@pytest.mark.parametrize(("rows", "columns"), [(True, True), (True, False), (False, True)])
def test_quantising_is_a_cast(format: str, x: torch.Tensor, cast: str, rows: bool, columns: bool) -> None:
    matrix = x.repeat(4, 4)
    (one,) = ran(lambda: quantise(matrix, format, "tensor", False, rows, columns, "reference"))
    assert (one.op, one.format, one.reads, one.wide) == ("cast", cast, False, False)
    rest = (torch.ones(()), torch.zeros(()), format, False, rows, columns)
    (one,) = ran(lambda: quantise_delayed(matrix, *rest, implementation="reference"))
    assert (one.op, one.format, one.reads, one.wide) == ("cast", cast, False, False)


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize(
    ("left", "right", "format"),
    [
        ("fp8_e4m3", "fp8_e4m3", "fp8_e4m3"),
        ("fp8_e5m2", "fp8_e4m3", "fp8_e5m2"),
        ("fp8_e4m3", "fp8_e5m2", "fp8_e4m3"),
        ("fp8_e4m3fnuz", "fp8_e4m3fnuz", "fp8_e4m3fnuz"),
    ],
)
@pytest.mark.parametrize("bias", [None, torch.ones(16, dtype=torch.bfloat16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_of_ours_have_the_format_of_their_operands(
    granularity: str, left: str, right: str, format: str, bias: torch.Tensor | None, dtype: torch.dtype
) -> None:
    a, a_scale, _, _ = quantise(X32.repeat(4, 4), left, granularity, False, True, False, "reference")
    b, b_scale, _, _ = quantise(X32.repeat(4, 4), right, granularity, False, True, False, "reference")
    pair = granularity, granularity
    (one,) = ran(lambda: product(a, a_scale, b, b_scale, pair, bias, dtype, implementation="reference"))
    assert (one.op, one.format, one.wide) == ("deepseek_mp::product", format, False)
    assert product_kind(one.op) == "matmul"


def test_what_reads_the_values_of_floating_tensors() -> None:
    assert [one.reads for one in ran(lambda: X32.exp())] == [True]
    assert not any(one.reads for one in ran(lambda: torch.zeros_like(X32).fill_(1).bernoulli_(0.5)))
    assert not any(one.reads for one in ran(lambda: X32.to(torch.bfloat16)))


@pytest.mark.parametrize("gradients", [True, False])
def test_a_view_reads_only_where_it_has_a_backward(gradients: bool) -> None:
    view = torch.ops.aten.view.default
    with torch.set_grad_enabled(gradients):
        assert classify(view, (X32, [16]), {}, X32.view(16)).reads is gradients
        assert classify(torch.ops.aten.exp.default, (X32,), {}, X32).reads


def test_wide_is_more_than_16_bits_in_memory() -> None:
    def one(format: str) -> bool:
        return Ran("op", format, None, reads=True).wide

    assert [one(format) for format in ("fp64", "fp32", "tf32", "hf32")] == [True] * 4
    assert [one(format) for format in ("bf16", "fp16", "fp8_e4m3", "integer", "bf16<-fp32")] == [False] * 5


def test_operations_of_other_libraries_keep_their_namespace() -> None:
    @torch.library.custom_op("monitor_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    assert ("monitor_test::twice", "fp32") in named(lambda: twice(X32))
    assert op_name(torch.ops.aten.add_.Tensor) == "add_"


def test_a_type_that_is_no_format_of_ours_keeps_its_name() -> None:
    assert format_name(torch.float4_e2m1fn_x2) == "float4_e2m1fn_x2"
    assert format_name(torch.complex64) == "fp32"
    assert format_name(torch.int8) == "integer"
