import math

import pytest
import torch

from deepseek_mp.workloads.gratings import CLASSES, Gratings


def first(**options):
    return next(iter(Gratings(side=48, batch_size=64, count=2, **{"seed": 0, **options})))


def test_batches_come_from_the_seed_and_differ():
    images, classes = first()
    assert images.shape == (64, 3, 48, 48)
    assert images.dtype is torch.float32
    assert 0 <= int(classes.min()) <= int(classes.max()) < CLASSES
    assert torch.equal(images, first()[0])
    assert not torch.equal(images, first(seed=1)[0])
    one, other = Gratings(side=48, batch_size=64, count=2, seed=0)
    assert not torch.equal(one[0], other[0])


@pytest.mark.parametrize("fixed", [True, False])
def test_epochs_differ_unless_fixed(fixed):
    data = Gratings(side=16, batch_size=4, count=1, seed=0, fixed=fixed)
    [(first_epoch, _)], [(second_epoch, _)] = list(data), list(data)
    assert torch.equal(first_epoch, second_epoch) is fixed


def test_the_direction_of_the_wave_is_the_class():
    images, classes = first()
    power = torch.fft.fft2(images).abs().square().sum(1)
    power[:, 0, 0] = 0
    place = power.flatten(1).argmax(1)
    frequency = torch.fft.fftfreq(48)
    down, right = frequency[place // 48], frequency[place % 48]
    turn = torch.atan2(down, right) % math.pi
    off = (turn / (math.pi / CLASSES) - classes + CLASSES / 2) % CLASSES - CLASSES / 2
    assert float((off.abs() < 1.5).float().mean()) > 0.9
