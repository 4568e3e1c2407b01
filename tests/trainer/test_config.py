"""The trainer's settings: what is taken, and what each refusal says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deepseek_mp import PrecisionPlan
from deepseek_mp.errors import ConfigError
from deepseek_mp.trainer.config import MODES, TrainerConfig, check_extent, check_single_process

GOOD = [
    *({"precision_mode": mode} for mode in MODES),
    {"precision_mode": PrecisionPlan.of("bf16", {"head": "fp32"})},
    {"gradient_accumulation_steps": 1},
    {"max_grad_norm": 0.5},
    {"max_grad_norm": 1},
    {"ema_decay": 0.999},
    {"pin": {}},
    {"kernels": "triton"},
    {"compile": True},
    {"compile": "regional"},
    {"compile": True, "activation_memory_budget": 0.5},
    {"memory": "auto"},
    {"memory": 0.5},
    {"memory": 20},
    {"activation_memory_budget": 0.5},
    {"seed": 0},
    {"seed": 2**64 - 1},
    {"seed": np.int64(3)},
    {"checkpoint_every": 1},
    {"statistics_every": None},
]
BAD = [
    ({"precision_mode": "bf61"}, r"precision_mode='bf61'\. Allowed: 'auto', 'fp32', .*PrecisionPlan.* mean 'bf16'"),
    ({"precision_mode": "FP16"}, r"Did you mean 'fp16'\?"),
    ({"precision_mode": "int8"}, "precision_mode='int8'"),
    ({"precision_mode": None}, "precision_mode=None"),
    ({"precision_mode": torch.bfloat16}, r"precision_mode=torch\.bfloat16"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0.*whole number from 1.*Change gradient_acc"),
    ({"gradient_accumulation_steps": 2.0}, r"gradient_accumulation_steps=2\.0"),
    ({"gradient_accumulation_steps": True}, "gradient_accumulation_steps=True"),
    ({"max_grad_norm": 0}, "max_grad_norm=0.*None or a finite number above 0"),
    ({"max_grad_norm": float("inf")}, "max_grad_norm=inf"),
    ({"max_grad_norm": float("nan")}, "max_grad_norm=nan"),
    ({"max_grad_norm": "1"}, "max_grad_norm='1'"),
    ({"ema_decay": 1.0}, r"ema_decay=1\.0.*between 0 and 1"),
    ({"ema_decay": 0}, "ema_decay=0"),
    ({"pin": ["head"]}, r"pin=\['head'\].*\{'\*\.norm\*': 'fp32'\}"),
    ({"precision_mode": "rows"}, "precision_mode='rows'.*Did you mean 'row'"),
    ({"kernels": "tritn"}, r"kernels='tritn'\. Allowed: None, 'native', 'triton', 'reference'.*mean 'triton'"),
    ({"compile": "blocks"}, "compile='blocks'.*False, True, 'regional'"),
    ({"compile": 1}, "compile=1"),
    ({"compile": None}, "compile=None"),
    ({"activation_memory_budget": 0.0, "compile": True}, "activation_memory_budget=0.0.*above 0 and up to 1"),
    ({"activation_memory_budget": True, "compile": True}, "activation_memory_budget=True"),
    ({"memory": 0}, "memory=0.*None, 'auto' or a number of GiB above 0"),
    ({"memory": True}, "memory=True"),
    ({"memory": "20"}, "memory='20'"),
    ({"memory": float("nan")}, "memory=nan"),
    ({"seed": "a"}, "seed='a'.*whole number from 0"),
    ({"seed": -1}, "seed=-1"),
    ({"seed": 2**64}, "seed=18446744073709551616"),
    ({"seed": 1.5}, r"seed=1\.5"),
    ({"max_skipped_steps": 0}, "max_skipped_steps=0"),
    ({"monitor_every": 0}, "monitor_every=0"),
    ({"checkpoint_every": 0}, "checkpoint_every=0.*None or a whole number of steps from 1"),
    ({"statistics_every": 0}, "statistics_every=0.*None or a whole number of steps from 1"),
]


@pytest.mark.parametrize("settings", GOOD, ids=str)
def test_what_is_allowed_is_kept_as_it_is(settings):
    config = TrainerConfig(**settings)
    for name, value in settings.items():
        assert getattr(config, name) == value


@pytest.mark.parametrize(("settings", "message"), BAD, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_what_is_not_allowed_is_named_with_what_is(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        TrainerConfig(**settings)
    assert "Allowed: " in str(caught.value)


def test_settings_cannot_be_changed():
    with pytest.raises(AttributeError, match="cannot assign to field"):
        TrainerConfig().seed = 3


@pytest.mark.parametrize(("epochs", "max_steps"), [(0, None), (1, 0), (3, 100)])
def test_a_fit_goes_as_far_as_whole_numbers_say(epochs, max_steps):
    check_extent(epochs, max_steps)


@pytest.mark.parametrize(
    ("epochs", "max_steps", "message"),
    [
        (None, None, "epochs=None.*whole number from 0.*Change epochs"),
        (-1, None, "epochs=-1"),
        (1.0, None, r"epochs=1\.0"),
        (True, None, "epochs=True"),
        (False, None, "epochs=False"),
        (1, -1, "max_steps=-1.*Change max_steps"),
        (1, "10", "max_steps='10'"),
    ],
)
def test_other_extents_are_refused(epochs, max_steps, message):
    with pytest.raises(ConfigError, match=message):
        check_extent(epochs, max_steps)


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "many"}])
def test_one_process_may_train(environment):
    check_single_process(environment)


@pytest.mark.parametrize("size", ["2", "64"])
def test_one_of_several_processes_may_not(size):
    with pytest.raises(ConfigError, match=rf"\(WORLD_SIZE={size}\).*one process on one device.*without torchrun"):
        check_single_process({"WORLD_SIZE": size})


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_a_process_group_counts_as_well_as_the_environment(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with pytest.raises(ConfigError, match=r"\(WORLD_SIZE=4\)"):
        check_single_process({})
