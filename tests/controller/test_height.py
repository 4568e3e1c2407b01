"""The order of recipes."""

import pytest

from deepseek_mp.controller.height import height, height_of, parts_of
from deepseek_mp.precision import RECIPES, Role

BF16 = RECIPES["bf16"]


def test_plain_recipes_are_ordered_by_how_exact_they_are():
    names = ["fp64", "fp32", "hf32", "tf32", "fp16", "bf16", "block", "nvfp4"]
    heights = [height(RECIPES[name]) for name in names]
    assert heights == sorted(heights, reverse=True)
    assert len(set(heights)) == len(names)


def test_all_fp8_recipes_are_equally_high():
    assert len({height(RECIPES[name]) for name in ("tensor", "delayed", "row", "block", "mx")}) == 1


def test_a_mixture_lies_between():
    assert height_of("block", BF16) < height_of("block[dgrad+wgrad]", BF16) < height_of("block[wgrad]", BF16)
    assert height_of("block[wgrad]", BF16) < height_of("bf16", BF16) == height(BF16)


@pytest.mark.parametrize(
    ("name", "parts"),
    [("block", ("block", tuple(Role))), ("row[dgrad+wgrad]", ("row", (Role.DGRAD, Role.WGRAD)))],
)
def test_the_parts_of_a_name(name, parts):
    assert parts_of(name) == parts
