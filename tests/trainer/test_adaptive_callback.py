"""Live precision belongs to one trainer."""

import pytest
import torch
from torch import nn

from deepseek_mp import AdaptivePrecision, AdaptiveSettings, MixedPrecisionTrainer
from deepseek_mp.errors import ConfigError

BATCH = torch.randn(16, 32), torch.randint(0, 8, (16,))


def trainer(live):
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    return MixedPrecisionTrainer(model, "bf16", emulate=True, progress=False, callbacks=[live])


def test_one_that_has_steered_a_trainer_is_refused_by_the_next():
    live = AdaptivePrecision(AdaptiveSettings(recipes=("fp32", "tensor")))
    first = trainer(live)
    trainer(live)  # it has seen no model yet
    first.step(BATCH)
    assert first.adaptive is live
    with pytest.raises(ConfigError, match=r"steered another trainer.*Make a new one with the same settings"):
        trainer(live)


def test_settings_of_another_type_are_refused():
    with pytest.raises(ConfigError, match=r"settings=0\.001\. Allowed: an AdaptiveSettings or None"):
        AdaptivePrecision(0.001)
