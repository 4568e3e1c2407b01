from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepseek_mp.errors import BatchError
from deepseek_mp.nn.loss import averages_elements, check_loss, class_weights, infer_loss, weigh_labels


def _infer(output: Tensor, target: Tensor) -> tuple[str, Tensor, int]:
    name, loss_fn = infer_loss(output, target)
    return name, *loss_fn(output, target)


def _labels(*shape: int) -> Tensor:
    labels = torch.randint(0, 5, shape)
    labels.view(-1)[0] = -100
    return labels


@pytest.mark.parametrize(
    ("logits", "target"),
    [((6, 5), (6,)), ((3, 4, 5), (3, 4)), ((3, 5, 4), (3, 4)), ((2, 5, 3, 4), (2, 3, 4)), ((2, 3, 4, 5), (2, 3, 4))],
)
def test_integer_targets_mean_cross_entropy_over_counted_labels(logits: Any, target: Any) -> None:
    output, labels = torch.randn(logits), _labels(*target)
    name, loss, count = _infer(output, labels)
    classes_second = output if output.shape[1] == 5 and output.shape[-1] != 5 else output.movedim(-1, 1)
    assert name == "cross_entropy"
    assert torch.allclose(loss, F.cross_entropy(classes_second, labels))
    assert count == labels.numel() - 1


def test_a_shape_that_reads_both_ways_is_a_sequence_in_3d_and_an_image_in_4d() -> None:
    output, labels = torch.randn(2, 5, 5), _labels(2, 5)
    assert torch.allclose(_infer(output, labels)[1], F.cross_entropy(output.movedim(-1, 1), labels))
    output, labels = torch.randn(2, 5, 5, 5), _labels(2, 5, 5)
    assert torch.allclose(_infer(output, labels)[1], F.cross_entropy(output, labels))


def test_integer_targets_of_any_width_are_labels() -> None:
    output, labels = torch.randn(6, 5), torch.randint(0, 5, (6,))
    assert torch.equal(_infer(output, labels.int())[1], _infer(output, labels)[1])


def test_floating_targets_mean_squared_error_over_elements() -> None:
    output, target = torch.randn(4, 3), torch.randn(4, 3)
    name, loss, count = _infer(output, target)
    assert (name, count) == ("mse", 12)
    assert torch.allclose(loss, F.mse_loss(output, target))


def test_a_float64_target_does_not_widen_the_loss() -> None:
    assert _infer(torch.randn(4, 3), torch.randn(4, 3, dtype=torch.float64))[1].dtype == torch.float32
    assert _infer(torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3))[1].dtype == torch.float64


def test_bool_targets_mean_binary_cross_entropy() -> None:
    output, target = torch.randn(4, 3), torch.rand(4, 3) > 0.5
    name, loss, count = _infer(output, target)
    assert (name, count) == ("binary_cross_entropy_with_logits", 12)
    assert torch.allclose(loss, F.binary_cross_entropy_with_logits(output, target.float()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_in_16_bits_give_a_loss_in_fp32(dtype: torch.dtype) -> None:
    output = (torch.randn(64, 5) * 50).to(dtype)
    for target in (_labels(64), torch.randn(64, 5) * 400, torch.rand(64, 5) > 0.5):
        loss = _infer(output, target)[1]
        assert loss.dtype == torch.float32
        assert torch.equal(loss, _infer(output.float(), target)[1])
        assert loss.isfinite()  # a squared error of 400 is above the range of fp16


@pytest.mark.parametrize(
    ("shape", "target"),
    [
        ((4, 5), torch.full((4,), -100)),
        ((0, 5), torch.zeros(0, dtype=torch.long)),
        ((0, 3, 5), torch.zeros(0, 3, dtype=torch.long)),
        ((0, 5), torch.zeros(0, 5)),
        ((0, 5), torch.zeros(0, 5, dtype=torch.bool)),
    ],
    ids=["all ignored", "no samples", "no sequences", "no values", "no flags"],
)
def test_a_batch_without_items_has_loss_zero_and_zero_gradients(shape: Any, target: Any) -> None:
    output = torch.randn(shape, requires_grad=True)
    _, loss, count = _infer(output, target)
    loss.backward()
    assert loss.item() == 0.0
    assert count == 0
    assert torch.equal(output.grad, torch.zeros(shape))


@pytest.mark.parametrize(
    ("output", "target", "shown"),
    [
        (torch.randn(4, 1), torch.randn(4), r"float32 \[4, 1\] with target float32 \[4\]"),
        (torch.randn(4, 5), torch.zeros(4, 1, dtype=torch.long), r"float32 \[4, 5\] with target int64 \[4, 1\]"),
        (torch.randn(4), torch.zeros(4, dtype=torch.long), r"float32 \[4\] with target int64 \[4\]"),
        (torch.zeros(4, 5, dtype=torch.long), torch.zeros(4, dtype=torch.long), r"int64 \[4, 5\]"),
        (torch.randn(4, 5), None, r"with target NoneType"),
        ((torch.randn(4, 5),), torch.zeros(4, dtype=torch.long), r"output tuple"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_shapes(output: Any, target: Any, shown: str) -> None:
    with pytest.raises(BatchError, match=rf"{shown}.*Allowed: .*cross entropy.*Pass loss_fn"):
        infer_loss(output, target)


@pytest.mark.parametrize(
    ("loss", "advice"),
    [
        (torch.ones(3, requires_grad=True), r"shape \[3\].*Reduce it with \.mean\(\)"),
        (torch.ones(1, requires_grad=True), r"shape \[1\].*Reduce it"),
        (torch.tensor(3), r"torch\.int64.*Compute it from floating values"),
        (0.5, r"a float\b.*before \.item\(\)"),
        (torch.tensor(0.5), r"without gradient history.*\.detach\(\)"),
        (None, r"a NoneType"),
    ],
    ids=["vector", "one element", "integer", "float", "detached", "none"],
)
def test_a_loss_that_cannot_be_trained_on_is_refused(loss: Any, advice: str) -> None:
    with pytest.raises(BatchError, match=advice):
        check_loss(loss)


def test_without_gradients_a_detached_loss_is_fine() -> None:
    with torch.no_grad():
        assert check_loss(torch.tensor(0.5)) == 0.5


def test_losses_of_pytorch_that_average_over_class_weights_are_known() -> None:
    weight = torch.tensor([1.0, 2.0])
    for loss in (nn.CrossEntropyLoss(weight), nn.NLLLoss(weight)):
        assert class_weights(loss) is loss.weight
    other = type("Focal", (nn.CrossEntropyLoss,), {})
    for unknown in (
        nn.CrossEntropyLoss(), nn.CrossEntropyLoss(weight, reduction="sum"), nn.BCEWithLogitsLoss(weight),
        other(weight), F.cross_entropy, None,
    ):  # fmt: skip
        assert class_weights(unknown) is None


@pytest.mark.parametrize("unit", [1.0, 1e-6])
@pytest.mark.parametrize("ignored", [-100, 255, 0])
def test_labels_count_by_the_weight_of_their_class_in_parts_of_the_mean(unit: float, ignored: int) -> None:
    weight = torch.tensor([1.0, 6.0, 2.0]) * unit
    found = weigh_labels(torch.tensor([[1, ignored], [2, 1]]), weight, ignored)
    assert float(found) == pytest.approx(14 / 3)
    nothing = weigh_labels(torch.full((2,), ignored), weight, ignored)
    assert type(nothing) is int
    assert nothing == 0


def test_losses_of_pytorch_that_average_over_elements_are_known() -> None:
    for known in (nn.MSELoss(), nn.BCEWithLogitsLoss(), F.l1_loss):
        assert averages_elements(known)
    other = type("Mine", (nn.MSELoss,), {})
    for unknown in (nn.MSELoss(reduction="sum"), other(), nn.CrossEntropyLoss(), F.cross_entropy, None):
        assert not averages_elements(unknown)
