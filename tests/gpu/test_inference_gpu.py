"""Graphed forms on a GPU: what a replay computes, state that moves on, and recordings that fail."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deepseek_mp.backends import capabilities
from deepseek_mp.inference import Form, Served, optimize_for_inference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs torch.cuda, whose graphs these are"),
]
DEVICE = torch.device("cuda", 0)
WIDTH = 256


def perceptron():
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)).to(DEVICE).eval()


def forms():
    found = [Form(format="bf16"), Form(format="fp16"), Form(format="bf16", linear="int8_weights")]
    if torch.cuda.is_available() and "fp8_e4m3" in capabilities(DEVICE).matmul_formats:
        found.append(Form(format="bf16", linear="fp8_weights"))
    return found


def graphed(form):
    return Form(**{**form.to_json(), "graphed": True})


@pytest.mark.parametrize("form", forms(), ids=lambda form: form.name)
def test_a_replay_has_the_bits_of_the_call_for_every_input_and_shape(form):
    plain = Served(perceptron(), form, DEVICE)
    recorded = Served(plain.model, graphed(form), DEVICE, plain)
    kept = []
    for rows in (1, 1, 1, 8, 1, 8, 200):
        x = torch.randn(rows, WIDTH, device=DEVICE)
        kept.append((recorded(x), plain(x)))
    for found, expected in kept:  # at the end: no result was overwritten by a later call
        assert torch.equal(found, expected)
    assert recorded.graph_bytes > 0


@pytest.mark.parametrize("linear", [None, "int8_weights"])
def test_compiled_code_is_recorded_too(linear):
    torch._dynamo.reset()
    form = Form(format="bf16", linear=linear, compiled=True)
    plain = Served(perceptron(), form, DEVICE)
    recorded = Served(plain.model, graphed(form), DEVICE, plain)
    for _ in range(3):
        x = torch.randn(4, WIDTH, device=DEVICE)
        assert torch.equal(recorded(x), plain(x))


def test_convolutions_whose_algorithm_is_searched_are_recorded():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.LazyLinear(8)).to(DEVICE)
    model(torch.randn(2, 3, 16, 16, device=DEVICE))
    served = Served(model, Form(format="fp16", channels_last=True, folded=True, graphed=True), DEVICE)
    for _ in range(2):
        x = torch.randn(2, 3, 16, 16, device=DEVICE)
        torch.testing.assert_close(served(x), model.eval()(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("channels", [3, 8])
@pytest.mark.parametrize("compiled", [False, True])
def test_images_are_cast_on_their_way_into_a_recording(channels, compiled):
    """In the copy of each call, where channels are few."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(channels, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).to(DEVICE).eval()
    form = Form(format="bf16", channels_last=True, compiled=compiled)
    plain = Served(model, form, DEVICE)
    recorded = Served(plain.model, graphed(form), DEVICE, plain)
    for dtype in (torch.float32, torch.float32, torch.bfloat16, torch.float32):
        x = torch.randn(2, channels, 16, 16, device=DEVICE).to(dtype)
        found = recorded(x)
        torch.testing.assert_close(found, plain(x), rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(found, model(x.float()), rtol=5e-2, atol=5e-2)


class Cached(nn.Module):
    """Attention of one new token over the tokens before it, whose keys and values are in buffers."""

    def __init__(self, length=8):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.register_buffer("keys", torch.zeros(1, length, WIDTH))
        self.register_buffer("values", torch.zeros(1, length, WIDTH))

    def forward(self, x, at):
        query, key, value = self.qkv(x).chunk(3, -1)
        self.keys.index_copy_(1, at, key.to(self.keys.dtype))
        self.values.index_copy_(1, at, value.to(self.values.dtype))
        seen = torch.arange(self.keys.shape[1], device=x.device) <= at
        return F.scaled_dot_product_attention(query, self.keys, self.values, attn_mask=seen[None, None])


@pytest.mark.parametrize("compiled", [False, True])
def test_a_cache_of_keys_and_values_is_right_after_some_steps(compiled):
    torch._dynamo.reset()
    model = Cached().to(DEVICE).eval()
    plain = Served(model, Form(format="bf16", compiled=compiled), DEVICE)
    recorded = Served(model, Form(format="bf16", compiled=compiled, graphed=True), DEVICE)
    for step in range(6):
        x, at = torch.randn(1, 1, WIDTH, device=DEVICE), torch.tensor([step], device=DEVICE)
        assert torch.equal(recorded(x, at), plain(x, at)), step
    assert torch.equal(recorded.model.keys, plain.model.keys)
    assert torch.equal(recorded.model.values, plain.model.values)
    assert not recorded.model.keys[:, 6:].any()


class Waits(nn.Linear):
    def forward(self, x):
        return super().forward(x) * float(x.abs().amax() > -1)


class WaitsUnseen(nn.Linear):
    """Waits in a way that is only found out while it is recorded."""

    def forward(self, x):
        torch.cuda.synchronize()
        return super().forward(x)


class Mixed(nn.Linear):
    def forward(self, x, scale):
        return super().forward(x) * scale


def still_works():
    """Memory, random numbers and another recording, after one that failed."""
    torch.cuda.synchronize()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.empty_cache()
    assert torch.rand(1000, device=DEVICE).isfinite().all()
    model, x = perceptron(), torch.randn(4, WIDTH, device=DEVICE)
    plain, recorded = Served(model, Form(), DEVICE), Served(model, Form(graphed=True), DEVICE)
    assert torch.equal(recorded(x), plain(x))


@pytest.mark.parametrize("kind", [Waits, WaitsUnseen])
def test_what_cannot_be_recorded_is_a_reason_and_the_device_stays_usable(kind):
    model = kind(WIDTH, 16).to(DEVICE)
    x = torch.randn(4, WIDTH, device=DEVICE)
    served, plan, _ = optimize_for_inference(model, x, compile=False, seconds=0.05, budget=1e-2)
    problems = {trial.form.name: trial.problem for trial in plan.trials if trial.form.graphed}
    assert problems
    assert all(problems.values())
    assert not plan.form.graphed
    torch.testing.assert_close(served(x), model(x), rtol=5e-2, atol=5e-2)
    still_works()


def test_inputs_on_the_host_are_a_reason():
    model = Mixed(WIDTH, 16).to(DEVICE)
    inputs = (torch.randn(4, WIDTH, device=DEVICE), torch.tensor(2.0))
    _, plan, _ = optimize_for_inference(model, inputs, compile=False, seconds=0.05, budget=1e-2)
    problems = [trial.problem for trial in plan.trials if trial.form.graphed]
    assert all("a Tensor on cpu in a call to be recorded" in problem for problem in problems)
    still_works()


def test_the_choice_has_graphed_forms_and_their_outputs_are_right():
    model, x = perceptron(), torch.randn(1, WIDTH, device=DEVICE)
    served, plan, card = optimize_for_inference(model, x, compile=False, seconds=0.2, budget=1e-2)
    found = {trial.form.name: trial for trial in plan.trials}
    assert found["bf16+graphed"].problem == ""
    assert found["bf16+graphed"].error == found["bf16"].error
    assert found["bf16+graphed"].peak_bytes > 0
    assert "graphed" in str(card)
    torch.testing.assert_close(served(x), model(x), rtol=5e-2, atol=5e-2)


def test_random_numbers_differ_from_replay_to_replay():
    class Noise(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("one", torch.ones(1))

        def forward(self, x):
            return x + torch.rand_like(x)

    served = Served(Noise().to(DEVICE), Form(graphed=True), DEVICE)
    x = torch.zeros(1000, device=DEVICE)
    assert not torch.equal(served(x), served(x))
