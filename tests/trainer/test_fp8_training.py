"""Training in FP8, emulated: it learns as BF16 does, and everything around a step goes on working."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from small_runs import by_chance
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from deepseek_mp import Callback, MixedPrecisionTrainer, PrecisionPlan
from deepseek_mp.nn import convert, functional, revert, saturated_tensors, update_scales
from deepseek_mp.nn.delayed import HEADROOM, HISTORY, scales_of
from deepseek_mp.precision import RECIPES, as_fnuz
from deepseek_mp.records import read_run
from deepseek_mp.workloads.gpt import GPTConfig, byte_gpt, next_byte_loss

RECIPES_THAT_RUN = [
    "tensor",
    "delayed",
    "row",
    "row_gw_hp",
    "block",
    "mx",
    as_fnuz(RECIPES["block"]),
    by_chance("tensor"),
]
STEPS = 12


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 128), nn.Linear(128, 4))


def mlp_batches(count, size=32):
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(128, 4, generator=generator)
    for _ in range(count):
        x = torch.randn(size, 128, generator=generator)
        yield x, (x @ direction).argmax(1)


def gpt():
    return byte_gpt(GPTConfig(width=128, heads=2, layers=1, context=16), seed=0)


def gpt_batches(count):
    """A text of short words in random order."""
    generator = torch.Generator().manual_seed(1)
    words = ["alpha ", "beta ", "gamma ", "delta "]
    picks = torch.randint(0, 4, (4000,), generator=generator).tolist()
    text = torch.tensor(list("".join(words[i] for i in picks).encode()))
    for _ in range(count):
        starts = torch.randint(0, len(text) - 17, (8,), generator=generator).tolist()
        rows = torch.stack([text[start : start + 17] for start in starts])
        yield rows[:, :-1], rows[:, 1:]


def pixels():
    """An image model whose convolutions are 1x1, but for one."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(128, 128, 1), nn.BatchNorm2d(128), nn.ReLU(inplace=True), nn.Conv2d(128, 128, 1, bias=False),
        nn.Conv2d(128, 16, 3, padding=1), nn.Flatten(), nn.Linear(64, 4),
    )  # fmt: skip


def pixel_batches(count):
    for x, target in mlp_batches(count, size=32):
        yield x[:, :, None, None] + 0.1 * torch.randn(32, 128, 2, 2, generator=torch.Generator().manual_seed(2)), target


MODELS = {
    "mlp": (mlp, mlp_batches, F.cross_entropy),
    "gpt": (gpt, gpt_batches, next_byte_loss),
    "pixels": (pixels, pixel_batches, F.cross_entropy),
}


def make(model, mode, loss_fn=F.cross_entropy, **options):
    options = {"emulate": True, "device": "cpu", "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-3)} | options
    return MixedPrecisionTrainer(model, mode, loss_fn=loss_fn, **options)


_losses = {}


def losses(name, mode):
    model, batches, loss_fn = MODELS[name]
    if (name, str(mode)) not in _losses:
        trainer = make(model(), mode, loss_fn)
        _losses[name, str(mode)] = [trainer.step(batch).loss for batch in batches(STEPS)]
    return _losses[name, str(mode)]


@pytest.mark.parametrize("recipe", RECIPES_THAT_RUN, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_recipe_learns_as_bf16_does(name, recipe):
    ours, theirs = losses(name, PrecisionPlan.of(recipe)), losses(name, "bf16")
    assert theirs[-1] < 0.95 * theirs[0]
    assert ours != theirs
    assert all(abs(a - b) < 0.01 * b for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_nvfp4_learns_with_more_noise(name):
    ours, theirs = losses(name, "nvfp4"), losses(name, "bf16")
    assert all(abs(a - b) < 0.05 * b for a, b in zip(ours, theirs, strict=True))
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) > 0.001


@pytest.mark.parametrize("compiled", [False, True])
def test_nvfp4_with_accumulation_compiled_and_changed_for_another(compiled):
    # One layer has all three products where a norm before it wants a gradient; each more is compiled for seconds.
    model = nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 4)) if compiled else mlp()
    trainer = make(model, "nvfp4", compile=compiled, gradient_accumulation_steps=2)
    data = list(mlp_batches(6))
    assert all(math.isfinite(trainer.step(batch).loss) for batch in data[:4])
    trainer.change_plan("row")
    assert {decision.new for decision in trainer.plan.decisions} == {"row", "bf16"}
    assert all(math.isfinite(trainer.step(batch).loss) for batch in data[4:])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_1x1_convolutions_train_in_fp8_and_others_beside_them_do_not(layout):
    trainer = make(pixels(), replace(PrecisionPlan.of("block"), memory_format=layout), gradient_accumulation_steps=2)
    said = {decision.layer: (decision.new, decision.reason.value) for decision in trainer.plan.decisions}
    assert said["0"] == said["3"] == ("block", "emulated")
    assert (said["1"], said["4"], said["6"]) == (("bf16", "no_kernel"), ("bf16", "no_kernel"), ("bf16", "output_layer"))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert all(math.isfinite(trainer.step(batch).loss) for batch in pixel_batches(4))
    trainer.settle()
    assert not any(torch.equal(trainer.model.state_dict()[name], before[name]) for name in ("0.weight", "3.weight"))
    assert trainer.model[0].weight.is_contiguous(memory_format=torch.channels_last)
    revert(trainer.model)
    assert type(trainer.model[0]) is nn.Conv2d


def test_fp8_is_a_mode_a_pin_and_the_base_of_a_run():
    trainer = make(gpt(), "fp8", next_byte_loss)
    assert trainer.plan.base.name == "row"
    news = {decision.layer: decision.new for decision in trainer.plan.decisions}
    assert news["blocks.0.up"] == "row"
    assert news["head"] == news["norm"] == "bf16"
    assert trainer.scaler.get_scale() == 1.0
    pinned = make(gpt(), "bf16", next_byte_loss, pin={"blocks.*.up": "fp8", "head": "block"})
    news = {decision.layer: decision.new for decision in pinned.plan.decisions}
    assert (news["blocks.0.up"], news["blocks.0.down"], news["head"]) == ("row", "bf16", "block")
    assert all(math.isfinite(pinned.step(batch).loss) for batch in gpt_batches(2))


def test_auto_keeps_a_layer_that_is_pinned_to_fp8():
    trainer = make(mlp(), "auto", pin={"0": "block"}, kernels="reference")
    trainer.step(next(mlp_batches(1)))
    said = {decision.layer: decision for decision in trainer.plan.decisions}
    assert (said["0"].new, said["0"].reason.value) == ("block", "emulated")
    assert said["0"].evidence == {"quantise": "reference", "product": "reference"}


@pytest.mark.parametrize("compiled", [False, True])
def test_stochastic_rounding_is_repeated_by_the_seed_and_by_a_resumed_run(tmp_path, compiled):
    def trainer(seed):
        made = make(mlp(), PrecisionPlan.of(by_chance("row")), compile=compiled)
        torch.manual_seed(seed)
        return made

    data, first = list(mlp_batches(6)), trainer(3)
    found = [first.step(batch).loss for batch in data[:3]]
    first.save(tmp_path / "half")
    found += [first.step(batch).loss for batch in data[3:]]
    again = trainer(3)
    assert [again.step(batch).loss for batch in data] == found
    other = trainer(4)
    assert [other.step(batch).loss for batch in data] != found
    if not compiled:  # code that is compiled anew after a resume need not round sums as it did before
        resumed = trainer(5)
        resumed.load(tmp_path / "half")
        assert [resumed.step(batch).loss for batch in data[3:]] == found[3:]


@pytest.mark.parametrize("recipe", ["row", "block", "delayed"])
def test_micro_batches_add_up_to_the_gradients_of_each(recipe):
    """Exactly: a window's gradient is the weighted sum of those its micro-batches have alone."""
    parts = list(mlp_batches(2))
    seen = []
    trainer = make(mlp(), recipe, gradient_accumulation_steps=2, callbacks=[Gradients(seen)])
    for part in parts:
        trainer.step(part)
    trainer.settle()
    sums = None
    for part in parts:
        alone = []
        make(mlp(), recipe, callbacks=[Gradients(alone)]).step(part).loss  # noqa: B018 - waits
        sums = alone[0] if sums is None else [a + b for a, b in zip(sums, alone[0], strict=True)]
    for got, want in zip(seen[0], sums, strict=True):
        torch.testing.assert_close(got, want / 2, rtol=1e-5, atol=1e-7)


class Gradients(Callback):
    """Keeps copies of the gradients of every step."""

    def __init__(self, seen):
        self.seen = seen

    def on_gradients(self, trainer):
        self.seen.append([parameter.grad.clone() for parameter in trainer.model.parameters()])


class Checkpointed(nn.Module):
    def __init__(self, body, reentrant):
        super().__init__()
        self.body, self.reentrant, self.dropout = body, reentrant, nn.Dropout(0.2)

    def forward(self, x):
        if self.reentrant is None:
            return self.inner(x)
        return checkpoint(self.inner, x.requires_grad_(), use_reentrant=self.reentrant)

    def inner(self, x):
        return self.body(self.dropout(x))


def test_a_weight_is_quantised_once_for_the_micro_batches_of_a_step(monkeypatch):
    seen = []
    original = functional.quantise

    def watched(x, *args, **options):
        seen.append(tuple(x.shape))
        return original(x, *args, **options)

    trainer = make(mlp(), "block", gradient_accumulation_steps=4)
    data = list(mlp_batches(8))
    for batch in data[:4]:
        trainer.step(batch)
    monkeypatch.setattr(functional, "quantise", watched)
    for batch in data[4:]:
        trainer.step(batch)
    trainer.settle()
    weights = [tuple(m.weight.shape) for m in trainer.model if isinstance(m, torch.nn.Linear)][:-1]  # not the output
    assert weights
    assert all(seen.count(shape) == weights.count(shape) for shape in weights)


@pytest.mark.parametrize("recipe", ["row_gw_hp", "block", "delayed"])
def test_checkpointing_trains_to_the_same_weights(recipe):
    weights = []
    for reentrant in (None, True, False):
        trainer = make(Checkpointed(mlp(), reentrant), recipe, seed=3)
        for batch in mlp_batches(3):
            trainer.step(batch)
        trainer.settle()
        weights.append(trainer.model.state_dict())
    for other in weights[1:]:
        assert all(torch.equal(value, other[name]) for name, value in weights[0].items())


class GatedBlocks(nn.Module):
    def __init__(self, *, checkpointed):
        super().__init__()
        torch.manual_seed(0)
        self.checkpointed = checkpointed
        self.layers = nn.ModuleDict({name: nn.Linear(128, 256) for name in ("gate", "up")})
        self.down, self.head = nn.Linear(256, 128), nn.Linear(128, 8)

    def forward(self, x):
        return self.head(checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x))

    def block(self, x):
        return x + self.down(nn.functional.silu(self.layers["gate"](x)) * self.layers["up"](x))


@pytest.mark.parametrize("recipe", ["block", "delayed"])
def test_checkpointing_in_compiled_code_trains_to_the_same_losses(recipe):
    generator = torch.Generator().manual_seed(1)
    data = [(torch.randn(64, 128, generator=generator), torch.randint(0, 8, (64,))) for _ in range(3)]
    losses = []
    for checkpointed in (False, True):
        torch._dynamo.reset()
        trainer = make(GatedBlocks(checkpointed=checkpointed), recipe, compile=True)
        losses.append([trainer.step(batch).loss for batch in data])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("recipe", ["block", "delayed"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_goes_on_bit_by_bit(tmp_path, recipe, accumulation):
    batches = list(mlp_batches(6))
    options = {"gradient_accumulation_steps": accumulation}
    straight = make(mlp(), recipe, **options)
    wanted = [straight.step(batch).loss for batch in batches]
    first = make(mlp(), recipe, run_dir=tmp_path, **options)
    for batch in batches[:3]:  # in a window of two this is within one
        first.step(batch)
    first.save(tmp_path)
    first.close()
    again = make(mlp(), recipe, run_dir=tmp_path, **options)
    again.load(tmp_path)
    assert [again.step(batch).loss for batch in batches[3:]] == wanted[3:]
    again.close()
    assert again.plan.digest == straight.plan.digest
    for ours, theirs in zip(scales_of(again.model), scales_of(straight.model), strict=True):
        ours, theirs = ours.tensors(), theirs.tensors()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
        assert ours["0/top"].all()


# -- delayed scaling -------------------------------------------------------------------------------------


def scales(trainer):
    (found,) = scales_of(trainer.model)
    return found


def test_a_loop_of_your_own_gets_the_same_weights_with_one_more_line():
    batches = list(mlp_batches(6))
    trainer = make(mlp(), "delayed", gradient_accumulation_steps=2)
    for batch in batches:
        trainer.step(batch)
    trainer.settle()
    model = mlp()
    convert(model, "delayed", emulate=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for index, (x, target) in enumerate(batches):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), target)
        loss.backward()
        if index % 2:
            for parameter in model.parameters():
                parameter.grad /= 2
            optimizer.step()
            optimizer.zero_grad()
            update_scales(model)
    assert torch.equal(scales_of(model)[0].history, scales(trainer).history)
    assert scales(trainer).history[:3].all()
    for ours, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_skipped_step_counts_once_and_neither_its_replay_nor_an_evaluation_counts():
    trainer = make(mlp(), "delayed")
    data = list(mlp_batches(3))
    trainer.step(data[0]).loss  # noqa: B018 - waits
    bad = data[1][0].clone()
    bad[0, 0] = math.inf
    assert trainer.step((bad, data[1][1])).status == "skipped"
    finite = float(bad[bad.isfinite()].abs().max())
    largest = [finite, float(data[0][0].abs().max())]
    assert scales(trainer).history[:3, 0].tolist() == [*largest, 0.0]
    assert not torch.stack(scales(trainer).amax).any()
    trainer.evaluate([(1000 * data[2][0], data[2][1])])
    trainer.predict(1000 * data[2][0])
    trainer.step(data[2]).loss  # noqa: B018 - waits
    assert scales(trainer).history[0, 0] == data[2][0].abs().max()
    assert scales(trainer).top[0] == HEADROOM * max(*largest, float(data[2][0].abs().max()))
    assert not saturated_tensors(trainer.model)


def test_what_fails_within_a_window_is_forgotten():
    trainer = make(mlp(), "delayed", gradient_accumulation_steps=2)
    data = list(mlp_batches(2))
    trainer.step((1000 * data[0][0], data[0][1]))
    with pytest.raises(ValueError, match="batch"):
        trainer.step((data[0][0], data[0][1][:3]))
    assert not torch.stack(scales(trainer).amax).any()
    for batch in data:
        trainer.step(batch)
    trainer.settle()
    assert scales(trainer).history[0, 0] == max(float(x.abs().max()) for x, _ in data)


def test_a_tensor_that_outgrows_its_scale_is_recorded_and_warned_of_once(tmp_path, caplog):
    trainer = make(mlp(), "delayed", run_dir=tmp_path)
    data = list(mlp_batches(HISTORY + 4))
    with caplog.at_level("WARNING", logger="deepseek_mp"):
        for index, (x, target) in enumerate(data):
            result = trainer.step((x * (100 if index == 2 else 10_000 if index == HISTORY + 3 else 1), target))
            found = [one for one in result.facts.saturated if one[:2] == ("0", "input")]
            assert len(found) == (index in (2, HISTORY + 3))
    trainer.close()
    lines = [line for line in read_run(tmp_path).decisions if line["reason"] == "saturated" and line["layer"] == "0"]
    lines = [line for line in lines if line["evidence"]["operand"] == "input"]
    assert [line["step"] for line in lines] == [3, HISTORY + 4]
    assert [line["evidence"]["steps_saturated"] for line in lines] == [1, 2]
    assert (lines[0]["old"], lines[0]["new"], lines[0]["role"]) == ("delayed", "delayed", "fprop")
    said = [record.message for record in caplog.records if record.message.startswith("0: its input")]
    assert said == [f"0: its input outgrew its past; scaled by its own maximum for {HISTORY} steps"]


def test_a_compiled_trainer_has_the_numbers_of_an_eager_one(monkeypatch):
    losses, original = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: original(function, backend="aot_eager"))
    for compiled in (False, True):
        trainer = make(mlp(), "delayed", compile=compiled, gradient_accumulation_steps=2)
        losses.append([trainer.step(batch).loss for batch in mlp_batches(8)])
        assert scales(trainer).top.all()
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_records_name_the_recipe_and_the_peak_is_that_of_its_products(tmp_path):
    trainer = make(mlp(), "block", run_dir=tmp_path, monitor_every=1)
    object.__setattr__(trainer, "capabilities", Peak(trainer.capabilities))
    trainer.fit(list(mlp_batches(2, size=128)))  # no rows are added, whose products would count
    run = read_run(tmp_path)
    line = next(line for line in run.metrics if "flop_utilisation" in line)
    layers = 128 * 128 * 2 + 128 * 4
    work = 2 * 128 * (3 * layers - 128 * 128)  # three products of each layer, less the first input's gradient
    assert line["flop_utilisation"] == pytest.approx(work / (line["seconds"] * 1e12))


class Peak:
    """Capabilities with a peak of one TFLOP/s in E4M3 alone."""

    def __init__(self, found):
        self.found, self.peak_tflops = found, {"fp8_e4m3": 1.0}

    def __getattr__(self, name):
        return getattr(self.found, name)


def test_a_trained_model_goes_back_to_fp32_weights_and_classes():
    trainer = make(mlp(), "block")
    x, target = next(mlp_batches(1))
    trainer.step((x, target))
    scores = trainer.evaluate([(x, target)])
    output = trainer.predict(x)
    model = trainer.model
    revert(model)
    assert {type(module) for module in model} == {nn.Linear, nn.GELU, nn.LayerNorm}
    plain = model(x).detach()
    assert output.dtype == torch.bfloat16
    assert 0 < float((plain - output).norm() / plain.norm()) < 0.1
    assert scores["loss"] == pytest.approx(float(F.cross_entropy(plain, target)), rel=0.05)
