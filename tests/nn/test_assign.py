"""Which recipe each unit gets, and the reason where it is not the one that the plan asks for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from deepseek_mp.backends import Capabilities, capabilities
from deepseek_mp.backends.capabilities import Identity, resolve
from deepseek_mp.nn import assign as assigning
from deepseek_mp.nn import register_unit
from deepseek_mp.nn.assign import Assigned, around, assign, for_device, output_layer
from deepseek_mp.nn.functional import multiple_of
from deepseek_mp.nn.survey import survey
from deepseek_mp.precision import RECIPES, PrecisionPlan, Reason, as_fnuz

CPU = capabilities("cpu")
EMULATED = frozenset(RECIPES)


def device(row: str) -> Capabilities:
    return resolve(Identity(row=row, device_name=row), vendor="some", backend="some", executes=frozenset())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(128), nn.Linear(128, 256), nn.Linear(256, 128)


class Model(nn.Module):
    """An embedding, two blocks, convolutions of one pixel and of three, a narrow layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 128)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.conv = nn.Conv1d(128, 128, 3)
        self.mix = nn.Conv1d(128, 128, 1)
        self.narrow = nn.Linear(128, 40)
        self.head = nn.Linear(128, 1024)


def given(model: nn.Module, plan: PrecisionPlan, kernels: str | None = None) -> dict[str, Assigned]:
    found = survey(model)
    return dict(assign(model, plan, found, device=CPU, emulated=EMULATED, kernels=kernels))


def short(assigned: dict[str, Assigned]) -> dict[str, tuple[str, Reason | None]]:
    return {name: (unit.recipe.name, unit.reason) for name, unit in assigned.items()}


def test_the_base_is_for_linear_layers_and_their_like_that_fit_and_are_not_the_output() -> None:
    assigned = given(Model(), PrecisionPlan.of("block"))
    assert short(assigned) == {
        "embed": ("bf16", Reason.NO_KERNEL),
        "blocks.0.norm": ("bf16", Reason.NO_KERNEL),
        "blocks.0.up": ("block", None),
        "blocks.0.down": ("block", None),
        "blocks.1.norm": ("bf16", Reason.NO_KERNEL),
        "blocks.1.up": ("block", None),
        "blocks.1.down": ("block", None),
        "conv": ("bf16", Reason.NO_KERNEL),
        "mix": ("block", None),
        "narrow": ("bf16", Reason.SHAPE),
        "head": ("bf16", Reason.OUTPUT_LAYER),
    }
    assert assigned["narrow"].detail == "its weight is [40, 128] and block takes multiples of 128"
    known = "nn.Linear and 1x1 convolutions only"
    assert f"{known}, not in a Conv1d with kernel_size=(3,)" in assigned["conv"].detail
    assert f"{known}, not in Embedding" in assigned["embed"].detail
    assert {name for name, unit in assigned.items() if unit.products} == {
        "blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "mix",
    }  # fmt: skip
    assert not any(unit.rounds for unit in assigned.values())


def test_a_rule_for_the_output_layer_is_obeyed_and_one_that_cannot_be_falls_back() -> None:
    plan = PrecisionPlan.of("fp32", {"head": "row", "narrow": "row", "conv": "row", "mix": "row"})
    assigned = given(Model(), plan)
    assert short(assigned)["head"] == ("row", None)
    assert short(assigned)["narrow"] == ("bf16", Reason.SHAPE)  # of the recipe's own region, also under fp32
    assert short(assigned)["conv"] == ("bf16", Reason.NO_KERNEL)
    assert short(assigned)["mix"] == ("row", None)
    assert short(assigned)["blocks.0.up"] == ("fp32", None)


def test_plain_recipes_are_for_everything() -> None:
    assert short(given(Model(), PrecisionPlan.of("bf16", {"head": "fp32"})))["head"] == ("fp32", None)
    assert all(unit.products is None for unit in given(Model(), PrecisionPlan.of("fp16")).values())


def test_subclasses_and_taught_kinds_are_no_linear_layers() -> None:
    @register_unit
    class Mine(nn.Linear):
        def forward(self, x: Any) -> Any:
            return 2 * super().forward(x)

    @register_unit
    class MyConv(nn.Conv2d):
        def forward(self, x: Any) -> Any:
            return 2 * super().forward(x)

    for module in (Mine(128, 128), MyConv(128, 128, 1)):
        assert short(given(nn.Sequential(module), PrecisionPlan.of("block"))) == {"0": ("bf16", Reason.NO_KERNEL)}


def test_one_object_runs_all_layers_of_a_recipe_also_the_next_time() -> None:
    first, again = (given(Model(), PrecisionPlan.of("block", {"head": "row"})) for _ in range(2))
    assert first["blocks.0.up"].products is first["blocks.1.down"].products is again["blocks.0.up"].products
    assert first["head"].products is again["head"].products
    assert first["head"].products is not first["blocks.0.up"].products


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    ("recipe", "multiple"), [("tensor", 16), ("row", 16), ("row_gw_hp", 16), ("mx", 32), ("block", 128)]
)
def test_sizes_fit_where_every_granularity_divides_them(recipe: str, multiple: int) -> None:
    assert multiple_of(RECIPES[recipe]) == multiple
    for sizes, fits in (
        ((multiple, 3 * multiple), True),
        ((multiple + 8, multiple), False),
        ((multiple, multiple + 8), False),
        ((0, multiple), False),
    ):
        why = assigning.why_not(RECIPES[recipe], nn.Linear(*sizes, device="meta"), is_output=False)
        assert (why is None) == fits
        assert fits or why[0] is Reason.SHAPE


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (Model(), "head"),
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.ReLU()), "1"),
        (nn.Linear(2, 2), ""),
        (nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 3)), None),
        (nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 1), nn.ReLU()), "1"),
        (nn.ModuleDict({"head": nn.Linear(128, 128), "blocks": nn.ModuleList([Block(), Block()])}), None),
        (nn.ModuleDict({"blocks": nn.ModuleList([Block()]), "pool": nn.Sequential(nn.Linear(2, 2))}), "pool.0"),
    ],
)
def test_the_output_layer_is_the_last_one_outside_a_list_of_blocks_if_it_could_be_fp8(
    model: nn.Module, name: str | None
) -> None:
    assert output_layer(model, survey(model)) == name


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=str)
def test_around_a_recipe_runs_its_region(recipe: Any) -> None:
    assert around(recipe).is_plain
    assert around(recipe).name == recipe.region
    assert not recipe.is_plain or around(recipe) is recipe


def test_an_output_convolution_that_does_not_fit_says_that() -> None:
    """A linear head says that it is one; what it says of rules then has to be tried."""
    for head, reason in ((nn.Conv2d(128, 21, 1), Reason.SHAPE), (nn.Linear(128, 21), Reason.OUTPUT_LAYER)):
        assert short(given(nn.Sequential(head), PrecisionPlan.of("block"))) == {"0": ("bf16", reason)}


def test_fp8_becomes_the_recipe_of_the_device_wherever_it_stands() -> None:
    plan = PrecisionPlan.of("fp8", {"head": "fp8", "blocks": "row"})
    made = for_device(plan, [device("sm_90")])
    assert (made.base, [rule.recipe.name for rule in made.rules]) == (RECIPES["block"], ["block", "row"])
    assert for_device(plan, [device("gfx942")]).base == as_fnuz(RECIPES["row"])
    assert for_device(PrecisionPlan.of("row"), [device("sm_90")]).base is RECIPES["row"]
    mine = replace(RECIPES["fp8"], wgrad=RECIPES["row_gw_hp"].wgrad)  # has the name and means something else
    assert for_device(PrecisionPlan.of(mine), [device("sm_90")]).base is mine
