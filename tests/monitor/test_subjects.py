"""Which layers are sampled, and which rows of their tensors."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from deepseek_mp.monitor.subjects import Choice, Subject, activation_rows, is_plain, subjects_of, weight_rows
from deepseek_mp.nn import convert
from deepseek_mp.nn.lazy import lazy


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.body = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.LSTM(4, 3))
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embedding.weight


def test_units_with_a_matrix_are_subjects_before_and_after_a_conversion() -> None:
    model = Net()
    expected = ["embedding", "body.0", "body.2", "head"]
    assert [subject.name for subject in subjects_of(model)] == expected
    assert subjects_of(model)[2].weight is model.body[2].weight_ih_l0
    convert(model, "bf16", emulate=True)
    found = subjects_of(model)
    assert [subject.name for subject in found] == expected
    assert [subject.kind for subject in found] == [nn.Embedding, nn.Conv2d, nn.LSTM, nn.Linear]
    assert [subject.index for subject in found] == [0, 1, 2, 3]


def test_names_of_a_compiled_model_are_those_of_the_original() -> None:
    assert [subject.name for subject in subjects_of(torch.compile(nn.Sequential(nn.Linear(2, 2))))] == ["0"]


def test_a_parameter_that_was_replaced_is_found() -> None:
    module = nn.Linear(2, 2)
    subject = subjects_of(module)[0]
    module.weight = nn.Parameter(torch.ones(2, 2))
    assert subject.weight is module.weight


def test_complex_weights_are_no_subjects() -> None:
    assert subjects_of(nn.Linear(2, 2, dtype=torch.complex64)) == []


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 100, 1000, 4096])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_choice_is_within_the_rows_and_as_many_as_asked_for(count: int, rows: int) -> None:
    choice, starts = Choice(rows, 0), set()
    for _ in range(200):
        found = choice.of(count)
        assert len(found) == min(count, rows)
        assert found[0] >= 0
        assert found[-1] < count
        starts.add(found[0])
    if count > rows:
        assert len(starts) > 1  # not always the same rows
    assert found.step % 2 == 1 or len(found) == 1


def test_a_seed_gives_the_same_choices_and_another_one_others() -> None:
    one, same, other = (Choice(8, seed) for seed in (1, 1, 2))
    first = [one.of(10_000) for _ in range(5)]
    assert first == [same.of(10_000) for _ in range(5)]
    assert first != [other.of(10_000) for _ in range(5)]


def test_runs_stay_together() -> None:
    starts = Choice(8, 0).of(64, run=4)
    assert len(starts) == 2
    assert all(start % 4 == 0 for start in starts)
    assert len(Choice(2, 0).of(64, run=4)) == 1  # at least


def linear() -> Subject:
    return subjects_of(nn.Linear(6, 4))[0]


def is_among(rows: Tensor, all_rows: Tensor) -> bool:
    return all(any(torch.equal(row, other) for other in all_rows) for row in rows)


@pytest.mark.parametrize("shape", [(6,), (7, 6), (3, 5, 6), (2, 3, 4, 6), (0, 6), (3, 0, 6)])
def test_rows_of_what_a_linear_layer_reads(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    rows = activation_rows(x, linear(), Choice(4, 0))
    assert rows.shape == (min(4, x.numel() // 6), 6)
    assert is_among(rows, x.reshape(-1, 6))


@pytest.mark.parametrize("strided", [lambda x: x.transpose(0, 1), lambda x: x[:, ::2], lambda x: x[:1].expand(9, 8, 6)])
def test_rows_of_a_tensor_that_is_not_contiguous(strided: object) -> None:
    x = strided(torch.randn(5, 8, 6))  # type: ignore[operator]
    rows = activation_rows(x, linear(), Choice(7, 0))
    assert rows.shape == (7, 6)
    assert is_among(rows, x.reshape(-1, 6))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_rows_of_an_image_are_the_channels_of_its_pixels(memory_format: torch.memory_format) -> None:
    subject = subjects_of(nn.Conv2d(3, 8, 3))[0]
    x = torch.randn(2, 3, 5, 5).to(memory_format=memory_format)
    rows = activation_rows(x, subject, Choice(9, 0))
    assert rows.shape == (9, 3)
    assert is_among(rows, x.permute(0, 2, 3, 1).reshape(-1, 3))
    assert activation_rows(x[0], subject, Choice(9, 0)).shape == (9, 3)  # an image without a batch


def test_rows_of_weights_make_one_output_each() -> None:
    for module in (nn.Linear(6, 8), nn.Conv2d(6, 8, 3), nn.ConvTranspose2d(6, 8, 3), nn.ConvTranspose1d(6, 8, 3)):
        subject = subjects_of(module)[0]
        expected = module.weight if "Transpose" not in type(module).__name__ else module.weight.transpose(0, 1)
        rows = weight_rows(module.weight.detach(), subject, range(1, 8, 3), 1)
        assert torch.equal(rows, expected[1:8:3].flatten(1))
        runs = weight_rows(module.weight.detach(), subject, range(0, 8, 4), 2)
        assert torch.equal(runs, expected[[0, 1, 4, 5]].flatten(1))


def test_rows_of_a_weight_are_a_copy() -> None:
    subject = linear()
    rows = weight_rows(subject.weight.detach(), subject, range(0, 4, 1), 1)
    before = rows.clone()
    with torch.no_grad():
        subject.weight.zero_()
    assert torch.equal(rows, before)


def test_a_weight_with_the_inputs_first_is_turned() -> None:
    kind = type("Conv1D", (nn.Module,), {"__module__": "transformers.pytorch_utils", "__qualname__": "Conv1D"})
    module = kind()
    module.weight = nn.Parameter(torch.randn(3, 5))
    subject = replace(linear(), module=module)
    assert torch.equal(weight_rows(module.weight.detach(), subject, range(0, 5, 1), 1), module.weight.T)


def test_plain_tensors_and_those_that_are_not() -> None:
    assert is_plain(torch.ones(2))
    assert is_plain(nn.Parameter(torch.ones(2)))
    assert is_plain(lazy(torch.ones(2)))
    assert not is_plain(torch.ones(2).to_sparse())

    class Other(Tensor):
        pass

    assert not is_plain(torch.ones(2).as_subclass(Other))
    assert is_plain(copy.deepcopy(torch.ones(2)))
