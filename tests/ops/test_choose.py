"""Which implementation each device runs, on every row of the capability table."""

import pytest

from deepseek_mp.backends.capabilities import Identity, resolve, table
from deepseek_mp.errors import ConfigError, FormatError
from deepseek_mp.ops import choose as module
from deepseek_mp.ops.choose import choose, made_of, product_of, quantise_delayed_of, quantise_of
from deepseek_mp.ops.native import product as native_product
from deepseek_mp.ops.reference import made as reference_made
from deepseek_mp.ops.reference import product as reference_product
from deepseek_mp.ops.reference import quantise as reference_quantise

BLOCKS = [("1x128", "128x128"), ("1x128", "1x128")]


def device(row):
    found = table()[row]
    identity = Identity(row=row, device_name=f"a {row}")
    return resolve(identity, vendor=found["vendor"], backend=found["backend"], executes=frozenset())


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.setattr(module, "_has_triton", lambda: True)
    monkeypatch.setattr(module.torch.version, "cuda", "13.0")


@pytest.mark.parametrize("row", table())
@pytest.mark.parametrize("pairs", [[("tensor", "tensor")], [("row", "row")], BLOCKS, [("1x32", "1x32")]])
def test_every_device_has_an_implementation_and_without_fp8_units_the_emulation(row, pairs):
    capabilities = device(row)
    names = sorted({name for pair in pairs for name in pair})
    chosen = choose("quantise", names, capabilities), choose("product", pairs, capabilities)
    has_fp8 = any(name.startswith("fp8") for name in capabilities.matmul_formats)
    if not has_fp8 or capabilities.backend not in ("cuda", "rocm"):
        assert chosen[0] == "reference"
    else:
        assert "reference" not in chosen


@pytest.mark.parametrize(
    ("row", "pairs", "expected"),
    [
        ("sm_90", BLOCKS, "native"),
        ("sm_90", [("row", "row")], "native"),
        ("sm_89", BLOCKS, "triton"),
        ("sm_89", [("tensor", "tensor")], "native"),
        ("sm_100", BLOCKS, "triton"),
        ("sm_90", [("1x32", "1x32")], "triton"),
        ("sm_100", [("1x32", "1x32")], "triton"),
        ("gfx942", BLOCKS, "triton"),
        ("gfx942", [("row", "row")], "native"),
        ("sm_80", BLOCKS, "reference"),
        ("gfx90a", [("tensor", "tensor")], "reference"),
    ],
)
def test_the_library_first_then_triton_then_the_reference(row, pairs, expected):
    assert choose("product", pairs, device(row)) == expected


def test_libraries_before_cuda_12_9_have_no_block_scales(monkeypatch):
    monkeypatch.setattr(module.torch.version, "cuda", "12.8")
    assert choose("product", BLOCKS, device("sm_90")) == "triton"
    assert choose("product", [("row", "row")], device("sm_90")) == "native"


def test_without_triton_the_reference_is_left(monkeypatch):
    monkeypatch.setattr(module, "_has_triton", lambda: False)
    assert choose("quantise", ["1x128"], device("sm_90")) == "reference"
    with pytest.raises(FormatError, match="the package triton is not installed"):
        choose("quantise", ["1x128"], device("sm_90"), "triton")


def test_what_is_asked_for_is_run_or_refused():
    assert choose("product", BLOCKS, device("sm_90"), "triton") == "triton"
    assert choose("product", BLOCKS, device("sm_90"), "reference") == "reference"
    with pytest.raises(FormatError, match="no product of 1x128 with 128x128 scales"):
        choose("product", BLOCKS, device("sm_100"), "native")
    with pytest.raises(FormatError, match="has no FP8 units"):
        choose("product", BLOCKS, device("sm_80"), "triton")
    with pytest.raises(ConfigError, match="kernels='fast' for product"):
        choose("product", BLOCKS, device("sm_90"), "fast")


@pytest.mark.parametrize("pair", [("row", "tensor"), ("1x32", "1x128"), ("128x128", "128x128"), ("1x128", "row")])
def test_pairs_of_scales_that_no_kernel_reads_are_left_to_the_reference(pair):
    assert choose("quantise", sorted(set(pair)), device("sm_90")) == "triton"
    assert choose("product", [("row", "row"), pair], device("sm_90")) == "reference"
    with pytest.raises(FormatError, match=f"there is no kernel for products of {' with '.join(pair)} scales"):
        choose("product", [("row", "row"), pair], device("sm_90"), "triton")


def test_an_unknown_device_gets_the_reference():
    unknown = resolve(Identity(row=None, device_name="new"), vendor="nvidia", backend="cuda", executes=frozenset())
    assert choose("product", BLOCKS, unknown) == "reference"


def test_names_lead_to_functions():
    assert quantise_of("reference") is reference_quantise.quantise
    assert product_of("native") is native_product.product
    assert product_of("reference") is reference_product.product
    with pytest.raises(ConfigError, match="implementation 'native' of quantise"):
        quantise_of("native")
    assert made_of("quantise_gate_grads", "reference") is reference_made.quantise_gate_grads
    with pytest.raises(ConfigError, match="implementation 'native' of made"):
        made_of("quantise_made", "native")
    assert quantise_delayed_of("reference") is not quantise_of("reference")
    with pytest.raises(ConfigError, match="implementation 'native' of quantise"):
        quantise_delayed_of("native")


@pytest.mark.parametrize("row", ["x86_amx", "aarch64", "xpu_pvc"])
def test_a_library_without_fp8_units_is_used_only_when_asked_for(row):
    pairs = [("row", "row")]
    assert choose("product", pairs, device(row)) == "reference"
    assert choose("product", pairs, device(row), "native") == "native"
