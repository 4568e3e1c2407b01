from collections import OrderedDict, UserDict, namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, TensorDataset

from deepseek_mp.errors import BatchError
from deepseek_mp.nn.call import Call, batch_size, item_count, move, parse_batch, run

X, Y = torch.randn(4, 3), torch.randn(4, 3)
LABELS = torch.tensor([0, 1, -100, 2])
Pair = namedtuple("Pair", ["input", "target"])


class Encoding(UserDict):
    """A mapping with a `to` of its own, as Hugging Face's tokenizers return."""

    def to(self, device: torch.device) -> "Encoding":
        return Encoding({key: value.to(device) for key, value in self.items()})


def test_the_forms_of_a_batch() -> None:
    assert parse_batch(X) == Call(args=(X,), kwargs={}, target=None)
    assert parse_batch((X, Y)) == Call(args=(X,), kwargs={}, target=Y)
    assert parse_batch([X, Y]) == Call(args=(X,), kwargs={}, target=Y)
    assert parse_batch(Pair(X, Y)) == Call(args=(X,), kwargs={}, target=Y)
    assert parse_batch(((X, Y), LABELS)) == Call(args=(X, Y), kwargs={}, target=LABELS)
    assert parse_batch(([X, (Y, None)], LABELS)) == Call(args=(X, (Y, None)), kwargs={}, target=LABELS)
    assert parse_batch(({"x": X}, Y)) == Call(args=(), kwargs={"x": X}, target=Y)
    mapping = {"x": X, "labels": LABELS}
    for batch in (mapping, OrderedDict(mapping), Encoding(mapping)):
        assert parse_batch(batch) == Call(args=(), kwargs=mapping, target=LABELS)
    assert parse_batch({"x": X}).target is None


def test_a_packed_sequence_is_one_input() -> None:
    packed = pack_sequence([torch.randn(3, 2), torch.randn(1, 2)])
    assert parse_batch(packed).args == (packed,)
    call = parse_batch((packed, Y))
    assert call.args[0] is packed
    assert batch_size(call) == 2


def test_what_a_loader_collates_is_understood() -> None:
    batch = next(iter(DataLoader(TensorDataset(X, LABELS), batch_size=2)))
    assert torch.equal(parse_batch(batch).target, LABELS[:2])


@pytest.mark.parametrize(
    ("batch", "shown"),
    [
        ((X, Y, LABELS), r"tuple of 3 \(Tensor, Tensor, Tensor\)"),
        ([X], r"list of 1 \(Tensor\)"),
        ((), r"tuple of 0"),
        ("text", "str"),
        (None, "NoneType"),
        ({}, "dict with keys"),
        ({1: X}, r"dict with keys \[1\]"),
        (("text", Y), "a pair whose input is str"),
        (([], Y), "a pair whose input is list of 0"),
        ((X.numpy(), Y), "a pair whose input is ndarray"),
    ],
)
def test_other_forms_are_refused_with_the_three_that_are_allowed(batch: Any, shown: str) -> None:
    with pytest.raises(BatchError, match=rf"a batch that is {shown}.*a tensor; a pair \(input, target\).*mapping"):
        parse_batch(batch)


def test_move_keeps_structure_and_moves_every_tensor() -> None:
    packed = pack_sequence([torch.randn(3, 2), torch.randn(1, 2)])
    batch = Pair({"x": X, "more": [Y, ("name", 3)]}, (LABELS, packed, Encoding(a=X)))
    moved = move(batch, "meta")
    assert type(moved) is Pair
    assert moved.input["x"].device.type == moved.input["more"][0].device.type == "meta"
    assert moved.input["more"][1] == ("name", 3)
    labels, sequence, encoding = moved.target
    assert labels.device.type == encoding["a"].device.type == "meta"
    assert isinstance(sequence, PackedSequence)
    assert isinstance(encoding, Encoding)
    assert batch.input["x"] is X
    assert move(X, "cpu") is X


def test_batch_size_is_the_first_dimension_of_the_first_tensor() -> None:
    assert batch_size(parse_batch((X, Y))) == 4
    assert batch_size(parse_batch({"name": "x", "x": X})) == 4
    assert batch_size(parse_batch((torch.zeros(0, 3), Y))) == 0
    assert batch_size(parse_batch(torch.tensor(1.0))) == 1
    with pytest.raises(BatchError, match="a batch without tensors"):
        batch_size(parse_batch({"name": "x"}))


def test_item_count_counts_labels_that_are_not_ignored() -> None:
    assert item_count(parse_batch((X, LABELS))) == 3
    assert item_count(parse_batch({"x": X, "labels": LABELS.view(2, 2)})) == 3
    assert item_count(parse_batch((X, LABELS.int()))) == 3
    assert item_count(parse_batch((X, Y))) == 4
    assert item_count(parse_batch((X, torch.ones(4, 3, dtype=torch.bool)))) == 4
    assert item_count(parse_batch(X)) == 4
    assert isinstance(item_count(parse_batch((X, LABELS))), int)


def test_item_count_on_a_device_stays_there() -> None:
    count = item_count(Call(args=(X,), kwargs={}, target=LABELS.to("meta")))
    assert isinstance(count, Tensor)
    assert (count.device.type, count.dim()) == ("meta", 0)


class Model(nn.Module):
    """Returns what `form` makes of the linear layer's output."""

    def __init__(self, form: Any = lambda output, labels: output) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.form = form

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        return self.form(self.layer(x), labels)


def test_run_with_a_loss_function() -> None:
    result = run(Model(), parse_batch((X, Y)), lambda output, target: (output - target).abs().mean())
    assert (result.items, result.loss_name) == (4, "loss_fn")
    assert torch.equal(result.loss, (result.output - Y).abs().mean())


@pytest.mark.parametrize("count", [7, torch.tensor(7)])
def test_a_loss_function_may_count_its_items(count: int | Tensor) -> None:
    result = run(Model(), parse_batch((X, LABELS)), lambda output, target: (output.sum(), count))
    assert result.items is count


def test_a_loss_that_weighs_classes_counts_labels_by_their_weight() -> None:
    loss = nn.CrossEntropyLoss(torch.tensor([3.0, 6.0, 0.0]))
    assert float(run(Model(), parse_batch((X, LABELS)), loss).items) == 3.0
    assert run(Model(), parse_batch((X, Y.softmax(1))), loss).items == 4


@pytest.mark.parametrize("second", [1.5, True, -1, torch.ones(2), None])
def test_a_wrong_count_is_refused(second: Any) -> None:
    with pytest.raises(BatchError, match=r"loss_fn returned a tuple of tuple of 2.*number of items"):
        run(Model(), parse_batch((X, Y)), lambda output, target: (output.sum(), second))


def test_run_with_the_models_own_loss() -> None:
    call = parse_batch({"x": X, "labels": LABELS})
    for form in (
        lambda output, labels: {"loss": output.sum(), "logits": output},
        lambda output, labels: SimpleNamespace(loss=output.sum(), logits=output),
    ):
        result = run(Model(form), call, None)
        assert (result.items, result.loss_name) == (3, "output.loss")


def test_run_infers_the_loss_and_names_it() -> None:
    result = run(Model(), parse_batch((X, LABELS)), None)
    assert (result.items, result.loss_name) == (3, "cross_entropy")
    assert torch.allclose(result.loss, nn.functional.cross_entropy(result.output, LABELS))
    assert run(Model(), parse_batch((X, Y)), None).loss_name == "mse"


@pytest.mark.parametrize("batch", [X, {"x": X}, {"x": X, "labels": LABELS}], ids=["tensor", "mapping", "labels"])
def test_no_loss_at_all_is_refused(batch: Any) -> None:
    model = Model(lambda output, labels: {"logits": output, "loss": None})
    with pytest.raises(BatchError, match=r"from which no loss can be inferred.*Pass loss_fn"):
        run(model, parse_batch(batch), None)


def test_a_bad_loss_is_refused_wherever_it_comes_from() -> None:
    with pytest.raises(BatchError, match=r"shape \[4\]"):
        run(Model(), parse_batch((X, Y)), lambda output, target: (output - target).square().mean(1))
    with pytest.raises(BatchError, match="without gradient history"):
        run(Model(lambda output, labels: {"loss": output.sum().detach()}), parse_batch(X), None)


def test_evaluation_runs_without_gradients() -> None:
    with torch.no_grad():
        assert not run(Model(), parse_batch((X, Y)), None).loss.requires_grad


def test_move_moves_every_tensor_of_a_call():
    call = parse_batch(({"x": torch.ones(2), "deep": [torch.ones(1)]}, torch.zeros(2)))
    moved = move(call, "meta")
    assert moved.kwargs["x"].device.type == moved.kwargs["deep"][0].device.type == moved.target.device.type == "meta"
    assert call.target.device.type == "cpu"


@pytest.mark.parametrize("batch", [{"x": X}, Call(args=(), kwargs={"x": X}, target=None)], ids=["batch", "call"])
def test_a_batch_that_holds_itself_is_refused(batch):
    inside = batch.kwargs if isinstance(batch, Call) else batch
    inside["again"] = [inside]
    with pytest.raises(BatchError, match="a batch with a container that holds itself"):
        move(batch, "cpu")
