"""Where a model's code asks about sizes, its graph is refused for those at which the answer would be another."""

from __future__ import annotations

import inspect
import warnings
from collections import namedtuple

import pytest
import torch
from torch import nn

from deepseek_mp.errors import BatchError
from deepseek_mp.qat import FloatingModel, Int8Model, convert, prepare
from deepseek_mp.qat.size_conditions import SizeConditions

Pair = namedtuple("Pair", ["first", "second"])


class Asks(nn.Module):
    """A layer, negated unless the answer is yes."""

    def __init__(self, question):
        super().__init__()
        self.layer, self.question = nn.Linear(8, 8), question

    def forward(self, *inputs):
        y = self.layer(inputs[0])
        return y if self.question(*inputs) else -y


class Applies(nn.Module):
    """A function of a layer's outputs."""

    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(8, 8), function

    def forward(self, x):
        return self.function(self.layer(x))


def rows(*sizes):
    """Of values from -1 to 1, both of which are among them, so that no range is left later."""
    generator = torch.Generator().manual_seed(sum(sizes))
    made = [torch.rand(size, 8, generator=generator) * 2 - 1 for size in sizes]
    for one in made:
        one[:, 0], one[:, 1] = 1, -1
    return tuple(made)


def made(model, example):
    torch.manual_seed(0)
    simulated = prepare(model.eval(), example)
    return simulated, FloatingModel(simulated, torch.float32), convert(simulated)


def near(found, expected):
    return found.shape == expected.shape and bool((found - expected).norm() <= 0.05 * expected.norm())


@pytest.mark.parametrize(
    ("question", "example", "right", "wrong"),
    [
        (lambda x: x.shape[0] % 2 == 0, (4,), [(0,), (6,), (18,)], [(1,), (3,), (17,)]),
        (lambda x: x.shape[0] % 2 == 0, (3,), [(1,), (5,)], [(0,), (2,), (4,)]),
        (lambda x: x.shape[0] == 1, (3,), [(0,), (2,), (9,)], [(1,)]),
        (lambda x: 1 // x.shape[0] == 0, (3,), [(2,), (20,)], [(0,), (1,)]),
        (lambda x: x.shape[0] not in (5, 40), (3,), [(4,), (6,)], [(5,), (40,)]),
        (lambda x: -(-x.shape[0] // 3) == 2 and x.shape[0] / 4 > 1.1, (5,), [(6,)], [(4,), (7,), (1,)]),
        (lambda x: int(x.shape[0] ** 0.5) == 2, (5,), [(4,), (8,)], [(3,), (9,), (1,)]),
        (lambda x: x.shape[0] & (x.shape[0] - 1) == 0, (4,), [(1,), (16,)], [(3,), (12,)]),
        (lambda x, y: x.shape[0] == y.shape[0], (4, 4), [(1, 1), (5, 5)], [(4, 3), (1, 4)]),
        (lambda x, y: x.shape[0] == y.shape[0], (4, 3), [(1, 2), (5, 4)], [(3, 3), (1, 1), (40, 40)]),
        (lambda x, y: x.shape[0] > y.shape[0], (4, 3), [(5, 2), (3, 2)], [(3, 3), (2, 5)]),
        (lambda x, y: x.shape[0] % 2 == 0 or y.shape[0] % 2 == 0, (4, 6), [(6, 3), (2, 2)], [(3, 3), (5, 17)]),
        (
            lambda x, y: 1 not in (x.shape[0], y.shape[0]) or x.shape[0] == y.shape[0],
            (4, 4),
            [(3, 5)],
            [(4, 1), (1, 4)],
        ),
        (lambda x: int((x.shape[0] - 4) ** 0.5) < 3, (7,), [(5,), (6,)], [(3,), (13,)]),
    ],
)
def test_sizes_at_which_the_model_goes_another_way_are_refused(question, example, right, wrong):
    model = Asks(question)
    forms = made(model, rows(*example))
    for sizes in right:
        for form in (forms[0], forms[-1].reference):
            assert near(form(*rows(*sizes)), model(*rows(*sizes)))
    for sizes in wrong:
        for form in forms:
            with pytest.raises(BatchError, match=r"shape\[0\]|from \d"):
                form(*rows(*sizes))
    with pytest.raises(BatchError, match=r"not as .*shape\[0\]"):  # it would be trained for the wrong way too
        forms[0].train()(*rows(*wrong[0]))


@pytest.mark.parametrize(
    ("function", "sizes"),
    [
        (lambda y: y[::2], (0, 1, 2, 3, 7)),
        (lambda y: torch.cat([y[1:], y[:1]]), (1, 2, 9)),
        (lambda y: y[: y.shape[0] // 2], (1, 2, 3, 9)),
        (lambda y: y.view(2, -1), (2, 4, 6, 20)),
        (lambda y: y[: max(2, y.shape[0] // 2)], (1, 2, 9)),
    ],
)
def test_what_operations_ask_for_themselves_refuses_no_size_that_is_right(function, sizes):
    model = Applies(function)
    *_, int8 = made(model, rows(4))
    for size in sizes:
        assert near(int8.reference(*rows(size)), model(*rows(size)))


@pytest.mark.parametrize(
    ("function", "example", "right", "wrong"),
    [
        (lambda y: y if y.shape[0] >= 4 else y[:2], 5, 4, 3),  # the same at 1 and 2
        (lambda y: y if y.shape[0] < 16 else y[:16], 5, 15, 17),  # the same at 16
        (lambda y: y if y.shape[0] % 2 == 0 or y.shape[0] < 20 else -y, 4, 6, 21),
        (lambda y: y if y.shape[0] % 2 == 0 else y.flip(0), 2, 6, 3),  # of samples in a period, the same
        (lambda y: y.argmax(1) if y.shape[0] % 2 == 0 else y.argmin(1), 4, 6, 3),
        (lambda y: (y if y.shape[0] % 2 == 0 else -y).masked_fill(torch.arange(8) == 3, -torch.inf), 4, 6, 3),
        (lambda y: y.clamp_min(-9) if y.shape[0] % 2 == 0 else torch.where(y > 0, -torch.inf, torch.inf), 4, 6, 3),
        (lambda y: torch.complex(y if y.shape[0] % 2 == 0 else -y, y), 4, 6, 3),
    ],
)
def test_a_difference_at_one_size_and_in_any_numbers_is_enough(function, example, right, wrong):
    torch.manual_seed(0)
    simulated = prepare(Applies(function), rows(example))
    assert len(simulated(*rows(right))) == right
    with pytest.raises(BatchError, match="not as"):
        simulated(*rows(wrong))


@pytest.mark.parametrize(
    "function",
    [
        lambda y: (y * 30000).to(torch.int32),
        lambda y: y.masked_fill((y * 30000).to(torch.int32) % 2 == 0, -torch.inf),
    ],
)
def test_a_few_values_that_fall_to_the_other_side_of_a_step_are_no_difference(function):
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 3, 3))

        def forward(self, x):
            return function(self.layers(x).abs())

    torch.manual_seed(0)
    model = Steps()
    model.layers[1].running_mean.normal_()
    model.layers[1].running_var.uniform_(0.5, 2)
    simulated = prepare(model.eval(), torch.randn(2, 3, 64, 64))
    assert simulated(torch.randn(1, 3, 64, 64)).shape == (1, 3, 60, 60)


def test_a_branch_that_begins_as_nothing_makes_a_difference():
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.scale, self.gate = nn.Linear(8, 8), nn.Parameter(torch.full((8,), 1e-6)), nn.Linear(8, 8)
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)

        def forward(self, x):
            y = self.layer(x)
            x = x + self.scale * (y if x.shape[0] % 3 == 0 else -y)
            return x + self.gate(y if x.shape[0] % 2 == 0 else -y)

    simulated = prepare(Adds(), rows(6))
    for size in (3, 4):
        with pytest.raises(BatchError, match="not as"):
            simulated(*rows(size))
    kept = dict(simulated.graph.named_parameters())
    assert not kept["gate.weight"].any()
    assert not kept["gate.bias"].any()
    assert torch.equal(kept["scale"], torch.full((8,), 1e-6))


def test_sizes_in_proportion_are_tried():
    class Doubles(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x, y):
            return self.layer(x).repeat_interleave(2, 0) + y

    model = Doubles()
    simulated, _, int8 = made(model, rows(4, 8))
    for sizes in ((1, 2), (3, 6), (20, 40)):
        assert near(simulated(*rows(*sizes)), model(*rows(*sizes)))
    assert near(int8.reference(*rows(3, 6)), model(*rows(3, 6)))
    for form in (simulated, int8):
        with pytest.raises(BatchError, match="not as"):
            form(*rows(3, 5))


def test_what_trying_sizes_is_warned_of_is_kept_back():
    class Spreads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            if x.shape[0] < 2:
                warnings.warn("one sample has no spread", stacklevel=1)
            return self.layer(x) + self.layer(x).std(0)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("default", category=DeprecationWarning)
        simulated = prepare(Spreads(), rows(4))
        assert not simulated.sizes.conditions


def test_sizes_that_do_not_fit_an_operation_are_refused_in_words():
    model = Asks(lambda x: x.view(x.shape[0] // 2, 2, 8).shape[1] == 2)
    simulated, _, int8 = made(model, rows(4))
    assert near(int8.reference(*rows(2)), model(*rows(2)))
    for form in (simulated, int8):
        with pytest.raises(BatchError, match="Pass"):
            form(*rows(3))


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, table, mask, *, x):
        y = self.layer(x)
        return (y if table["it's"][0].shape[0] % 2 == 0 and mask.second.shape[0] % 3 == 0 else -y), mask.first


def test_inputs_are_known_in_any_order_and_in_containers():
    example = {"x": rows(5)[0], "mask": Pair(rows(7)[0], rows(3)[0]), "table": {"it's": list(rows(4))}}
    *_, int8 = made(ByName(), example)
    assert int8.reference(**example)[0].shape == (5, 8)
    free = {**example, "x": rows(8)[0], "mask": Pair(rows(8)[0], rows(6)[0])}
    assert int8.reference(**free)[0].shape == (8, 8)
    for changed in ({"mask": Pair(rows(3)[0], rows(7)[0])}, {"table": {"it's": list(rows(3))}}):
        with pytest.raises(BatchError, match="not as"):
            int8.reference(**{**example, **changed})


def test_of_many_conditions_the_first_are_shown():
    def question(x):
        return all(x.shape[0] != size for size in range(20, 30))

    simulated, *_ = made(Asks(question), rows(4))
    with pytest.raises(BatchError, match=r"not as .* != 29, .* != 24 and 5 more of the kind\. Pass"):
        simulated(*rows(29))


def test_conditions_go_by_the_order_of_a_program():
    class Names(nn.Module):
        def forward(self, x, y):
            return x.sum() + y.sum()

    example = dict(zip("xy", rows(4, 3), strict=True))
    program = torch.export.export(Names(), (), example)
    sizes = SizeConditions(
        parameters=inspect.signature(Names().forward),
        places={"['y']": 0, "['x']": 1},
        conditions=("t0_0 > 2",),
        idle=frozenset(["t1_0 != 1"]),
    )
    turned = {"y": example["y"], "x": example["x"]}
    assert sizes.of(program, turned, ("t0_0 != 1", "t1_0 != 1")) == ("t1_0 > 2", "t1_0 != 1")


def test_messages_name_inputs_as_the_forward_does():
    parameters = inspect.signature(lambda x, pair: None)
    places = {"['x']": 0, "['pair']['a']": 1}
    asked = SizeConditions(parameters=parameters, places=places, conditions=("t0_0 == t1_0",))
    with pytest.raises(BatchError, match=r"not as x\.shape\[0\] == pair\['a'\]\.shape\[0\], which"):
        asked.check((torch.ones(2), {"a": torch.ones(3)}), {})


def test_what_cannot_be_checked_holds_for_the_example_s_sizes():
    model = Asks(lambda x: x.shape[0] | 1 == 5)
    *_, int8 = made(model, rows(4))
    assert near(int8.reference(*rows(4)), model(*rows(4)))
    with pytest.raises(BatchError, match="not as"):
        int8.reference(*rows(5))


def test_inputs_without_the_size_that_is_asked_for_are_refused_in_words():
    (x,) = rows(4)
    simulated, floating, int8 = made(Asks(lambda x: x.shape[0] % 2 == 0), (x,))
    for form in (simulated, floating, int8):
        for wrong in (None, [x], torch.tensor(1.0)):
            with pytest.raises(BatchError, match="Pass"):
                form(wrong)
        assert form(x).shape == (4, 8)


def test_calls_like_the_last_one_are_not_read_again(monkeypatch):
    simulated, floating, _ = made(Asks(lambda x: x.shape[0] % 2 == 0), rows(4))
    assert floating(*rows(6)).shape == (6, 8)
    monkeypatch.setattr(type(simulated.sizes), "_sizes", None)
    assert floating(*rows(6)).shape == (6, 8)
    with pytest.raises(TypeError, match="not callable"):
        floating(*rows(4))


def test_a_tensor_passed_twice_keeps_its_two_sizes_equal():
    (x,) = rows(4)
    simulated, _, int8 = made(Asks(lambda x, y: x.shape[0] == y.shape[0]), (x, x))
    assert simulated(*rows(5, 5)).shape == (5, 8)
    for form in (simulated, int8):
        with pytest.raises(BatchError, match=r"shape\[0\]|s\d+ from 0"):
            form(*rows(5, 4))


def test_a_file_keeps_them(tmp_path):
    *_, int8 = made(Asks(lambda x: x.shape[0] % 2 == 0), rows(4))
    int8.save(tmp_path / "even.pt2")
    loaded = Int8Model.load(tmp_path / "even.pt2")
    assert torch.equal(loaded.reference(*rows(6)), int8.reference(*rows(6)))
    with pytest.raises(BatchError, match=r"not as .*shape\[0\] % 2"):
        loaded.reference(*rows(5))


class InTraining(nn.Module):
    """Does something else in training, which its graph does as well."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        y = self.layer(x)
        y = y * 2 if self.training else y
        return y if x.shape[0] % 2 == 0 else -y


def test_without_a_model_to_compare_with_all_that_was_asked_is_kept():
    with pytest.warns(UserWarning, match="will not give what the model passed gives"):
        simulated = prepare(InTraining(), rows(4))
    assert simulated(*rows(6)).shape == (6, 8)
    assert len(simulated.sizes.conditions) == 1
    with pytest.raises(BatchError, match="not as"):
        simulated(*rows(5))


def test_trying_sizes_changes_neither_ranges_nor_state():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            y = self.layer(x)
            return y if x.shape[0] % 2 == 0 else -y

    model, example = Counts(), torch.cat([*rows(3), torch.full((1, 8), 9.0)])
    torch.manual_seed(0)
    simulated = prepare(model, example)
    assert model.calls == 0
    assert simulated.graph.get_buffer("calls") == 0
    ranges = [one.activation_post_process.max_val for one in simulated.quantisers()]
    assert max(float(one.max()) for one in ranges) == pytest.approx(9.0)
    with simulated.observing():
        simulated.unchecked(example)  # once more the same, which moves no average
    assert all(
        torch.equal(one.activation_post_process.max_val, kept)
        for one, kept in zip(simulated.quantisers(), ranges, strict=True)
    )


class Scales(nn.Module):
    """Has inputs that may be left out, and one that is no tensor."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x, mask=None, factor=3):
        found = self.layer(x) * factor
        return found if mask is None else found * mask


@pytest.mark.parametrize(
    ("example", "args", "kwargs", "match"),
    [
        (
            (None, 3),
            (torch.zeros(4, 1), 3),
            {},
            r"input mask, float32 \[4, 1\]\. Allowed: mask = None, which is part of",
        ),
        ((None, 3), (None, 4), {}, r"input factor, 4\. Allowed: factor = 3, which"),
        ((None, 3), (None,), {}, r"inputs x, mask\. Allowed: x, mask, factor"),
        ((), (torch.zeros(4, 1),), {}, r"inputs x, mask\. Allowed: x\. Pass"),
        ((), (), {"mask": None}, r"inputs x, mask\. Allowed: x\. Pass"),
        ((), (), {"other": None}, r"a call that does not fit \(.*'other'\)\. Allowed: x\. Pass"),
    ],
)
def test_what_the_graph_would_ignore_is_refused_by_all_forms(example, args, kwargs, match):
    torch.manual_seed(0)
    model, (x,) = Scales().eval(), rows(4)
    simulated = prepare(model, (x, *example))
    for form in (simulated, FloatingModel(simulated, torch.float32)):
        for _ in range(2):
            with pytest.raises(BatchError, match=match):
                form(x, *args, **kwargs)
    assert near(simulated(x, *example), model(x))


def test_labels_that_the_model_takes_by_place_come_by_name_too():
    class Own(nn.Linear):
        def forward(self, x, labels):
            return super().forward(x) + labels

    model, (x, labels) = Own(8, 8).eval(), rows(4, 4)
    simulated = prepare(model, (x, labels))
    assert simulated.sizes.takes("labels")
    assert not simulated.sizes.takes("input")
    assert near(simulated(x=x, labels=labels), model(x, labels))
