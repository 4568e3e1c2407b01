"""Every refusal of `apply`: its message, and that the model is as it was."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from deepseek_mp.backends import Capabilities
from deepseek_mp.backends.base import FP8, SIXTEEN_BIT
from deepseek_mp.backends.capabilities import Identity, resolve
from deepseek_mp.errors import ConfigError, FormatError, PlanError
from deepseek_mp.nn import apply, current_plan, units
from deepseek_mp.ops.storage_marks import mark_storage
from deepseek_mp.precision import FORMATS, Granularity, PrecisionPlan, Reason, Recipe, ScaleRule
from deepseek_mp.precision.recipe import OperandRecipe, RoleRecipe
from deepseek_mp.precision.recipes import RECIPES, uniform
from deepseek_mp.precision.storage import StorageFormat


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))


def _state(model: nn.Module) -> list[Any]:
    return [(type(m), dict(m.__dict__)) for m in model.modules()] + [
        (id(p), p.dtype, None if is_lazy(p) else p.stride()) for p in model.parameters()
    ]


@pytest.fixture
def refused(everything: Capabilities) -> Callable[..., None]:
    """Apply a plan that must be refused with a message, and see that nothing changed."""

    def check(model: nn.Module, plan: PrecisionPlan | str, match: str) -> None:
        before = _state(model)
        with pytest.raises(PlanError, match=match):
            apply(model, plan, capabilities=everything)
        assert _state(model) == before
        assert current_plan(model) is None

    return check


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "recipe",
    [
        uniform(FORMATS["fp8_e4m3"]),
        uniform(FORMATS["int8"]),
        replace(RECIPES["bf16"], name="mixed", wgrad=RECIPES["fp32"].wgrad),
    ],
    ids=lambda recipe: recipe.name,
)
@pytest.mark.parametrize("place", ["base", "rule"])
def test_recipes_that_units_cannot_run_yet(recipe: Recipe, place: str, refused: Callable[..., None]) -> None:
    plan = PrecisionPlan.of(recipe) if place == "base" else PrecisionPlan.of("bf16", {"0": recipe})
    refused(_model(), plan, rf"recipe '{recipe.name}'.*in this release units run fp64, fp32, tf32, hf32, bf16, fp16")


def test_a_scaled_recipe_is_not_a_plain_format(refused: Callable[..., None]) -> None:
    side = OperandRecipe(format=FORMATS["bf16"], rule=ScaleRule.CURRENT)
    product = RoleRecipe(left=side, right=side)
    scaled = Recipe(name="scaled bf16", fprop=product, dgrad=product, wgrad=product)
    refused(_model(), PrecisionPlan.of(scaled), "recipe 'scaled bf16', which is not one unscaled format")


def test_a_plain_format_under_another_name_is_accepted(everything: Capabilities) -> None:
    mine = replace(RECIPES["bf16"], name="mine")
    assert apply(_model(), PrecisionPlan.of("fp32", {"0": mine}), capabilities=everything).decisions[0].new == "mine"


def test_a_rule_that_matches_nothing(refused: Callable[..., None]) -> None:
    refused(_model(), PrecisionPlan.of("bf16", {"3": "fp32"}), "rule '3' -> fp32 matches no layer")
    refused(nn.Sequential(nn.ReLU()), PrecisionPlan.of("bf16", {"0": "fp32"}), "rule '0' -> fp32 matches no layer")


def test_a_rule_that_covers_only_what_cannot_be_controlled(refused: Callable[..., None]) -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "out": nn.Linear(4, 4)})
    plan = PrecisionPlan.of("bf16", {"attention.out_proj": "fp32"})
    refused(model, plan, "covers only 'attention.out_proj'.*never calls its forward.*name a unit")


def test_a_rule_for_the_second_name_of_a_module(refused: Callable[..., None]) -> None:
    model = nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(2, 2))})
    model["decoder"] = model["encoder"]
    refused(model, PrecisionPlan.of("bf16", {"decoder": "fp32"}), "names 'decoder', the second name of 'encoder'")


@pytest.mark.parametrize("plan", ["bf16", "fp16", "fp32"])
def test_fp16_parameters(plan: str, refused: Callable[..., None]) -> None:
    refused(_model().half(), plan, r"'0\.weight' is stored in fp16.*master weights.*model\.float\(\)")


def test_frozen_fp16_parameters(refused: Callable[..., None]) -> None:
    refused(_model().half().requires_grad_(False), "bf16", r"'0\.weight' is stored in fp16")


def test_fp16_parameters_of_a_module_that_is_no_unit(refused: Callable[..., None]) -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(2).half())

    refused(nn.Sequential(nn.Linear(2, 2), Scale()), "bf16", r"'1\.gain' is stored in fp16")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_in_16_bits(dtype: torch.dtype, refused: Callable[..., None]) -> None:
    """Running statistics overflow or stick in 16 bits: also those of a norm without parameters."""
    refused(nn.Sequential(nn.BatchNorm1d(4)).to(dtype), "bf16", r"'0\.weight' is stored in (fp16|bf16)")
    bare = nn.Sequential(nn.BatchNorm1d(4, affine=False)).to(dtype)
    refused(bare, "bf16", r"'0\.running_mean' is stored in (fp16|bf16).*running statistics in fp32")


def test_trained_bf16_parameters(refused: Callable[..., None]) -> None:
    refused(_model().bfloat16(), "bf16", r"'0\.weight' is stored in bf16 and its unit runs in bf16.*small updates")


def test_frozen_bf16_parameters_need_a_bf16_unit(refused: Callable[..., None], everything: Capabilities) -> None:
    model = nn.Sequential(nn.Linear(4, 4).bfloat16().requires_grad_(False), nn.Linear(4, 4))
    refused(model, "fp32", r"'0\.weight' is stored in bf16 and its unit runs in fp32")
    apply(model, "bf16", capabilities=everything)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(2, 4)).dtype == torch.bfloat16


def test_fp64_needs_fp64_parameters_and_the_reverse(refused: Callable[..., None], everything: Capabilities) -> None:
    refused(_model(), "fp64", r"'0\.weight' is stored in torch\.float32 and its unit runs in fp64")
    refused(_model().double(), "bf16", r"'0\.weight' is stored in torch\.float64.*fp64 parameters for fp64 units")
    apply(_model().double(), "fp64", capabilities=everything)


@pytest.mark.parametrize(
    ("base", "pin", "match"),
    [
        ("fp32", {"0": "tf32"}, r"tf32 beside fp32 in '\(base\)', '2'"),
        ("tf32", {"0": "fp32"}, r"tf32 beside fp32 in '0'"),
        ("hf32", {"0": "fp32"}, r"hf32 beside fp32 in '0'"),
        ("bf16", {"0": "tf32", "2": "fp32"}, r"tf32 beside fp32 in '2'.*a setting of the whole process"),
        ("fp32", {"1": "tf32"}, r"tf32 beside fp32 in '\(base\)', '0', '2'"),
        ("tf32", {"0": "hf32"}, "a plan with both tf32 and hf32"),
    ],
)
def test_one_kind_of_fp32_products_for_the_process(
    base: str, pin: dict[str, str], match: str, refused: Callable[..., None]
) -> None:
    refused(_model(), PrecisionPlan.of(base, pin), match)


@pytest.mark.parametrize(
    ("base", "pin"),
    [("tf32", {"1": "fp32"}), ("bf16", {"0": "tf32", "1": "fp32"}), ("tf32", {"0": "bf16"}), ("bf16", {"0": "fp32"})],
)
def test_fp32_norms_go_with_tf32_products(base: str, pin: dict[str, str], everything: Capabilities) -> None:
    apply(_model(), PrecisionPlan.of(base, pin), capabilities=everything)


def test_lazy_modules_are_named(refused: Callable[..., None], everything: Capabilities) -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyBatchNorm1d())
    refused(model, "bf16", "'0', '2' has parameters without a shape.*Run one batch through the model")
    model(torch.randn(2, 3))
    apply(model, "bf16", capabilities=everything)
    assert list(units(model)) == ["0", "2"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripted_modules(refused: Callable[..., None]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.Linear(2, 2)))
    refused(model, "bf16", "'1' is compiled by TorchScript.*Convert, then script a copy")


def test_sharded_parameters(one_process: None, refused: Callable[..., None], everything: Capabilities) -> None:
    mesh = init_device_mesh("cpu", (1,))
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = nn.Parameter(distribute_tensor(model[1].weight.data, mesh, [Replicate()]))
    refused(model, "bf16", r"'1' is sharded \(FSDP, DTensor\).*Convert before sharding")
    replicated = DistributedDataParallel(_model())
    apply(replicated, "bf16", capabilities=everything)
    assert list(units(replicated)) == ["module.0", "module.1", "module.2"]


def test_fsdp_modules(one_process: None, refused: Callable[..., None]) -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    fsdp.fully_shard(model[0], mesh=init_device_mesh("cpu", (1,)))
    refused(model, "bf16", r"'0' is sharded \(FSDP, DTensor\)")


class OnlyFp32:
    """Capabilities of a device that emulates bf16 and has nothing else."""

    def require(self, format: str, *, emulate: bool) -> bool:
        if format != "fp32" and not emulate:
            raise FormatError(f"no {format} here")
        return format == "fp32"


@pytest.mark.parametrize("plan", ["bf16", PrecisionPlan.of("fp32", {"0": "bf16"})], ids=["base", "rule"])
def test_a_format_the_device_lacks(plan: PrecisionPlan | str) -> None:
    model = _model()
    before = _state(model)
    with pytest.raises(FormatError, match="no bf16 here"):
        apply(model, plan, capabilities=OnlyFp32())
    assert _state(model) == before
    decisions = apply(model, plan, emulate=True, capabilities=OnlyFp32()).decisions
    assert all((d.reason == "emulated") == (d.new == "bf16") for d in decisions)


def test_capabilities_are_those_of_the_models_device() -> None:
    """No CPU has fp8, hf32 or tf32."""
    for name in ("hf32", "block"):
        with pytest.raises(FormatError, match=name):
            apply(_model(), name)
    apply(_model(), "fp32")
    apply(nn.Sequential(nn.ReLU()), "fp32")


def test_granularity_is_part_of_a_recipe(refused: Callable[..., None]) -> None:
    rows = OperandRecipe(format=FORMATS["fp16"], granularity=Granularity(name="row", rows=1, columns=None))
    product = RoleRecipe(left=rows, right=rows)
    refused(
        _model(),
        PrecisionPlan.of(Recipe(name="rows", fprop=product, dgrad=product, wgrad=product)),
        "recipe 'rows', which is not one unscaled format",
    )


# -- FP8 -----------------------------------------------------------------------------------------------

ROW = RECIPES["row"].wgrad.left


def _device(row: str) -> Capabilities:
    executes = SIXTEEN_BIT | FP8
    return resolve(Identity(row=row, device_name="some chip"), vendor="some", backend="cuda", executes=executes)


@pytest.mark.parametrize(
    ("row", "recipe", "match"),
    [
        ("x86_avx512_bf16", "block", r"recipe 'block' needs fp8_e4m3, which some chip \(x86_avx512_bf16\) does not "
         r"multiply\. Allowed: recipes of .*bf16.*\. Use 'bf16', the nearest it has, or pass emulate=True"),
        ("sm_80", "fp8", "recipe 'row' needs fp8_e4m3.*Use 'bf16'"),
        ("sm_75", "mx", r"recipe 'mx' needs bf16.*Use 'fp16'"),
        ("gfx942", "block", r"recipe 'block' needs fp8_e4m3.*Use 'block_fnuz', the nearest it has"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["base", "rule"])
def test_a_device_without_fp8_names_the_nearest_recipe(row: str, recipe: str, match: str, place: str) -> None:
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))
    before = _state(model)
    plan = PrecisionPlan.of(recipe) if place == "base" else PrecisionPlan.of("fp32", {"0": recipe})
    with pytest.raises(FormatError, match=match):
        apply(model, plan, capabilities=_device(row))
    assert _state(model) == before


def test_a_format_that_cannot_even_be_emulated_offers_no_emulation() -> None:
    device = resolve(Identity(row="mps", device_name="M"), vendor="apple", backend="mps", executes=SIXTEEN_BIT)
    with pytest.raises(FormatError, match=r"recipe 'row' needs fp8_e4m3.*the nearest it has\.$"):
        apply(_model(), "row", emulate=True, capabilities=device)


def test_delayed_scales_are_those_of_whole_tensors(refused: Callable[..., None]) -> None:
    side = replace(ROW, rule=ScaleRule.DELAYED)
    mine = replace(RECIPES["row"], name="mine", fprop=RoleRecipe(left=side, right=side))
    refused(
        _model(), PrecisionPlan.of(mine), "recipe 'mine', whose row scales come from past.*Use granularity 'tensor'"
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"wgrad": RECIPES["fp32"].wgrad}, "recipe 'mine', which is not one unscaled format"),
        ({"wgrad": RoleRecipe(left=ROW, right=RECIPES["bf16"].wgrad.left)}, "'mine', which is not"),
        ({"wgrad": RoleRecipe(left=ROW, right=RECIPES["block"].wgrad.left)}, "row and 1x128, padded"),
        (dict.fromkeys(("fprop", "dgrad"), RECIPES["bf16"].fprop) | {"wgrad": RECIPES["fp32"].wgrad}, "'mine', which"),
    ],
)
def test_products_that_units_cannot_multiply(change: Any, match: str, refused: Callable[..., None]) -> None:
    refused(_model(), PrecisionPlan.of(replace(RECIPES["row"], name="mine", **change)), match)


def test_a_granularity_without_a_name_is_refused(refused: Callable[..., None]) -> None:
    side = replace(RECIPES["row"].fprop.left, granularity=Granularity(name="1x128", rows=1, columns=64))
    mine = replace(RECIPES["row"], name="mine", fprop=RoleRecipe(left=side, right=side))
    refused(_model(), PrecisionPlan.of(mine), "recipe 'mine', which is not")


def test_recipes_mixed_by_product_are_taken() -> None:
    parts = {"fprop": RECIPES["block"].fprop, "dgrad": RECIPES["bf16"].dgrad, "wgrad": RECIPES["tensor"].wgrad}
    mine = replace(RECIPES["row"], name="mine", **parts)
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))
    assert apply(model, mine, emulate=True).decisions[0].new == "mine"
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        model(torch.randn(3, 128)).sum().backward()


# -- recipes that are emulated only --------------------------------------------------------------------

INT8 = OperandRecipe(format=FORMATS["int8"], rule=ScaleRule.CURRENT)


@pytest.mark.parametrize(
    ("row", "nearest"),
    [("x86_avx2", "fp32"), ("x86_avx512_bf16", "bf16"), ("sm_80", "bf16"), ("sm_90", "block"), ("sm_100", "row")],
)
@pytest.mark.parametrize("place", ["base", "rule"])
def test_nvfp4_is_refused_without_emulation(row: str, nearest: str, place: str) -> None:
    model = _model()
    before = _state(model)
    plan = PrecisionPlan.of("nvfp4") if place == "base" else PrecisionPlan.of("fp32", {"0": "nvfp4"})
    match = rf"recipe 'nvfp4', which .* multiplies nowhere, on some chip \({row}\)\. .* Use '{nearest}', the nearest it"
    for kernels in (None, "reference"):
        with pytest.raises(FormatError, match=match):
            apply(model, plan, capabilities=_device(row), kernels=kernels)
    assert _state(model) == before
    found = apply(model, plan, capabilities=_device(row), emulate=True).decisions[0]
    assert (found.new, found.reason) == ("nvfp4", Reason.EMULATED)


def test_a_device_without_the_region_around_cannot_emulate_it() -> None:
    device = resolve(Identity(row="mps", device_name="M"), vendor="apple", backend="mps", executes=frozenset({"fp16"}))
    lacks_bf16 = replace(device, matmul_formats=frozenset({"fp32"}), emulated_formats=frozenset())
    with pytest.raises(FormatError, match=r"recipe 'nvfp4' needs bf16, which M .*Use 'fp32', the nearest it has\.$"):
        apply(_model(), "nvfp4", emulate=True, capabilities=lacks_bf16)


def test_own_recipes_are_rounded_where_emulation_was_agreed_to(refused: Callable[..., None]) -> None:
    mine = replace(RECIPES["row"], name="mine", fprop=RoleRecipe(left=INT8, right=INT8))
    refused(_model(), PrecisionPlan.of(mine), "recipe 'mine', which is not one .* or pass emulate=True to have its")
    assert apply(_model(), mine, emulate=True).decisions[0].reason is Reason.EMULATED


@pytest.mark.parametrize(
    "side", [replace(INT8, rule=ScaleRule.DELAYED), OperandRecipe(format=FORMATS["fp64"])], ids=["delayed", "fp64"]
)
def test_what_cannot_be_rounded_is_refused_under_emulation_too(side: OperandRecipe) -> None:
    mine = replace(RECIPES["row"], name="mine", fprop=RoleRecipe(left=side, right=side))
    with pytest.raises(PlanError, match=r"recipe 'mine', which is not one unscaled.* its formats and granularities.$"):
        apply(_model(), mine, emulate=True)


@pytest.mark.parametrize("name", ["cutlass", "Triton", 3])
def test_kernels_have_names(name: Any) -> None:
    with pytest.raises(ConfigError, match=r"kernels=.*Allowed: None, 'native', 'triton', 'reference'"):
        apply(_model(), "bf16", kernels=name)


@pytest.mark.parametrize("kernels", ["native", "triton"])
def test_kernels_that_the_device_lacks_are_refused(kernels: str) -> None:
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))
    before = _state(model)
    with pytest.raises(FormatError, match=f"kernels='{kernels}' for .*Allowed: reference"):
        apply(model, "block", emulate=True, kernels=kernels)
    assert _state(model) == before


def test_frozen_bf16_weights_are_quantised_too() -> None:
    model = nn.Sequential(nn.Linear(128, 128).bfloat16().requires_grad_(False), nn.Linear(128, 128))
    apply(model, "block", emulate=True)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        model(torch.randn(3, 128)).sum().backward()
    assert model[1].weight.grad is not None


def test_recipes_of_equal_name_are_equal() -> None:
    other = replace(RECIPES["block"], wgrad=RECIPES["row"].wgrad)
    with pytest.raises(PlanError, match=r"a recipe called 'block' that is not the known one.*Rename it"):
        apply(_model(), PrecisionPlan.of(other), emulate=True)


@pytest.mark.parametrize("row", ["sm_90", "sm_100"])
def test_scales_without_a_kernel_are_refused_or_labelled(row: str) -> None:
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))
    of_row, of_tensor = (RECIPES[name].fprop for name in ("row", "tensor"))
    mixed = replace(RECIPES["row"], name="mixed", fprop=replace(of_row, right=of_tensor.right))
    with pytest.raises(FormatError, match=r"recipe 'mixed' has no kernel for its scales.*'?row"):
        apply(model, mixed, capabilities=_device(row))
    plan = apply(model, mixed, capabilities=_device(row), emulate=True)
    assert [decision.reason for decision in plan.decisions] == [Reason.EMULATED, Reason.OUTPUT_LAYER]


def test_bf16_weights_that_an_optimizer_stores_are_taken_where_units_run_in_bf16(refused: Callable[..., None]) -> None:
    model = _model().bfloat16()
    for parameter in model.parameters():
        mark_storage(parameter, StorageFormat.BF16_SR)
    match = r"'2.weight' is stored in bf16_sr and its unit runs in fp32.*set_storage\(optimizer, parameter, 'fp32'\)"
    refused(model, PrecisionPlan.of("bf16", {"2": "fp32"}), match)
    refused(model, "fp32", "'0.weight' is stored in bf16_sr and its unit runs in fp32")
    refused(_model().bfloat16(), "bf16", "'0.weight' is stored in bf16 and its unit runs in bf16.*master weights")
    apply(model, "bf16")
    assert current_plan(model) is not None
