"""Recorded calls by a recorder of the test's own: what is copied in and out, what is kept, and what is refused."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from deepseek_mp.errors import ConfigError
from deepseek_mp.inference import Form, Served, graphed, optimize, optimize_for_inference, serve
from deepseek_mp.inference.graphed import Graphed, kept_state, signature
from deepseek_mp.ops.early_launch import is_unwritten

CPU = torch.device("cpu")


class Fake:
    """Records as a device does: outputs are the same memory at each replay, and recording itself computes nothing."""

    def __init__(self, model=None):
        self.model, self.bytes, self.warmed, self.recorded, self.replayed = model or nn.Identity(), 0, 0, 0, 0

    def warm(self, call):
        call()
        self.warmed += 1

    def record(self, call):
        self.recorded += 1
        self.bytes += 100
        with kept_state(self.model):
            outputs = call()

        def replay():
            self.replayed += 1
            made = call()
            with torch.inference_mode():  # a device asks nobody
                for mine, new in zip(graphed.tensors(outputs), graphed.tensors(made), strict=True):
                    mine.copy_(new)

        return replay, outputs


def recorded(run, model=None):
    model = model or nn.Identity()
    fake = Fake(model)
    return Graphed(lambda args, kwargs: run(*args, **kwargs), model, CPU, recorder=fake), fake


def test_new_inputs_give_new_outputs_and_old_ones_stay():
    call, fake = recorded(lambda x, *, scale: {"y": x * scale, "n": 3})
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    first = call((x,), {"scale": 2.0})
    second = call((y,), {"scale": 2.0})
    assert (fake.warmed, fake.recorded, fake.replayed) == (1, 1, 2)
    torch.testing.assert_close(first["y"], 2 * x)
    torch.testing.assert_close(second["y"], 2 * y)
    assert first["n"] == 3
    first["y"].zero_()
    torch.testing.assert_close(call((y,), {"scale": 2.0})["y"], 2 * y)


def test_what_changes_on_its_way_out_is_not_copied_again():
    taken = []

    def out(leaf):
        taken.append(leaf)
        return leaf.float() if isinstance(leaf, torch.Tensor) else leaf

    call = Graphed(lambda args, kwargs: (args[0].bfloat16(), args[0]), nn.Identity(), CPU, out=out, recorder=Fake(None))
    x = torch.ones(2)
    narrow, wide = call((x,), {})
    assert narrow.dtype is wide.dtype is torch.float32
    call((torch.zeros(2),), {})
    assert wide.eq(1).all()
    assert wide.data_ptr() != taken[1].data_ptr(), "the recording's own"


def test_weights_that_no_call_writes_to_may_be_read_early():
    model, seen = nn.BatchNorm1d(2), []

    def call(args, kwargs):
        seen.append([is_unwritten(tensor) for tensor in (model.running_mean, model.running_var, args[0])])
        return args[0] + 1

    Graphed(call, model, CPU, fixed=lambda: [model.running_mean], recorder=Fake())((torch.ones(2),), {})
    assert seen[:2] == [[True, False, False]] * 2, "warm, and recorded"
    assert not is_unwritten(model.running_mean)


def test_inputs_are_not_written_to_and_not_kept():
    call, _ = recorded(lambda x: x + 1)
    x = torch.zeros(3)
    call((x,), {})
    x.fill_(5)
    torch.testing.assert_close(call((torch.ones(3),), {}), torch.full((3,), 2.0))
    assert x.eq(5).all()


@pytest.mark.parametrize(
    "other",
    [
        (torch.zeros(3, 2), 1),
        (torch.zeros(2, 3, dtype=torch.float64), 1),
        (torch.zeros(3, 2).t(), 1),
        (torch.zeros(2, 3), True),
        (torch.zeros(2, 3), 1.0),
        (torch.zeros(2, 3), None),
        [torch.zeros(2, 3), 1],
        (torch.zeros(2, 3), 1, {}),
        (torch.zeros(2, 3), slice(1)),
    ],
)
def test_signatures_tell_apart_what_needs_a_recording_of_its_own(other):
    whole = (torch.zeros(2, 3), 1)
    assert signature(whole, CPU) == signature((torch.ones(2, 3), 1), CPU)
    assert hash(signature(whole, CPU)) == hash(signature((torch.ones(2, 3), 1), CPU))
    assert signature(other, CPU) != signature(whole, CPU)
    assert signature({"a": 1, "b": 2}, CPU) != signature({"a": 2, "b": 1}, CPU)


def test_zero_has_a_sign():
    assert signature(0.0, CPU) != signature(-0.0, CPU)


class Box:
    """Nobody can look into it."""

    def __init__(self, x):
        self.x = x


@dataclass
class Answer:
    x: torch.Tensor


def test_what_comes_out_in_a_dataclass_is_a_copy():
    call, _ = recorded(lambda x: Answer(x + 1))
    first, second = (call((torch.full((1,), value),), {}) for value in (1.0, 2.0))
    assert (first.x.item(), second.x.item()) == (2, 3)
    with pytest.raises(ConfigError, match="a Answer in a call to be recorded"):
        call((first,), {})


def test_what_cannot_be_copied_in_or_out_is_refused():
    call, _ = recorded(lambda x: x)
    for wrong, message in (
        (Box(torch.zeros(1)), "a Box in a call to be recorded"),
        (torch.zeros(1, device="meta"), "a Tensor on meta in a call"),
        (torch.zeros(1).to_sparse(), "a Tensor on cpu in a call"),
    ):
        with pytest.raises(ConfigError, match=message):
            call((wrong,), {})
    boxed, _ = recorded(Box)
    with pytest.raises(ConfigError, match="outputs with a Box"):
        boxed((torch.zeros(1),), {})
    assert len(boxed) == 0


def test_the_recording_that_was_unused_for_longest_goes_first(monkeypatch):
    monkeypatch.setattr(graphed, "MOST", 2)
    call, fake = recorded(lambda x: x + 1)
    one, two, three = (torch.zeros(n) for n in (1, 2, 3))
    for x in (one, two, one, three):
        call((x,), {})
    assert (len(call), fake.recorded) == (2, 3)
    call((one,), {})
    assert fake.recorded == 3
    call((two,), {})
    assert fake.recorded == 4
    call.forget()
    assert len(call) == 0


class Cached(nn.Module):
    """A place of its own for each token, and the sum of all so far."""

    def __init__(self, length=4):
        super().__init__()
        self.register_buffer("cache", torch.zeros(length))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x, at):
        self.calls.add_(1)
        self.cache.index_copy_(0, at, x)
        return self.cache.sum(), self.calls.clone()


def test_state_changes_once_for_each_call():
    model, expected = Cached(), Cached()
    call, _ = recorded(model, model)
    for step in range(4):
        x, at = torch.randn(1), torch.tensor([step])
        found, wanted = call((x, at), {}), expected(x, at)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert model.calls == 4
    torch.testing.assert_close(model.cache, expected.cache)


def test_state_is_restored_where_recording_fails():
    model = Cached()
    call, fake = recorded(model, model)

    def fails(run):
        raise RuntimeError("it waits")

    fake.record = fails
    cache = model.cache
    with pytest.raises(RuntimeError, match="it waits"):
        call((torch.ones(1), torch.tensor([0])), {})
    assert model.calls == 0
    assert not model.cache.any()
    assert model.cache is cache
    assert len(call) == 0


def test_buffers_that_nothing_writes_to_are_not_copied():
    model = Cached()
    with kept_state(model, [model.cache]) as replaced:
        model.cache.fill_(1)
        model.calls.fill_(1)
    assert model.cache.all()
    assert model.calls == 0
    assert replaced == []


def test_buffers_that_cannot_be_written_to_are_left_alone():
    model = Cached()
    model.register_buffer("places", torch.arange(3).expand(2, 3))
    model.register_buffer("rows", torch.zeros(3).to_sparse())
    with kept_state(model) as replaced:
        model.calls.fill_(1)
    assert model.calls == 0
    assert replaced == []


def test_tensors_in_attributes_are_state_too():
    model = Cached()
    model.kept = torch.zeros(2)
    with kept_state(model):
        model.kept.fill_(1)
        model.seen = torch.ones(1)
    assert not model.kept.any()
    with kept_state(model) as replaced:
        model.kept = torch.ones(2)
    assert replaced == []


def test_what_a_recording_would_get_wrong_is_refused():
    class Replaces(Cached):
        def forward(self, x):
            self.cache = self.cache + x
            return self.cache

    model = Replaces()
    cache = model.cache
    call, _ = recorded(model, model)
    with pytest.raises(ConfigError, match="replaces its buffers cache"):
        call((torch.ones(4),), {})
    assert model.cache is cache
    writes, _ = recorded(lambda x: x.add_(1))
    with pytest.raises(ConfigError, match="writes to its inputs"):
        writes((torch.ones(4),), {})


def narrowed(run):
    """Recorded with inputs that come in as BF16."""
    fake = Fake()
    into = lambda leaf: leaf.bfloat16() if isinstance(leaf, torch.Tensor) else leaf  # noqa: E731
    return Graphed(lambda args, kwargs: run(*args, **kwargs), nn.Identity(), CPU, into=into, recorder=fake), fake


def test_what_changes_on_its_way_in_is_cast_by_the_copy():
    seen = []
    call, fake = narrowed(lambda x: (seen.append((x.dtype, x.data_ptr())), x + 0)[1])
    wide, narrow = torch.randn(3), torch.randn(3).bfloat16()
    assert torch.equal(call((wide,), {}), wide.bfloat16())
    assert torch.equal(call((2 * wide,), {}), (2 * wide).bfloat16())
    assert torch.equal(call((narrow,), {}), narrow)
    assert fake.recorded == 2, "one for each dtype that is given"
    assert {dtype for dtype, _ in seen} == {torch.bfloat16}
    assert narrow.data_ptr() not in {place for _, place in seen}, "nothing is done to it, and it is copied all the same"


def test_what_is_made_on_the_way_in_may_be_written_to():
    """A form that is not recorded casts too: there as here the caller's tensor stays as it was."""
    call, _ = narrowed(lambda x: x.add_(1))
    for value in (1.0, 5.0):
        x = torch.full((3,), value)
        assert torch.equal(call((x,), {}), (x + 1).bfloat16())
        assert x.eq(value).all()
    with pytest.raises(ConfigError, match="writes to its inputs"):
        call((x.bfloat16(),), {})


def test_gradients_are_off_inside_and_as_before_after():
    modes = []
    call, _ = recorded(lambda x: (modes.append(torch.is_grad_enabled()), x * 2)[1])
    x = torch.ones(2, requires_grad=True)
    for _ in range(2):
        out = call((x,), {})
        assert torch.is_grad_enabled()
        assert not out.requires_grad
        assert out.grad_fn is None
    assert not any(modes)
    assert not call._last.inputs[0].requires_grad
    with torch.no_grad():
        call((x,), {})
        assert not torch.is_grad_enabled()
    with pytest.raises(ConfigError, match="in a call to be recorded"):
        call((object(),), {})
    assert torch.is_grad_enabled()


def test_a_weight_among_the_outputs_comes_out_without_gradients():
    weight = nn.Parameter(torch.ones(2))
    call, _ = recorded(lambda x: weight)
    for _ in range(2):
        assert not call((torch.ones(2),), {}).requires_grad


def test_calls_that_take_turns_find_their_own_recordings(monkeypatch):
    call, fake = recorded(lambda x, y=None, *, flag=True: x + (1 if flag else 2) + (0 if y is None else y))
    x, y = torch.zeros(2), torch.full((2,), 10.0)
    kinds = [
        ((x,), {}, 1), ((x.double(),), {}, 1), ((torch.zeros(4)[::2],), {}, 1), ((x,), {"flag": False}, 2),
        ((x, y), {"flag": True}, 11), ((x, y.double()), {}, 11), ((x,), {"y": y, "flag": False}, 12),
        ((x,), {"flag": False, "y": y}, 12), ((nn.Parameter(x), y), {}, 11),
    ]  # fmt: skip
    for _ in range(2):
        for args, kwargs, expected in kinds:
            found = call(args, kwargs)
            assert found.eq(expected).all()
            assert found.dtype == torch.result_type(*(args if len(args) > 1 else (args[0], 1)))
    assert fake.recorded == len(kinds)
    monkeypatch.setattr(graphed, "signature", lambda *_: pytest.fail("all of them are known"))
    for args, kwargs, expected in kinds:
        assert call(args, kwargs).eq(expected).all()


def test_what_is_like_the_last_call_but_elsewhere_is_refused_still():
    call, fake = recorded(lambda x: x + 1)
    call((torch.zeros(2),), {})
    for wrong in (torch.zeros(2, device="meta"), torch.zeros(2).to_sparse(), torch.zeros(2).as_subclass(Marked)):
        with pytest.raises(ConfigError, match="in a call to be recorded"):
            call((wrong,), {})
    assert call((nn.Parameter(torch.ones(2)),), {}).eq(2).all()
    assert fake.recorded == 1, "a parameter is as good as a tensor"


class Marked(torch.Tensor):
    """A subclass."""


def test_nothing_is_known_of_what_was_dropped():
    call, fake = recorded(lambda x: x + 1)
    call((torch.zeros(2),), {})
    call.forget()
    call((torch.zeros(2),), {})
    assert fake.recorded == 2


def test_nested_arguments_are_recorded_as_before():
    call, fake = recorded(lambda pair, *, more: pair[0] + pair[1] + more["x"])
    for value in (1.0, 2.0):
        x = torch.full((2,), value)
        assert torch.equal(call(((x, x),), {"more": {"x": x}}), 3 * x)
    assert fake.recorded == 1


def test_calls_in_inference_mode():
    call, _ = recorded(lambda x: x + 1)
    with torch.inference_mode():
        torch.testing.assert_close(call((torch.ones(2),), {}), torch.full((2,), 2.0))
    torch.testing.assert_close(call((torch.zeros(2),), {}), torch.ones(2))


def test_expanded_inputs_have_memory_of_their_own():
    call, _ = recorded(lambda x: x * 2)
    for value in (1.0, 2.0):
        x = torch.full((1, 3), value).expand(4, 3)
        torch.testing.assert_close(call((x,), {}), 2 * x)


def test_a_cpu_records_nothing():
    with pytest.raises(ConfigError, match="a form with CUDA graphs on cpu"):
        Served(nn.Linear(2, 2), Form(graphed=True), CPU)


@pytest.fixture
def fakes(monkeypatch):
    """Graphed forms on this machine; the recorders that they made."""
    made = []
    monkeypatch.setattr(graphed, "records", lambda device: True)
    monkeypatch.setattr(graphed, "DeviceRecorder", lambda device: made.append(Fake()) or made[-1])
    return made


@pytest.mark.parametrize("form", [Form(), Form(format="bf16"), Form(format="bf16", linear="int8_weights")])
def test_a_graphed_form_serves_what_the_form_does(fakes, form):
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU()).eval()
    plain = Served(model, form, CPU)
    served = Served(model, replace(form, graphed=True), CPU, plain)
    assert served.model is plain.model
    for x in (torch.randn(3, 256), torch.randn(3, 256), torch.randn(2, 256)):
        assert torch.equal(served(x), plain(x))
    assert (fakes[0].recorded, fakes[0].replayed, served.graph_bytes) == (2, 3, 200)
    assert plain.graph_bytes == 0
    served.to(CPU)
    served(x)
    assert fakes[0].recorded == 3, "what the recordings read was another"


@pytest.mark.parametrize("channels", [3, 8])
def test_images_come_in_as_the_form_has_them_unless_they_have_many_channels(fakes, channels):
    form = Form(format="bf16", channels_last=True)
    plain = Served(nn.Conv2d(channels, 4, 3), form, CPU)
    served = Served(plain.model, replace(form, graphed=True), CPU, plain)
    for _ in range(2):
        x = torch.randn(2, channels, 8, 8)
        assert torch.equal(served(x), plain(x))
    (own,) = served._graphed._last.inputs
    last = own.is_contiguous(memory_format=torch.channels_last)
    assert (own.dtype, last) == ((torch.bfloat16, True) if channels == 3 else (torch.float32, False))


def test_recorded_code_was_compiled_for_the_form_that_is_not_recorded(fakes, monkeypatch):
    whole, seen = torch.compile, []

    def backend(graph, inputs):
        seen.append([tensor.dtype for tensor in inputs if tensor.dim() == 4])
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function: whole(function, backend=backend))
    monkeypatch.setattr(serve, "records", lambda device: True)
    torch._dynamo.reset()
    form = Form(format="bf16", channels_last=True, compiled=True)
    plain = Served(nn.Conv2d(3, 4, 3), form, CPU)
    served = Served(plain.model, replace(form, graphed=True), CPU, plain)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(served(x), plain(x))
    assert len(seen) == 1
    torch._dynamo.reset()


def test_hooks_run_in_front_of_replays_and_after_them(fakes):
    served, seen = Served(nn.Linear(2, 2), Form(graphed=True), CPU), []
    served.register_forward_pre_hook(lambda module, args: seen.append("before"))
    served.register_forward_hook(lambda module, args, out: seen.append("after"))
    for _ in range(2):
        served(torch.ones(1, 2))
    assert seen == ["before", "after"] * 2


def test_weights_written_in_place_are_those_of_the_next_replay(fakes):
    served, x = Served(nn.Linear(2, 2), Form(graphed=True), CPU), torch.ones(1, 2)
    served(x)
    with torch.no_grad():
        served.model.weight.zero_()
        served.model.bias.fill_(3)
    assert served(x).eq(3).all()
    served.load_state_dict({name: torch.zeros_like(value) for name, value in served.state_dict().items()}, assign=True)
    assert not served(x).any()


def test_graphs_are_tried_and_what_cannot_be_recorded_is_a_reason(fakes, monkeypatch):
    monkeypatch.setattr(optimize, "records", lambda device: True)

    class Keyed(nn.Linear):
        def forward(self, x):
            return {"logits": super().forward(x), "kept": Box(x)}

    for model, why in ((nn.Linear(4, 2), ""), (Keyed(4, 2), "outputs with a Box in a call to be recorded")):
        options = {"compile": False, "seconds": 0.01}
        _, plan, _ = optimize_for_inference(model, torch.randn(3, 4), **options)
        problems = [trial.problem for trial in plan.trials if trial.form.graphed]
        assert problems
        assert all(problem.startswith(why) for problem in problems)
        assert any(problems) is bool(why)
        _, plan, _ = optimize_for_inference(model, torch.randn(3, 4), graphs=False, **options)
        assert not any(trial.form.graphed for trial in plan.trials)


def test_a_replay_does_not_switch_the_modes_that_it_was_recorded_in(monkeypatch):
    """They cost a good part of the host's time of a short call."""

    class Silent(Fake):
        def record(self, call):
            return lambda: None, super().record(call)[1]

    entered, real = [], serve.arithmetic
    monkeypatch.setattr(serve, "arithmetic", lambda device, fp32: (entered.append(fp32), real(device, fp32))[1])
    monkeypatch.setattr(graphed, "records", lambda device: True)
    monkeypatch.setattr(graphed, "DeviceRecorder", lambda device: Silent())
    served = Served(nn.Linear(2, 2), Form(graphed=True), CPU)
    served(torch.ones(1, 2))
    recording = len(entered)
    served(torch.ones(1, 2))
    assert recording == len(entered) == 2, "once to warm up and once to record"
