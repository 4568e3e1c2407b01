"""Training with rounded weights: what is stored afterwards is what training saw, and what cannot be is said."""

from __future__ import annotations

import math
import pickle
from importlib.util import find_spec
from unittest.mock import patch

import pytest
import torch
from small_runs import accuracy, same_models
from torch import nn

from deepseek_mp import MixedPrecisionTrainer, QuantizationAwareTrainer
from deepseek_mp.errors import ConfigError
from deepseek_mp.inference import load
from deepseek_mp.inference.linear_kinds import KINDS
from deepseek_mp.inference.quantised_embedding import QuantisedEmbedding
from deepseek_mp.inference.quantised_linear import QuantisedLinear
from deepseek_mp.precision import PrecisionPlan
from deepseek_mp.qat import Int8Model
from deepseek_mp.qat.rounded_layers import rounded_layers


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.hidden = nn.Embedding(512, 128), nn.Linear(128, 512)
        self.norm, self.last, self.small = nn.LayerNorm(512), nn.Linear(512, 128), nn.Linear(128, 4)

    def forward(self, tokens):
        return self.small(torch.relu(self.last(self.norm(self.hidden(self.table(tokens).mean(1))))))


def model():
    torch.manual_seed(0)
    return Words()


def sgd(params):
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def make(precision="int8_weights", **options):
    return QuantizationAwareTrainer(model(), precision, **({"optimizer": sgd, "device": "cpu"} | options))


def batches(count=6):
    made = torch.Generator().manual_seed(1)
    tokens = [torch.randint(512, (8, 5), generator=made) for _ in range(count)]
    return [(x, x[:, 0] % 4) for x in tokens]


def stored_weight(layer):
    """In fp32, of a deployed layer or embedding."""
    if isinstance(layer, QuantisedEmbedding):
        return layer.q.float() * layer.scale[:, None]
    return KINDS[layer.kind].widened(layer._kind.unprepared(layer._prepared(), layer.implementation))


def forward_weight(layer):
    """What training multiplied or looked up."""
    if isinstance(layer, nn.Embedding):
        return layer(torch.arange(layer.num_embeddings))
    seen = []
    with patch("deepseek_mp.qat.rounded_layers.F.linear", lambda x, weight, bias: seen.append(weight) or x):
        layer(torch.zeros(1, layer.in_features))
    return seen[0]


@pytest.mark.parametrize("options", [
    {"precision": "int8_weights"}, {"precision": "fp8_weights"},
    {"precision": "int8_weights", "learned_step_size": True}, {"precision": "int8_weights", "ema_decay": 0.5},
    {"precision": "int4_weights"}, {"precision": "int4_weights", "learned_step_size": True}, {"precision": "fp8"},
])  # fmt: skip
def test_the_deployed_model_gives_what_training_saw(options):
    trainer = make(**options)
    first = trainer.fit(batches()).loss
    assert trainer.fit(batches(), epochs=4).loss < first
    deployed, x = trainer.convert(torch.float32), batches(1)[0][0]
    torch.testing.assert_close(deployed(x), trainer.predict((x, None)), rtol=1e-5, atol=1e-5)
    assert isinstance(deployed.model.table, QuantisedEmbedding)
    assert isinstance(deployed.model.hidden, QuantisedLinear)
    assert isinstance(trainer.model.hidden, nn.Linear)
    if "ema_decay" not in options:
        for name, layer in rounded_layers(trainer.model).items():
            assert torch.equal(stored_weight(deployed.model.get_submodule(name)), forward_weight(layer))


def test_in_bf16_all_that_is_not_stored_in_8_bits_is_bf16():
    deployed, x = make().convert(), batches(1)[0][0]
    dtypes = {tensor.dtype for tensor in deployed.state_dict().values()}
    assert dtypes == {torch.bfloat16, torch.int8, torch.float32}
    assert deployed.model.norm.weight.dtype == torch.bfloat16
    found = deployed(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, make().predict((x, None)), rtol=5e-2, atol=2e-2)
    with pytest.raises(ConfigError, match="weights in fewer bits"):
        deployed.train()
    assert deployed.eval() is deployed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_callers_autocast_does_not_change_what_it_gives(dtype):
    deployed, x = make().convert(dtype), batches(1)[0][0]
    expected = deployed(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(deployed(x), expected)


def test_each_layer_has_a_decision_with_its_reason(tmp_path):
    trainer = make(keep=["last"], run_dir=tmp_path / "run")
    said = {decision.layer: (decision.new, decision.detail) for decision in trainer.decisions}
    assert said["table"] == said["hidden"] == ("int8_weights", "")
    assert said["last"] == ("fp32", "named in keep")
    assert said["small"][0] == "fp32"
    assert "512 weights, fewer than" in said["small"][1]
    assert [decision.layer for decision in trainer.convert().not_converted] == ["last", "small"]
    trainer.fit(batches(1))
    assert "int8_weights" in (tmp_path / "run" / "decisions.jsonl").read_text()


@pytest.mark.parametrize(("precision", "table", "why"), [
    ("int4_weights", "int8_weights", "no form in 4 bits"), ("fp8", "fp8_weights", "looked up, not multiplied"),
])  # fmt: skip
def test_embeddings_stay_in_8_bits_and_it_is_said(precision, table, why):
    odd = model()
    odd.last, odd.small = nn.Linear(512, 130), nn.Linear(130, 520)
    trainer = QuantizationAwareTrainer(odd, precision, optimizer=sgd, device="cpu", keep=["hidden"])
    said = {decision.layer: (decision.new, decision.detail) for decision in trainer.decisions}
    assert said["table"][0] == table
    assert why in said["table"][1]
    assert said["hidden"] == ("fp32", "named in keep")
    assert said["small"][0] == "fp32"
    assert "are not in whole" in said["small"][1]
    left = [decision.layer for decision in trainer.convert().not_converted]
    assert left == (["hidden", "small"] if precision == "int4_weights" else ["hidden", "last", "small"])


def test_in_fp8_a_token_that_is_not_finite_has_its_step_skipped():
    torch.manual_seed(0)
    trainer = QuantizationAwareTrainer(nn.Sequential(nn.Linear(256, 256)), "fp8", optimizer=sgd, device="cpu")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    x, y = torch.randn(4, 256), torch.arange(4)
    bad = x.clone()
    bad[1, 3] = math.inf
    result = trainer.fit([(bad, y)])
    assert (result.steps_attempted, result.steps_applied) == (1, 0)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert trainer.fit([(x, y)], epochs=2).steps_applied == 1


@pytest.mark.parametrize("precision", ["int4_weights", "fp8"])
def test_in_bf16_a_deployed_layer_is_of_the_kind(precision):
    deployed, x = make(precision).convert(), batches(1)[0][0]
    assert deployed.model.hidden.kind == precision
    torch.testing.assert_close(deployed(x), make(precision).predict((x, None)), rtol=5e-2, atol=2e-2)


def features_of_other_sizes(count=1024, spread=3):
    """Inputs whose columns have scales of 2 ** -spread to 2 ** spread, their classes, and the scales."""
    made = torch.Generator().manual_seed(3)
    x = torch.randn(count, 128, generator=made)
    score = (x @ torch.randn(128, 256, generator=made)).relu() @ torch.randn(256, 8, generator=made)
    sizes = torch.exp2(spread * (2 * torch.rand(128, generator=made) - 1))
    return x, (score - score.mean(0)).argmax(1), sizes


@pytest.mark.parametrize("learned", [False, True])
def test_training_wins_back_what_rounding_to_4_bits_lost(learned):
    x, y, sizes = features_of_other_sizes()

    def pairs(x):
        return list(zip(x.split(64), y.split(64), strict=True))

    def adam(params):
        return torch.optim.Adam(params, lr=1e-3)

    plain = nn.Sequential(nn.Linear(128, 512), nn.ReLU(), nn.Linear(512, 8))
    MixedPrecisionTrainer(plain, "fp32", optimizer=adam, device="cpu").fit(pairs(x), epochs=10)
    with torch.no_grad():
        plain[0].weight.div_(sizes)  # as where the division by a feature's spread becomes a part of the first layer
    x = x * sizes
    trainer = QuantizationAwareTrainer(plain, "int4_weights", learned_step_size=learned, optimizer=adam, device="cpu")
    exact, rounded = (float(accuracy(model(x), y)) for model in (plain, trainer.convert(torch.float32)))
    trainer.fit(pairs(x), epochs=6)
    trained = float(accuracy(trainer.convert(torch.float32)(x), y))
    assert exact - rounded > 0.1
    assert exact - trained < 0.25 * (exact - rounded)


def test_steps_are_learned():
    trainer = make(learned_step_size=True)
    trainer.fit(batches())
    log_step = trainer.model.hidden.log_step.detach()
    assert log_step.abs().max() > 0
    stored = trainer.convert().model.hidden.scale
    amax = trainer.model.hidden.weight.detach().abs().amax(1)
    torch.testing.assert_close(stored, amax / 127 * log_step.exp())


def test_the_model_passed_stays_and_a_checkpoint_loads_into_it():
    plain = model()
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    trainer = QuantizationAwareTrainer(plain, "int8_weights", optimizer=sgd, device="cpu")
    trainer.fit(batches())
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    plain.load_state_dict(trainer.model.state_dict())
    assert not torch.equal(plain.hidden.weight, before["hidden.weight"])


@pytest.mark.parametrize("precision", ["int8_weights", "int4_weights"])
def test_resumed_it_is_bit_for_bit_the_run_without_a_break(tmp_path, precision):
    def run(**options):
        return make(precision, learned_step_size=True, **options)

    whole = run()
    whole.fit(batches(), epochs=2)
    run(run_dir=tmp_path / "run").fit(batches(), epochs=1)
    second = run(run_dir=tmp_path / "run")
    second.fit(batches(), epochs=2, resume=tmp_path / "run")
    assert same_models(whole, second)


def test_a_forward_with_decisions_by_values_is_no_obstacle():
    class Branching(Words):
        def forward(self, tokens):
            return super().forward(tokens) if tokens.sum() > 0 else self.small(self.table(tokens).mean(1))

    trainer = QuantizationAwareTrainer(Branching(), "int8_weights", optimizer=sgd, device="cpu")
    trainer.fit(batches())
    x = torch.zeros(2, 5, dtype=torch.long)
    torch.testing.assert_close(trainer.convert(torch.float32)(x), trainer.predict((x, None)), rtol=1e-5, atol=1e-5)


def test_a_single_layer_is_a_model():
    trainer = QuantizationAwareTrainer(nn.Linear(256, 256), "fp8_weights", device="cpu")
    x = torch.randn(3, 256)
    torch.testing.assert_close(trainer.convert(torch.float32)(x), trainer.predict((x, None)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["int8_weights", "int4_weights"])
def test_a_layer_under_two_names_is_rounded_once_and_stays_one(precision):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(256, 256)
            self.block = nn.Sequential(nn.ReLU(), self.first)

        def forward(self, x):
            return self.block(self.first(x))

    trainer, x = QuantizationAwareTrainer(Twice(), precision, device="cpu"), torch.randn(3, 256)
    assert [(one.layer, one.new) for one in trainer.decisions] == [("first", precision)]
    assert trainer.model.first is trainer.model.block[1]
    served = trainer.convert(torch.float32)
    assert type(served.model.first) is QuantisedLinear
    assert served.model.first is served.model.block[1]
    torch.testing.assert_close(served(x), trainer.predict((x, None)), rtol=1e-5, atol=1e-5)


class Tied(Words):
    def __init__(self):
        super().__init__()
        self.again = nn.Embedding(512, 128)
        self.again.weight = self.table.weight
        self.clipped = nn.Embedding(512, 128, max_norm=1.0)
        self.hooked = nn.Embedding(512, 128)
        self.hooked.register_forward_hook(lambda *args: None)


def test_embeddings_that_cannot_be_replaced_are_left():
    trainer = QuantizationAwareTrainer(Tied(), "int8_weights", device="cpu")
    said = {decision.layer: decision.detail for decision in trainer.decisions}
    assert said["table"] == said["again"] == "its weight is shared"
    assert "max_norm" in said["clipped"]
    assert "hooks" in said["hooked"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"keep": ["table", "hidden", "last"]}, r"nothing to quantise \(table: named in keep"),
        ({"keep": ["nothing"]}, "a list of names of the model's modules"),
        ({"keep": PrecisionPlan.of("fp32")}, "a plan of the base fp32"),
        ({"example_inputs": torch.zeros(2, 2)}, "example_inputs or calibration with precision='int8_weights'"),
        ({"calibration": []}, "example_inputs or calibration"),
        ({"precision": "int4_weights", "keep": ["table", "hidden", "last"]}, r"nothing to quantise \(table: named in"),
        ({"precision": "fp8", "keep": ["table", "hidden", "last"]}, r"nothing to quantise \(table: named in keep"),
        ({"precision": "fp8", "example_inputs": torch.zeros(2, 2)}, "none: no ranges are observed"),
        ({"precision": "fp8", "learned_step_size": True}, "it with 'int8', 'int8_weights', 'int4_weights'"),
        ({"precision": "fp8_weights", "learned_step_size": True}, "learned_step_size with precision='fp8_weights'"),
        ({"learned_step_size": 1}, "learned_step_size=1"),
        ({"precision": "int8_weight"}, "Did you mean 'int8_weights'"),
    ],
)
def test_what_does_not_fit_is_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        make(**options)


def test_weights_that_are_not_finite_are_refused():
    bad = model()
    with torch.no_grad():
        bad.hidden.weight[0, 0] = math.nan
    with pytest.raises(ConfigError, match="weights that are not finite"):
        QuantizationAwareTrainer(bad, "int8_weights")


def test_compare_and_dtypes_are_of_one_precision_only():
    with pytest.raises(ConfigError, match="compare of a trainer for another precision"):
        make().compare(torch.zeros(2, 2))
    trainer = QuantizationAwareTrainer(nn.Sequential(nn.Linear(4, 4)), example_inputs=torch.randn(2, 4))
    assert isinstance(trainer.convert(), Int8Model)
    with pytest.raises(ConfigError, match=r"convert\(dtype=torch.bfloat16\) to INT8"):
        trainer.convert(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("precision", ["int8_weights", "fp8_weights", "int4_weights", "fp8"])
def test_files_give_the_same_bits_without_the_models_code(tmp_path, precision, dtype):
    served, (tokens, _) = make(precision).convert(dtype), batches(1)[0]
    served.save(tmp_path / "words.pt2", tokens)
    loaded = load(tmp_path / "words.pt2", "cpu")
    assert torch.equal(loaded(tokens[:3]), served(tokens[:3]))
    assert loaded.formats["model.table.q"]["format"] == ("fp8_e4m3" if precision.startswith("fp8") else "int8")


@pytest.mark.parametrize("precision", ["int8_weights", "fp8"])
def test_pickles_and_casts_keep_what_is_stored(precision):
    served, (tokens, _) = make(precision).convert(), batches(1)[0]
    found = pickle.loads(pickle.dumps(served))
    assert torch.equal(found(tokens), served(tokens))
    assert torch.equal(found.bfloat16()(tokens), served(tokens))


@pytest.mark.skipif(not all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))), reason="needs onnx and its runtime")
def test_an_onnx_file_holds_int8_and_gives_the_outputs(tmp_path):
    import onnxruntime

    served, (tokens, _) = make("int8_weights").convert(torch.float32), batches(1)[0]
    served.export_onnx(tmp_path / "words.onnx", tokens)
    session = onnxruntime.InferenceSession(tmp_path / "words.onnx")
    found = session.run(None, {session.get_inputs()[0].name: tokens.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), served(tokens))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, "bf16"])
def test_dtypes_that_stored_layers_do_not_multiply_are_refused(dtype):
    trainer = make()
    with pytest.raises(
        ConfigError, match=r"convert\(dtype=.*\)\. Allowed: torch\.bfloat16, torch\.float16, torch\.float32"
    ):
        trainer.convert(dtype)


def test_what_is_converted_moves_but_is_not_cast():
    trainer = make()
    trainer.fit(batches(1), epochs=1)
    found, (x, _) = trainer.convert(), batches(1)[0]
    expected = found(x)
    with pytest.raises(ConfigError, match="to float16 of a model with weights in fewer bits"):
        found.half()
    assert torch.equal(found.to("cpu")(x), expected)
