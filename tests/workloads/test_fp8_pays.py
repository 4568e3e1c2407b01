"""Where FP8 pays follows from the times, and only a device that multiplies FP8 itself is timed."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from deepseek_mp.backends import Capabilities, capabilities
from deepseek_mp.backends.capabilities import Identity, resolve, table
from deepseek_mp.nn.assign import products_of
from deepseek_mp.nn.functional import Products
from deepseek_mp.precision import RECIPES
from deepseek_mp.workloads import fp8_pays as module
from deepseek_mp.workloads.fp8_pays import WIDTHS, fp8_pays, layer_ms, own_products

DEVICE = torch.device("cpu")


def device(row: str) -> Capabilities:
    found = table()[row]
    identity = Identity(row=row, device_name=f"a {row}")
    return resolve(identity, vendor=found["vendor"], backend=found["backend"], executes=frozenset())


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    be("sm_90", monkeypatch)


def be(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is one of this row, in a PyTorch that has its products."""
    monkeypatch.setattr(module, "capabilities", lambda _: device(row))
    monkeypatch.setattr("deepseek_mp.ops.choose._has_triton", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def made_up(fp8: dict[int, float]) -> Callable[[torch.device, int, Products | None], float]:
    """Every width takes 10 ms in bf16, and in FP8 what is given."""

    def measure(_: torch.device, width: int, products: Products | None) -> float:
        return 10.0 if products is None else fp8[width]

    return measure


@pytest.mark.parametrize(
    ("fp8_ms", "start"),
    [
        ((14.0, 11.0, 9.0, 6.0), 2048),
        ((9.0, 8.0, 7.0, 6.0), 512),
        ((14.0, 12.0, 11.0, 10.0), None),
        ((14.0, 11.0, 10.0, 9.6), None),  # 4 % faster does not count
        ((14.0, 11.0, 9.6, 9.5), 4096),  # 5 % does
        ((9.0, 11.0, 9.0, 9.0), 2048),  # a lucky small one does not count: from there on, all have to be faster
        ((9.0, 9.0, 9.0, 11.0), None),
    ],
)
@pytest.mark.usefixtures("hopper")
def test_fp8_pays_from_the_width_from_which_it_is_faster(fp8_ms: tuple[float, ...], start: int | None) -> None:
    found = fp8_pays(DEVICE, layer_time=made_up(dict(zip(WIDTHS, fp8_ms, strict=True))))
    assert found.pays_from == start
    assert [(one.width, one.bf16_ms, one.fp8_ms) for one in found.times] == [
        (width, 10.0, ms) for width, ms in zip(WIDTHS, fp8_ms, strict=True)
    ]
    assert (found.recipe, found.rows, found.why) == ("block", 8192, "")
    assert json.loads(json.dumps(found.to_json()))["pays_from"] == start


@pytest.mark.usefixtures("hopper")
def test_the_summary_has_the_verdict_and_both_times() -> None:
    found = fp8_pays(DEVICE, widths=(512, 1024), layer_time=made_up({512: 14.0, 1024: 7.25}))
    assert found.summary == (
        "FP8 (recipe block) pays from width 1024 on. A linear layer of 8192 rows, FP8 and bf16: "
        "14 against 10 ms at width 512, 7.25 against 10 ms at width 1024"
    )
    slow = fp8_pays(DEVICE, widths=(512,), layer_time=made_up({512: 14.0}))
    assert slow.summary.startswith("FP8 (recipe block) is not 5 % faster at the largest width. ")


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "no time at width 2048: memory is short"),
        (MemoryError(), "no time at width 2048: memory is short"),
        (RuntimeError("no kernel\nat line 7"), "no time at width 2048: no kernel"),
    ],
)
@pytest.mark.parametrize("in_bf16", [True, False])
@pytest.mark.usefixtures("hopper")
def test_timing_stops_where_memory_is_short_or_a_kernel_fails(error: Exception, why: str, in_bf16: bool) -> None:
    asked: list[int] = []

    def measure(_: torch.device, width: int, products: Products | None) -> float:
        asked.append(width)
        if width == 2048 and (products is None) is in_bf16:
            raise error
        return 10.0 if products is None else 5.0

    found = fp8_pays(DEVICE, layer_time=measure)
    assert [one.width for one in found.times] == [512, 1024]
    assert (found.pays_from, found.why) == (512, why)
    assert found.summary.endswith(f"; {why}")
    assert max(asked) == 2048


def no_time(_: torch.device, width: int, products: Products | None) -> float:
    raise AssertionError("timed")


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("x86_avx512_bf16", "a x86_avx512_bf16 does not multiply fp8_e4m3"),
        ("x86_avx2", "a x86_avx2 does not multiply bf16 and fp8_e4m3"),
        ("sm_80", "a sm_80 does not multiply fp8_e4m3"),
        ("ascend950", "no product of this release runs the recipe row on a ascend950"),
    ],
)
def test_a_device_without_fp8_is_not_timed_and_says_why(row: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    be(row, monkeypatch)
    found = fp8_pays(DEVICE, layer_time=no_time)
    assert (found.times, found.pays_from, found.why) == ((), None, why)
    assert found.to_json()["times"] == []
    assert found.summary == f"FP8: {why}"


@pytest.mark.parametrize(
    ("row", "recipe"),
    [("sm_89", "row"), ("sm_90", "block"), ("sm_100", "row"), ("gfx942", "row_fnuz"), ("gfx950", "row")],
)
def test_the_recipe_is_the_devices_own(row: str, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    be(row, monkeypatch)
    products, why = own_products(DEVICE)
    assert products is not None
    assert (products.recipe.name, products.is_emulated, why) == (recipe, False, "")


def test_this_cpu_has_no_times() -> None:
    assert fp8_pays(DEVICE, layer_time=no_time).times == ()


@pytest.mark.parametrize("recipe", [None, "block", "row_gw_hp"])
def test_one_layer_is_timed_with_the_packages_own_products(recipe: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    products = None if recipe is None else products_of(RECIPES[recipe], capabilities(DEVICE), None)
    calls = 0
    original = module.low_precision_linear

    def watched(*args: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "low_precision_linear", watched)
    assert layer_ms(DEVICE, 128, products, rows=64, budget_s=0.0) > 0
    assert calls == (0 if recipe is None else 4)  # one to warm up, three to time


def test_nothing_random_is_drawn_from_the_users_generator() -> None:
    before = torch.get_rng_state()
    layer_ms(DEVICE, 128, None, rows=16, budget_s=0.0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
def test_times_of_the_device() -> None:
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    found = fp8_pays(accelerator, widths=(512, 1024))
    assert len(found.times) == (2 if own_products(accelerator)[0] else 0)
    assert found.why == "" or not found.times
