"""The table of operands against the shapes of the three matrix products."""

from __future__ import annotations

import pytest

from deepseek_mp.precision import OPERANDS, Operand, Role

SHAPES = {Operand.INPUT: ("M", "K"), Operand.WEIGHT: ("N", "K"), Operand.GRAD_OUTPUT: ("M", "N")}
RESULTS = {
    Role.FPROP: SHAPES[Operand.GRAD_OUTPUT],
    Role.DGRAD: SHAPES[Operand.INPUT],
    Role.WGRAD: SHAPES[Operand.WEIGHT],
}


@pytest.mark.parametrize("role", Role)
def test_operands_share_the_extent_that_the_product_sums_over(role: Role) -> None:
    left, right = (SHAPES[operand] for operand in OPERANDS[role])
    assert len(set(left) & set(right)) == 1
    assert set(left) ^ set(right) == set(RESULTS[role])


def test_each_tensor_is_read_by_two_products() -> None:
    read = [operand for operands in OPERANDS.values() for operand in operands]
    assert sorted(read) == sorted([*Operand] * 2)


def test_names_are_the_values() -> None:
    assert [*map(str, Role)] == ["fprop", "dgrad", "wgrad"]
    assert [*map(str, Operand)] == ["input", "weight", "grad_output"]
    assert list(OPERANDS) == [*Role]
