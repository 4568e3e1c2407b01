"""Micro-batches of any sizes weigh as one batch of all their items."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deepseek_mp import MixedPrecisionTrainer
from deepseek_mp.errors import BatchError
from deepseek_mp.trainer.window import Window

CPU = torch.device("cpu")


def filled(losses, counts):
    """A window of these mean losses over these counts."""
    window = Window()
    for loss, count in zip(losses, counts, strict=True):
        window.micro_batches += 1
        window.add(torch.tensor(loss), window.weigh(count))
    return window


@pytest.mark.parametrize("kind", [int, torch.tensor], ids=["numbers", "tensors"])
@given(sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=6))
def test_the_mean_over_all_items_whatever_the_sizes(kind, sizes):
    losses = [1.0 + 0.25 * i for i in range(len(sizes))]
    window = filled(losses, [kind(n) for n in sizes])
    expected = sum(loss * n for loss, n in zip(losses, sizes, strict=True)) / sum(sizes)
    assert float(window.mean_loss(window.divisor)) == pytest.approx(expected, rel=1e-5)


def test_weights_are_relative_to_the_first_so_that_numbers_stay_near_those_of_one_batch():
    window = Window()
    assert [window.weigh(n) for n in (4000, 4000, 1000)] == [1.0, 1.0, 0.25]
    assert window.weight == 2.25


def test_a_divisor_of_one_is_none():
    assert Window().divisor is None
    assert filled([1.0], [7]).divisor is None
    assert float(filled([1.0, 1.0], [7, 7]).divisor) == 2.0


def test_a_micro_batch_that_is_a_whole_window_weighs_one_without_any_arithmetic():
    window, count = Window(), torch.tensor(7)
    assert window.weigh(count, whole=True) == 1.0
    assert window.only is count
    window.add(torch.tensor(3.0), 1.0)
    assert window.divisor is None
    assert float(window.mean_loss(None)) == 3.0


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("count", "empty"), [(torch.tensor(0), True), (torch.tensor(3), False), (3, None)])
def test_empty_is_known_on_the_device_where_the_counts_are(count, empty, whole):
    window = Window()
    window.add(torch.tensor(0.0), window.weigh(count, whole=whole))
    assert (None if window.empty is None else bool(window.empty)) is empty


def test_no_items_at_all_divide_by_one_and_not_by_zero():
    window = filled([0.0, 0.0], [torch.tensor(0), torch.tensor(0)])
    assert float(window.divisor) == 1.0
    assert float(window.mean_loss(window.divisor)) == 0.0


def test_empty_micro_batches_before_and_between_count_for_nothing():
    window = filled([0.0, 2.0, 0.0, 4.0], [torch.tensor(n) for n in (0, 3, 0, 1)])
    assert float(window.mean_loss(window.divisor)) == pytest.approx(2.5)
    assert not window.empty


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_loss_marks_the_window(bad):
    assert float(filled([1.0, 2.0], [3, 3]).nonfinite) == 0.0
    for position in range(3):
        losses = [1.0, 1.0, 1.0]
        losses[position] = bad
        assert float(filled(losses, [3, 3, 3]).nonfinite) == 1.0


def test_the_loss_is_summed_in_float32_and_apart_from_the_graph():
    window = Window()
    loss = torch.tensor(3.0, dtype=torch.bfloat16, requires_grad=True)
    window.add(loss, window.weigh(1))
    window.add(torch.tensor(2**-10, dtype=torch.bfloat16), window.weigh(1))
    assert window.loss.dtype == torch.float32
    assert not window.loss.requires_grad
    assert float(window.loss) == 3.0 + 2**-10


@pytest.mark.parametrize("counts", [[7, 3], [torch.tensor(7), torch.tensor(3)]], ids=["numbers", "tensors"])
def test_a_window_survives_json_and_goes_on_with_the_same_bits(counts):
    straight = filled([0.1, 0.7], counts)
    resumed = Window.load(json.loads(json.dumps(straight.save())), CPU)
    assert resumed.save() == straight.save()
    for window in (straight, resumed):
        window.add(torch.tensor(0.3), window.weigh(counts[0]))
    assert torch.equal(straight.mean_loss(straight.divisor), resumed.mean_loss(resumed.divisor))


def test_an_untouched_window_survives_json_too():
    assert Window.load(json.loads(json.dumps(Window().save())), CPU) == Window()


# --------------------------------------------------------------------------- windows of a trainer


def summing(accumulation):
    """A trainer whose weight goes down by the window's mean input: lr 1, loss w * mean(x)."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    trainer = MixedPrecisionTrainer(
        model, "fp32", loss_fn=lambda output, target: output.mean(), device="cpu",
        optimizer=lambda params: torch.optim.SGD(params, lr=1.0), gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    return trainer, model.weight


def ones(samples, value=1.0):
    return torch.full((samples, 1), value)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_loop_that_closes_its_windows_itself_gets_their_means(accumulation):
    trainer, weight = summing(accumulation)
    statuses = [
        trainer.step(ones(2, 1.0), close=False).status,
        trainer.step(ones(2, 1.0), close=False).status,
        trainer.step(ones(4, 2.0), close=True).status,
    ]
    assert statuses == ["accumulated", "accumulated", "applied"]
    assert weight.item() == -1.5
    trainer.step(ones(2, 3.0), close=True)
    assert weight.item() == -4.5


def test_a_window_longer_than_the_trainers_own():
    trainer, weight = summing(2)
    for _ in range(5):
        trainer.step(ones(3), close=False)
    assert trainer.step(ones(3)).status == "applied"
    assert weight.item() == -1.0


@pytest.mark.parametrize("batch", [{"flag": 3}, "text", (1, 2)])
def test_a_refused_batch_is_no_part_of_the_window(batch):
    trainer, weight = summing(3)
    trainer.step(ones(2, 1.0))
    with pytest.raises(BatchError, match="a batch that is"):
        trainer.step(batch)
    assert [trainer.step(ones(2, value)).status for value in (3.0, 5.0)] == ["accumulated", "applied"]
    assert weight.item() == -3.0
