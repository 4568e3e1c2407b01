"""Live precision in the trainer: what it changes, and what it leaves exactly alone."""

import json

import pytest
import torch
from torch import nn

from deepseek_mp import MixedPrecisionTrainer, PrecisionPlan
from deepseek_mp.controller.settings import AdaptiveSettings
from deepseek_mp.nn.call import parse_batch
from deepseek_mp.precision import Reason
from deepseek_mp.trainer.adaptive import AdaptivePrecision, part_of

SETTINGS = AdaptiveSettings(
    warm_up=4, probe_every=2, decide_every=4, recipes=("row",), loss_budget=1.0, noise_budget=9.0
)
NEVER = AdaptiveSettings(warm_up=10**6, probe_every=2, recipes=("row",))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(32, 32)
        self.up = nn.Linear(32, 64)
        self.norm = nn.BatchNorm1d(64)
        self.drop = nn.Dropout(0.1)
        self.down = nn.Linear(64, 32)
        self.head = nn.Linear(32, 32)

    def forward(self, tokens):
        hidden = self.up(self.embedding(tokens).mean(1))
        return self.head(self.down(self.drop(torch.relu_(self.norm(hidden)))))


def batches(count=24):
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randint(0, 32, (16, 4), generator=generator), torch.randint(0, 32, (16,), generator=generator))
        for _ in range(count)
    ]


def trainer(adaptive, precision="bf16", **values):
    torch.manual_seed(0)
    callbacks = [] if adaptive is None else [adaptive]
    return MixedPrecisionTrainer(
        Model(), precision, seed=1, emulate=True, callbacks=callbacks, progress=False, **values
    )


def recipes(trainer):
    return {
        name: module.unit_precision.recipe.name
        for name, module in trainer.model.named_modules()
        if hasattr(module, "unit_precision")
    }


def test_layers_are_lowered_while_training_and_every_decision_is_on_disk(tmp_path):
    adaptive = AdaptivePrecision(SETTINGS)
    made = trainer(adaptive, run_dir=tmp_path)
    made.fit(batches())
    assert {name for name, recipe in recipes(made).items() if recipe == "row"} == {"up", "down"}
    lines = [json.loads(line) for line in (tmp_path / "decisions.jsonl").read_text().splitlines()]
    taken = [line for line in lines if line["reason"] == Reason.ALLOCATED.value and line["new"] == "row"]
    assert {line["layer"] for line in taken} >= {"up", "down"}
    assert all(line["evidence"].get("loss") is not None for line in taken)
    assert {d.layer for d in adaptive.decisions} == {"up", "down"}


def test_probes_change_nothing_of_a_run_without_decisions():
    plain = trainer(None)
    loss = plain.fit(batches()).loss
    probed = trainer(AdaptivePrecision(NEVER))
    assert probed.fit(batches()).loss == loss
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, probed.model.state_dict()[name]), name
    assert probed.callbacks[0].controller.probes > 5


def test_a_resumed_run_goes_on_as_the_whole_one(tmp_path):
    data = batches()
    whole = trainer(AdaptivePrecision(SETTINGS), checkpoint_every=6, run_dir=tmp_path / "whole")
    whole.fit(data)
    half = trainer(AdaptivePrecision(SETTINGS), checkpoint_every=6, run_dir=tmp_path / "half")
    half.fit(data, max_steps=12)
    resumed = trainer(AdaptivePrecision(SETTINGS), run_dir=tmp_path / "half")
    resumed.fit(data, resume=tmp_path / "half")
    assert recipes(resumed) == recipes(whole)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_pinned_layers_and_rules_of_a_plan_are_left_alone():
    made = trainer(AdaptivePrecision(SETTINGS), PrecisionPlan.of("bf16", {"up": "fp32"}), pin={"down": "bf16"})
    made.fit(batches())
    assert made.callbacks[0].disabled == "no layer can be lowered"
    assert recipes(made)["up"] == "fp32"


def test_a_layer_that_makes_a_bad_number_is_raised():
    adaptive = AdaptivePrecision(SETTINGS)
    made = trainer(adaptive)
    with BadOutput(made, "down", at=18):
        made.fit(batches())
    guarded = [d for d in adaptive.decisions if d.reason is Reason.GUARDED]
    assert [(d.layer, d.new, d.evidence["guard"]) for d in guarded] == [("down", "bf16", "non_finite")]
    assert recipes(made)["down"] == "bf16"
    assert recipes(made)["up"] == "row"


class BadOutput:
    """The layer's output is NaN in the forward of one training step, also when that is replayed."""

    def __init__(self, trainer, name, at):
        self.trainer, self.at = trainer, at
        self.handle = trainer.model.get_submodule(name).register_forward_hook(self.hook)

    def hook(self, module, args, output):
        return output * float("nan") if self.trainer.steps_attempted == self.at and output.shape[0] == 16 else None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


@pytest.mark.parametrize(
    ("precision", "settings", "why"),
    [
        ("fp16", SETTINGS, "beside fp16"),
        ("bf16", AdaptiveSettings(recipes=("block",)), "no layer can be lowered"),
    ],
)
def test_where_nothing_can_be_decided_it_says_why(precision, settings, why):
    made = trainer(AdaptivePrecision(settings), precision)
    made.fit(batches(4))
    assert why in made.callbacks[0].disabled


def test_a_device_without_fp8_says_so():
    torch.manual_seed(0)
    adaptive = AdaptivePrecision()
    MixedPrecisionTrainer(Model(), "bf16", callbacks=[adaptive], progress=False).fit(batches(2))
    assert "multiplies in none of tensor, row, block" in adaptive.disabled


def test_a_part_of_a_batch_keeps_its_form():
    labels = torch.arange(40)
    call = part_of(parse_batch({"input_ids": torch.arange(80).view(40, 2), "labels": labels, "flag": 3}), 0.25)
    assert call.kwargs["input_ids"].shape == (10, 2)
    assert call.kwargs["labels"] is call.target
    assert call.target.tolist() == list(range(10))
    assert call.kwargs["flag"] == 3
    assert part_of(parse_batch(torch.zeros(40, 3)), 0.1).args[0].shape == (8, 3)
    few = parse_batch(torch.zeros(5, 3))
    assert part_of(few, 0.1) is few
