"""PyTorch's hidden FP32 flags are set as asked and put back as if nothing had happened.

Each test runs in a child process, because a flag once written cannot always be unwritten: that is
the very thing that `fp32_flags` works around.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Any

import pytest
import torch
from fp32_users import USERS, B, read, state_and_reactions

from deepseek_mp.backends.fp32_flags import cuda_fp32, cuda_mode, onednn_fp32, onednn_mode

InChild = Callable[[Callable[[], Any]], Any]
Region = Callable[[], AbstractContextManager[None]]
REGIONS: dict[str, Region] = {
    "cuda ieee": lambda: cuda_fp32("ieee"),
    "cuda tf32": lambda: cuda_fp32("tf32"),
    "onednn ieee": lambda: onednn_fp32("ieee"),
}


@pytest.mark.parametrize("user", USERS)
def test_everything_is_as_it_was_also_after_an_exception(in_child: InChild, user: str) -> None:
    def untouched() -> Any:
        USERS[user]()
        return state_and_reactions()

    def touched(region: Region) -> Any:
        USERS[user]()
        with region():
            pass
        with suppress(KeyError), region():
            raise KeyError
        return state_and_reactions()

    expected = in_child(untouched)
    for name, region in REGIONS.items():
        assert in_child(partial(touched, region)) == expected, name


@pytest.mark.parametrize("user", USERS)
def test_inside_all_three_kinds_of_product_are_in_the_mode(in_child: InChild, user: str) -> None:
    def inside() -> Any:
        USERS[user]()
        seen = []
        for region in REGIONS.values():
            with region():
                seen.append((modes(cuda_mode), modes(onednn_mode)))
        return seen

    (cuda_ieee, _), (cuda_tf32, _), (_, onednn_ieee) = in_child(inside)
    assert (cuda_ieee, cuda_tf32, onednn_ieee) == (["ieee"] * 3, ["tf32"] * 3, ["ieee"] * 3)


def modes(mode: Callable[[str], str]) -> list[str]:
    return [mode(product) for product in ("matmul", "conv", "rnn")]


@pytest.mark.parametrize("user", [user for user in USERS if user.startswith("old") or user == "wrote nothing"])
def test_inside_the_old_interface_of_matrix_products_can_be_read(in_child: InChild, user: str) -> None:
    def inside() -> Any:
        USERS[user]()
        seen = []
        for mode in ("ieee", "tf32"):
            with cuda_fp32(mode):
                seen.append([read(B.cuda.matmul, "allow_tf32"), read(torch, "get_float32_matmul_precision")])
        return seen

    ieee, tf32 = in_child(inside)
    if user in ("old: high", "old: medium"):  # it covers the CPU as well, so one of the two cannot be read
        assert ieee == ["unreadable", user.removeprefix("old: ")]
    else:
        assert ieee == ["False", "highest"]
    assert tf32 in (["True", "high"], ["True", "medium"])


BOTH_WRITTEN = [user for user in USERS if "cudnn o" in user or "conv and rnn" in user]


@pytest.mark.parametrize("user", USERS)
def test_inside_the_old_interface_of_cudnn_can_be_read_if_that_can_be_undone(in_child: InChild, user: str) -> None:
    def can_be_undone() -> bool:
        """Whether PyTorch's default for convolutions is a value like others, as before 2.13."""
        B.cudnn.fp32_precision = "ieee"
        return B.cudnn.conv.fp32_precision == "tf32"

    def inside() -> Any:
        USERS[user]()
        seen = []
        for mode in ("ieee", "tf32"):
            with cuda_fp32(mode):
                seen.append(read(B.cudnn, "allow_tf32"))
        return seen

    ieee, tf32 = in_child(inside)
    if in_child(can_be_undone) or user in BOTH_WRITTEN:
        assert (ieee, tf32) == ("False", "True")
    else:
        assert (ieee, tf32) == ("unreadable", "True")


def test_a_region_for_cuda_leaves_the_cpu_alone_and_the_other_way_round(in_child: InChild) -> None:
    def inside() -> Any:
        with cuda_fp32("tf32"):
            cpu = modes(onednn_mode)
        with onednn_fp32("ieee"):
            return cpu, modes(cuda_mode)

    assert in_child(inside) == [["ieee"] * 3, ["ieee", "tf32", "tf32"]]


def test_regions_nest(in_child: InChild) -> None:
    def nested() -> Any:
        seen = []
        with cuda_fp32("tf32"):
            with cuda_fp32("ieee"):
                seen.append(modes(cuda_mode))
            seen.append(modes(cuda_mode))
        return [*seen, modes(cuda_mode)]

    assert in_child(nested) == [["ieee"] * 3, ["tf32"] * 3, ["ieee", "tf32", "tf32"]]
