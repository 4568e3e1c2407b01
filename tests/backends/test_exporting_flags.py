"""Exporting succeeds whatever the FP32 flags are, and leaves them as if it had not been."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from fp32_users import USERS, B, state_and_reactions
from torch import nn

from deepseek_mp.backends.exporting_flags import fp32_flags_left_alone
from deepseek_mp.backends.fp32_flags import cuda_fp32

InChild = Callable[[Callable[[], Any]], Any]
REGIONS: list[Callable[[], AbstractContextManager[None]]] = [
    nullcontext,
    lambda: cuda_fp32("ieee"),
    lambda: cuda_fp32("tf32"),
]


def export() -> None:
    with fp32_flags_left_alone():
        torch.export.export(nn.ReLU(), (torch.randn(3),), strict=False)


@pytest.mark.parametrize("user", USERS)
def test_flags_are_as_if_nothing_had_been_exported(in_child: InChild, user: str) -> None:
    def untouched() -> Any:
        USERS[user]()
        return state_and_reactions()

    def exported() -> Any:
        USERS[user]()
        for region in REGIONS:
            with region():
                export()
        return state_and_reactions()

    assert in_child(exported) == in_child(untouched)


def test_libraries_are_off_in_the_trace_and_on_after_it(in_child: InChild) -> None:
    class Looks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append([B.cudnn.enabled, B.mkldnn.enabled])
            return x + 1

    seen: list[list[bool]] = []

    def looked() -> Any:
        with fp32_flags_left_alone():
            torch.export.export(Looks(), (torch.randn(3),), strict=False)
            seen.append([B.cudnn.enabled, B.mkldnn.enabled])
            B.cudnn.set_flags(False)
        return [seen[-2], seen[-1], B.cudnn.enabled]

    assert in_child(looked) == [[False, False], [True, True], False]


def test_other_flags_are_set_as_ever_and_functions_put_back(in_child: InChild) -> None:
    def asked() -> Any:
        before = [library.set_flags for library in (B.cudnn, B.mkldnn)]
        with fp32_flags_left_alone(), fp32_flags_left_alone():
            former = B.cudnn.set_flags(_deterministic=True)
            inside = B.cudnn.deterministic
            B.cudnn.set_flags(*former)
            assert B.mkldnn.set_flags is not before[1]
        after = [library.set_flags for library in (B.cudnn, B.mkldnn)]
        return [inside, B.cudnn.deterministic, after == before]

    assert in_child(asked) == [True, False, True]


def test_frozen_flags_stand_in_no_exporter_s_way(in_child: InChild) -> None:
    def frozen() -> Any:
        torch.backends.disable_global_flags()
        export()
        return [B.cudnn.enabled, B.mkldnn.enabled]

    assert in_child(frozen) == [True, True]
