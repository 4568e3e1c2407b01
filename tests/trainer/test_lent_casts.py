"""Training in a 16-bit base with weights cast in one pass: the numbers are those of autocast, whatever happens."""

from __future__ import annotations

import copy
import math
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from deepseek_mp import MixedPrecisionTrainer
from deepseek_mp.nn.weight_casts import LENT
from deepseek_mp.trainer import step

pytestmark = pytest.mark.usefixtures("lent_on_a_cpu")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture
def lent_on_a_cpu(monkeypatch):
    """The trainer leaves a CPU's casts to autocast, which is faster there; the numbers can be checked all the same."""
    monkeypatch.setattr(step, "SLOWER_IN_ONE_PASS", ())


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def conv_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 2, bias=False), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


def make(mode="bf16", model=None, **options):
    options = {
        "loss_scale_policy": 64.0,
        "optimizer": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        "device": "cpu",
        "emulate": True,
    } | options
    return MixedPrecisionTrainer(mlp() if model is None else model, mode, **options)


def without(trainer):
    """The same trainer, with casts left to autocast."""
    trainer.stepper._casts = None
    return trainer


def batch(seed):
    inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
    return inputs, inputs[:, :3].argmax(dim=1)


def weights(trainer):
    return copy.deepcopy(trainer.model.state_dict())


def same(one, two):
    return all(torch.equal(value, two[name]) for name, value in one.items())


def lent(model):
    return [name for name, module in model.named_modules() if LENT in vars(module)]


@pytest.mark.parametrize("mode", DTYPES)
@pytest.mark.parametrize("build", [mlp, conv_net])
@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 3}, {"max_grad_norm": 0.1}, {"monitor_every": 2}], ids=str
)
def test_training_is_that_of_autocast_bit_for_bit(mode, build, options):
    one, two = make(mode, build(), **options), without(make(mode, build(), **options))
    for seed in range(7):
        torch.manual_seed(seed)
        first = one.step(batch(seed)).facts
        torch.manual_seed(seed)
        assert first == two.step(batch(seed)).facts
    assert same(weights(one), weights(two))


@pytest.mark.parametrize("mode", ["bf16"])
def test_losses_are_those_of_a_loop_with_autocast(mode):
    trainer, model = make(mode), mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for seed in range(5):
        inputs, labels = batch(seed)
        torch.manual_seed(seed)
        got = trainer.step((inputs, labels)).loss
        torch.manual_seed(seed)
        with torch.autocast("cpu", DTYPES[mode]):
            loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert got == loss.item()


class Casts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        narrow = func is torch.ops.aten._foreach_copy_.default and args[0][0].dtype == torch.bfloat16
        self.seen["narrow" if narrow else func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("accumulation", "expected"), [(1, 4), (2, 2)])
def test_weights_are_cast_once_per_window(accumulation, expected):
    trainer = make(gradient_accumulation_steps=accumulation)
    for seed in range(2):
        trainer.step(batch(seed))
    with Casts() as casts:
        for seed in range(4):
            trainer.step(batch(seed))
    assert casts.seen["narrow"] == expected


def test_a_compiled_model_is_lent_nothing():
    assert make(compile=True).stepper._casts is None
    assert make("fp32").stepper._casts is None


def test_layers_are_lent_casts_in_forward_and_backward_only():
    trainer, forward, backward, elsewhere = make(), [], [], []
    model = trainer.model
    model[3].register_forward_hook(lambda *_: (forward if model.training else elsewhere).append(lent(model)))
    model[0].weight.register_hook(lambda _: backward.append(lent(model)))
    for seed in range(2):
        trainer.step(batch(seed))
    assert forward == [[], ["0", "3", "5"]], "the first forward shows whether it leaves the weights alone"
    assert backward == forward
    trainer.evaluate([batch(0)])
    trainer.predict(batch(0))
    assert elsewhere == [[], []]


def test_an_exception_in_the_forward_leaves_nothing_lent_and_training_goes_on():
    one, two = make(), make()
    for trainer in (one, two):
        torch.manual_seed(1)
        trainer.step(batch(0))

    def fail(*_):
        raise RuntimeError("stop")

    handle = one.model[3].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        one.step(batch(1))
    handle.remove()
    assert lent(one.model) == []
    assert one.stepper._casts._casts.made == ()
    torch.manual_seed(3)
    first = one.step(batch(2)).facts
    torch.manual_seed(3)
    assert first.loss == two.step(batch(2)).facts.loss


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_bad_step_is_skipped_and_its_module_named(accumulation):
    trainer = make(gradient_accumulation_steps=accumulation)
    for seed in range(accumulation):
        trainer.step(batch(seed))
    before = weights(trainer)
    handle = trainer.model[3].register_forward_hook(lambda module, args, output: output / 0.0)
    for seed in range(accumulation):
        result = trainer.step(batch(seed))
    assert (result.status, result.first_bad_module) == ("skipped", "3")
    assert same(weights(trainer), before)
    handle.remove()
    for seed in range(accumulation):
        result = trainer.step(batch(seed))
    assert result.status == "applied"


def test_casts_are_given_back_with_the_window():
    trainer = make(gradient_accumulation_steps=2)
    kept = []
    for seed in range(4):
        trainer.step(batch(seed))
        kept.append(len(trainer.stepper._casts._casts.made))
    assert kept == [0, 0, 6, 0]
    trainer.step(batch(4))
    trainer.step((torch.full((6, 4), math.nan), batch(5)[1]))
    assert trainer.stepper._casts._casts.made == ()


def test_the_last_input_is_not_kept_for_the_backward():
    trainer, kept = make(), []
    inputs = trainer.stepper._casts._inputs
    trainer.model[0].register_forward_hook(lambda *_: kept.append(inputs._last is not None))
    trainer.model[0].weight.register_hook(lambda _: kept.append(inputs._last is not None))
    for seed in range(2):
        trainer.step(batch(seed))
    assert kept == [False, False, True, False]


class Moves(nn.Module):
    """Writes a trained weight in its forward, from the third on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.calls, self.growth = nn.Linear(4, 4, bias=False), nn.Linear(4, 3), 0, []

    def forward(self, x):
        self.calls += 1
        before = self.first(x)
        if self.calls > 2:
            with torch.no_grad():
                self.first.weight.mul_(2.0)
        after = self.first(x)
        self.growth.append((after.float().norm() / before.float().norm()).item())
        return self.second(after)


def test_a_weight_written_in_the_forward_is_seen(caplog):
    one = make(model=Moves(), optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    two = without(make(model=Moves(), optimizer=lambda params: torch.optim.SGD(params, lr=0.0)))
    for seed in range(5):
        one.step(batch(seed))
        two.step(batch(seed))
    assert one.model.growth == [1.0, 1.0, 2.0, 2.0, 2.0]
    assert one.model.growth[3:] == two.model.growth[3:]


def test_the_monitor_counts_the_same_operations_and_the_casts():
    usages = []
    for trainer in (make(monitor_every=1), without(make(monitor_every=1))):
        trainer.step(batch(0))
        trainer.monitor.log_precision_usage()
        trainer.step(batch(1))
        usages.append(trainer.monitor.log_precision_usage())
    ours, plain = usages
    assert ours.formats == plain.formats
    assert ours.layers["0"]["addmm"] == plain.layers["0"]["addmm"]
    casts, before = ours.ops["cast"]["bf16<-fp32"], plain.ops["cast"]["bf16<-fp32"]
    assert before.forward - casts.forward == 6 - 1
    assert plain.ops["cast"]["fp32<-bf16"].backward - ours.ops["cast"]["fp32<-bf16"].backward == 6 - 1


def test_a_cpu_keeps_the_casts_of_autocast(monkeypatch):
    monkeypatch.undo()
    trainer = make()
    assert trainer.step(batch(0)).status == "applied"
    assert trainer.stepper._casts is None
