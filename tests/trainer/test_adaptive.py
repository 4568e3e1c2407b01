"""Live precision in the trainer: what it changes, and what it leaves exactly alone."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from deepseek_mp import MixedPrecisionTrainer, PrecisionPlan
from deepseek_mp.controller.settings import AdaptiveSettings
from deepseek_mp.controller.speed import SETTLING, WINDOW
from deepseek_mp.errors import ConfigError
from deepseek_mp.monitor.alarms import Alarm
from deepseek_mp.precision import Reason
from deepseek_mp.profiler.layer_times import LayerCosts
from deepseek_mp.records import read_run
from deepseek_mp.records.lines import to_plain
from deepseek_mp.trainer.adaptive import AdaptivePrecision
from deepseek_mp.trainer.recording import describe

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


def test_its_settings_are_in_the_record_once_however_it_came_about(tmp_path):
    trainer(AdaptivePrecision(SETTINGS), run_dir=tmp_path / "given").fit(batches(2))
    assert read_run(tmp_path / "given").info["callbacks"] == {"AdaptivePrecision": to_plain(SETTINGS, "settings")}
    asked = describe(MixedPrecisionTrainer(Plain(), "auto", adapt=SETTINGS, device="cpu"))
    assert asked["callbacks"] == {"AdaptivePrecision": SETTINGS.to_json()}
    assert asked["config"]["adapt"] is True


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


def spiking(at, **values):
    """A trainer whose `up` gets a hundred times its gradient in one step."""
    made = trainer(AdaptivePrecision(SETTINGS), **values)
    weight = made.model.up.weight
    weight.register_hook(lambda g: g * 100 if made.steps_attempted == at and g.shape == weight.shape else g)
    return made


def test_a_spike_of_one_layers_gradient_raises_it_before_the_next_step(tmp_path):
    made = spiking(40, run_dir=tmp_path)
    made.fit(batches(48))
    lines = [json.loads(line) for line in (tmp_path / "decisions.jsonl").read_text().splitlines()]
    (line,) = {line["detail"]: line for line in lines if line["reason"] == Reason.GUARDED.value}.values()
    assert (line["layer"], line["new"], line["evidence"]["guard"]) == ("up", "bf16", "gradient_spike")
    assert line["evidence"]["step"] == 41  # counted from 1
    assert line["evidence"]["value"] > 50 * line["evidence"]["usual"]
    assert (recipes(made)["up"], recipes(made)["down"]) == ("bf16", "row")
    assert not made.optimizer._optimizer_step_pre_hooks


def test_a_resumed_run_knows_what_gradients_were_usual(tmp_path):
    data = batches(48)
    whole = spiking(40)
    whole.fit(data)
    spiking(40, run_dir=tmp_path).fit(data, max_steps=30)
    resumed = spiking(40)
    resumed.fit(data, resume=tmp_path)
    assert resumed.callbacks[0].decisions == whole.callbacks[0].decisions
    assert any(decision.evidence.get("guard") == "gradient_spike" for decision in whole.callbacks[0].decisions)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


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


def test_a_guard_that_fires_while_the_last_step_settles_is_not_lost():
    adaptive = AdaptivePrecision(SETTINGS)
    made = trainer(adaptive)
    settle, late = made.settle, []

    def settles_late():
        settle()
        states = adaptive.controller.states if adaptive.controller else {}
        if not late and states.get("up") and states["up"].recipe == "row":
            late.append(1)
            adaptive._pending += adaptive.controller.see(7, 0.0, applied=False, first_bad_module="up")

    made.settle = settles_late
    made.fit(batches())
    assert late
    assert any(d.layer == "up" and d.reason is Reason.GUARDED for d in adaptive.decisions)
    assert recipes(made)["up"] == adaptive.controller.states["up"].recipe == "bf16"


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 8)

    def forward(self, x):
        return self.head(torch.relu(self.down(torch.relu(self.up(x)))))


def fitted(model, data, adaptive, precision="bf16"):
    torch.manual_seed(0)
    made = MixedPrecisionTrainer(
        model, precision, seed=1, emulate=True, callbacks=[] if adaptive is None else [adaptive], progress=False
    )
    made.fit(data)
    return made


def vectors(count=24):
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(16, 32, generator=generator), torch.randint(0, 8, (16,), generator=generator))
        for _ in range(count)
    ]


def test_a_batch_that_is_not_finite_says_nothing():
    data = vectors()
    data[4][0][:] = float("nan")
    adaptive = AdaptivePrecision(SETTINGS)
    made = fitted(Plain(), data, adaptive)
    assert {recipes(made)[name] for name in ("up", "down")} == {"row"}
    assert all(effect.second < 1 for r in adaptive.controller.readings.values() for effect in r.effects.values())


def test_a_model_that_bears_no_probe_goes_on_without():
    class Checkpointed(Plain):
        def forward(self, x):
            hidden = torch.relu(self.up(x))
            return self.head(checkpoint(lambda h: torch.relu(self.down(h)), hidden, use_reentrant=True))

    adaptive = AdaptivePrecision(SETTINGS)
    made = fitted(Checkpointed(), vectors(), adaptive)
    assert made.steps_applied == 24
    assert "probes failed: RuntimeError" in adaptive.disabled


def test_delayed_scales_have_not_seen_what_a_probe_ran():
    plan = PrecisionPlan.of("bf16", {"up": "delayed"})
    torch.manual_seed(5)
    first = fitted(Plain(), vectors(), None, plan)
    torch.manual_seed(5)
    second = fitted(Plain(), vectors(), AdaptivePrecision(NEVER), plan)
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


@pytest.mark.parametrize("stop", [3, 4, 7])
def test_what_a_probe_measured_before_a_checkpoint_counts_after_it(tmp_path, stop):
    data = batches()
    whole = trainer(AdaptivePrecision(SETTINGS))
    whole.fit(data)
    trainer(AdaptivePrecision(SETTINGS), run_dir=tmp_path).fit(data, max_steps=stop)
    resumed = trainer(AdaptivePrecision(SETTINGS))
    resumed.fit(data, resume=tmp_path)
    steps = [[d.evidence["step"] for d in made.callbacks[0].decisions] for made in (whole, resumed)]
    assert steps[0] == steps[1]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_further_fit_makes_the_run_longer():
    adaptive = AdaptivePrecision(NEVER)
    made = trainer(adaptive)
    made.fit(batches(), epochs=1)
    made.fit(batches(), epochs=3)
    assert adaptive.controller.total_steps == 72


@pytest.fixture
def timed(monkeypatch):
    """Timings of two of the layers, the same for all that asks for them."""
    times = {"up": {"fp32": 4.0, "bf16": 2.0, "row": 1.0}, "down": {"fp32": 4.0, "bf16": 1.0, "row": 0.99}}
    choices = "deepseek_mp.trainer.adaptive_choices"
    monkeypatch.setattr(f"{choices}.layer_costs", lambda *_, **__: LayerCosts(macs={}, milliseconds=times))
    monkeypatch.setattr(f"{choices}._is_timed", lambda *_: True)


def test_layers_that_do_not_pay_or_could_not_be_timed_beside_others_are_left_alone(timed):
    adaptive = AdaptivePrecision(SETTINGS)
    trainer(adaptive).step(batches(1)[0])
    assert set(adaptive.controller.units) == {"up"}


def test_steps_that_became_no_faster_raise_what_was_lowered_and_the_record_says_so(timed, tmp_path):
    adaptive = AdaptivePrecision(replace(SETTINGS, pays=1e-9))
    made = trainer(adaptive, run_dir=tmp_path, gradient_accumulation_steps=2)
    for batch in batches(24):
        made.step(batch)
    made.settle()
    assert adaptive.controller.states["up"].recipe == "row"
    promised = []
    for seconds, lowered in ((0.010, False), (0.011, True)):
        adaptive.controller.states["up"].recipe = "row" if lowered else "bf16"
        for _ in range(WINDOW + SETTLING):
            adaptive._time(made, adaptive.controller, seconds)
        promised.append(adaptive.controller.pass_seconds)
    assert promised == [0.005, 0.0055], "of one micro-batch"
    for batch in batches(4):
        made.step(batch)
    made.close()
    assert adaptive.controller.states["up"].recipe == "bf16"
    (path,) = tmp_path.rglob("decisions.jsonl")
    written = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    (timing,) = [line for line in written if line["reason"] == "measured_slower"]
    assert timing["evidence"]["promised_ms"] == pytest.approx(2.0)
    assert timing["evidence"]["saved_ms"] == pytest.approx(-1.0)


OWN = AdaptivePrecision(SETTINGS)


@pytest.mark.parametrize(
    ("mode", "adapt", "callbacks", "expected"),
    [
        ("auto", None, [], AdaptiveSettings()),
        ("auto", True, [], AdaptiveSettings()),
        ("auto", SETTINGS, [], SETTINGS),
        ("auto", False, [], None),
        ("bf16", None, [], None),
        ("bf16", False, [], None),
        ("bf16", None, [OWN], SETTINGS),
        ("auto", True, [OWN], SETTINGS),
    ],
)
def test_adapt_goes_with_auto_unless_refused(mode, adapt, callbacks, expected):
    made = MixedPrecisionTrainer(Plain(), mode, adapt=adapt, callbacks=callbacks, device="cpu")
    assert (made.adaptive.settings if made.adaptive else None) == expected
    assert len(made.callbacks) == (expected is not None)


@pytest.mark.parametrize(
    ("mode", "adapt", "count", "message"),
    [
        ("bf16", SETTINGS, 0, r"adapt=AdaptiveSettings\(.*Allowed: adapt with precision_mode='auto'"),
        ("bf16", True, 0, "adapt=True.*Allowed: adapt with precision_mode='auto'.*AdaptivePrecision"),
        (PrecisionPlan.of("bf16"), True, 0, "adapt=True.*precision_mode='auto'"),
        ("auto", "on", 0, "adapt='on'.*Allowed: None, True, False or AdaptiveSettings"),
        ("auto", 1, 0, "adapt=1.*Allowed: None"),
        ("auto", SETTINGS, 1, "1 AdaptivePrecision among the callbacks.*Leave one out"),
        ("auto", False, 1, "adapt=False and 1 AdaptivePrecision"),
        ("bf16", None, 2, "2 AdaptivePrecision among"),
    ],
)
def test_what_adapt_cannot_mean_is_refused(mode, adapt, count, message):
    live = [AdaptivePrecision() for _ in range(count)]
    with pytest.raises(ConfigError, match=message):
        MixedPrecisionTrainer(Plain(), mode, adapt=adapt, callbacks=live, device="cpu")


class Outliers:
    """From a step on, one channel of a layer's input is ten thousand times as large."""

    def __init__(self, trainer, name, start):
        self.trainer, self.start, self.steps = trainer, start, []
        self.handle = trainer.model.get_submodule(name).register_forward_pre_hook(self.hook, prepend=True)

    def hook(self, module, args):
        if self.trainer.steps_attempted < self.start:
            return None
        x = args[0].clone()
        x[:, 0] *= 1e4
        return (x,)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


RARE = AdaptiveSettings(
    warm_up=2, probe_every=8, decide_every=4, recipes=("fp32", "row"), loss_budget=1.0, noise_budget=9.0
)


@pytest.mark.parametrize("watch", [True, False])
def test_outliers_between_two_probes_take_their_step_back(watch):
    adaptive = AdaptivePrecision(replace(RARE, probe_every=2, watch_inputs=watch, decide_every=2))
    made = trainer(adaptive)
    statuses = []
    with Outliers(made, "down", start=13):
        for batch in batches():
            statuses.append(made.step(batch).status)
    made.settle()
    first = raised(adaptive, "down")[0]
    assert (statuses[13] == "skipped") is watch
    assert statuses.count("skipped") == int(watch)
    assert (first.new, first.evidence["guard"]) == (("bf16", "input") if watch else ("fp32", "region"))
    assert recipes(made)["down"] == "fp32"


def raised(adaptive, name):
    return [d for d in adaptive.decisions if d.layer == name and "guard" in d.evidence]


def test_a_layer_goes_to_fp32_where_the_region_harms_it_and_the_plan_says_why():
    adaptive = AdaptivePrecision(replace(RARE, probe_every=1, loss_budget=1e-7))
    made = trainer(adaptive)
    made.fit(batches(6))
    assert "fp32" in recipes(made).values()
    assert {d.reason for d in adaptive.decisions} == {Reason.REGION_HARMS}
    assert all(made.plan.recipe_for(d.layer).name == "fp32" for d in adaptive.decisions)


def test_on_a_cpu_what_a_probe_saw_counts_for_that_step():
    adaptive = AdaptivePrecision(replace(RARE, probe_every=1, decide_every=2, watch_inputs=False))
    made = trainer(adaptive)
    with Outliers(made, "down", start=13):
        made.fit(batches())
    assert raised(adaptive, "down")[0].evidence["step"] == 13


@pytest.mark.parametrize("stop", [13, 14, 15])
def test_a_run_that_is_resumed_after_a_step_was_taken_back_goes_on_as_the_whole_one(tmp_path, stop):
    data = batches()

    def train(made, first, last):
        with Outliers(made, "down", start=13):
            return [made.step(batch).status for batch in data[first:last]]

    settings = replace(RARE, probe_every=4)
    whole = trainer(AdaptivePrecision(settings))
    train(whole, 0, 20)
    half = trainer(AdaptivePrecision(settings))
    train(half, 0, stop)
    half.save(tmp_path)
    resumed = trainer(AdaptivePrecision(settings))
    resumed.load(tmp_path)
    assert "skipped" not in train(resumed, stop, 20)[1:]
    assert recipes(resumed) == recipes(whole)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize("layer", ["down", "embedding"])
def test_an_alarm_of_the_monitor_about_a_lowered_layer_brings_a_probe(layer, monkeypatch):
    adaptive = AdaptivePrecision(replace(SETTINGS, probe_every=100))
    made = trainer(adaptive)
    data = batches()
    made.step(data[0])
    adaptive.controller.states["down"].recipe = "row"
    alarm = Alarm(step=3, layer=layer, tensor="input", kind="mass", value=0.03, limit=0.005)
    monkeypatch.setattr(type(made.monitor), "alarms_raised", 1)
    monkeypatch.setattr(type(made.monitor), "alarms_since", lambda _, raised: (alarm,) if raised < 1 else ())
    for batch in data[1:4]:
        made.step(batch)
    assert adaptive.controller.probes == (2 if layer == "down" else 1)


def lowered_run(**values):
    adaptive = AdaptivePrecision(SETTINGS)
    made = trainer(adaptive, **values)
    for batch in batches(12):
        made.step(batch)
    made.settle()
    assert adaptive.controller.lowered
    return adaptive, made


def test_a_plan_that_the_user_changes_is_left_alone():
    adaptive, made = lowered_run()
    made.change_plan("fp32")
    for batch in batches(12):
        made.step(batch)
    assert adaptive.disabled == "the plan was changed from outside, and is left as it is"
    assert set(recipes(made).values()) == {"fp32"}


@pytest.mark.parametrize("count", [1, 2])
def test_a_probe_that_fails_is_tried_again_and_two_raise_what_nobody_watches_any_more(count, monkeypatch, tmp_path):
    adaptive, made = lowered_run(run_dir=tmp_path)
    left, original = [count], AdaptivePrecision._probe

    def failing(self, *args, **values):
        left[0] -= 1
        if left[0] >= 0:
            raise torch.OutOfMemoryError("none left")
        original(self, *args, **values)

    monkeypatch.setattr(AdaptivePrecision, "_probe", failing)
    for batch in batches(12):
        made.step(batch)
    made.close()
    lowered = {name for name, recipe in recipes(made).items() if recipe == "row"}
    assert bool(adaptive.disabled) is (count == 2) is not bool(lowered)
    (path,) = tmp_path.rglob("decisions.jsonl")
    reasons = [json.loads(line)["reason"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert ("adapt_off" in reasons) is (count == 2)


def hooks(made):
    on_modules = [m for m in made.model.modules() if m._forward_pre_hooks or m._forward_hooks]
    return len(made.optimizer._optimizer_step_pre_hooks), len(on_modules)


def test_nothing_is_left_on_the_model_and_the_optimizer_however_training_ends():
    plain = trainer(None)
    plain.fit(batches(2))
    before = hooks(plain)
    _, made = lowered_run()
    assert hooks(made) > before
    made.close()
    assert hooks(made) == before
    assert made.stepper.veto is None
    made.step(batches(1)[0])
    assert hooks(made) > before

    def broken():
        yield from batches(12)
        raise OSError("the disk is gone")

    for data in (batches(12), broken()):
        other = trainer(AdaptivePrecision(SETTINGS))
        with pytest.raises(OSError, match="gone") if not isinstance(data, list) else nullcontext():
            other.fit(data)
        assert hooks(other) == before


def test_a_run_resumed_with_other_recipes_leaves_those_that_are_not_among_them(tmp_path):
    _, made = lowered_run()
    made.save(tmp_path)
    other = AdaptivePrecision(replace(SETTINGS, recipes=("fp32", "tensor")))
    resumed = trainer(other)
    resumed.load(tmp_path)
    resumed.step(batches(1)[0])
    assert set(recipes(resumed).values()) == {"bf16"}
    assert {name for name, unit in other.controller.units.items() if "tensor" in unit.recipes} == {"up", "down"}
    measured = other.controller.readings
    assert all("tensor" in measured[name].effects for name in ("up", "down") if name in measured)


def test_a_run_that_had_ended_live_precision_does_not_begin_it_again_when_resumed(tmp_path, monkeypatch):
    adaptive, made = lowered_run()
    adaptive._failed(made, "probes failed", ValueError("odd"))
    made.step(batches(1)[0])
    made.save(tmp_path)
    again = AdaptivePrecision(SETTINGS)
    resumed = trainer(again)
    resumed.load(tmp_path)
    for batch in batches(8):
        resumed.step(batch)
    assert again.disabled == adaptive.disabled == "probes failed: ValueError: odd"
    assert again.controller is None
    assert again.decisions == adaptive.decisions
    assert again.state_dict()["disabled"] == again.disabled


def test_a_checkpoint_without_live_precision_begins_it_anew(tmp_path):
    plain = trainer(None)
    for batch in batches(3):
        plain.step(batch)
    plain.save(tmp_path)
    adaptive, made = lowered_run()
    made.load(tmp_path)
    assert (adaptive.controller, adaptive.decisions, adaptive._next_probe) == (None, [], 0)
    made.step(batches(1)[0])
    assert adaptive.controller.probes <= 1
