"""Hooks that measure: what they see, what they leave alone, and what they say they did not see."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from deepseek_mp.activations.block_state import Writes
from deepseek_mp.activations.checkpointed import recomputed_blocks
from deepseek_mp.nn.call import parse_batch, run
from deepseek_mp.precision import RECIPES, Operand
from deepseek_mp.sensitivity import Probe


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.second = nn.Linear(16, 4)
        self.unused = nn.Linear(4, 4)
        self.side = nn.Linear(8, 4)

    def forward(self, x):
        self.side(x)
        return self.second(torch.relu_(self.norm(self.first(x))))


NAMES = ["first", "norm", "second", "unused", "side"]


def step(probe, model, data, names=None):
    call = parse_batch(data)
    with probe.watching(call, names):
        found = run(model, call, None)
        probe.loss_is(found, None)
        found.loss.backward()


def watched(model, batches, **settings):
    recipes = [RECIPES["bf16"], RECIPES["tensor"]]
    probe = Probe({name: model.get_submodule(name) for name in NAMES}, recipes, **settings)
    for data in batches:
        step(probe, model, data)
    return probe


def batch(size=32):
    return torch.randn(size, 8), torch.randint(0, 4, (size,))


def test_units_are_read_in_the_order_of_their_calls():
    probe = watched(Model(), [batch(), batch()])
    readings = probe.read()
    assert list(readings) == ["first", "norm", "second"]
    assert readings["second"].batches == readings["second"].calls == 2
    assert set(readings["first"].effects) == {"bf16", "tensor"}
    assert set(readings["norm"].effects) == {"bf16"}
    assert probe.loss > 0
    assert "never called" in probe.unmeasured["unused"]
    assert "does not depend" in probe.unmeasured["side"]


def test_the_gradient_seen_is_that_of_the_output_before_it_is_overwritten():
    model, data = Model(), batch()
    reading = watched(model, [data], rows=1000).read()["norm"]
    normed = model.norm(model.first(data[0])).detach().requires_grad_()
    loss = nn.functional.cross_entropy(model.second(torch.relu(normed)), data[1])
    (g,) = torch.autograd.grad(loss, normed)
    assert reading.spreads[Operand.GRAD_OUTPUT]["amax"] == pytest.approx(float(g.abs().max()), rel=1e-4)


def test_the_largest_magnitudes_are_those_of_all_batches_drawn_or_not():
    model, data = Model(), [batch(), batch(), batch()]
    data[1][0][:, 3] *= torch.linspace(1, 100, 32)
    reading = watched(model, data, rows=4).read()["first"]
    assert reading.batches == 3
    assert reading.spreads[Operand.INPUT]["amax"] == float(data[1][0].abs().max())
    assert reading.spreads[Operand.WEIGHT]["amax"] == float(model.first.weight.detach().abs().max())


def test_of_two_calls_of_a_unit_the_larger_input_counts():
    model, data = Model(), batch()
    model.second = nn.Linear(16, 16)
    model.forward = lambda x: model.second(100 * model.second(model.first(x)))
    reading = watched(model, [data], rows=4).read()["second"]
    assert reading.calls == 2
    larger = (100 * model.second(model.first(data[0]))).detach().abs().max()
    assert reading.spreads[Operand.INPUT]["amax"] == pytest.approx(float(larger), rel=1e-5)


def test_a_unit_called_twice_counts_once_a_batch():
    model = Model()
    model.second = nn.Linear(16, 16)
    model.forward = lambda x: model.second(model.second(model.first(x)))
    reading = watched(model, [batch()]).read()["second"]
    assert (reading.batches, reading.calls) == (1, 2)


def test_a_checkpointed_unit_is_seen_once():
    model = Model()
    model.forward = lambda x: model.second(checkpoint(model.first, x, use_reentrant=False))
    assert watched(model, [batch()]).read()["first"].calls == 1


def fail(*_):
    raise RuntimeError("on purpose")


@pytest.mark.parametrize("frozen", [False, True])
def test_a_block_that_is_computed_again_draws_no_other_samples(frozen):
    data = [batch(64) for _ in range(3)]
    readings = []
    for again in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)))
        model[0].requires_grad_(not frozen)
        units = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        probe = Probe(units, [RECIPES["tensor"]], rows=8, frozen=frozen)
        for each in data:
            with recomputed_blocks(model if again else [], torch.device("cpu"), Writes()):
                step(probe, model, each)
        readings.append(probe.read())
    assert readings[0] == readings[1]
    assert len(readings[0]) == 2


def test_hooks_and_random_numbers_are_as_before_also_after_an_exception():
    model = Model()
    probe = Probe({"first": model.first}, [RECIPES["bf16"]], rows=4)
    state = torch.get_rng_state()
    call = parse_batch((torch.zeros(32, 8), torch.zeros(32, dtype=torch.long)))
    model.second.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"), probe.watching(call):
        run(model, call, None)
    assert not model.first._forward_hooks
    assert torch.equal(torch.get_rng_state(), state)
    assert probe.read() == {}


def test_a_backward_after_the_watching_is_not_seen():
    model = Model()
    probe = Probe({"first": model.first}, [RECIPES["bf16"]])
    call = parse_batch(batch())
    with probe.watching(call):
        found = run(model, call, None)
        probe.loss_is(found, None)
    found.loss.backward()
    assert probe.read() == {}


def test_only_those_named_are_watched():
    model = Model()
    probe = Probe({"first": model.first, "second": model.second}, [RECIPES["bf16"]])
    step(probe, model, batch(), ["second"])
    assert list(probe.read()) == ["second"]


def test_an_embedding_is_measured_by_its_weight_and_output():
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 10))
    probe = Probe(dict(model.named_children()), [RECIPES["bf16"]], rows=8)
    step(probe, model, (torch.randint(0, 10, (4, 16)), torch.randint(0, 10, (4, 16))))
    assert probe.read()["0"].effects["bf16"].second > 0


def test_frozen_units_are_measured_where_asked_for_but_have_no_gradient_of_weights_to_disturb():
    model, data = Model(), [batch(), batch()]
    trained = watched(model, data).read()
    for unit in (model.first, model.norm):
        unit.requires_grad_(False)
    probe = watched(model, data, frozen=True)
    found = probe.read()
    assert found["first"].effects == trained["first"].effects
    assert found["norm"].spreads == trained["norm"].spreads
    assert (found["first"].energy, found["first"].row_energy) == (0, 0)
    assert found["second"] == trained["second"]
    assert "does not depend" in probe.unmeasured["side"]
    unasked = watched(model, data)
    assert list(unasked.read()) == ["second"]
    assert "nothing in it or before it is trained" in unasked.unmeasured["first"]


def test_a_frozen_unit_may_be_computed_again_and_overwritten_in_place():
    model = Model()
    model.first.requires_grad_(False)
    block = lambda x: torch.relu_(model.first(x)).exp()  # noqa: E731
    model.forward = lambda x: model.second(checkpoint(block, x, use_reentrant=False))
    data = batch()
    before = model(data[0])
    found = watched(model, [data], frozen=True).read()["first"]
    assert found.calls == 1
    assert found.effects["tensor"].second > 0
    assert torch.equal(model(data[0]), before)


def test_a_unit_without_gradients_or_one_tensor_is_told_apart():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    def forward(x):
        model.side(x)
        with torch.no_grad():
            x = model.first(x)
        return model.second(x)

    model = Model()
    model.side, model.forward = Pair(8, 4), forward
    probe = watched(model, [batch()], frozen=True)
    assert "first" not in probe.read()
    assert "gradients are off" in probe.unmeasured["first"]
    assert probe.unmeasured["side"] == "its input or its output is not one tensor with values"


def test_the_same_batches_give_the_same_numbers():
    model, data = Model(), [batch(), batch()]
    assert watched(model, data, rows=8).read() == watched(model, data, rows=8).read()


def test_a_batch_that_is_discarded_does_not_count():
    model, good = Model(), batch()
    probe = watched(model, [good])
    before = probe.read(), probe.loss
    call = parse_batch((torch.full((32, 8), float("nan")), torch.zeros(32, dtype=torch.long)))
    with probe.watching(call):
        found = run(model, call, None)
        probe.loss_is(found, None)
        found.loss.backward()
        probe.discard()
    assert (probe.read(), probe.loss) == before


def test_readings_of_two_halves_join_to_that_of_all():
    model, data = Model(), [batch(), batch(), batch()]
    whole = watched(model, data, rows=1000).read()["first"]
    joined = (
        watched(model, data[:1], rows=1000).read()["first"].joined(watched(model, data[1:], rows=1000).read()["first"])
    )
    assert joined.batches == 3
    assert joined.energy == pytest.approx(whole.energy)
    for name in ("first", "second", "standard_error"):
        assert getattr(joined.effects["tensor"], name) == pytest.approx(
            getattr(whole.effects["tensor"], name), rel=1e-4
        )
