"""The profiler as a user calls it."""

import random

import pytest
import torch
from torch import nn

from deepseek_mp import PrecisionPlan, PrecisionProfiler, convert
from deepseek_mp.errors import BatchError, ConfigError, PlanError
from deepseek_mp.nn import current_plan
from deepseek_mp.precision import RECIPES
from deepseek_mp.sensitivity.truth import outputs_in


def state_of(model):
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return tensors, gradients, [m.training for m in model.modules()], torch.get_rng_state(), random.getstate()


def assert_same(model, before):
    tensors, gradients, training, generator, python = before
    assert all(torch.equal(t, tensors[name]) for name, t in model.state_dict().items())
    assert all(p.grad is gradients[name] for name, p in model.named_parameters())
    assert [m.training for m in model.modules()] == training
    assert torch.equal(torch.get_rng_state(), generator)
    assert random.getstate() == python
    assert not any(m._forward_hooks for m in model.modules())


def test_every_unit_is_reported_with_its_losses(report):
    assert list(report) == ["embedding", "up", "norm", "down", "head", "unused"]
    for name in ("up", "down", "head"):
        unit = report[name]
        assert 0 < unit["bf16_loss"] < unit["fp8_loss"] < 0.1
        assert unit["fp16_loss"] < unit["fp8_loss"]
        assert unit["recommended"] in ("fp32", "bf16")
        assert unit["reason"]
    assert report["norm"]["bf16_loss"] >= 0
    assert "fp8_loss" not in report["norm"]
    assert "never called" in report["unused"]["not_analysed"]
    assert report.batches == 4
    assert "overflow" not in str(report)


def test_the_loss_of_fp8_is_that_of_the_worst_recipe_the_unit_takes(report):
    taken = {name: r["loss"] for name, r in report["up"]["recipes"].items() if r["taken"]}
    assert set(taken) == {"bf16", "fp16", "tensor", "row"}  # 64 inputs are no multiple of 128, which block needs
    assert report["up"]["fp8_loss"] == max(taken["tensor"], taken["row"])


def test_the_model_is_as_before(model, batches):
    model.up.weight.grad = torch.ones_like(model.up.weight)
    model.norm.eval()
    before = state_of(model)
    PrecisionProfiler(model).analyze(batches, max_batches=2, verify=2, time_layers=True)
    assert_same(model, before)


def test_the_model_is_as_before_after_an_exception(model, batches):
    model.up.weight.grad = torch.ones_like(model.up.weight)
    before = state_of(model)

    def failing(output, target):
        torch.rand(1)
        random.random()
        raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        PrecisionProfiler(model, loss_fn=failing).analyze(batches)
    assert_same(model, before)


def test_a_loss_that_is_a_module_is_as_before(model, batches):
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.heat, self.calls = nn.Parameter(torch.ones(())), 0

        def forward(self, output, target):
            self.calls += 1
            return nn.functional.cross_entropy((output * self.heat).flatten(0, -2), target.flatten())

    loss_fn = Loss()
    loss_fn.heat.grad = torch.ones(())
    before = state_of(loss_fn)
    PrecisionProfiler(model, loss_fn=loss_fn).analyze(batches, max_batches=2, verify=1, time_layers=False)
    assert_same(loss_fn, before)
    assert loss_fn.calls == 0
    assert loss_fn.heat.grad == 1


def test_running_statistics_are_as_before():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))
    batch = torch.randn(8, 1, 6, 6), torch.randint(0, 3, (8,))
    before = state_of(model)
    report = PrecisionProfiler(model).analyze([batch], time_layers=False)
    assert_same(model, before)
    assert report["0"]["fp8_loss"] > report["0"]["bf16_loss"]
    assert report["1"]["bf16_loss"] > 0


def test_a_converted_model_is_profiled_in_fp32_and_stays_converted(model, batches):
    plain = PrecisionProfiler(model).analyze(batches, max_batches=2, time_layers=False)
    plan = convert(model, PrecisionPlan.of("bf16"))
    converted = PrecisionProfiler(model).analyze(batches, max_batches=2, time_layers=False)
    assert current_plan(model) == plan
    assert converted["down"]["fp8_loss"] == plain["down"]["fp8_loss"]


def test_a_batch_without_a_finite_loss_is_left_out_and_named(batches):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x)

    torch.manual_seed(0)
    good = [(torch.randn(8, 4), torch.randint(0, 3, (8,))) for _ in range(2)]
    bad = (torch.full((8, 4), float("nan")), torch.zeros(8, dtype=torch.long))
    model = Model()
    with_bad = PrecisionProfiler(model).analyze([good[0], bad, good[1]], time_layers=False)
    assert with_bad.skipped == ("batch 1: its loss is nan",)
    assert with_bad.batches == 2
    assert with_bad["layer"]["bf16_loss"] > 0
    with pytest.raises(ConfigError, match="no batch to profile: batch 0: its loss is nan"):
        PrecisionProfiler(model).analyze([bad])


@pytest.mark.parametrize("loss_fn", [None, nn.CrossEntropyLoss(), nn.CrossEntropyLoss(torch.ones(3))])
def test_batches_with_nothing_in_them_do_not_lower_the_means_and_are_named(loss_fn):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    good = torch.randn(8, 4), torch.randint(0, 3, (8,))
    empty, masked = (good[0][:0], good[1][:0]), (good[0], torch.full_like(good[1], -100))
    profiler = PrecisionProfiler(model, loss_fn=loss_fn, recipes=["bf16"])
    alone = profiler.analyze([good], time_layers=False)
    among = profiler.analyze([empty, good, masked], time_layers=False)
    assert among.skipped == ("batch 0: it has no samples", "batch 2: none of its items counts")
    assert (among.batches, among.loss) == (1, alone.loss)
    assert among["0"]["bf16_loss"] == alone["0"]["bf16_loss"]
    with pytest.raises(ConfigError, match="no batch to profile: batch 0: it has no samples"):
        profiler.analyze([empty], time_layers=False)


def test_a_model_with_sparse_gradients_is_profiled_as_the_same_with_dense_ones(batches):
    def profiled(sparse):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(32, 16, sparse=sparse), nn.Linear(16, 32))
        return PrecisionProfiler(model, recipes=["bf16"]).analyze(batches[:2], time_layers=False)

    sparse, dense = profiled(True), profiled(False)
    assert sparse["1"]["bf16_loss"] == dense["1"]["bf16_loss"] > 0
    assert sparse.skipped == ()


def test_a_layer_the_loss_does_not_depend_on_is_named(batches):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.side = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            self.side(x)
            return self.layer(x)

    report = PrecisionProfiler(Model()).analyze([(torch.randn(8, 4), torch.randint(0, 3, (8,)))], time_layers=False)
    assert "does not depend" in report["side"]["not_analysed"]
    assert report["side"]["recommended"] == report.base


def test_frozen_layers_are_measured_and_not_trained(model, batches):
    model.requires_grad_(False)
    model.down.requires_grad_(True)
    before = state_of(model)
    report = PrecisionProfiler(model).analyze(batches, max_batches=2, verify=1, time_layers=False)
    assert_same(model, before)
    assert report["up"]["not_analysed"] is None
    assert 0 < report["up"]["bf16_loss"] < report["up"]["fp8_loss"]
    noise = {name: report[name]["recipes"]["tensor"]["noise"] for name in ("up", "down", "head")}
    assert noise["up"]["wgrad"] == noise["up"]["dgrad"] == noise["head"]["wgrad"] == 0
    assert noise["down"]["wgrad"] > 0
    assert noise["head"]["dgrad"] > 0


def test_a_model_without_units_is_refused():
    with pytest.raises(ConfigError, match="a model without units"):
        PrecisionProfiler(nn.Sequential(nn.ReLU())).analyze()


def test_no_batches_are_refused(model):
    with pytest.raises(ConfigError, match="no batch to profile"):
        PrecisionProfiler(model).analyze([])


def test_fp16_that_overflows_is_infinite(batches):
    model = nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 32))
    nn.init.constant_(model[0].weight, 300.0)
    nn.init.constant_(model[1].weight, 300.0)
    report = PrecisionProfiler(model).analyze(batches[:1], time_layers=False)
    assert report["1"]["fp16_loss"] == float("inf")
    assert report["1"]["bf16_loss"] < float("inf")
    assert "overflow" in str(report)


def test_a_profile_is_resumed_where_it_stood(model, batches, tmp_path):
    file = tmp_path / "profile.json"
    whole = PrecisionProfiler(model).analyze(batches, max_batches=6, time_layers=False)
    seen = []

    def counted():
        for batch in batches:
            seen.append(1)
            yield batch

    PrecisionProfiler(model).analyze(batches, max_batches=2, time_layers=False, resume=file)
    resumed = PrecisionProfiler(model).analyze(counted(), max_batches=6, time_layers=False, resume=file)
    assert resumed.batches == 6
    # Rows are all looked at here, so that draws play no part.
    assert resumed["up"]["fp8_loss"] == pytest.approx(whole["up"]["fp8_loss"], rel=1e-3)
    assert resumed.loss == pytest.approx(whole.loss)
    with pytest.raises(ConfigError, match="of another profile"):
        PrecisionProfiler(model, seed=5).analyze(batches, resume=file)


@pytest.mark.parametrize("max_batches", [6, 2])
def test_a_profile_that_was_complete_is_verified_from_its_file(model, batches, tmp_path, max_batches):
    file = tmp_path / "profile.json"
    whole = PrecisionProfiler(model, recipes=["bf16"]).analyze(batches, max_batches=6, verify=1, resume=file)
    again = PrecisionProfiler(model, recipes=["bf16"]).analyze(batches, max_batches=max_batches, verify=1, resume=file)
    assert again.batches == 6
    assert again.verification.pairs == whole.verification.pairs
    assert again["down"]["milliseconds"].keys() == whole["down"]["milliseconds"].keys()


@pytest.mark.parametrize("base", ["bf16", "tf32"])
def test_the_base_is_measured_and_counted_although_it_was_not_named(model, batches, base):
    report = PrecisionProfiler(model, recipes=["row"], base=base).analyze(batches, max_batches=2, time_layers=False)
    assert report.recipes == (base, "row")
    assert report["down"][f"{base}_loss"] > 0
    tight = report.plan(budget=report["down"][f"{base}_loss"] / 100, recipes=["row"])
    assert "fp32" in {decision.new for decision in tight.decisions}


def test_a_file_of_other_data_weights_or_another_loss_is_not_joined(model, batches, tmp_path):
    def cross_entropy(output, target):
        return nn.functional.cross_entropy(output.flatten(0, -2), target.flatten())

    def resumed(batches, loss_fn=cross_entropy):
        profiler = PrecisionProfiler(model, loss_fn=loss_fn, recipes=["bf16"])
        return profiler.analyze(batches, max_batches=2, time_layers=False, resume=tmp_path / "profile.json")

    before = state_of(model)
    assert resumed(batches).batches == resumed(batches).batches == 2
    assert_same(model, before)
    with pytest.raises(ConfigError, match="of another profile"):
        resumed(batches[1:])
    with pytest.raises(ConfigError, match="of another profile"):
        resumed(batches, lambda output, target: 2 * cross_entropy(output, target))
    with torch.no_grad():
        model.down.weight *= 2
    with pytest.raises(ConfigError, match="of another profile"):
        resumed(batches)
    with pytest.raises(ConfigError, match="no batch to profile"):
        resumed([])


def test_a_file_of_a_model_with_dropout_is_joined_whatever_was_drawn_before(batches, tmp_path):
    model = nn.Sequential(nn.Embedding(32, 16), nn.Dropout(0.5), nn.Linear(16, 32))
    for seen in (1, 2):
        torch.rand(5)
        profiler = PrecisionProfiler(model, recipes=["bf16"])
        report = profiler.analyze(batches, max_batches=seen, time_layers=False, resume=tmp_path / "profile.json")
        assert report.batches == seen


def test_verification_stands_beside_the_predictions(model, batches):
    report = PrecisionProfiler(model).analyze(batches, max_batches=3, verify=2, time_layers=False)
    assert report.verification.pairs == 10
    assert report.verification.held_out
    assert sum("true_change" in unit for unit in report.values()) == 2
    last = PrecisionProfiler(model).analyze(batches, max_batches=6, verify=1, time_layers=False)
    assert not last.verification.held_out


def test_true_changes_are_not_those_of_other_dropout_draws(batches):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(32, 64), nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 32))
    report = PrecisionProfiler(model, recipes=["bf16"]).analyze(batches, max_batches=2, verify=3, time_layers=False)
    changes = [unit["true_change"]["bf16"] for unit in report.values()]
    assert all(0 < abs(change) < 1e-3 for change in changes)  # other draws: 1e-2


def test_weights_alone_say_how_far_outputs_would_be(model):
    report = PrecisionProfiler(model).analyze()
    assert report.basis == "weights"
    assert "no data" in str(report)
    assert report["up"]["bf16_loss"] == pytest.approx(5.6e-6, rel=0.15)
    assert report["up"]["fp8_loss"] == pytest.approx(1.4e-3, rel=0.15)
    assert "bf16_loss" not in report["norm"]


def test_parts_hold_a_metric_together(model, batches):
    tokens = batches[0][0]
    report = PrecisionProfiler(model).analyze(
        metric=lambda m: float(m(tokens).square().mean()), tolerance=1e-5, parts=["up", "down", "head"]
    )
    assert report.error <= 1e-5
    assert set(report.formats) == {"up", "down", "head"}
    assert "fp32" in report.formats.values() or "fp16" in report.formats.values()


def test_the_metric_is_compared_with_all_parts_in_the_highest_format(model, batches):
    def metric(m):
        return float(m(batches[0][0]).detach().square().mean())

    report = PrecisionProfiler(model).analyze(metric=metric, tolerance=1e-9, formats=("bf16", "nvfp4"))
    parts = dict.fromkeys((model.up, model.down, model.head, model.unused), RECIPES["bf16"])
    with outputs_in(parts), torch.no_grad():
        assert report.reference == metric(model)
    assert report.reference != metric(model)
    used = ("up", "down", "head")
    assert {report.formats[part] for part in used} == {"bf16"}
    assert all(report.alone[part]["nvfp4"] > 1e-9 for part in used)


def test_a_metric_asks_for_a_tolerance_and_parts_that_exist(model):
    profiler = PrecisionProfiler(model)
    with pytest.raises(ConfigError, match="a metric without tolerance"):
        profiler.analyze(metric=lambda m: 1.0)
    with pytest.raises(ConfigError, match=r"parts \['nothing'\] without units"):
        profiler.analyze(metric=lambda m: 1.0, tolerance=1e-3, parts=["nothing"])
    with pytest.raises(ConfigError, match="a metric of nan"):
        profiler.analyze(metric=lambda m: float("nan"), tolerance=1e-3)
    with pytest.raises(ConfigError, match=r"parts='down'.*Pass \['down'\]"):
        profiler.analyze(metric=lambda m: 1.0, tolerance=1e-3, parts="down")
    with pytest.raises(ConfigError, match=r"formats \['bf16', 'fp32'\].*from the highest to the lowest"):
        profiler.analyze(metric=lambda m: 1.0, tolerance=1e-3, formats=("bf16", "fp32"))
    for norm, message in ((nn.LayerNorm(4), "without units that multiply"), (nn.ReLU(), "a model without units")):
        with pytest.raises(ConfigError, match=message):
            PrecisionProfiler(norm).analyze(metric=lambda m: 1.0, tolerance=1e-3)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"tolerance": 1e-3}, "tolerance without a metric"),
        ({"parts": ["up"], "formats": ("fp32", "bf16")}, "parts, formats without a metric"),
        ({"metric": float, "tolerance": 1.0, "batches": []}, "batches beside a metric"),
        ({"metric": float, "tolerance": 1.0, "verify": 1, "resume": "file"}, "verify, resume beside a metric"),
        ({"verify": -1}, "verify=-1"),
        ({"max_batches": 2.5}, r"max_batches=2\.5"),
    ],
)
def test_arguments_that_would_be_ignored_are_refused(model, asked, message):
    with pytest.raises(ConfigError, match=message):
        PrecisionProfiler(model).analyze(**asked)


def test_a_model_that_no_plan_could_train_is_refused(model, batches):
    with pytest.raises(PlanError, match=r"'embedding\.weight', which is trained and stored in"):
        PrecisionProfiler(model.bfloat16()).analyze(batches)
    with pytest.raises(ConfigError, match="the class LayerNorm as model"):
        PrecisionProfiler(nn.LayerNorm)


def test_one_batch_is_no_loader(model, batches):
    with pytest.raises(BatchError, match="batches that are one batch, a tuple"):
        PrecisionProfiler(model).analyze(batches[0])
