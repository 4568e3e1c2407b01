"""`optimize_for_inference` end to end on a CPU, with latencies of the test's own."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from deepseek_mp.errors import ConfigError
from deepseek_mp.inference import Form, Latency, Served, layer_savings, optimize, optimize_for_inference
from deepseek_mp.inference.layer_times import LayerTime


@pytest.fixture
def times(monkeypatch):
    """Milliseconds by the name of a form, 10 for others; what is in force when they are asked for."""
    given = {}

    def latencies(calls, device, *, seconds):
        for call in calls.values():
            call()
        found = {name: given.get(name, 10.0) for name in calls}
        return {name: Latency(median_ms=ms, p95_ms=ms, runs=3) for name, ms in found.items()}

    monkeypatch.setattr(optimize, "latencies", latencies)
    return given


def run(model, inputs, **options):
    return optimize_for_inference(model, inputs, compile=False, **options)


def test_the_fastest_form_within_the_budget_is_served(classifier, times):
    times["bf16+channels_last+folded"] = 2.0
    x = torch.randn(4, 3, 8, 8)
    served, plan, card = run(classifier, x)
    assert plan.form == Form(format="bf16", channels_last=True, folded=True)
    assert served.form == plan.form
    torch.testing.assert_close(served(x), classifier.eval()(x), rtol=5e-2, atol=5e-2)
    assert card.batch_size == 4
    assert card.chosen.weight_bytes < plan.trials[0].weight_bytes
    assert plan.trials[0].form == Form()
    assert plan.trials[0].error == 0


def test_a_budget_of_nothing_leaves_fp32(classifier, times):
    times["bf16"] = 1.0
    _, plan, _ = run(classifier, torch.randn(4, 3, 8, 8), budget=0.0)
    assert plan.form.format == "fp32"
    assert "beyond the budget of 0" in next(t.why for t in plan.trials if t.form.name == "bf16")


def test_a_metric_of_ones_own_decides(times):
    times["bf16"] = 1.0
    model, seen = nn.Linear(4, 2), []

    def metric(outputs, reference):
        seen.append((outputs.dtype, reference.dtype))
        return 0.0 if outputs is reference else 0.5

    _, plan, _ = run(model, torch.randn(3, 4), metric=metric, budget=0.6)
    assert plan.form.name == "bf16"
    assert plan.metric == "metric"
    assert set(seen) == {(torch.float32, torch.float32)}


def test_the_model_and_the_generators_stay_as_they_were(classifier, times):
    before, mode = copy.deepcopy(classifier.state_dict()), classifier.training
    state = torch.get_rng_state()
    run(classifier, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)
    assert classifier.training is mode
    for key, value in classifier.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def test_a_form_that_the_model_does_not_bear_is_left_out_with_the_reason(times):
    class OnlyWide(nn.Linear):
        def forward(self, x):
            if x.dtype is not torch.float32:
                raise RuntimeError("only in FP32")
            return super().forward(x)

    _, plan, _ = run(OnlyWide(4, 2), torch.randn(3, 4))
    assert plan.form.name == "fp32"
    assert next(t.why for t in plan.trials if t.form.name == "bf16") == "RuntimeError: only in FP32"


def test_outputs_that_overflow_are_no_choice(times, monkeypatch):
    times["bf16"] = 1.0

    class Overflows(nn.Linear):
        def forward(self, x):
            return super().forward(x) + (torch.inf if x.dtype is torch.bfloat16 else 0)

    _, plan, _ = run(Overflows(4, 2), torch.randn(3, 4), budget=1e9)
    assert plan.form.name == "fp32"
    assert next(t.why for t in plan.trials if t.form.name == "bf16") == "its outputs are not finite"


class Unseen(nn.Linear):
    """What a metric does not look at overflows in BF16."""

    def forward(self, x):
        scores = super().forward(x)
        return {"logits": scores, "hidden": scores + (torch.inf if x.dtype is torch.bfloat16 else 0)}


@pytest.mark.parametrize("metric", ["kl", lambda outputs, reference: 0.0], ids=["kl", "own"])
def test_outputs_that_overflow_where_the_metric_does_not_look_are_no_choice(times, metric):
    times["bf16"] = 1.0
    torch.manual_seed(0)
    _, plan, _ = run(Unseen(4, 2), torch.randn(3, 4), metric=metric, budget=1e9)
    assert plan.form.name == "fp32"
    assert next(t.why for t in plan.trials if t.form.name == "bf16") == "its outputs are not finite"


def test_the_peak_of_a_form_is_its_weights_and_what_a_call_adds(monkeypatch):
    """On an accelerator all forms are in one memory, and some share their weights."""
    device = torch.device("meta")  # any that is no CPU
    monkeypatch.setattr(optimize, "reset_peak_memory", lambda where: None)
    monkeypatch.setattr(optimize, "peak_memory_bytes", lambda where: 700)
    monkeypatch.setattr(optimize, "peak_during", lambda call, where, resident: 1000)
    monkeypatch.setattr(optimize, "synchronize", lambda where: None)
    monkeypatch.setattr(optimize, "distinct_bytes", lambda tensors: 4 * sum(tensor.numel() for tensor in tensors))
    monkeypatch.setattr(Served, "graph_bytes", 50)
    trial, _, _ = optimize._built(nn.Linear(4, 2, device=device), Form(), torch.randn(3, 4, device=device), device)
    assert trial.problem == ""
    assert trial.peak_bytes == 300 + 40 + 50


def test_forms_that_keep_weights_alike_share_a_copy(times, monkeypatch):
    built = []
    whole = optimize.Served

    def serve(*args):
        built.append(whole(*args))
        return built[-1]

    monkeypatch.setattr(optimize, "Served", serve)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    optimize_for_inference(nn.Linear(4, 2), torch.randn(3, 4), formats=("bf16",))
    copies = {one.form.name: one.model for one in built}
    assert copies["fp32"] is copies["fp32+compiled"]
    assert copies["bf16"] is copies["bf16+compiled"]
    assert copies["fp32"] is not copies["bf16"]


class Counter(nn.Module):
    """Gives scores that move on with each call, by a count in a buffer."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        self.count.add_(1)
        return self.head(x) + self.count * torch.arange(2)


def test_state_is_as_it_was_for_each_form_and_at_the_end(times):
    model, x = Counter(), torch.randn(3, 4)
    served, plan, _ = run(model, x, budget=1e-2)
    assert model.count == served.model.count == 0
    errors = {trial.form.name: trial.error for trial in plan.trials}
    assert errors["fp32"] == 0
    assert 0 < errors["bf16"] < 1e-2  # by a call more the scores would be apart by far more


def test_outputs_that_are_state_are_compared_as_they_came_out(layers, times):
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers
            self.register_buffer("last", torch.zeros(layers[0].in_features))

        def forward(self, x):
            self.last.copy_(x[0].float())
            return self.layers(x), self.last

    _, plan, _ = run(Keeps(), torch.randn(3, layers[0].in_features), metric="relative")
    assert max(trial.error for trial in plan.trials) < 1, [(trial.form.name, trial.error) for trial in plan.trials]


def test_what_modules_keep_in_attributes_is_as_it_was(times):
    class Remembers(nn.Linear):
        def __init__(self):
            super().__init__(4, 2)
            self.seen, self.calls = [], 0

        def forward(self, x):
            self.seen.append(super().forward(x).float())
            self.calls += 1
            return torch.stack(self.seen).sum(0)

    model, x = Remembers(), torch.randn(3, 4)
    served, plan, _ = run(model, x, metric="relative")
    assert (served.model.seen, served.model.calls) == ([], 0)
    assert next(trial.error for trial in plan.trials if trial.form.name == "bf16") < 0.02


def test_a_forward_that_writes_to_its_inputs_leaves_the_examples_as_they_were(times):
    class Centres(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(x.sub_(1))

    x = torch.randn(3, 4)
    before = x.clone()
    served, plan, _ = run(Centres(), x, metric="relative")
    assert torch.equal(x, before)
    assert torch.equal(served.example_inputs, before)
    assert next(trial.error for trial in plan.trials if trial.form.name == "bf16") < 0.02


def test_outputs_without_floating_numbers_and_a_metric_that_gives_a_tensor(times, tmp_path):
    class Best(nn.Linear):
        def forward(self, x):
            return super().forward(x).argmax(-1)

    served, plan, _ = run(Best(4, 3), torch.randn(5, 4), metric=lambda one, two: (one != two).float().mean())
    assert [type(trial.error) for trial in plan.trials] == [float] * len(plan.trials)
    served.save(tmp_path / "model.pt2")


def test_keyword_arguments_and_structures(times):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)

        def forward(self, tokens, mask=None):
            return {"logits": self.head(self.words(tokens)) * (1 if mask is None else mask)}

    given = {"tokens": torch.tensor([[1, 2], [3, 4]]), "mask": torch.ones(2, 2, 1)}
    served, _, card = run(Tokens(), given)
    assert served(**given)["logits"].shape == (2, 2, 9)
    assert card.batch_size == 2
    assert run(Tokens(), (given["tokens"],)).card.batch_size == 2


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 2)

    def forward(self, x):
        return self.layer(x).flatten(1).to_sparse()


def test_what_is_refused(classifier, times):
    x = torch.randn(2, 3, 8, 8)
    for options, message in (
        ({"budget": -1.0}, "budget=-1.0"),
        ({"budget": float("nan")}, "budget=nan"),
        ({"budget": "1e-3"}, "budget='1e-3'"),
        ({"seconds": None}, "seconds=None"),
        ({"formats": ("int8",)}, r"formats with int8 on cpu.*fp32"),
        ({"formats": [torch.bfloat16]}, r"formats=\[torch.bfloat16\]. Allowed: a tuple of names: .*bf16"),
        ({"formats": 16}, "formats=16"),
        ({"formats": "fp32"}, r"formats='fp32'.*\('fp32',\)"),
        ({"seconds": -1.0}, "seconds=-1.0"),
        ({"energy_seconds": float("inf")}, "energy_seconds=inf"),
        ({"metric": "psnr"}, "metric='psnr'"),
        ({"metric": ["kl"]}, r"metric=\['kl'\]"),
        ({"metric": lambda outputs, reference: reference.zero_().sum()}, "the metric '<lambda>' that writes to"),
        ({"progress": 3}, "progress=3. Allowed: None, or a function"),
        ({"metric": lambda outputs, reference: "0.1"}, "the metric '<lambda>' that gave a str"),
        ({"formats": ("fp32", "int3")}, "formats with int3"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(classifier, x, **options)
    with pytest.raises(ConfigError, match="FP32 outputs are not finite"):
        run(classifier, x * torch.nan)
    with pytest.raises(ConfigError, match=r"a metric that is nan between.*inputs of one sample or more"):
        run(classifier, x[:0])
    with pytest.raises(ConfigError, match=r"outputs have no values\. Allowed: inputs of one sample or more"):
        run(classifier, x[:0], metric="relative")
    with pytest.raises(ConfigError, match=r"a metric that is 1 between"):
        run(classifier, x, metric=lambda outputs, reference: torch.cosine_similarity(outputs, reference).mean())
    with pytest.raises(ConfigError, match=r"does not run in FP32 \(.*expected input.*Change what is named there"):
        run(classifier, torch.randn(2, 5, 8, 8))
    with pytest.raises(ConfigError, match="a model and inputs on the meta device"):
        run(copy.deepcopy(classifier).to("meta"), x.to("meta"))
    endless = [x]
    endless.append(endless)
    with pytest.raises(ConfigError, match="example inputs with a list that holds itself"):
        run(classifier, endless)
    with pytest.raises(ConfigError, match=r"outputs with a tensor that is torch\.sparse_coo"):
        run(Sparse(), x)
    with pytest.raises(ConfigError, match="a model and inputs on no device"):
        run(nn.ReLU(), "text")
    with pytest.raises(ConfigError, match="metric='kl' for outputs"):
        run(nn.Linear(4, 1), torch.randn(2, 4))


def test_weights_in_8_bits_are_tried_where_they_pay(times, monkeypatch):
    monkeypatch.setattr(optimize, "linear_kinds", lambda model, dtype, device: ["int8_weights"])
    times["bf16+int8_weights"] = 1.0
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 8))
    x = torch.randn(4, 256)
    served, plan, card = run(model, x, budget=1e-2)
    assert plan.form == served.form == Form(format="bf16", linear="int8_weights")
    found = {trial.form.name: trial.weight_bytes for trial in plan.trials}
    assert found["bf16"] - found["bf16+int8_weights"] == 256 * 512 - 4 * 512  # a byte a weight, less the scales
    assert card.chosen.to_json()["form"]["linear"] == "int8_weights"
    torch.testing.assert_close(served(x), model(x), rtol=5e-2, atol=5e-2)
    assert not any(trial.form.linear for trial in run(model, x, formats=("fp32",)).plan.trials)


def test_weights_that_are_not_finite_leave_the_other_forms(times, monkeypatch):
    monkeypatch.setattr(optimize, "linear_kinds", lambda model, dtype, device: ["int8_weights"])

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(256, 256)

        def forward(self, x):
            return self.layer(x)[:, 1:]

    model = Masked()
    with torch.no_grad():
        model.layer.weight[0, 0] = torch.inf
    _, plan, _ = run(model, torch.randn(2, 256))
    why = next(trial.why for trial in plan.trials if trial.form.linear)
    assert "weight of 'layer' with values that are not finite" in why


@pytest.fixture
def layers(monkeypatch):
    """Int8 weights are there, and layers of 512 channels twice as fast with them."""

    def layer_times(shapes, *about, **others):
        ms = {512: 5.0, 256: 20.0}
        return {shape: LayerTime(plain=10.0, kinds=dict.fromkeys(kinds, ms[shape.channels])) for shape, kinds in
                shapes.items()}  # fmt: skip

    monkeypatch.setattr(optimize, "linear_kinds", lambda model, dtype, device: ["int8_weights"])
    monkeypatch.setattr(layer_savings, "layer_times", layer_times)
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256), nn.Linear(256, 512), nn.Linear(512, 8))


def test_kinds_by_layer_are_one_more_form(layers, times):
    times["bf16+mixed(2)"] = 1.0
    x, before = torch.randn(4, 256), copy.deepcopy(layers.state_dict())
    state = torch.get_rng_state()
    served, plan, card = run(layers, x, budget=1e-2)
    assert plan.form == served.form == Form(format="bf16", layers=(("0", "int8_weights"), ("3", "int8_weights")))
    assert [trial.form.name for trial in plan.trials][-2:] == ["bf16+int8_weights", "bf16+mixed(2)"]
    assert 0 < card.chosen.error <= 1e-2
    assert [choice.kind for choice in plan.layers.choices] == ["int8_weights", None, "int8_weights"]
    assert "2 of 3 layers" in str(card)
    assert card.to_json()["layers"]["choices"][1]["why"] == "no kind is faster"
    torch.testing.assert_close(served(x), layers(x), rtol=5e-2, atol=5e-2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in layers.state_dict().items())


def test_without_time_or_budget_for_layers_the_plan_says_so(layers, times):
    x = torch.randn(4, 256)
    assert run(layers, x, layer_seconds=0.0).plan.layers.why == "not tried: no time was given to it"
    assert "nothing is left" in run(layers, x, budget=1e-12).plan.layers.why
    plan = run(layers, x, formats=("fp32",)).plan
    assert plan.layers.why == "not tried: the model and the device have no kinds of linear layers"
    with pytest.raises(ConfigError, match="layer_seconds=nan"):
        run(layers, x, layer_seconds=float("nan"))


def test_kinds_that_cannot_win_are_not_compiled(layers, times, monkeypatch):
    built = []
    whole = optimize.Served

    def serve(model, form, *others):
        built.append(form.name)
        return whole(model, replace(form, compiled=False), *others)

    monkeypatch.setattr(optimize, "Served", serve)
    x = torch.randn(4, 256)
    layers[0] = nn.Linear(256, 256)
    layers[2], layers[3], layers[4] = nn.Linear(256, 256), nn.Linear(256, 256), nn.Linear(256, 8)  # 20 ms beside 10
    _, plan, _ = optimize_for_inference(layers, x, budget=1e-2)
    assert "bf16+int8_weights" in built
    assert "bf16+int8_weights+compiled" not in built
    why = {trial.form.name: trial.why for trial in plan.trials}
    assert why["bf16+int8_weights+compiled"] == "not built: its layers take 2 times as long as in 16 bits"
    assert why["bf16+compiled"].endswith("the time of fp32")
    _, plan, _ = optimize_for_inference(layers, x, budget=1e-9, layer_seconds=0.1)
    why = {trial.form.name: trial.why for trial in plan.trials}
    assert "far beyond the budget of 1e-09" in why["bf16+int8_weights+compiled"]


def test_what_fails_for_layers_leaves_the_other_forms(layers, times, monkeypatch):
    times["bf16"] = 1.0
    monkeypatch.setattr(layer_savings, "layer_times", lambda *about, **others: 1 / 0)
    served, plan, _ = run(layers, torch.randn(4, 256), budget=1e-2)
    assert plan.form.name == "bf16"
    assert plan.layers.why == "not tried: ZeroDivisionError: division by zero"
    assert not any(module._forward_pre_hooks for module in served.modules())


@pytest.mark.stress
def test_compiled_forms_run():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 8))
    x = torch.randn(4, 256)
    names = {"fp32", "bf16", "fp32+compiled", "bf16+compiled"}
    for kind in optimize.linear_kinds(model, torch.bfloat16, torch.device("cpu")):
        names |= {f"bf16+{kind}", f"bf16+{kind}+compiled"}
    served, plan, _ = optimize_for_inference(model, x, formats=("bf16",), seconds=0.1, layer_seconds=0.0)
    assert names <= {trial.form.name for trial in plan.trials}
    assert not any(trial.problem for trial in plan.trials)
    torch.testing.assert_close(served(x), model(x), rtol=5e-2, atol=5e-2)


def test_progress_is_told_form_by_form(classifier):
    told = []
    x = torch.randn(2, 3, 8, 8)
    _, plan, _ = optimize_for_inference(
        classifier, x, compile=False, seconds=0.01, metric="relative", progress=lambda *what: told.append(what)
    )
    assert [text for text, _ in told if text.startswith("building")] == [f"building {t.form.name}" for t in plan.trials]
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert told[-1] == ("done", 1.0)


@pytest.mark.parametrize("step", ["building", "timing", "measuring the energy"])
def test_what_progress_raises_is_raised_as_it_is(step):
    def cancel(text, _share):
        if text.startswith(step):
            raise TimeoutError("the user's own")

    torch.manual_seed(0)
    given = {"formats": ("fp32",), "compile": False, "seconds": 0.01, "energy_seconds": 0.01}
    with pytest.raises(TimeoutError, match="the user's own"):
        optimize_for_inference(nn.Linear(4, 2), torch.randn(1, 4), progress=cancel, **given)


@dataclass
class Answer:
    logits: torch.Tensor
    hidden: torch.Tensor


class Answers(nn.Linear):
    """Gives an object, as models for text do."""

    def forward(self, x):
        return Answer(super().forward(x), x)


@pytest.mark.parametrize("metric", ["kl", "relative"])
def test_outputs_in_a_dataclass_are_measured_and_come_out_in_fp32(times, metric):
    times["bf16"] = 1.0
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    served, plan, _ = run(Answers(4, 2), x, metric=metric, budget=0.1)
    assert plan.form.name == "bf16"
    assert 0 < next(t.error for t in plan.trials if t.form.name == "bf16") < 0.1
    outputs = served(x)
    assert type(outputs) is Answer
    assert (outputs.logits.dtype, outputs.hidden.dtype) == (torch.float32, torch.float32)


def test_a_model_that_fails_after_some_calls_in_a_row_is_told_so():
    class Fills(nn.Linear):
        """Has room for what eight calls give."""

        def __init__(self):
            super().__init__(4, 2)
            self.register_buffer("at", torch.zeros(1, dtype=torch.long))
            self.register_buffer("kept", torch.zeros(8, 2))

        def forward(self, x):
            self.kept.index_copy_(0, self.at, super().forward(x))
            self.at += 1
            return self.kept.sum(0, keepdim=True).clone()

    torch.manual_seed(0)
    model = Fills()
    with pytest.raises(ConfigError, match=r"fails when it is called again and again \(IndexError: .*Keep positions in"):
        run(model, torch.randn(1, 4), budget=1.0, seconds=0.01)
    assert model.at.item() == 0
