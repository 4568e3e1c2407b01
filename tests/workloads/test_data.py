"""The data is real, split without overlap, and a loader goes on exactly where it was."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from deepseek_mp.errors import ConfigError, LoaderError
from deepseek_mp.workloads.data import (
    Batches,
    ExampleBatches,
    TextWindows,
    digits,
    library_text,
    library_windows,
    seeded,
)


def epoch(loader: Batches) -> list[torch.Tensor]:
    return [inputs for inputs, _ in loader]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def examples(*, count: int = 10, batch_size: int = 3, seed: int | None = 0) -> ExampleBatches:
    return ExampleBatches(torch.arange(count), torch.arange(count) * 10, batch_size=batch_size, seed=seed)


def test_digits_are_split_into_distinct_images_with_the_documented_form() -> None:
    data = digits(batch_size=64)
    images, labels = next(iter(data.train))
    assert (images.shape, images.dtype, labels.shape, labels.dtype) == (
        (64, 1, 8, 8), torch.float32, (64,), torch.int64,
    )  # fmt: skip
    assert images.min() == 0
    assert images.max() == 1
    held_out = sum(len(labels) for _, labels in data.validation)
    assert (len(data.train), held_out) == ((1797 - 359) // 64, 359)
    # Every label occurs among the images held out, so the split is not one of sorted data.
    assert torch.cat([labels for _, labels in data.validation]).unique().tolist() == list(range(10))


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'deepseek-mp\[demo\]'"):
        digits()


def test_inputs_and_targets_stay_paired_and_a_shuffled_epoch_has_no_short_batch() -> None:
    batches = list(examples(count=10, batch_size=3))
    assert [len(inputs) for inputs, _ in batches] == [3, 3, 3]
    assert all(torch.equal(inputs * 10, targets) for inputs, targets in batches)
    assert len(torch.cat([inputs for inputs, _ in batches]).unique()) == 9


def test_without_a_seed_examples_come_in_order_and_none_is_left_out() -> None:
    assert torch.cat(epoch(examples(count=10, batch_size=4, seed=None))).tolist() == list(range(10))
    assert len(examples(count=8, batch_size=4, seed=None)) == 2


def test_each_epoch_has_its_own_order_and_the_seed_fixes_all_of_them() -> None:
    first, again = examples(count=60), examples(count=60)
    orders = [epoch(first) for _ in range(2)]
    assert not same(*orders)
    assert same(orders[0], epoch(again))
    assert same(orders[1], epoch(again))
    assert not same(orders[0], epoch(examples(count=60, seed=1)))


def test_a_loader_goes_on_from_a_saved_position() -> None:
    loader = examples(count=60)
    epoch(loader)
    running = iter(loader)
    for _ in range(4):
        next(running)
    position = loader.state_dict()
    resumed = examples(count=60)
    resumed.load_state_dict(position)
    assert same(epoch(resumed), [inputs for inputs, _ in running])
    assert same(epoch(resumed), epoch(loader))


def test_a_window_is_followed_by_its_targets() -> None:
    text = torch.arange(200, dtype=torch.uint8)
    inputs, targets = next(iter(TextWindows(text, batch_size=5, length=16, count=1, seed=3)))
    assert inputs.shape == targets.shape == (5, 16)
    assert inputs.dtype == torch.int64
    assert torch.equal(inputs + 1, targets)


def test_windows_reach_both_ends_of_the_text() -> None:
    text = torch.arange(6, dtype=torch.uint8)
    inputs, targets = next(iter(TextWindows(text, batch_size=200, length=3, count=1, seed=0)))
    assert inputs.min() == 0
    assert targets.max() == 5


def test_fixed_windows_are_the_same_every_epoch_and_others_are_not() -> None:
    text = torch.arange(250, dtype=torch.uint8)
    size = {"batch_size": 4, "length": 8, "count": 3, "seed": 0}
    fixed, fresh = TextWindows(text, **size, fixed=True), TextWindows(text, **size)
    assert same(epoch(fixed), epoch(fixed))
    assert not same(epoch(fresh), epoch(fresh))


def test_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(LoaderError, match="a text of 8 bytes"):
        TextWindows(torch.zeros(8, dtype=torch.uint8), batch_size=1, length=8, count=1, seed=0)


def test_examples_too_few_for_one_batch_are_refused() -> None:
    with pytest.raises(LoaderError, match="no batch at all"):
        examples(count=2, batch_size=3)


def test_the_text_is_the_source_of_the_standard_library_in_order_of_names() -> None:
    text = bytes(library_text(limit=200_000).tolist())
    first = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[0].read_bytes()
    assert len(text) == 200_000
    assert text.startswith(first[:200_000])


def test_training_and_validation_windows_come_from_different_parts_of_the_text() -> None:
    data = library_windows(count=1)
    assert isinstance(data.train, TextWindows)
    assert isinstance(data.validation, TextWindows)
    whole = library_text()
    assert torch.equal(torch.cat([data.train.text, data.validation.text]), whole)
    assert len(data.validation.text) == len(whole) // 10


def test_a_python_without_source_files_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(LoaderError, match="no Python source in"):
        library_text()


def test_a_generator_depends_on_each_number_and_on_their_order() -> None:
    seeds = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]
    draws = {numbers: torch.randint(2**31, (4,), generator=seeded(*numbers)).tolist() for numbers in seeds}
    assert len({tuple(draw) for draw in draws.values()}) == len(seeds)
    assert draws[0, 1] == torch.randint(2**31, (4,), generator=seeded(0, 1)).tolist()
