"""Which FP8 recipe a device gets, and what it is told to use instead of one it lacks."""

import pytest

from deepseek_mp.backends import capabilities, formats_of, fp8_recipe, nearest_recipe
from deepseek_mp.backends.base import FP8, SIXTEEN_BIT
from deepseek_mp.backends.capabilities import Capabilities, Identity, resolve, table
from deepseek_mp.precision import RECIPES, as_fnuz


def device(row: str | None) -> Capabilities:
    return resolve(Identity(row=row, device_name=str(row)), vendor="some", backend="some", executes=SIXTEEN_BIT | FP8)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ("sm_89", "row"),
        ("sm_90", "block"),
        ("sm_100", "row"),
        ("sm_103", "row"),
        ("sm_120", "row"),
        ("gfx942", "row_fnuz"),
        ("gfx950", "row"),
        ("ascend950", "row"),
        ("sm_80", "row"),
        (None, "row"),
    ],
)
def test_the_best_recipe_of_a_device(row: str | None, name: str) -> None:
    assert fp8_recipe(device(row)).name == name


@pytest.mark.parametrize("row", [row for row in table() if table()[row].get("matmul_formats")])
def test_a_device_with_fp8_multiplies_in_the_formats_of_its_best_recipe(row: str) -> None:
    found = device(row)
    has_fp8 = bool(FP8 & found.matmul_formats)
    assert (formats_of(fp8_recipe(found)) <= found.matmul_formats) == has_fp8


@pytest.mark.parametrize(
    ("row", "asked", "nearest"),
    [
        ("sm_80", RECIPES["block"], "bf16"),
        ("sm_75", RECIPES["block"], "fp16"),
        ("x86_avx2", RECIPES["tensor"], "fp32"),
        ("gfx942", RECIPES["block"], "block_fnuz"),
        ("sm_90", as_fnuz(RECIPES["tensor"]), "block"),
        ("sm_80", RECIPES["nvfp4"], "bf16"),
        ("sm_90", RECIPES["nvfp4"], "block"),
        ("sm_100", RECIPES["nvfp4"], "row"),  # which has FP4, but no kernel of ours
        ("gfx942", RECIPES["nvfp4"], "row_fnuz"),
    ],
)
def test_the_nearest_recipe_is_one_the_device_has(row: str, asked: object, nearest: str) -> None:
    assert nearest_recipe(asked, device(row)) == nearest


def test_formats_are_those_of_operands_and_region() -> None:
    assert formats_of(RECIPES["tensor"]) == {"bf16", "fp8_e4m3", "fp8_e5m2"}
    assert formats_of(RECIPES["tf32"]) == {"tf32"}


def test_a_cpu_emulates_every_kind_of_fp8() -> None:
    assert capabilities("cpu").emulated_formats >= FP8
