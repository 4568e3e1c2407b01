"""Where training stands in its data: leaving a loader anywhere and coming back to the same batches."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset, WeightedRandomSampler

from deepseek_mp.errors import LoaderError
from deepseek_mp.trainer.position import LoaderPosition, check_loader, length, no_batch

CPU = torch.device("cpu")
DATA = TensorDataset(torch.arange(10))


def shuffled(**options):
    return DataLoader(DATA, batch_size=3, shuffle=True, **options)


def sampled(sampler):
    return DataLoader(DATA, batch_size=3, sampler=sampler)


def generator():
    return torch.Generator().manual_seed(7)


class Counted:
    """Keeps epoch and place in a state_dict; its order hangs on the epoch alone."""

    def __init__(self):
        self.epoch = self.place = self.start = 0

    def __iter__(self):
        order = torch.randperm(10, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        first, self.start = self.start, 0
        for place in range(first, 4):
            self.place = place + 1
            yield [torch.tensor(order[3 * place : 3 * place + 3])]
        self.epoch, self.place = self.epoch + 1, 0

    def state_dict(self):
        return {"epoch": self.epoch, "place": self.place}

    def load_state_dict(self, state):
        self.epoch, self.start = state["epoch"], state["place"]


class Drawing:
    """A generator function that shuffles with Python's, draws with NumPy's and torch's generators, batch by batch."""

    def __iter__(self):
        order = list(range(10))
        random.shuffle(order)
        for start in range(0, 10, 3):
            noise = np.random.randint(100) + int(torch.randint(100, ()))
            yield [torch.tensor(order[start : start + 3]) + noise]


LOADERS = {
    "shuffled": shuffled,
    "own generator": lambda: shuffled(generator=generator()),
    "sampler's generator": lambda: sampled(
        RandomSampler(DATA, replacement=True, num_samples=10, generator=generator())
    ),
    "replacement": lambda: sampled(RandomSampler(DATA, replacement=True, num_samples=40)),
    "weighted": lambda: sampled(WeightedRandomSampler([1.0] * 10, 10, generator=generator())),
    "drawing": Drawing,
    "counted": Counted,
}


def setup_function():
    seed(0)


def seed(value):
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def consume(position, loader, count=10**6, epochs=2):
    """The next `count` batches as lists of numbers; each is followed by draws of a model's dropout."""
    seen = []
    while position.epoch < epochs:
        for _, batch in position.batches(loader):
            seen.append([*batch[0].tolist(), float(torch.rand(())), random.random()])
            position.stepped(position.batch)
            if len(seen) == count:
                return seen
        position.next_epoch()
    return seen


def moved(position, loader):
    """The position as a checkpoint carries it to another process."""
    tensors, values = position.save(loader)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    seed(99)
    other = LoaderPosition(CPU)
    other.load(tensors, values, open_batches=0)
    return other


@pytest.mark.parametrize("kind", LOADERS)
def test_what_is_left_after_a_resume_is_what_would_have_come(kind):
    straight = consume(LoaderPosition(CPU), LOADERS[kind]())
    random_state = torch.get_rng_state()
    for stop in range(1, len(straight)):
        seed(0)
        first, loader = LoaderPosition(CPU), LOADERS[kind]()
        seen = consume(first, loader, stop)
        second = moved(first, loader)
        assert seen + consume(second, LOADERS[kind]()) == straight, stop
        assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("kind", LOADERS)
def test_what_is_left_at_the_end_of_an_epoch_is_the_next_one(kind):
    straight = consume(LoaderPosition(CPU), LOADERS[kind]())
    seed(0)
    first, loader = LoaderPosition(CPU), LOADERS[kind]()
    seen = consume(first, loader, epochs=1)
    assert first.epoch == 1
    assert seen + consume(moved(first, loader), LOADERS[kind]()) == straight


@pytest.mark.parametrize("kind", LOADERS)
def test_going_on_with_the_same_loader_gives_what_is_left(kind):
    straight = consume(LoaderPosition(CPU), LOADERS[kind]())
    seed(0)
    position, loader, seen = LoaderPosition(CPU), LOADERS[kind](), []
    for step in itertools.cycle([1, 2, 3]):
        seen += consume(position, loader, step)
        if position.epoch == 2:
            break
    assert seen == straight


@pytest.mark.parametrize("kind", [kind for kind in LOADERS if kind != "counted"])
@pytest.mark.parametrize("lost", [1, 2])
def test_batches_without_a_step_are_given_again(kind, lost):
    straight = consume(LoaderPosition(CPU), LOADERS[kind]())
    for stop in range(4):
        seed(0)
        position, loader = LoaderPosition(CPU), LOADERS[kind]()
        seen = consume(position, loader, stop) if stop else []
        for _, _batch in zip(range(lost), position.batches(loader), strict=False):
            torch.rand(3)
        position.rewind(loader)
        assert position.batch == stop
        saved = moved(position, loader)
        assert seen + consume(saved, LOADERS[kind]()) == straight, "by a checkpoint"


@pytest.mark.parametrize("kind", [kind for kind in LOADERS if kind != "counted"])
def test_batches_without_a_step_are_given_again_by_the_same_position(kind):
    straight = consume(LoaderPosition(CPU), LOADERS[kind]())
    for stop in range(4):
        seed(0)
        position, loader = LoaderPosition(CPU), LOADERS[kind]()
        seen = consume(position, loader, stop) if stop else []
        next(position.batches(loader))
        position.rewind(loader)
        assert seen + consume(position, loader) == straight


def test_a_loader_that_keeps_its_place_or_a_generator_cannot_go_back():
    for loader in (Counted(), (batch for batch in shuffled())):
        position = LoaderPosition(CPU)
        taken = [batch[0].tolist() for _, batch in itertools.islice(position.batches(loader), 2)]
        position.rewind(loader)
        assert position.batch == 2
        rest = [batch[0].tolist() for _, batch in position.batches(loader)]
        assert sorted(itertools.chain(*taken, *rest)) == list(range(10))


def test_a_generator_goes_on_in_the_next_fit_and_is_skipped_into_after_a_resume():
    def numbers():
        return ([torch.tensor(i)] for i in range(6))

    first, loader = LoaderPosition(CPU), numbers()
    assert [index for index, _ in itertools.islice(first.batches(loader), 2)] == [0, 1]
    assert [int(batch[0]) for _, batch in first.batches(loader)] == [2, 3, 4, 5]
    first.batch = 2
    assert [int(batch[0]) for _, batch in moved(first, numbers()).batches(numbers())] == [2, 3, 4, 5]


class AtItsEnd:
    """A loader whose restored state at the end of an epoch first gives that end: nothing."""

    def __init__(self):
        self.place = 0
        self.start = 0

    def __iter__(self):
        first, self.start = self.start, 0
        for place in range(first, 3):
            self.place = place + 1
            yield [torch.tensor([place])]

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.start = state["place"]


def test_a_loader_restored_at_the_end_of_an_epoch_begins_the_next():
    first, loader = LoaderPosition(CPU), AtItsEnd()
    assert len(list(first.batches(loader))) == 3
    first.next_epoch()
    second = moved(first, loader)
    assert [index for index, _ in second.batches(AtItsEnd())] == [0, 1, 2]


def test_indices_count_from_the_start_of_the_epoch():
    position, loader = LoaderPosition(CPU), shuffled()
    assert [index for index, _ in itertools.islice(position.batches(loader), 2)] == [0, 1]
    assert [index for index, _ in moved(position, loader).batches(shuffled())] == [2, 3]


def test_an_exhausted_loader_has_no_batch_twice():
    position = LoaderPosition(CPU)
    position.load(*LoaderPosition(CPU).save([]), open_batches=0)
    assert list(position.batches([])) == []


def test_a_loader_that_became_shorter_is_an_error():
    position, loader = LoaderPosition(CPU), shuffled()
    list(itertools.islice(position.batches(loader), 3))
    with pytest.raises(LoaderError, match=r"ended after 1 batches, while resuming behind batch 3.*same data and batch"):
        next(moved(position, loader).batches([1]))


def test_a_position_without_a_loader_keeps_the_random_state():
    tensors, values = LoaderPosition(CPU).save(None)
    expected = float(torch.rand(()))
    seed(99)
    LoaderPosition(CPU).load(tensors, values, open_batches=0)
    assert float(torch.rand(())) == expected


class Endless(IterableDataset):
    def __iter__(self):
        return iter(range(3))


@pytest.mark.parametrize(
    ("loader", "expected"),
    [([1, 2], 2), (shuffled(), 4), (DataLoader(Endless()), None), (iter([1]), None), (Drawing(), None)],
)
def test_a_length_is_known_or_not(loader, expected):
    assert length(loader) == expected


@pytest.mark.parametrize("loader", [None, 5, object()])
def test_what_cannot_be_iterated_is_refused(loader):
    with pytest.raises(LoaderError, match=r"loader .*Allowed: an iterable of batches.*Pass a DataLoader, or a list"):
        check_loader(loader)


def test_what_can_be_iterated_is_taken():
    class Indexed:
        def __getitem__(self, index):
            return [1, 2][index]

    for loader in ([], shuffled(), iter([]), Drawing(), Indexed()):
        check_loader(loader)


def test_the_error_for_no_batch_names_the_epoch():
    assert "gave no batch in epoch 3" in str(no_batch(3))
