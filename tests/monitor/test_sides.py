"""What tensors are rounded to: by the recipe in use, and by those one asks about."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from deepseek_mp import backends
from deepseek_mp.backends import capabilities
from deepseek_mp.monitor.sides import in_use, sides_of, what_if
from deepseek_mp.monitor.subjects import subjects_of
from deepseek_mp.nn import convert
from deepseek_mp.precision import RECIPES, Operand, PrecisionPlan
from deepseek_mp.precision.recipe import OperandRecipe

CPU = capabilities(torch.device("cpu"))  # whose best recipe is `row`


def test_an_operand_is_that_of_the_product_it_is_looked_at_in() -> None:
    sides = sides_of(RECIPES["block"])
    assert sides[Operand.INPUT] == RECIPES["block"].fprop.left
    assert sides[Operand.WEIGHT] == RECIPES["block"].fprop.right
    assert sides[Operand.GRAD_OUTPUT] == RECIPES["block"].dgrad.left
    assert sides[Operand.WEIGHT].granularity.name == "128x128"


def test_formats_of_16_bits_are_not_scaled_and_narrow_ones_as_the_best_recipe_does() -> None:
    asked = what_if(("bf16", "fp8_e5m2", "fp4_e2m1", "int8"), CPU)
    assert all(side == OperandRecipe(format="bf16") for side in asked["bf16"].values())
    for name in ("fp8_e5m2", "fp4_e2m1", "int8"):
        for side in asked[name].values():
            assert (side.format.name, side.granularity.name, side.rule) == (name, "row", "current")


def test_recipes_are_taken_as_they_are() -> None:
    asked = what_if(("nvfp4", "fp8", "delayed"), CPU)
    assert asked["nvfp4"] == sides_of(RECIPES["nvfp4"])
    assert asked["fp8"] == sides_of(RECIPES["row"])
    assert asked["delayed"][Operand.GRAD_OUTPUT].format.name == "fp8_e5m2"


def used(module: nn.Module) -> list[str]:
    return [in_use(subject).name for subject in subjects_of(module)]


def model(**options: Any) -> nn.Module:
    return nn.Sequential(nn.Embedding(4, 16), nn.Linear(16, 16, **options), nn.Linear(16, 16, **options))


def test_what_a_plan_says_is_in_use() -> None:
    net = model()
    convert(net, PrecisionPlan.of("row", pin={"2": "fp32"}), emulate=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert used(net) == ["fp32", "row", "fp32"]  # an embedding multiplies nothing


def test_without_a_plan_it_is_autocast_s_format_or_that_of_the_parameters() -> None:
    assert used(model()) == ["fp32"] * 3
    with torch.autocast("cpu", torch.float16):
        assert used(model()) == ["fp32", "fp16", "fp16"]
    assert used(model(dtype=torch.bfloat16)) == ["fp32", "bf16", "bf16"]
    narrow = nn.Linear(4, 4, device="meta", dtype=torch.float8_e5m2)
    assert used(narrow) == ["fp32"]  # no plain recipe


@pytest.mark.parametrize("way", ["tf32", "bf16"])
def test_a_flag_that_changes_fp32_products_counts(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setattr(backends, "fp32_mode", lambda device, product: way if product == "matmul" else "ieee")
    assert used(model()) == ["fp32", way, way]
    assert used(nn.Conv2d(3, 3, 1)) == ["fp32"]
