"""Which measures a trainer has, what they set, and that setting them can be taken back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from deepseek_mp import AdaptivePrecision, MixedPrecisionTrainer
from deepseek_mp.optim import SGD, Adafactor, AdamW
from deepseek_mp.trainer.memory_measures import allowed_options, possible, put_in_force, settings_of

pytestmark = pytest.mark.usefixtures("fused_if_asked")

LEVELS = [f"activation_memory_budget={share}" for share in (0.75, 0.5, 0.25)]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.norm = nn.Embedding(128, 64), nn.LayerNorm(64)
        self.first, self.head = nn.Linear(64, 80), nn.Linear(80, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.first(self.norm(self.words(x))))


def trainer(mode: str = "bf16", **options: Any) -> MixedPrecisionTrainer:
    options = {"optimizer": torch.optim.AdamW} | options
    return MixedPrecisionTrainer(Model(), mode, device="cpu", emulate=True, **options)


def found(run: MixedPrecisionTrainer) -> tuple[list[str], dict[str, str]]:
    measures, refused = possible(run, run.plan)
    return [measure.name for measure in measures], refused


def test_eager_code_and_compiled_code_have_their_own() -> None:
    names, refused = found(trainer())
    assert [name for name in names if name not in LEVELS] == [
        "fused_loss=auto", "states=8bit", "storage=bf16_sr", "activations=True",
    ]  # fmt: skip
    names, refused = found(trainer(compile=True))
    assert [name for name in names if name.startswith("activation")] == LEVELS
    assert refused["activations=True"].startswith("activations=True with compile=True")
    assert "a model compiled whole has the loss in it" in refused["fused_loss=auto"]


def test_each_level_goes_further_than_the_one_before() -> None:
    run = trainer(compile=True)
    by_name = {measure.name: measure for measure in possible(run, run.plan)[0]}
    assert [by_name[name].after for name in LEVELS] == ["", *LEVELS[:2]]
    assert settings_of(LEVELS).options == {"activation_memory_budget": 0.25}
    assert settings_of(LEVELS[:1]).options == {"activation_memory_budget": 0.75}
    assert settings_of(reversed(LEVELS)).options == {"activation_memory_budget": 0.25}


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"fused_loss": True}, "fused_loss=auto"),
        ({"fused_loss": False}, "fused_loss=auto"),
        ({"activations": True}, "activations=True"),
        ({"compile": True, "activation_memory_budget": 0.9}, LEVELS[0]),
        ({"optimizer": lambda p: AdamW(p, states="8bit")}, "states=8bit"),
    ],
)
def test_what_was_set_by_hand_is_no_measure(options: dict[str, Any], name: str) -> None:
    names, refused = found(trainer(**options))
    assert name not in names
    assert refused[name] == "it was set by hand"


def test_an_option_set_by_hand_is_no_reason_against_others() -> None:
    names, _ = found(trainer(compile=True, fused_loss="auto"))
    assert LEVELS[0] in names


@pytest.mark.parametrize(
    ("options", "name", "why"),
    [
        ({"optimizer": lambda p: SGD(p, lr=0.1)}, "states=8bit", "keeps no moments"),
        ({"optimizer": lambda p: Adafactor(p, lr=0.1)}, "states=8bit", "Adafactor keeps no such moments"),
        ({"callbacks": [AdaptivePrecision()]}, "storage=bf16_sr", "live precision may take a layer out of BF16"),
        ({"mode": "fp32"}, "storage=bf16_sr", "no layer reads an FP32 weight in BF16"),
        ({"loss_fn": lambda o, t: o.square().mean()}, "fused_loss=auto", "fused_loss=True, but"),
    ],
)
def test_what_is_not_possible_says_why(options: dict[str, Any], name: str, why: str) -> None:
    names, refused = found(trainer(**options))
    assert name not in names
    assert why in refused[name]


def test_weights_of_products_alone_are_stored_in_bf16_and_all_can_be_taken_back() -> None:
    run = trainer(optimizer=torch.optim.AdamW)
    model: Any = run.model
    config, before = run.config, {name: p.detach().clone() for name, p in model.named_parameters()}
    undo = put_in_force(run, run.plan, settings_of(["states=8bit", "storage=bf16_sr", "fused_loss=auto"]))
    low = {name for name, p in model.named_parameters() if p.dtype is torch.bfloat16}
    assert low == {"first.weight", "head.weight"}
    assert type(run.optimizer) is AdamW
    assert run.config.fused_loss == "auto"
    x = torch.randint(0, 128, (6,))
    assert run.step((x, x)).status == "applied"
    undo()
    assert run.config is config
    assert type(run.optimizer) is torch.optim.AdamW
    assert not run.optimizer.state
    for name, parameter in model.named_parameters():
        assert parameter.dtype is torch.float32
        torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=5e-2)


def test_an_optimizer_of_ours_stays_and_gets_its_states_back() -> None:
    run = trainer(optimizer=AdamW)
    undo = put_in_force(run, run.plan, settings_of(["states=8bit"]))
    assert run.optimizer.param_groups[0]["states"] == "8bit"
    undo()
    assert (type(run.optimizer), run.optimizer.param_groups[0]["states"]) == (AdamW, "fp32")


def test_options_that_are_not_allowed_are_left_out() -> None:
    run = trainer(compile=True)
    config, lost = allowed_options(run, settings_of(["activations=True", LEVELS[1]]))
    assert config.activation_memory_budget == 0.5
    assert config.activations is False
    assert lost is not None
    assert lost[0] == "activations"
