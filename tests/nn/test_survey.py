from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm

from deepseek_mp.backends import Capabilities
from deepseek_mp.nn import apply, uncontrollable, units
from deepseek_mp.nn.survey import survey


class Adapter(nn.Module):
    """A low-rank adapter beside a frozen layer, as LoRA builds it."""

    def __init__(self, layer: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


class LoraLinear(nn.Linear):
    """The other way to build one: a subclass with parameters of its own."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.lora = nn.Parameter(torch.zeros(4, 4))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))


def test_units_are_listed_in_order_and_tied_modules_once() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "act": nn.ReLU(), "norm": nn.LayerNorm(4)})
    model["again"] = model["embed"]
    model["head"] = nn.Linear(4, 8, bias=False)
    model["head"].weight = model["embed"].weight  # one tensor, two units
    assert list(units(model)) == ["embed", "norm", "head"]
    assert units(model)["embed"] is model["embed"]
    assert survey(model).aliases == {"again": "embed"}
    assert uncontrollable(model) == {}


def test_the_model_itself_can_be_the_unit() -> None:
    layer = nn.Linear(2, 2)
    assert units(layer) == {"": layer}


def test_every_known_kind_is_a_unit_before_and_after_conversion(kind: Any, everything: Capabilities) -> None:
    model = nn.Sequential(kind.make())
    assert list(units(model)) == ["0"]
    apply(model, "bf16", capabilities=everything)
    assert list(units(model)) == ["0"]
    assert uncontrollable(model) == {}


def test_subclasses_are_not_units() -> None:
    model = nn.Sequential(LoraLinear(), Scale(), nn.ReLU())
    assert units(model) == {}
    assert list(uncontrollable(model)) == ["0", "1"]
    assert uncontrollable(model)["0"] == (
        "LoraLinear is not a known kind of unit (deepseek_mp.nn.register_unit teaches one)"
    )


def test_adapters_are_units_of_their_own() -> None:
    assert list(units(nn.Sequential(Adapter(nn.Linear(4, 4))))) == ["0.base_layer", "0.down", "0.up"]


def test_parameter_lists_belong_to_another_module() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList([torch.ones(2), torch.ones(2)])
            self.named = nn.ParameterDict({"a": torch.ones(2)})
            self.empty = nn.ParameterList()

    assert uncontrollable(Mixed()) == {
        "weights": "ParameterList holds parameters that another module computes with",
        "named": "ParameterDict holds parameters that another module computes with",
    }


def test_attention_never_calls_its_output_projection() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "out": nn.Linear(4, 4)})
    assert list(units(model)) == ["out"]
    reasons = uncontrollable(model)
    assert list(reasons) == ["attention", "attention.out_proj"]
    assert "never calls its forward" in reasons["attention.out_proj"]


def test_the_fused_encoder_layer_skips_its_layers_in_eval_mode() -> None:
    model = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    inner = ["linear1", "linear2", "norm1", "norm2"]
    assert list(units(model)) == inner
    assert set(survey(model).notes) == set(inner)
    model.eval()
    assert units(model) == {}
    assert all("call model.train() before converting" in uncontrollable(model)[name] for name in inner)


def test_torch_does_skip_them() -> None:
    """The reason for the listing above; if this fails, torch has changed and the listing should too."""
    model = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    called = []
    model.linear1.forward = lambda x: called.append(x) or nn.Linear.forward(model.linear1, x)
    x = torch.randn(2, 3, 8)
    model(x)
    assert len(called) == 1
    with torch.no_grad():
        model.eval()(x)
    assert len(called) == 1


def test_a_parametrised_layer_is_left_alone_and_listed_once() -> None:
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4, bias=False)), nn.Linear(4, 4))
    assert list(units(model)) == ["1"]
    assert uncontrollable(model) == {"0": "its weight is computed by torch.nn.utils.parametrize outside its forward"}


@pytest.mark.parametrize("hook", [spectral_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.5)])
def test_a_weight_computed_by_a_hook_is_outside_the_unit(hook: Any) -> None:
    model = nn.Sequential(hook(nn.Linear(4, 4)))
    assert units(model) == {}
    assert "its weight is computed by a hook" in uncontrollable(model)["0"]


def test_a_forward_replaced_on_the_object_is_not_ours_to_change() -> None:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x
    assert "its forward was replaced on the object" in uncontrollable(nn.Sequential(layer))["0"]


def test_modules_without_parameters_are_listed_nowhere() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Dropout(), nn.Flatten())
    found = survey(model)
    assert (found.units, found.uncontrollable) == ({}, {})
