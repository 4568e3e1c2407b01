from torch import nn

from deepseek_mp.nn import apply
from deepseek_mp.nn.parameter_kinds import parameter_kinds
from deepseek_mp.precision import PrecisionPlan


def kinds(model, plan="bf16"):
    return {about.name: (about.kind, about.read_as) for about in parameter_kinds(model, plan).values()}


def test_weights_biases_norms_and_embeddings():
    model = nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.LSTM(8, 4))
    found = {name: kind for name, (kind, _) in kinds(model, PrecisionPlan.of("bf16")).items()}
    assert found == {
        "0.weight": "embedding", "1.weight": "weight", "1.bias": "bias", "2.weight": "norm", "2.bias": "bias",
        "3.weight_ih_l0": "weight", "3.weight_hh_l0": "weight", "3.bias_ih_l0": "bias", "3.bias_hh_l0": "bias",
    }  # fmt: skip


def test_the_region_is_that_of_the_unit():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    found = kinds(model, PrecisionPlan.of("bf16", {"1": "fp32", "2": "row"}))
    assert [found[f"{i}.weight"][1] for i in range(3)] == ["bf16", "fp32", "bf16"]


def test_converted_modules_are_what_they_were():
    model = nn.Sequential(nn.Embedding(4, 8))
    apply(model, "bf16")
    assert kinds(model, PrecisionPlan.of("bf16")) == {"0.weight": ("embedding", "bf16")}


def test_a_tied_parameter_is_listed_once_and_counts_as_what_is_kept():
    model = nn.Module()
    model.head, model.table = nn.Linear(8, 4, bias=False), nn.Embedding(4, 8)
    model.table.weight = model.head.weight
    assert kinds(model, PrecisionPlan.of("bf16", {"table": "fp32"})) == {"head.weight": ("embedding", "fp32")}
    assert kinds(model, PrecisionPlan.of("bf16", {"head": "fp32"})) == {"head.weight": ("embedding", "fp32")}
