"""Scenes are those of their seed, their boxes fit the shapes, and objects stand out from the ground."""

from __future__ import annotations

import pytest
import torch

from deepseek_mp.errors import ConfigError
from deepseek_mp.workloads.boxes import areas, intersections
from deepseek_mp.workloads.data import seeded
from deepseek_mp.workloads.scenes import (
    CLASSES,
    CONTRAST,
    COVERED,
    STRETCH,
    TINY_SCENES,
    SceneConfig,
    Scenes,
    layout,
    paint,
)


def scenes(**more: object) -> Scenes:
    return Scenes(TINY_SCENES, **{"batch_size": 4, "count": 2, "seed": 0, **more})  # type: ignore[arg-type]


def test_images_and_targets_have_the_documented_form() -> None:
    images, targets = scenes().batch(0, 0)
    assert (images.shape, images.dtype) == ((4, 3, 96, 96), torch.float32)
    assert (targets.shape, targets.dtype) == ((4, TINY_SCENES.objects, 5), torch.float32)
    assert -0.6 < images.min() < images.max() < 1.6


def test_the_seed_the_epoch_and_the_index_decide_the_scene() -> None:
    first, same = scenes().batch(1, 1), scenes().batch(1, 1)
    assert all(map(torch.equal, first, same))
    for other in (scenes(seed=1).batch(1, 1), scenes().batch(0, 1), scenes().batch(1, 0)):
        assert not torch.equal(first[0], other[0])
        assert not torch.equal(first[1], other[1])
    assert torch.equal(scenes(fixed=True).batch(0, 1)[0], scenes(fixed=True).batch(3, 1)[0])


def test_every_class_occurs_boxes_are_inside_of_the_stated_size_and_padding_is_last() -> None:
    config = SceneConfig(side=200, objects=6, smallest=0.1, largest=0.4)
    rows = layout(config, 200, seeded(0))
    real = rows[..., 0] >= 0
    assert real[:, 0].all()
    assert not (real[:, 1:] & ~real[:, :-1]).any()
    assert (rows[~real] == torch.tensor([-1.0, 0, 0, 0, 0])).all()
    labels, boxes = rows[real][:, 0], rows[real][:, 1:]
    assert sorted(set(labels.tolist())) == list(range(len(CLASSES)))
    assert boxes.min() >= 0
    assert boxes.max() <= 200
    sizes, sides = areas(boxes).sqrt() / 200, boxes[:, 2:] - boxes[:, :2]
    assert 0.1 <= sizes.min() < 0.11
    assert 0.35 < sizes.max() <= 0.4001
    assert (sides[:, 0] / sides[:, 1]).max() <= STRETCH + 1e-4


def test_objects_hardly_cover_each_other() -> None:
    boxes = layout(SceneConfig(side=200, objects=8, smallest=0.2, largest=0.5), 50, seeded(0))[..., 1:]
    shared = intersections(boxes[:, :, None], boxes[:, None])
    smaller = torch.minimum(areas(boxes)[:, :, None], areas(boxes)[:, None])
    apart = ~torch.eye(8, dtype=torch.bool)
    assert (shared / smaller.clamp(min=1))[:, apart].max() <= COVERED + 1e-4
    assert (shared > 0)[:, apart].any()


@pytest.mark.parametrize("label", range(len(CLASSES)))
def test_a_shape_fills_its_box_and_nothing_else(label: int) -> None:
    target = torch.tensor([[[label, 20.0, 30.0, 61.0, 81.0], [-1.0, 0, 0, 0, 0]]])
    colours = torch.tensor([[[0.0, 0, 0], [5.0, 5, 5], [9.0, 9, 9]]])
    image = paint(target, colours, 96, torch.Generator().manual_seed(0))[0]
    rows, columns = (image.mean(dim=0) > 2.5).nonzero().unbind(1)
    assert (columns.min(), columns.max() + 1) == (20, 61)
    assert rows.max() + 1 == 81
    assert 30 <= rows.min() <= 31  # the tip of the triangle is narrower than a pixel
    assert image.max() < 8  # padding paints nothing


def test_classes_have_different_outlines() -> None:
    targets = torch.tensor([[[label, 10.0, 10.0, 50.0, 50.0]] for label in range(len(CLASSES))])
    colours = torch.tensor([[0.0, 0, 0], [5.0, 5, 5]]).expand(len(CLASSES), -1, -1)
    inside = paint(targets, colours, 64, torch.Generator().manual_seed(0)).mean(dim=1) > 2.5
    for first in range(len(CLASSES)):
        for second in range(first):
            assert (inside[first] ^ inside[second]).sum() > 100


@pytest.mark.parametrize("ground", [[0.5, 0.6, 0.1], [0.9, 0.95, 0.9], [0.1, 0.05, 0.1]])
def test_a_colour_like_the_grounds_is_moved_away_from_it_and_stays_a_colour(ground: list[float]) -> None:
    target = torch.tensor([[[1.0, 10.0, 10.0, 90.0, 90.0]]])
    below = torch.tensor(ground)
    image = paint(target, torch.stack([below, below + 0.01])[None], 96, torch.Generator().manual_seed(0))[0]
    ink = image[:, 20:80, 20:80].mean(dim=(1, 2))
    assert CONTRAST - 0.1 < (ink - below).abs().max() < CONTRAST + 0.1
    assert -0.05 < ink.min() < ink.max() < 1.05


@pytest.mark.parametrize("sizes", [{"side": 0}, {"objects": 0}, {"smallest": 0.6, "largest": 0.5}, {"largest": 0.9}])
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="smallest at most largest"):
        SceneConfig(**sizes)  # type: ignore[arg-type]
