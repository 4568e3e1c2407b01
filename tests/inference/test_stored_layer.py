"""What is stored in fewer bits keeps its formats, whatever happens to the model around it."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from deepseek_mp.inference.stored_layer import StoredLayer


def made():
    layer = StoredLayer()
    layer.register_buffer("q", torch.randn(4, 4).to(torch.float8_e4m3fn))
    layer.register_buffer("scale", torch.rand(4))
    layer.register_parameter("bias", nn.Parameter(torch.zeros(4)))
    return layer


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.double, nn.Module.bfloat16])
def test_casts_leave_what_is_stored(cast):
    layer = made()
    q, scale = layer.q.float(), layer.scale.clone()
    cast(nn.Sequential(layer))
    assert (layer.q.dtype, layer.scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert torch.equal(layer.q.float(), q)
    assert torch.equal(layer.scale, scale)
    assert layer.bias.dtype is not torch.float32


def test_it_moves_also_where_it_is_cast():
    layer = made().to("meta", torch.bfloat16)
    assert {(buffer.device.type, buffer.dtype) for buffer in layer.buffers()} == {
        ("meta", torch.float8_e4m3fn),
        ("meta", torch.float32),
    }


def test_pickles_hold_what_is_stored():
    layer = made()
    found = pickle.loads(pickle.dumps(layer))
    assert torch.equal(found.q.float(), layer.q.float())
    assert found.q.dtype is layer.q.dtype
