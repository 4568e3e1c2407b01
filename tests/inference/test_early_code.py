"""Kernels that Inductor makes to be launched early wait before they write, and only those of devices that do so."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._inductor import config
from torch._inductor.codecache import FxGraphHashDetails
from torch._inductor.codegen.triton import TritonKernel
from torch._inductor.utils import IndentedBuffer

from deepseek_mp.inference import early_code
from deepseek_mp.inference.early_code import early_kernels

DEVICE = torch.device("cuda", 0)
WAIT, LAUNCH = TritonKernel.GDC_WAIT, TritonKernel.GDC_LAUNCH
LOADS = ["xoffset = tl.program_id(0)", WAIT, "tmp0 = tl.load(in_ptr0)", WAIT, LAUNCH, "tl.store(out_ptr0, tmp0)"]
STORES_IN_A_LOOP = [
    "for r0_offset in tl.range(0, r0_numel, R0_BLOCK):",
    "    tmp0 = tl.load(in_ptr0)",
    "    tl.store(out_ptr0, tmp0)",
    WAIT,
    LAUNCH,
    "if rsplit_id == (0 % RSPLIT):",
    f"    {WAIT}",
    "    tl.store(out_ptr1, tmp1)",
]
LOADS_NOTHING = ["xoffset = tl.program_id(0)", "tl.store(out_ptr0, 1.0)"]


@pytest.fixture
def early(monkeypatch):
    monkeypatch.setattr(early_code, "can_launch_early", lambda device: device == DEVICE)


def made(lines, *, is_early=True):
    """A kernel's code as Inductor completes it."""
    kernel = SimpleNamespace(GDC_WAIT=WAIT, GDC_LAUNCH=LAUNCH, _enable_pdl_codegen=lambda: is_early)
    code = IndentedBuffer()
    code.writelines(lines)
    TritonKernel._filter_pdl(kernel, code)
    return code._lines


def test_a_kernel_that_loads_nothing_waits_first(early):
    with early_kernels(DEVICE):
        assert config.triton.enable_pdl
        assert made(LOADS_NOTHING) == [WAIT, *LOADS_NOTHING]
    assert not config.triton.enable_pdl
    assert made(LOADS_NOTHING) == LOADS_NOTHING


@pytest.mark.parametrize("lines", [LOADS, STORES_IN_A_LOOP])
def test_kernels_wait_once_and_before_they_load_or_store(early, lines):
    with early_kernels(DEVICE):
        assert made(lines) == [WAIT, *(line for line in lines if WAIT not in line)]


def test_code_made_elsewhere_is_not_taken_from_caches(early):
    with torch.compiler.config.patch(cache_key_tag="own"):
        with early_kernels(DEVICE):
            assert FxGraphHashDetails(None, [], {}, []).cache_key_tag == f"own{early_code.TAG}"
        assert FxGraphHashDetails(None, [], {}, []).cache_key_tag == "own"


def test_kernels_that_are_not_early_are_left_alone(early):
    with early_kernels(DEVICE):
        assert made(LOADS_NOTHING, is_early=False) == LOADS_NOTHING


@pytest.mark.parametrize("lost", [True, False])
def test_nothing_is_changed_where_it_cannot_be(early, monkeypatch, lost):
    if lost:
        monkeypatch.setattr(early_code, "_NEEDED", ("no such name",))
    with early_kernels(DEVICE if lost else torch.device("cpu")):
        assert not config.triton.enable_pdl
        assert made(LOADS_NOTHING) == LOADS_NOTHING


def test_it_is_undone_after_a_failure(early):
    with pytest.raises(RuntimeError, match="inside"), early_kernels(DEVICE):
        raise RuntimeError("inside")
    assert not config.triton.enable_pdl
    assert made(LOADS_NOTHING) == LOADS_NOTHING
