"""Bytes kept for backward."""

from deepseek_mp.precision import RECIPES, Role
from deepseek_mp.precision.composite import with_roles
from deepseek_mp.precision.kept import kept_bytes


def test_bytes_kept_for_backward_are_those_of_wgrads_input():
    assert kept_bytes(RECIPES["fp32"], 10) == 40
    assert kept_bytes(RECIPES["bf16"], 10) == 20
    assert kept_bytes(RECIPES["block"], 10) == 10
    assert kept_bytes(RECIPES["row_gw_hp"], 10) == 20


def test_of_a_mixture_the_product_of_the_weights_gradient_counts():
    row, bf16 = RECIPES["row"], RECIPES["bf16"]
    assert kept_bytes(with_roles(row, [Role.FPROP], bf16), 10) == 20
    assert kept_bytes(with_roles(row, [Role.WGRAD], bf16), 10) == 10
