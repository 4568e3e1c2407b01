"""The chunked loss equals PyTorch's, value and gradients, in every case that a training brings."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from deepseek_mp.errors import ConfigError, ShapeError
from deepseek_mp.nn import chunked_loss, linear_cross_entropy
from deepseek_mp.nn.chunked_loss import CHUNK_BYTES, rows_of

CLOSE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2e-2, torch.float16: 2e-3}
CLASSES, WIDTH = 37, 8


def operands(*leading: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> list[Tensor]:
    """Hidden, weight and bias that require gradients, and a target with some labels ignored."""
    hidden = torch.randn(*leading, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(CLASSES, WIDTH, dtype=dtype, requires_grad=True)
    b = torch.randn(CLASSES, dtype=dtype, requires_grad=True)
    target = torch.randint(0, CLASSES, leading)
    if target.numel() > 2:
        target.view(-1)[1:3] = -100
    return [hidden, weight, target, *([b] if bias else [])]


def ordinary(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), target.reshape(-1), **options)
    return loss.view(target.shape) if options.get("reduction") == "none" else loss


def gradients(loss: Tensor, tensors: list[Tensor], incoming: Tensor | None = None) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, [t for t in tensors if t.requires_grad], incoming, allow_unused=True))


def assert_same(parts: list[Tensor], *, incoming: Any = None, close: float = 2e-6, **options: Any) -> None:
    chunk = options.pop("chunk", 3)
    ours = linear_cross_entropy(*parts[:3], bias=(*parts, None)[3], chunk=chunk, **options)
    theirs = ordinary(*parts, **options)
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=close, atol=close, equal_nan=True)
    weights = incoming if incoming is None or incoming.dim() == ours.dim() else incoming.expand_as(ours)
    for got, want in zip(gradients(ours, parts, weights), gradients(theirs, parts, weights), strict=True):
        assert got is not None
        assert want is not None
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        scale = float(want.abs().max()) if want.numel() else 1.0
        torch.testing.assert_close(got, want, rtol=close, atol=close * max(scale, 1e-3))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_pytorch_s_loss(reduction: str, smoothing: float, dtype: torch.dtype) -> None:
    parts = operands(4, 5, dtype=dtype)
    incoming = torch.rand(4, 5, dtype=dtype) if reduction == "none" else torch.tensor(0.37, dtype=dtype)
    assert_same(parts, reduction=reduction, label_smoothing=smoothing, incoming=incoming, close=CLOSE[dtype])


@pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("chunk", [1, 2, 7, 100, None])
def test_any_leading_shape_in_chunks_of_any_size(leading: tuple[int, ...], chunk: int | None) -> None:
    assert_same(operands(*leading), chunk=chunk, reduction="sum")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_narrow_operands(dtype: torch.dtype, reduction: str) -> None:
    incoming = torch.tensor(3.0) if reduction == "mean" else torch.rand(6, 5)
    assert_same(operands(6, 5, dtype=dtype), reduction=reduction, incoming=incoming, close=CLOSE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_products_have_the_format_of_the_region(dtype: torch.dtype, hidden_dtype: torch.dtype) -> None:
    parts = operands(6, 5)
    parts[0] = parts[0].detach().to(hidden_dtype).requires_grad_()
    with torch.autocast("cpu", dtype):
        assert_same(parts, close=CLOSE[dtype])


def test_the_weight_s_gradient_is_summed_in_fp32() -> None:
    """A thousand equal chunks: a sum in bf16 stops to grow where a part is lost beside it."""
    hidden = torch.ones(4096, 4, dtype=torch.bfloat16)
    weight = torch.zeros(2, 4, dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros(4096, dtype=torch.long)
    loss = linear_cross_entropy(hidden, weight, target, reduction="sum", chunk=4)
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.tolist() == [[-2048.0] * 4, [2048.0] * 4]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_labels_ignored_and_none_at_all(reduction: str, smoothing: float) -> None:
    parts = operands(4)
    parts[2].fill_(-100)
    incoming = torch.ones(4) if reduction == "none" else torch.tensor(1.0)
    chunked = linear_cross_entropy(*parts[:3], reduction=reduction, label_smoothing=smoothing, chunk=3)  # type: ignore[arg-type]
    expected = ordinary(*parts[:3], reduction=reduction, label_smoothing=smoothing)
    torch.testing.assert_close(chunked, expected, equal_nan=True)
    for gradient in gradients(chunked, parts[:2], incoming):
        assert gradient is not None
        assert not gradient.any()
    empty = operands(0, bias=False)
    loss = linear_cross_entropy(*empty, reduction=reduction)  # type: ignore[arg-type, misc]
    torch.testing.assert_close(loss, ordinary(*empty, reduction=reduction), equal_nan=True)
    assert [g.shape for g in gradients(loss, empty, torch.ones_like(loss)) if g is not None] == [
        (0, WIDTH), (CLASSES, WIDTH),
    ]  # fmt: skip


def test_another_label_may_be_the_ignored_one() -> None:
    parts = operands(9)
    parts[2] = torch.arange(9) % 4
    assert_same(parts, ignore_index=2)


@pytest.mark.parametrize("frozen", [(0,), (1,), (3,), (0, 3), (1, 3), (0, 1)])
def test_frozen_operands_get_no_gradient(frozen: tuple[int, ...]) -> None:
    parts = operands(7)
    for place in frozen:
        parts[place].requires_grad_(requires_grad=False)
    assert_same(parts)


def test_without_gradients_no_graph_is_made() -> None:
    parts = operands(7)
    with torch.no_grad():
        loss = linear_cross_entropy(*parts[:3], bias=parts[3])
    assert not loss.requires_grad
    torch.testing.assert_close(loss, ordinary(*parts))


def test_a_tied_weight_gets_both_gradients() -> None:
    weight = torch.randn(CLASSES, WIDTH, requires_grad=True)
    tokens, target = torch.randint(0, CLASSES, (2, 9)).unbind()
    ours = linear_cross_entropy(F.embedding(tokens, weight).tanh(), weight, target, chunk=2)
    theirs = ordinary(F.embedding(tokens, weight).tanh(), weight, target)
    torch.testing.assert_close(torch.autograd.grad(ours, weight), torch.autograd.grad(theirs, weight))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_graph_that_is_kept_gives_its_gradients_again(reduction: Any) -> None:
    hidden, weight, target, bias = parts = operands(7)
    loss = linear_cross_entropy(hidden, weight, target, bias=bias, reduction=reduction, chunk=3)
    leaves = [hidden, weight, bias]
    for factor in (1.0, 8.0, 0.5):
        got = torch.autograd.grad(loss, leaves, torch.tensor(factor), retain_graph=True)
        want = torch.autograd.grad(ordinary(*parts, reduction=reduction), leaves, torch.tensor(factor))
        torch.testing.assert_close(got, want)


def test_gradients_add_up_and_belong_to_who_gets_them() -> None:
    hidden, weight, target, _ = operands(7)
    for _ in range(2):
        linear_cross_entropy(hidden, weight, target, chunk=3).backward()
    (once,) = torch.autograd.grad(ordinary(hidden, weight, target), [weight])
    torch.testing.assert_close(weight.grad, 2 * once)


@pytest.mark.parametrize("reentrant", [False, True])
def test_within_checkpointing(reentrant: bool) -> None:
    layer, (hidden, weight, target, _) = nn.Linear(WIDTH, WIDTH), operands(7)

    def block(x: Tensor) -> Tensor:
        return linear_cross_entropy(layer(x).tanh(), weight, target, chunk=3)

    loss = checkpoint(block, hidden, use_reentrant=reentrant)
    loss.backward()
    leaves = [hidden, weight, *layer.parameters()]
    want = torch.autograd.grad(ordinary(layer(hidden).tanh(), weight, target), leaves)
    torch.testing.assert_close([leaf.grad for leaf in leaves], list(want))


def test_the_loss_scale_keeps_fp16_gradients_in_range() -> None:
    """Unscaled, the gradient of a logit is 4.1 times FP16's smallest number here."""
    hidden = torch.ones(1000, 2, dtype=torch.float16)
    weight = torch.zeros(4096, 2, dtype=torch.float16, requires_grad=True)
    target = torch.zeros(1000, dtype=torch.long)
    scale = torch.tensor(2.0**15)
    (ours,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, target), weight, scale)
    exact = scale / 4096
    assert (ours[1:].float() / exact - 1).abs().max() < 1e-3


def test_nothing_is_prepared_for_a_backward_that_cannot_come(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = operands(7)
    monkeypatch.setattr("deepseek_mp.nn.chunked_loss._Sums", None)
    with torch.no_grad():
        linear_cross_entropy(*parts[:3])
    linear_cross_entropy(*[part.detach() for part in parts[:3]])
    with pytest.raises(TypeError, match="not callable"):
        linear_cross_entropy(*parts[:3])


def test_large_and_masked_logits() -> None:
    hidden, weight, target, bias = parts = operands(7)
    with torch.no_grad():
        bias += 1e4
        bias[0] = -torch.inf
        target[target == 0] = 1
        hidden *= 30
    assert_same(parts, close=1e-3)
    del weight


def test_a_second_derivative_is_refused() -> None:
    hidden, weight, target, _ = operands(7)
    loss = linear_cross_entropy(hidden, weight, target)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    torch.testing.assert_close(gradient, *torch.autograd.grad(ordinary(hidden, weight, target), hidden))
    with pytest.raises(ConfigError, match=r"a second derivative of linear_cross_entropy.*first derivatives"):
        gradient.square().sum().backward(retain_graph=True)
    for one in (hidden, weight):
        with pytest.raises(ConfigError, match="a second derivative of linear_cross_entropy"):
            torch.autograd.grad(gradient.square().sum(), one, retain_graph=True)


def test_gradcheck() -> None:
    hidden, weight, target, bias = operands(5, dtype=torch.float64)

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_cross_entropy(h, w, target, bias=b, label_smoothing=0.1, chunk=2)

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


class _Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """The most elements that a result had, and that results of that size had together at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.together = 0
        self._made: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.numel() >= self.largest:
            self.together = self.together if out.numel() == self.largest else 0
            self.largest = out.numel()
            self._made.append(weakref.ref(out))
            alive = {one.data_ptr() for ref in self._made if (one := ref()) is not None and one.numel() == self.largest}
            self.together = max(self.together, len(alive) * self.largest)
        return out


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_are_never_there_as_a_whole(reduction: Any) -> None:
    hidden = torch.randn(1000, WIDTH, requires_grad=True)
    weight, target = torch.randn(500, WIDTH, requires_grad=True), torch.randint(0, 500, (1000,))
    with _Watch() as seen:
        linear_cross_entropy(hidden, weight, target, reduction=reduction, chunk=20).sum().backward()
    assert (seen.largest, seen.together) == (20 * 500, 20 * 500)


def test_rows_of_a_chunk_fit_the_budget() -> None:
    for classes in (2, 256, 50257, 128256):
        rows = rows_of(classes, CHUNK_BYTES)
        assert 4 * classes * rows <= CHUNK_BYTES < 4 * classes * (rows + 64)
        assert rows % 64 == 0
    assert rows_of(10**9, CHUNK_BYTES) == 1


def test_the_gradient_of_a_large_weight_is_added_up_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part is on its way to the sum in no more memory than that of a chunk."""
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 5 * 4 * WIDTH)
    sizes = []
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: sizes.append(len(a)) or product(a, b))
    assert_same(operands(2, 7, dtype=torch.bfloat16), close=CLOSE[torch.bfloat16], chunk=14)
    assert sizes == [5] * 7 + [2]


def test_compiled_code_takes_the_ordinary_form() -> None:
    hidden, weight, target, bias = parts = operands(2, 7)
    compiled = torch.compile(
        lambda h, w, b: linear_cross_entropy(h, w, target, bias=b, reduction="none"), backend="eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(hidden, weight, bias), ordinary(*parts, reduction="none"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.zeros(3, dtype=torch.long)}, r"target torch.int64 \[3\].*Allowed: hidden \[\.\.\., K\]"),
        ({"target": torch.zeros(4)}, r"target torch.float32 \[4\].*whole numbers"),
        ({"weight": torch.zeros(5, 7)}, r"weight \[5, 7\]"),
        ({"bias": torch.zeros(4)}, r"bias \[4\]"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, Tensor], message: str) -> None:
    parts = {"hidden": torch.zeros(4, 8), "weight": torch.zeros(5, 8), "target": torch.zeros(4, dtype=torch.long)}
    with pytest.raises(ShapeError, match=message):
        linear_cross_entropy(**(parts | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_smoothing": 1.5}, "label_smoothing=1.5. Allowed: a number from 0 to 1"),
        ({"reduction": "max"}, "reduction='max'. Allowed: 'mean', 'sum', 'none'"),
        ({"chunk": 0}, "chunk=0. Allowed: None or a whole number of rows from 1"),
        ({"weight": torch.zeros(5, 8, dtype=torch.bfloat16)}, "hidden of torch.float32 and weight of torch.bfloat16"),
    ],
)
def test_other_arguments_that_are_not_allowed(change: dict[str, Any], message: str) -> None:
    parts = {"hidden": torch.zeros(4, 8), "weight": torch.zeros(5, 8), "target": torch.zeros(4, dtype=torch.long)}
    with pytest.raises(ConfigError, match=message):
        linear_cross_entropy(**(parts | change))


def test_a_class_that_is_not_there_is_an_error() -> None:
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_cross_entropy(torch.zeros(4, 8), torch.zeros(5, 8), torch.full((4,), 5))
