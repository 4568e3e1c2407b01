"""The detector has the stated sizes, trains in the trainer as it is, compiles whole, and learns."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from deepseek_mp import MixedPrecisionTrainer
from deepseek_mp.errors import ConfigError
from deepseek_mp.workloads.detection_loss import detection_loss
from deepseek_mp.workloads.detections import detect, mean_average_precision
from deepseek_mp.workloads.detector import STRIDES, TINY_DETECTOR, DetectorConfig, detector, predictions
from deepseek_mp.workloads.scenes import TINY_SCENES, Scenes

STEPS = 160
BEATEN = 0.2
"""mAP that so many steps reach with room to spare (0.30 to 0.38 at three seeds); without training it is below 0.01."""


def scenes(*, count: int, seed: int = 0, batch_size: int = 8, fixed: bool = False) -> Scenes:
    return Scenes(TINY_SCENES, batch_size=batch_size, count=count, seed=seed, fixed=fixed)


def quality(model: torch.nn.Module) -> float:
    """mAP at an overlap of 0.5 on scenes that were not trained on."""
    model.eval()
    found, targets = [], []
    with torch.no_grad():
        for images, rows in scenes(count=2, seed=1, batch_size=48, fixed=True):
            found += detect(model(images))
            targets += list(rows)
    return mean_average_precision(found, targets)[0]


@pytest.mark.parametrize(("config", "millions"), [(TINY_DETECTOR, 0.73), (DetectorConfig(), 11.98)])
def test_the_number_of_parameters_is_the_stated_one(config: DetectorConfig, millions: float) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in detector(config).parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


def test_the_output_has_four_distances_and_the_classes_at_each_of_three_scales() -> None:
    scales = detector(TINY_DETECTOR)(torch.randn(2, 3, 64, 96))
    assert [tuple(scale.shape) for scale in scales] == [(2, 10, 64 // s, 96 // s) for s in STRIDES]
    found = predictions(tuple(scale - 4 for scale in scales))  # raw distances are negative then
    places = 8 * 12 + 4 * 6 + 2 * 3
    assert (found.boxes.shape, found.logits.shape) == ((2, places, 4), (2, places, 6))
    assert found.places[:2].tolist() == [[4, 4], [12, 4]]  # along a row first
    assert found.places[-1].tolist() == [80, 48]
    inside = (found.boxes[..., :2] < found.places) & (found.places < found.boxes[..., 2:])
    assert inside.all()


def test_an_untrained_model_is_sure_of_nothing() -> None:
    found = predictions(detector(TINY_DETECTOR).eval()(torch.rand(2, 3, 96, 96)))
    assert found.logits.sigmoid().mean() < 0.03


def test_every_scale_sees_the_whole_of_a_small_image() -> None:
    model = detector(TINY_DETECTOR).eval()
    image = torch.rand(1, 3, 96, 96, requires_grad=True)
    for scale in model(image):
        (gradient,) = torch.autograd.grad(scale[0, 4, 0, 0], image, retain_graph=True)
        assert (gradient[0, :, 60:, 60:] != 0).any()


def test_the_seed_fixes_the_weights_and_leaves_the_callers_generator_alone() -> None:
    before = torch.get_rng_state()
    one, two, other = detector(TINY_DETECTOR), detector(TINY_DETECTOR), detector(TINY_DETECTOR, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    weights = [model.backbone.stem.conv.weight for model in (one, two, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("channels_last", [False, True])
def test_every_parameter_gets_a_finite_gradient_in_bf16(channels_last: bool) -> None:
    model = detector(TINY_DETECTOR)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    images = torch.rand(2, 3, 256, 256)
    boxes = [[1.0, 10.0, 10.0, 40.0, 40.0], [2.0, 50.0, 50.0, 120.0, 120.0], [3.0, 100.0, 100.0, 236.0, 236.0]]
    targets = torch.tensor([boxes, boxes])  # one for each scale
    with torch.autocast("cpu", torch.bfloat16):
        loss = detection_loss(model(images), targets)
    assert loss.dtype == torch.float32
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name


def test_model_and_loss_are_one_graph_whose_result_is_that_of_eager_code() -> None:
    model = detector(TINY_DETECTOR)
    images, targets = scenes(count=1, batch_size=2).batch(0, 0)

    def step(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return detection_loss(model(images), targets)

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, targets), step(images, targets))


def test_it_trains_in_the_trainer_in_bf16_without_a_skipped_step() -> None:
    trainer = MixedPrecisionTrainer(
        detector(TINY_DETECTOR), "bf16", loss_fn=detection_loss, emulate=True, device="cpu", progress=False
    )
    batch = scenes(count=1, batch_size=4).batch(0, 0)
    steps = [trainer.step(batch) for _ in range(6)]
    assert all(step.status == "applied" and math.isfinite(step.loss) for step in steps)
    assert steps[-1].loss < steps[0].loss


def test_it_learns_to_find_objects_on_a_cpu() -> None:
    model = detector(TINY_DETECTOR)
    assert quality(model) < 0.01
    model.train()
    trainer = MixedPrecisionTrainer(
        model,
        "fp32",
        loss_fn=detection_loss,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
        scheduler=lambda optimizer: LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / 10, (STEPS - n) / 30)),
        device="cpu",
        progress=False,
    )
    trainer.fit(scenes(count=STEPS), max_steps=STEPS)
    assert quality(model) > BEATEN


@pytest.mark.parametrize("sizes", [{"width": 6}, {"depths": (1, 1, 1)}, {"depths": (1, 0, 1, 1)}, {"classes": 0}])
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="a width that is a multiple of 4"):
        DetectorConfig(**sizes)
