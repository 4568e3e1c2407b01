"""Attention of few queries on a GPU: sizes of decoders against FP64, replays of a graph, and served models."""

from __future__ import annotations

import pytest
import torch
from attention_cases import CASES, MASKS, Case, exact, mask_of, operands
from torch import nn
from torch.nn import functional as F

from deepseek_mp.inference import Form, Served
from deepseek_mp.ops import few_query_attention as op
from deepseek_mp.ops.few_query_attention import few_query_attention

DEVICE = torch.device("cuda")
BF16 = torch.bfloat16
DECODERS = {
    "7b": Case(heads=32, shared=32, keys=1024, width=128, wide=128),
    "7b, by position": Case(heads=32, shared=32, keys=1000, width=128, wide=128, order="position"),
    "8b": Case(batch=2, heads=32, shared=8, keys=4096, width=128, wide=128),
    "70b": Case(heads=64, shared=8, keys=16384, width=128, wide=128),
    "batch": Case(batch=16, heads=32, shared=32, keys=513, width=128, wide=128),
    "one key head": Case(batch=2, heads=71, shared=1, keys=2048),
    "several queries": Case(batch=2, heads=32, shared=8, queries=8, keys=2048, width=128, wide=128),
    "most queries": Case(heads=8, shared=8, queries=16, keys=5000, width=128, wide=128),
    "wide": Case(heads=8, shared=4, keys=3000, width=256, wide=256),
    "wide, many rows": Case(heads=32, shared=2, queries=16, keys=700, width=256, wide=256),
}


@pytest.fixture(autouse=True)
def _kernels():
    if not torch.cuda.is_available() or op.fastest(DEVICE, BF16, 64) != "triton":
        pytest.skip("no Triton kernels for this device")


def agree(case, kind, dtype):
    query, key, value = operands(case, dtype, DEVICE)
    mask = mask_of(kind, case, dtype, DEVICE)
    scale = case.width**-0.5
    found = few_query_attention(query, key, value, mask, scale, implementation="triton")
    expected = exact(query, key, value, mask, scale)
    close = 2**-7 if dtype is BF16 else 2**-10
    torch.testing.assert_close(found.cpu().double(), expected, rtol=close, atol=close)
    norm = float((found.cpu().double() - expected).norm() / expected.norm().clamp(min=1e-12))
    assert norm < (4e-3 if dtype is BF16 else 5e-4) or kind == "blind"


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", CASES)
def test_small_cases(name, kind, dtype):
    agree(CASES[name], kind, dtype)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", DECODERS)
def test_sizes_of_decoders(name, kind):
    agree(DECODERS[name], kind, BF16)


def test_a_replay_sees_new_queries_keys_and_masks():
    case = DECODERS["7b"]
    query, key, value = operands(case, BF16, DEVICE)
    seen = torch.zeros(1, 1, 1, case.keys, dtype=torch.bool, device=DEVICE)

    def call():
        return few_query_attention(query, key, value, seen, 0.1, implementation="triton")

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for position in (0, 63, 64, 500, 1023):
        query.normal_()
        key[:, :, position].normal_()
        seen.copy_((torch.arange(case.keys, device=DEVICE) <= position)[None, None, None])
        graph.replay()
        assert torch.equal(out, call()), position
        torch.testing.assert_close(
            out.cpu().double(), exact(query, key, value, seen, 0.1), rtol=2**-7, atol=2**-7, msg=str(position)
        )


class Cached(nn.Module):
    """Attention of one new token over the tokens before it, whose keys and values are in buffers, with groups."""

    def __init__(self, positions=512):
        super().__init__()
        self.qkv = nn.Linear(256, 512, bias=False)
        self.out = nn.Linear(256, 256, bias=False)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, 2, positions, 64))

    def forward(self, x, at):
        query, key, value = self.qkv(x).view(1, 1, 8, 64).transpose(1, 2).split((4, 2, 2), dim=1)
        self.keys.index_copy_(2, at, key)
        self.values.index_copy_(2, at, value)
        seen = (torch.arange(self.keys.shape[2], device=x.device) <= at)[None, None, None]
        mixed = F.scaled_dot_product_attention(query, self.keys, self.values, attn_mask=seen, enable_gqa=True)
        return self.out(mixed.transpose(1, 2).reshape(1, 1, 256))


@pytest.mark.parametrize("linear", [None, "int8_weights"])
@pytest.mark.parametrize(("compiled", "graphed"), [(True, False), (False, True), (True, True)])
def test_a_decoder_s_steps_are_those_of_the_model(compiled, graphed, linear, monkeypatch):
    torch._dynamo.reset()
    model = Cached().to(DEVICE).eval()
    where = next(model.parameters()).device
    assert op.fastest(where, torch.bfloat16, 64) == "triton"  # compares with the reference when it is first asked
    taken = []
    run = op.few_query_attention_of
    monkeypatch.setattr(op, "few_query_attention_of", lambda name: taken.append(name) or run(name))
    served = Served(model, Form(format="bf16", linear=linear, compiled=compiled, graphed=graphed), DEVICE)
    for step in range(20):
        x, at = torch.randn(1, 1, 256, device=DEVICE), torch.tensor([step], device=DEVICE)
        with torch.no_grad():
            expected = model(x, at)
        torch.testing.assert_close(served(x, at), expected, rtol=3e-2, atol=3e-2, msg=str(step))
    assert set(taken) == {"triton"}
    assert len(taken) == 20 if compiled and not graphed else len(taken) < 10
    torch.testing.assert_close(served.model.keys.float(), model.keys, rtol=3e-2, atol=3e-2)


def test_eager_calls_that_are_not_recorded_are_pytorch_s(monkeypatch):
    monkeypatch.setattr(op, "few_query_attention_of", lambda name: pytest.fail("ours was called"))
    served = Served(Cached().to(DEVICE), Form(format="bf16"), DEVICE)
    served(torch.randn(1, 1, 256, device=DEVICE), torch.tensor([3], device=DEVICE))
