from __future__ import annotations

import pytest
import torch
from torch import nn

from deepseek_mp.activations import ActivationSettings, compressed_activations, norm_relu

SETTINGS = ActivationSettings(min_bytes=1, recompute_norm_relu=True)


def block(in_place: bool = False) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(in_place), nn.Conv2d(16, 8, 3, padding=1)
    )


def trained(model, x, settings=None):
    """The output, the gradients of one step, the running statistics, and the record."""
    model.zero_grad()
    if settings is None:
        output, record = model(x), None
    else:
        with compressed_activations(model, settings) as saved:
            output = model(x)
        record = saved.record()
    g = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    output.backward(g)
    return [output, *(p.grad for p in model.parameters())], [b.clone() for b in model.buffers()], record


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(16, 3, 12, 12), (7, 3, 13, 11)])
def test_gradients_are_the_same_bits(in_place, threads, shape):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model, x = block(in_place), torch.randn(shape)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        exact, statistics, _ = trained(model, x)
        model.load_state_dict(state)
        found, again, record = trained(model, x, SETTINGS)
    finally:
        torch.set_num_threads(before)
    assert same(found, exact)
    assert same(again, statistics)
    assert [(pair.module, pair.recomputed, pair.reason) for pair in record.pairs] == [("1", True, "")]
    output = 16 * x.numel() // 3 * 4
    assert record.by_form()["recomputed"] == (0, 0)  # its bytes are those of the ReLU, which keeps its bits
    assert record.by_form()["bits"][0] == output
    assert {e.reason.value for e in record.saved if e.form == "kept" and e.bytes_after >= output} == {"recomputed_from"}


def test_functions_do_as_well_as_modules():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.out = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16, affine=False), nn.Conv2d(16, 2, 1)

        def forward(self, x):
            return self.out(torch.relu(self.norm(self.conv(x))))

    model, x = Functional(), torch.randn(8, 3, 10, 10)
    exact, _, _ = trained(model, x)
    found, _, record = trained(model, x, SETTINGS)
    assert same(found, exact)
    assert [(pair.module, pair.recomputed) for pair in record.pairs] == [("norm", True)]


def test_a_norm_without_a_relu_is_compressed_after_all():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.GELU(), nn.Conv2d(16, 2, 3), nn.BatchNorm2d(2))
    x = torch.randn(32, 3, 16, 16)
    exact, _, _ = trained(model, x)
    found, _, record = trained(model, x, SETTINGS)
    assert not record.pairs
    norms = [e for e in record.saved if e.module == "1" and e.reason.value != "small"]
    assert {(e.operation, e.form.value) for e in norms if e.bytes_before > 1000} == {("batch_norm", "fp8")}
    assert 0 < max(float((a - b).norm() / b.norm()) for a, b in zip(found[1:2], exact[1:2], strict=True)) < 0.1


def test_pairs_that_are_not_proven_are_left_alone_and_say_why():
    model, x = block(), torch.randn(16, 3, 12, 12)
    _, _, record = trained(
        model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last), SETTINGS
    )
    assert [(p.recomputed, p.reason[:38]) for p in record.pairs] == [(False, "the sums of an input that is not conti")]
    _, _, record = trained(block().eval(), x, SETTINGS)
    assert [(p.recomputed, p.reason) for p in record.pairs] == [(False, "the BatchNorm is not in training mode")]
    assert "recomputed" not in record.by_form()


def test_an_output_that_differs_is_found_out(monkeypatch):
    monkeypatch.setattr(norm_relu, "_proven", set())
    monkeypatch.setattr(norm_relu.F, "relu", lambda x: torch.relu(x) * (1 + 1e-6))
    model, x = nn.Sequential(nn.BatchNorm2d(8), nn.Identity(), nn.Conv2d(8, 2, 1)), torch.randn(16, 8, 12, 12)
    model[1].forward = torch.relu
    _, _, record = trained(model, x, SETTINGS)
    assert [(p.recomputed, p.reason) for p in record.pairs] == [(False, "the output computed again is not the same")]


def test_nan_does_not_count_as_a_difference():
    model, x = block(), torch.randn(8, 3, 9, 9)
    x[0, 0, 0, 0] = float("nan")
    _, _, record = trained(model, x, SETTINGS)
    assert [pair.recomputed for pair in record.pairs] == [True]


def test_a_weight_that_was_updated_before_the_backward_is_refused():
    model, x = block(), torch.randn(16, 3, 12, 12)
    with compressed_activations(model, SETTINGS):
        output = model(x)
    with torch.no_grad():
        model[1].bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_without_gradients_nothing_is_held():
    model, x = block(), torch.randn(16, 3, 12, 12)
    with torch.no_grad(), compressed_activations(model, SETTINGS) as saved:
        model(x)
    assert not saved.record().saved
    assert not saved.record().pairs


def test_several_backwards():
    model, x = block(), torch.randn(16, 3, 12, 12)
    with compressed_activations(model, SETTINGS):
        output = model(x)
    g = torch.randn(output.shape)
    parameters = list(model.parameters())
    first = torch.autograd.grad(output, parameters, g, retain_graph=True)
    assert same(first, torch.autograd.grad(output, parameters, g))


def test_the_number_of_threads_may_change_before_the_backward():
    before = torch.get_num_threads()
    model, x = block(), torch.randn(32, 3, 24, 24)
    parameters = list(model.parameters())
    g = torch.randn(32, 8, 24, 24)
    try:
        torch.set_num_threads(2)
        exact = model(x)
        with compressed_activations(model, SETTINGS) as saved:
            found = model(x)
        torch.set_num_threads(1)
        assert saved.record().pairs[0].recomputed
        assert same(torch.autograd.grad(found, parameters, g), torch.autograd.grad(exact, parameters, g))
    finally:
        torch.set_num_threads(before)


def test_autocast():
    model, x = block(), torch.randn(16, 3, 12, 12)
    with torch.autocast("cpu", torch.bfloat16):
        exact = model(x)
        with compressed_activations(model, SETTINGS) as saved:
            found = model(x)
    assert saved.record().pairs[0].recomputed
    g, parameters = torch.randn_like(exact), list(model.parameters())
    assert same(torch.autograd.grad(found, parameters, g), torch.autograd.grad(exact, parameters, g))
