"""Training in a 16-bit base with weights cast in one pass: the numbers are those of autocast, whatever happens."""

from __future__ import annotations

import copy
import math
from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.nn.utils.parametrize import register_parametrization
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

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


class Own(nn.Module):
    """A model whose forward, of itself and a batch, gives the loss."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.own = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return {"loss": self.own(self, x)}


def square(*shape, **options):
    return nn.Linear(*(shape or (8, 8)), **options)


def frozen_for_a_while(m, x):
    made = m.a(x)
    m.b.requires_grad_(False)
    loss = -m.b(made).mean()
    m.b.requires_grad_(True)
    return loss + 0.5 * m.b(x).mean() + m.b(made.detach()).square().mean()


def in_fp16(m, x):
    hidden = m.a(x)
    with torch.autocast("cpu", torch.float16):
        return m.b(hidden).float().square().mean()


def assigned_in_between(m, x):
    hidden = m.a(x)
    m.c(hidden)
    hidden.data = hidden.data * 3
    return m.b(hidden).square().mean()


def detached_in_between(m, x):
    hidden = m.norm(x)
    kept = m.a(hidden).square().mean()
    hidden.detach_().requires_grad_()
    return kept + m.b(hidden).square().mean()


def assigned_twice(m, x):
    m.a.weight.data = m.a.weight.data.clamp(-0.3, 0.3)
    m.a.weight.data = F.normalize(m.a.weight.data) * 0.7
    return m.a(x).square().mean()


def checkpointed(m, x):
    how = {
        "use_reentrant": False,
        "context_fn": partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default]),
    }
    hidden = m.norm(x)
    one = checkpoint(lambda h: torch.tanh(m.a(h)), hidden, **how)
    return (one + checkpoint(lambda h: torch.tanh(m.b(h)), hidden, **how)).square().mean()


@pytest.mark.parametrize(
    "forward",
    [frozen_for_a_while, in_fp16, assigned_in_between, detached_in_between, assigned_twice, checkpointed],
    ids=lambda forward: forward.__name__,
)
def test_forwards_that_do_more_than_call_their_layers(forward):
    def run(*, lend):
        torch.manual_seed(0)
        model = Own(forward, a=square(), b=square(), c=square(), norm=nn.LayerNorm(8))
        trainer = make(model=model)
        if not lend:
            without(trainer)
        losses = [trainer.step(torch.randn(6, 8, generator=torch.Generator().manual_seed(i))).loss for i in range(4)]
        return losses, weights(trainer)

    (losses, ours), (expected, theirs) = run(lend=True), run(lend=False)
    assert losses == expected
    assert same(ours, theirs)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
        lambda layer: prune.l1_unstructured(layer, "bias", amount=0.5),
        lambda layer: register_parametrization(layer, "weight", nn.Identity()),
        lambda layer: nn.utils.spectral_norm(layer),
    ],
    ids=["weight pruned", "bias pruned", "parametrised", "spectral norm"],
)
def test_a_parameter_that_becomes_computed_between_steps(change):
    def run(*, lend):
        trainer = make() if lend else without(make())
        losses = []
        for seed in range(5):
            if seed == 2:
                torch.manual_seed(9)
                change(trainer.model[3])
            torch.manual_seed(seed)
            losses.append(trainer.step(batch(seed)).loss)
        return losses

    assert run(lend=True) == run(lend=False)


def test_a_convolution_with_a_forward_of_its_own_keeps_it():
    def padded(self, x, weight, bias):
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)

    def run(*, lend):
        model = conv_net()
        model[1]._conv_forward = padded.__get__(model[1])
        trainer = make(model=model) if lend else without(make(model=model))
        return [trainer.step(batch(seed)).loss for seed in range(3)]

    assert run(lend=True) == run(lend=False)


def test_many_layers_of_one_input_add_their_gradients_as_exactly_as_with_autocast():
    def sums(m, x):
        hidden = m.norm(x)
        return sum(layer(hidden).float().sum() for layer in m.many)

    torch.manual_seed(0)
    model = Own(sums, norm=nn.LayerNorm(8), many=nn.ModuleList(square(8, 1, bias=False) for _ in range(400)))
    for layer in model.many:
        nn.init.ones_(layer.weight)
    trainer = make(model=model, optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    found = []
    model.norm.bias.register_post_accumulate_grad_hook(lambda p: found.append(p.grad.clone()))
    for _ in range(2):
        trainer.step(torch.randn(6, 8))
    assert torch.equal(found[1], torch.full((8,), 6 * 400.0))


def test_a_fused_optimizer_in_a_hook_ends_the_reuse_within_a_window():
    def run(*, lend):
        trainer = make(gradient_accumulation_steps=3, max_grad_norm=None)
        weight = trainer.model[3].weight
        fused = torch.optim.SGD([weight], lr=0.5, fused=True)

        def step(parameter):
            fused.step()
            parameter.grad = None

        weight.register_post_accumulate_grad_hook(step)
        if not lend:
            without(trainer)
        losses = []
        for seed in range(6):
            torch.manual_seed(seed)
            losses.append(trainer.step(batch(seed)).facts.loss)
        return losses

    assert run(lend=True) == run(lend=False)
