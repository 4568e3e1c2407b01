"""Casts are refused in words before the first weight is another; what moves or shares weights is let through."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepseek_mp.errors import ConfigError
from deepseek_mp.inference import Form, Served, ServedByShape, load
from deepseek_mp.inference.no_casts import cast_with, check_no_cast

CPU = torch.device("cpu")
CASTS = {
    "half": nn.Module.half,
    "double": nn.Module.double,
    "to": lambda model: model.to(torch.float16),
    "to a tensor's": lambda model: model.to(torch.zeros(1, dtype=torch.float16)),
    "type": lambda model: model.type(torch.float16),
}
FORMS = [Form(), Form(format="bf16"), Form(format="bf16", linear="int8_weights")]


def made(form):
    return Served(nn.Sequential(nn.Linear(256, 256, bias=False), nn.ReLU()), form, CPU)


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_served_model_is_not_cast(form, cast):
    served, x = made(form), torch.randn(2, 256)
    expected = served(x)
    with pytest.raises(ConfigError, match=r"a cast from b?float\d\d to float\d\d of a model served in (fp32|bf16)"):
        cast(served)
    assert torch.equal(served(x), expected)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_what_is_no_cast_is_let_through(form):
    served, x = made(form), torch.randn(2, 256)
    expected = served(x)
    same = served.float() if form.format == "fp32" else served.bfloat16()
    assert torch.equal(same.cpu().to(CPU).share_memory()(x), expected)
    assert all(tensor.device.type == "meta" for tensor in cast_with(served.to("meta").model, None))


def test_a_move_with_a_cast_moves_nothing():
    served = made(Form(format="bf16"))
    with pytest.raises(ConfigError, match="a cast from bfloat16 to float32"):
        served.to("meta", torch.float32)
    assert served.model[0].weight.device.type == "cpu"


def test_nor_are_the_forms_of_several_sizes():
    x = torch.randn(2, 256)
    model = ServedByShape({"2": made(Form(format="bf16"))}, {"2": ((2, 256),)})
    with pytest.raises(ConfigError, match="of a model served in bf16"):
        model.half()
    assert model(x).dtype is torch.float32


def test_nor_a_model_from_a_file(tmp_path):
    x = torch.randn(2, 256)
    made(Form(format="bf16", linear="fp8_weights")).save(tmp_path / "model.pt2", x)
    loaded = load(tmp_path / "model.pt2", "cpu")
    expected = loaded(x)
    with pytest.raises(ConfigError, match="to float16 of a model from a file"):
        loaded.half()
    assert torch.equal(loaded.cpu()(x), expected)


def test_the_error_names_the_cast_of_any_tensor():
    tensors = [torch.zeros(1, dtype=torch.int64), torch.zeros(1)]
    check_no_cast(lambda tensor: tensor, tensors, "it")
    with pytest.raises(ConfigError, match=r"a cast from float32 to int64 of it\. Allowed: the formats that it is serv"):
        check_no_cast(lambda tensor: tensor.long(), tensors, "it")
