"""autocast and math_mode: what runs inside, what is refused, and that nothing is left behind."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from threading import Event, Thread
from typing import Any

import pytest
import torch
from torch import nn

from deepseek_mp.backends import autocast, fp32_mode, math_mode
from deepseek_mp.backends.detect import BUILT_IN
from deepseek_mp.errors import FormatError

B: Any = torch.backends
Install = Callable[..., None]


# --------------------------------------------------------- all contexts that change global state


def global_state() -> list[Any]:
    flags = (B, B.cudnn, B.cuda.matmul, B.cudnn.conv, B.cudnn.rnn, B.mkldnn.matmul, B.mkldnn.conv, B.mkldnn.rnn)
    state: list[Any] = [flag.fp32_precision for flag in flags]
    state += [B.cuda.matmul.allow_tf32, cudnn_allows_tf32(), torch.get_float32_matmul_precision()]
    state += [B.cudnn.benchmark, B.cudnn.deterministic, torch.is_autocast_cache_enabled()]
    for kind in ("cpu", "cuda"):
        state += [torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)]
    return state


def cudnn_allows_tf32() -> bool | None:
    """cuDNN's old flag, which PyTorch refuses to read while the new ones differ from it."""
    try:
        return bool(B.cudnn.allow_tf32)
    except RuntimeError:
        return None


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast bf16": lambda: autocast("cpu", "bf16"),
    "autocast bf16 with cache": lambda: autocast("cpu", "bf16", cache=True),
    "autocast fp16": lambda: autocast("cpu", "fp16"),
    "autocast fp32": lambda: autocast("cpu", "fp32"),
    "autocast fp32 on cuda": lambda: autocast("cuda", "fp32"),
    "math_mode cpu": lambda: math_mode("cpu", fp32="ieee", search=True),
    "math_mode cuda ieee": lambda: math_mode("cuda:0", fp32="ieee", search=True),
    "math_mode cuda tf32": lambda: math_mode("cuda:0", fp32="tf32", search=True),
}
CHANGES_NOTHING = {"autocast fp32", "autocast fp32 on cuda"}
"""As far as this state shows: only the cache differs, and autocast was off before."""


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("name", CONTEXTS)
def test_global_state_is_restored_also_after_an_exception(nvidia: Install, name: str, fail: bool) -> None:
    nvidia(8, 0)
    before = global_state()
    try:
        with CONTEXTS[name]():
            assert global_state() != before
            if fail:
                raise KeyError("inside")
    except KeyError:
        assert fail
    assert global_state() == before


@pytest.mark.parametrize("inner", CONTEXTS)
@pytest.mark.parametrize("outer", CONTEXTS)
def test_contexts_nest_in_each_other(nvidia: Install, outer: str, inner: str) -> None:
    nvidia(8, 0)
    before = global_state()
    with CONTEXTS[outer]():
        between = global_state()
        with CONTEXTS[inner]():
            pass
        assert global_state() == between
    assert global_state() == before


# ------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize(("format", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_products_inside_have_the_format(format: str, dtype: torch.dtype) -> None:
    layer = nn.Linear(4, 4)
    with autocast("cpu", format):
        assert layer(torch.ones(2, 4)).dtype is dtype


@pytest.mark.parametrize("format", ["fp64", "fp32", "tf32", "hf32"])
def test_a_full_width_region_switches_an_outer_one_off(format: str) -> None:
    layer = nn.Linear(4, 4)
    with autocast("cpu", "bf16"):
        with autocast("cpu", format):
            assert layer(torch.ones(2, 4)).dtype is torch.float32
        assert layer(torch.ones(2, 4)).dtype is torch.bfloat16


def test_a_full_width_region_exists_on_every_device_type() -> None:
    with autocast("meta", "fp32"):
        assert nn.Linear(4, 4, device="meta")(torch.ones(2, 4, device="meta")).dtype is torch.float32


@pytest.mark.parametrize("format", ["fp8_e4m3", "int8", "e8m0"])
def test_a_format_that_autocast_would_silently_ignore_is_an_error(format: str) -> None:
    with pytest.raises(FormatError, match=rf"cannot run {format} on device 'cpu'\. Allowed: bf16, fp16, fp32"):
        autocast("cpu", format)


def test_a_device_that_is_not_there_is_an_error_and_not_a_disabled_region(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in BUILT_IN:
        if backend.device_type == "cuda":
            monkeypatch.setattr(backend, "is_available", lambda: False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(FormatError, match=r"cannot run bf16 on device 'cuda'\. Allowed: fp32\."):
            autocast("cuda", "bf16")
    assert caught == []


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(FormatError, match="unknown format 'half'"):
        autocast("cpu", "half")


def two_outputs(region: AbstractContextManager[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer gives before and after its weight changes inside the region."""
    layer, batch = nn.Linear(8, 8), torch.ones(1, 8)
    with region:
        before = layer(batch)
        with torch.no_grad():
            layer.weight.add_(1.0)
        return before, layer(batch)


def test_weights_changed_inside_the_region_are_seen() -> None:
    before, after = two_outputs(autocast("cpu", "bf16"))
    assert torch.allclose(after.float() - before.float(), torch.tensor(8.0), atol=0.1)


def test_with_the_cache_of_torch_autocast_they_are_not() -> None:
    for region in (torch.autocast("cpu", dtype=torch.bfloat16), autocast("cpu", "bf16", cache=True)):
        before, after = two_outputs(region)
        assert torch.equal(before, after)  # stale


def test_a_region_without_cache_does_not_read_the_cache_of_one_around_it() -> None:
    layer, batch = nn.Linear(8, 8), torch.ones(1, 8)
    with autocast("cpu", "bf16", cache=True):
        before = layer(batch)
        with torch.no_grad():
            layer.weight.add_(1.0)
        with autocast("cpu", "bf16"):
            assert not torch.equal(before, layer(batch))


# ------------------------------------------------------------------------------------ math_mode


def test_search_is_cudnns_benchmark(nvidia: Install) -> None:
    nvidia(8, 0)
    with math_mode("cuda:0", fp32="ieee", search=True):
        assert B.cudnn.benchmark is True
        with math_mode("cuda:0", fp32="ieee", search=False):
            assert B.cudnn.benchmark is False


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_tf32_on_a_gpu_without_it_is_an_error_before_anything_is_set(
    nvidia: Install, capability: tuple[int, int]
) -> None:
    nvidia(*capability)
    before = global_state()
    with pytest.raises(FormatError, match=r"does not multiply tf32.*Use 'fp32'"):
        math_mode("cuda:0", fp32="tf32", search=True)
    assert global_state() == before


@pytest.mark.parametrize("mode", ["tf32", "hf32"])
def test_a_cpu_has_no_fast_fp32_of_that_kind(mode: Any) -> None:
    with pytest.raises(FormatError, match=f"does not multiply {mode}"):
        math_mode("cpu", fp32=mode, search=False)


def test_a_mode_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(FormatError, match=r"fp32='fp32' is no way to compute FP32\. Allowed: 'ieee', 'tf32', 'hf32'"):
        math_mode("cpu", fp32="fp32", search=False)  # type: ignore[arg-type]


def test_amd_uses_the_same_flags(amd: Install) -> None:
    amd("gfx942:sramecc+:xnack-")
    with math_mode("cuda:0", fp32="tf32", search=True):
        assert (fp32_mode("cuda:0", "matmul"), B.cudnn.benchmark) == ("tf32", True)
    amd("gfx90a:sramecc+:xnack-")
    with pytest.raises(FormatError, match="does not multiply tf32"):
        math_mode("cuda:1", fp32="tf32", search=True)


def test_fp32_mode_of_a_device_type_without_flags_is_ieee() -> None:
    assert fp32_mode("meta", "matmul") == "ieee"


def test_regions_of_threads_that_overlap_leave_what_was_there(nvidia: Install) -> None:
    nvidia(8, 0)
    before = global_state()
    begun, ended = Event(), Event()

    def other() -> None:
        with math_mode("cuda", fp32="ieee", search=True):
            begun.set()
            ended.wait(30)

    thread = Thread(target=other)
    with math_mode("cuda", fp32="ieee", search=True):
        thread.start()
        assert begun.wait(30)
    assert (B.cuda.matmul.fp32_precision, B.cudnn.benchmark) == ("ieee", True)
    ended.set()
    thread.join()
    assert global_state() == before
