"""What several tests of training share."""

import pytest
import torch
from torch._dynamo.backends import debugging

from deepseek_mp.nn.known_loss import CrossEntropy
from deepseek_mp.trainer import fused_loss, memory_measures


@pytest.fixture
def partitioned(monkeypatch):
    """Graphs are parted as Inductor parts them, and run as they are."""
    parting = torch._dynamo.lookup_backend("aot_eager_decomp_partition")
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: lambda graph, inputs, **_: parting(graph, inputs))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def backward(partitioned, monkeypatch):
    """What the backwards of compiled code call, by name."""
    called = []

    def parted(*args, **settings):
        forward, backward = part(*args, **settings)
        called.extend(str(node.target) for node in backward.graph.nodes if node.op == "call_function")
        return forward, backward

    part = debugging.min_cut_rematerialization_partition
    monkeypatch.setattr(debugging, "min_cut_rematerialization_partition", parted)
    return called


@pytest.fixture
def chunks(monkeypatch):
    """The shapes of hidden that the chunked loss was given with gradients."""
    seen = []
    original = CrossEntropy.of

    def of(how, hidden, *rest):
        if torch.is_grad_enabled():
            seen.append(tuple(hidden.shape))
        return original(how, hidden, *rest)

    monkeypatch.setattr(CrossEntropy, "of", of)
    return seen


@pytest.fixture
def fused_if_asked(monkeypatch):
    """In every precision, as in FP16, the loss is computed in chunks only if somebody asks for it."""
    for module in (fused_loss, memory_measures):
        monkeypatch.setattr(module, "is_fused_by_default", lambda plan: False)
