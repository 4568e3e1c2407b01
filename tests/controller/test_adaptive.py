"""Every rule of the controller, with made-up measurements."""

import json
import math
import random
from dataclasses import replace

import pytest

from deepseek_mp.controller.adaptive import AdaptiveController
from deepseek_mp.controller.adaptive_units import AdaptiveUnit, Comparison
from deepseek_mp.controller.settings import AdaptiveSettings
from deepseek_mp.controller.speed import Gain, StepTime
from deepseek_mp.controller.spikes import HELD, Gradient
from deepseek_mp.precision import RECIPES, Operand, Reason
from deepseek_mp.sensitivity import Effect, Measured, UnitReading
from deepseek_mp.sensitivity.measure import OPERAND_FIELDS, PRODUCT_OPERANDS

SECONDS = {"bf16": 1e-3, "row": 0.6e-3, "fp32": 4e-3}
SETTINGS = AdaptiveSettings(warm_up=10, decide_every=10, patience=100, most_at_once=0.5)


def effect(second, **errors):
    found = {which: dict.fromkeys(OPERAND_FIELDS, 0.0) | errors for which in PRODUCT_OPERANDS}
    return Effect(first=0.0, standard_error=1e-5, second=second, errors=found)


def reading(order, second=1e-5, kurtosis=3.0, region=0.0, amax=1.0, **errors):
    return UnitReading(
        order=order,
        batches=1,
        calls=1,
        effects={"bf16": effect(region), "row": effect(second, **errors)},
        energy=1.0,
        row_energy=1.0,
        spreads={operand: {"kurtosis": kurtosis, "amax": amax} for operand in Operand},
    )


def measured(**units):
    readings = {name: reading(order, **values) for order, (name, values) in enumerate(units.items())}
    return Measured(readings=readings, loss=2.0, curvature=1.0)


def controller(names=("a", "b"), settings=SETTINGS, total_steps=1000, recipes=("row",), **values):
    units = {name: AdaptiveUnit(macs=1e9, seconds=SECONDS, recipes=recipes, inputs=1000) for name in names}
    return AdaptiveController(units, RECIPES["bf16"], settings, total_steps=total_steps, **values)


def allocated(**units):
    made = controller(tuple(units) or ("a", "b"))
    for _ in range(2):
        made.learn(measured(**(units or {"a": {}, "b": {}})), 15)
    made.decide(10)
    return made


def recipes(made):
    return {name: state.recipe for name, state in made.states.items()}


def test_nothing_is_decided_before_the_warm_up_and_two_probes():
    made = controller()
    made.learn(measured(a={}, b={}), 15)
    assert not made.due(10)
    made.learn(measured(a={}, b={}), 15)
    assert not made.due(9)
    assert made.due(10)


def test_the_first_allocation_is_applied_at_once_with_evidence():
    made = controller()
    for _ in range(2):
        made.learn(measured(a={}, b={}), 15)
    decisions = made.decide(10)
    assert [(d.layer, d.old, d.new, d.reason) for d in decisions] == [
        ("a", "bf16", "row", Reason.ALLOCATED), ("b", "bf16", "row", Reason.ALLOCATED),
    ]  # fmt: skip
    assert decisions[0].evidence["step"] == 10
    assert recipes(made) == {"a": "row", "b": "row"}
    assert not made.due(19)
    assert made.due(20)


def test_a_layer_whose_loss_exceeds_the_budget_stays():
    assert recipes(allocated(a={}, b={"second": 0.1})) == {"a": "row", "b": "bf16"}


def test_later_lowering_needs_agreement_in_a_row():
    made = allocated(a={}, b={"second": 0.1})
    for _ in range(40):
        made.learn(measured(a={}, b={"second": 1e-5}), 15)
    assert made.decide(20) == []
    assert made.decide(30) == []
    assert [d.layer for d in made.decide(40)] == ["b"]


def test_few_are_lowered_at_once():
    names = tuple("abcdefgh")
    made = controller(names, replace(SETTINGS, most_at_once=0.2, confirmations=1))
    for _ in range(2):
        made.learn(measured(**{name: {"second": 0.1} for name in names}), 15)
    made.decide(10)
    for _ in range(20):
        made.learn(measured(**{name: {"second": 1e-6} for name in names}), 15)
    assert len(made.decide(20)) == 2


def test_a_layer_is_raised_as_soon_as_the_budget_is_exceeded():
    made = allocated()
    for _ in range(12):
        made.learn(measured(a={}, b={"second": 0.1}), 15)
    (decision,) = made.decide(20)
    assert (decision.layer, decision.new, decision.reason) == ("b", "bf16", Reason.ALLOCATED)
    assert made.states["b"].locked_until == 120


@pytest.mark.parametrize(
    ("errors", "words"),
    [({"mass": -0.1}, "loses 10.00%"), ({"overflow": 0.1}, "overflow"), ({"by_row": 0.1}, "row-balanced")],
)
def test_a_hard_limit_raises_whatever_the_budget_says(errors, words):
    made = allocated()
    (decision,) = made.learn(measured(a=errors, b={}), 15)
    assert made.states["a"].locked_until == 115
    assert (decision.layer, decision.new, decision.reason) == ("a", "bf16", Reason.GUARDED)
    assert words in decision.detail


def test_growing_outliers_raise_and_lock_a_layer_that_alone_costs_the_budget():
    made = allocated()
    (decision,) = made.learn(measured(a={"kurtosis": 40.0, "second": 0.03}, b={"second": 0.03}), 20)
    assert (decision.layer, decision.evidence["guard"]) == ("a", "kurtosis")
    assert decision.evidence["when_lowered"] == 3.0
    assert made.states["a"].locked_until == 120


def test_outliers_that_seem_to_do_harm_raise_when_the_next_probe_says_so_too():
    made = allocated()
    seemed, fine = ({"kurtosis": 40.0, "second": second} for second in (0.003, 1e-5))
    for step in range(20, 60, 2):  # as one batch of healthy training says it now and then
        assert made.learn(measured(a=seemed, b={}), step) == []
        assert made.learn(measured(a=fine, b={}), step + 1) == []
    assert made.learn(measured(a=seemed, b={}), 60) == []
    again = controller()
    again.load_state_dict(json.loads(json.dumps(made.state_dict())))
    for one in (made, again):
        (decision,) = one.learn(measured(a=seemed, b={}), 61)
        assert (decision.layer, decision.evidence["guard"]) == ("a", "kurtosis")


def test_an_activation_that_grows_sparse_does_no_harm():
    made = allocated()
    for step in range(20, 30):
        assert made.learn(measured(a={"kurtosis": 126.0, "underflow": 0.1}, b={}), step) == []


@pytest.mark.parametrize(("errors", "probes"), [({"mass": -0.0105}, 4), ({"by_row": 0.0036}, 14), ({"mass": -0.11}, 1)])
def test_a_limit_that_one_batch_breaks_by_a_little_must_be_broken_in_the_mean_of_several(errors, probes):
    made = allocated()
    for _ in range(8):
        made.learn(measured(a={}, b={}), 15)
    raised = []
    while not raised:
        raised = made.learn(measured(a=errors, b={}), 15)
        probes -= 1
    assert probes == 0


def test_the_layer_that_made_a_bad_number_is_raised_and_stays_for_a_time_that_doubles():
    made = allocated()
    assert made.see(15, float("nan"), applied=False, first_bad_module="elsewhere") == []
    (decision,) = made.see(15, float("nan"), applied=False, first_bad_module="a")
    assert (decision.layer, decision.new, decision.reason) == ("a", "bf16", Reason.GUARDED)
    assert decision.evidence["guard"] == "non_finite"
    for step in range(20, 115, 10):
        assert made.decide(step) == []
    lowered = [made.decide(step) for step in (120, 130, 140)]
    assert [d.layer for decisions in lowered for d in decisions] == ["a"]
    made.see(150, float("nan"), applied=False, first_bad_module="a")
    assert made.states["a"].locked_until == 150 + 200


def test_a_jump_of_the_loss_raises_all_that_is_lowered():
    made = allocated(a={}, b={"second": 0.1})
    for step in range(50):
        assert made.see(step, 2.0, applied=True) == []
    assert made.see(50, 9.0, applied=True) == []
    (decision,) = made.see(51, 9.0, applied=True)
    assert decision.layer == "a"
    assert decision.evidence["guard"] == "loss_spike"


@pytest.mark.parametrize(
    ("gradient", "guard"),
    [(Gradient(norm=9.0, rms=1.0), "gradient_spike"), (Gradient(norm=1.0, rms=3.0), "update_rms")],
)
def test_a_spike_raises_its_layer_for_a_short_time(gradient, guard):
    made, usual = allocated(), Gradient(norm=1.0, rms=1.0)
    for step in range(50):
        assert made.see_gradients(step, {"a": usual, "b": usual}, 1e-3) == []
    if guard == "update_rms":
        assert made.see_gradients(49, {"b": gradient}, 1e-3) == []
    (decision,) = made.see_gradients(50, {"a": usual, "b": gradient}, 1e-3)
    assert (decision.layer, decision.old, decision.new, decision.reason) == ("b", "row", "bf16", Reason.GUARDED)
    assert decision.evidence["guard"] == guard
    assert decision.evidence["value"] == max(gradient.norm, gradient.rms)
    assert decision.evidence["locked_until"] == 50 + HELD == made.states["b"].locked_until
    assert recipes(made) == {"a": "row", "b": "bf16"}
    assert made.states["b"].patience == SETTINGS.patience  # which is for guards that see harm
    assert made.see_gradients(51, {"b": gradient}, 1e-3) == []
    restored = controller()
    restored.load_state_dict(json.loads(json.dumps(made.state_dict())))
    for one in (made, restored):
        assert one.see_gradients(52, {"a": gradient}, 1e-3) == []  # one at once
    after = 50 + HELD
    for one in (made, restored):
        one.see_gradients(after - 1, {"a": gradient}, 1e-3)
    again = [one.see_gradients(after, {"a": gradient}, 1e-3) for one in (made, restored)]
    assert again[0] == again[1] != []


def test_what_does_not_pay_is_not_lowered():
    """Late in training the loss hardly falls, so a rise costs many steps."""
    made = controller(total_steps=4000)
    for step in range(3900):
        made.see(step, 2.0 + 1e-7 * (3900 - step), applied=True)
    for _ in range(2):
        made.learn(measured(a={"second": 4e-4}, b={"second": 1e-12}), 15)
    made.decide(3900)
    assert recipes(made) == {"a": "bf16", "b": "row"}


def test_what_stops_paying_is_raised():
    made = allocated(a={"second": 1e-6}, b={"second": 1e-12})
    assert recipes(made) == {"a": "row", "b": "row"}
    for step in range(11, 950):
        made.see(step, 2.0 + 1e-9 * (950 - step), applied=True)
    (decision,) = made.decide(950)
    assert decision.layer == "a"
    assert "would save" in decision.detail


def test_a_rise_beyond_the_prediction_halves_the_budgets():
    made = allocated()
    decision = made.compare(20, Comparison(loss=2.5, exact=2.0, standard_error=0.01))
    assert made.scale == 0.5
    assert decision.reason is Reason.COMPARED
    assert decision.evidence["true_rise"] == pytest.approx(0.5)
    assert made.compare(30, Comparison(loss=2.02, exact=2.0, standard_error=0.01)).evidence["budget_scale"] == 0.625
    for _ in range(10):
        made.compare(40, Comparison(loss=2.5, exact=2.0, standard_error=0.0))
    assert made.scale == 0.125
    for _ in range(20):
        made.compare(40, Comparison(loss=2.0, exact=2.0, standard_error=0.0))
    assert made.scale == 1.0
    assert made.compare(50, Comparison(loss=2.0, exact=2.0, standard_error=0.0)) is None


def test_a_smaller_budget_raises():
    made = allocated(a={"second": 4e-4}, b={"second": 6e-4})
    assert recipes(made) == {"a": "row", "b": "row"}
    for _ in range(3):
        made.compare(20, Comparison(loss=2.5, exact=2.0, standard_error=0.0))
    assert [d.layer for d in made.decide(30)]


def test_products_may_be_lowered_one_by_one():
    settings = replace(SETTINGS, by_role=True)
    made = controller(("a",), settings)
    for _ in range(2):
        made.learn(measured(a={"second": 0.1}), 15)
    (decision,) = made.decide(10)
    assert decision.new == "row[dgrad+wgrad]"


def test_equal_numbers_give_equal_decisions_and_a_restored_controller_goes_on():
    one, other = allocated(), allocated()
    other = controller()
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for made in (one, other):
        for _ in range(12):
            made.learn(measured(a={"second": 0.1}, b={}), 15)
    assert one.decide(20) == other.decide(20)
    assert one.state_dict() == other.state_dict()


def test_a_flat_stretch_by_chance_raises_nothing():
    """Late enough for a slope, and batches that scatter by ten percent around a loss that falls."""
    for seed in range(6):
        made = allocated(a={"second": 1e-5}, b={"second": 1e-5})
        generator = random.Random(seed)
        for step in range(11, 220):
            made.see(step, (3.0 - 0.002 * step) * math.exp(generator.gauss(0, 0.1)), applied=True)
            if step % 10 == 0:
                assert made.decide(step) == []


def test_an_exceeded_budget_is_met_by_another_recipe_of_the_same_speed():
    names = {"a": {}}
    units = {"a": AdaptiveUnit(macs=1e9, seconds={**SECONDS, "block": 0.7e-3}, recipes=("row", "block"))}
    made = AdaptiveController(units, RECIPES["bf16"], SETTINGS, total_steps=1000)

    def probe(row):
        found = measured(**names)
        old = found.readings["a"]
        effects = {**old.effects, "row": effect(row), "block": effect(1e-6)}
        return replace(found, readings={"a": replace(old, effects=effects)})

    for _ in range(2):
        made.learn(probe(1e-6), 5)
    made.decide(10)
    assert recipes(made) == {"a": "row"}
    for _ in range(20):
        made.learn(probe(0.1), 15)
    (decision,) = made.decide(20)
    assert (decision.old, decision.new) == ("row", "block")


@pytest.mark.parametrize("loss", [float("inf"), float("nan")])
def test_a_loss_that_is_not_finite_halves_the_budgets_too(loss):
    made = allocated()
    decision = made.compare(20, Comparison(loss=loss, exact=2.0, standard_error=0.01))
    assert made.scale == 0.5
    assert json.dumps(decision.to_json(), allow_nan=False)
    assert made.compare(30, Comparison(loss=2.0, exact=loss, standard_error=0.01)) is None
    assert made.compare(30, Comparison(loss=2.0, exact=2.0, standard_error=float("inf"))) is None
    assert made.scale == 0.5


def test_a_batch_without_a_finite_loss_is_not_learned():
    made = allocated()
    before = made.state_dict()
    made.learn(replace(measured(a={}, b={}), loss=float("nan")), 15)
    assert made.state_dict() == before


def gain(saved, promised=0.0008):
    before = StepTime(seconds=0.01, error=0.0, promised=0.0)
    return Gain(before=before, after=StepTime(seconds=0.01 - saved, error=0.0, promised=promised))


def test_layers_go_back_at_once_where_steps_became_no_faster_and_stay():
    made = allocated()
    assert made.promised() == pytest.approx(0.0008)
    noted = made.timed(15, gain(-0.0001))
    assert (noted.layer, noted.reason) == ("", Reason.MEASURED_SLOWER)
    assert noted.evidence["saved_ms"] == pytest.approx(-0.1)
    assert made.due(15)
    assert {(d.layer, d.new) for d in made.decide(15)} == {("a", "bf16"), ("b", "bf16")}
    assert made.promised() == 0.0
    for step in range(2000, 5000, 500):
        assert made.decide(step) == []


def after_900_steps(told):
    """Two lowered layers near the end of a run whose loss falls slowly: one costs 5 % of the steps that remain."""
    made = allocated(a={"second": 3e-4}, b={"second": 1e-12})
    assert recipes(made) == {"a": "row", "b": "row"}
    told(made)
    for step in range(11, 900):
        made.see(step, 2.0 - 1e-4 * step, applied=True)
    made.decide(900)
    return made


def test_what_was_saved_less_than_promised_counts_as_much():
    assert recipes(after_900_steps(lambda made: made.timed(15, gain(0.0008)))) == {"a": "row", "b": "row"}
    assert recipes(after_900_steps(lambda made: made.timed(15, gain(0.0001)))) == {"a": "bf16", "b": "row"}


def test_savings_are_a_part_of_the_whole_step_where_that_was_timed():
    assert recipes(after_900_steps(lambda made: setattr(made, "pass_seconds", 0.002))) == {"a": "row", "b": "row"}
    assert recipes(after_900_steps(lambda made: setattr(made, "pass_seconds", 0.02))) == {"a": "bf16", "b": "row"}


def test_what_steps_showed_is_part_of_the_state():
    made = allocated()
    made.timed(15, gain(-0.0001))
    again = controller()
    again.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert again.kept == made.kept < 0


def lowered_with_fp32(**settings):
    made = controller(recipes=("fp32", "row"), settings=replace(SETTINGS, **settings))
    for _ in range(2):
        made.learn(measured(a={}, b={}), 5)
    made.decide(10)
    assert recipes(made) == {"a": "row", "b": "row"}
    return made


def test_a_healthy_run_never_goes_above_the_region():
    """Ten times what BF16 costs in healthy layers, with a scatter of two either way."""
    made, generator = lowered_with_fp32(), random.Random(0)
    for step in range(20, 900, 10):
        values = {n: {"region": 2e-5 * math.exp(generator.gauss(0, 0.35)), "second": 1e-5} for n in ("a", "b")}
        assert made.learn(measured(**values), step) == []
        made.decide(step)
        assert "fp32" not in recipes(made).values()


def test_outliers_that_harm_the_region_too_raise_above_it_at_once():
    made = lowered_with_fp32()
    (decision,) = made.learn(measured(a={"kurtosis": 40.0, "region": 4e-5}, b={}), 20)
    assert (decision.new, decision.reason) == ("fp32", Reason.GUARDED)
    assert decision.evidence["share"] == pytest.approx(0.02)


def test_outliers_that_the_region_bears_raise_to_it():
    made = lowered_with_fp32()
    (decision,) = made.learn(measured(a={"kurtosis": 40.0, "second": 0.03, "region": 1e-6}, b={}), 20)
    assert decision.new == "bf16"


def test_a_region_that_takes_a_share_of_the_budget_for_long_is_left():
    made = lowered_with_fp32()
    for step in (12, 14, 16, 18):
        assert made.learn(measured(a={"region": 2e-4}, b={}), step) == []
    (decision,) = made.decide(20)
    assert (decision.layer, decision.new, decision.reason) == ("a", "fp32", Reason.REGION_HARMS)
    assert "bf16 would take" in decision.detail
    assert made.states["a"].locked_until == 120


def test_a_region_that_harms_suddenly_is_left_at_once_and_from_any_recipe():
    made = controller(recipes=("fp32", "row"))
    (decision,) = made.learn(measured(a={"region": 1e-3}, b={}), 3)
    assert (decision.old, decision.new, decision.reason) == ("bf16", "fp32", Reason.REGION_HARMS)
    assert decision.evidence["guard"] == "region"


def test_it_comes_back_as_slowly_as_layers_are_lowered():
    made = controller(recipes=("fp32", "row"))
    for step in (3, 4):
        made.learn(measured(a={"region": 1e-3}, b={}), step)
    for step in range(10, 90, 2):
        made.learn(measured(a={}, b={}), step)
    made.decide(90)
    assert recipes(made)["a"] == "fp32"  # locked until step 103
    decided = [made.decide(step) for step in range(110, 180, 10)]
    moves = [[(d.layer, d.new) for d in decisions] for decisions in decided]
    assert moves == [[], [], [("a", "bf16")], [], [], [("a", "row")], []]
    assert decided[2][0].detail == "bf16 takes little of the budgets here again"


def test_a_layer_that_the_region_harms_raises_no_other_one():
    made = controller(("a", "b", "c"), recipes=("fp32", "row"))
    for _ in range(2):
        made.learn(measured(a={}, b={}, c={}), 5)
    made.decide(10)
    for step in (12, 14, 16, 18):
        made.learn(measured(a={"region": 2e-4}, b={}, c={}), step)
    assert [(d.layer, d.new) for d in made.decide(20)] == [("a", "fp32")]
    assert recipes(made) == {"a": "fp32", "b": "row", "c": "row"}


def test_a_comeback_that_fails_locks_for_twice_as_long():
    made = controller(recipes=("fp32", "row"))
    made.learn(measured(a={"region": 1e-3}, b={}), 3)
    assert made.states["a"].locked_until == 103
    made.states["a"].recipe = "bf16"
    made.learn(measured(a={"region": 1e-3}, b={}), 150)
    assert made.states["a"].locked_until == 350


def test_without_a_recipe_above_the_region_nothing_changes():
    made = allocated()
    assert made.learn(measured(a={"region": 1e-3}, b={"region": 1e-3}), 15) == []
    made.decide(20)
    assert set(recipes(made).values()) <= {"row", "bf16"}


def test_what_the_region_costs_counts_against_the_budget():
    settings = replace(SETTINGS, loss_budget=1e-4, noise_budget=100.0)
    free, taken = (controller(settings=settings) for _ in range(2))
    for made, region in ((free, 0.0), (taken, 1.6e-4)):
        for _ in range(2):
            made.learn(measured(a={"region": region, "second": 1.7e-4}, b={"region": 0.0, "second": 1e-4}), 5)
        made.decide(10)
    assert recipes(free) == {"a": "row", "b": "bf16"} or recipes(free) == {"a": "bf16", "b": "row"}
    assert recipes(taken)["b"] == "bf16"


def test_an_input_that_outgrew_the_probes_raises_and_the_next_probe_says_how_far():
    made = lowered_with_fp32()
    assert made.input_sizes() == {"a": 1.0, "b": 1.0}
    (decision,) = made.grown(30, {"a": 900.0})
    assert (decision.layer, decision.new, decision.evidence["guard"]) == ("a", "bf16", "input")
    assert made.input_sizes() == {"b": 1.0}
    assert made.grown(31, {"a": 900.0}) == []
    (further,) = made.learn(measured(a={"region": 4e-5, "amax": 900.0}, b={}), 31)
    assert (further.layer, further.new) == ("a", "fp32")
    assert made.readings["a"].batches == 1  # the past is no mean of this


def test_fp16_is_left_when_its_range_ends():
    units = {"a": AdaptiveUnit(macs=1e9, seconds={}, recipes=("fp16",))}
    made = AdaptiveController(units, RECIPES["bf16"], SETTINGS)

    def probe(amax, region=1e-3):
        old = reading(0, amax=amax)
        spreads = {**old.spreads, Operand.GRAD_OUTPUT: {"kurtosis": 3.0, "amax": 1e-4}}
        found = replace(old, effects={"bf16": effect(region), "fp16": effect(1e-6)}, spreads=spreads)
        return Measured(readings={"a": found}, loss=2.0, curvature=1.0)

    (raised,) = made.learn(probe(1.0), 3)
    assert raised.new == "fp16"
    made.learn(probe(1.0), 4)
    assert made.decide(10) == []
    (left,) = made.learn(probe(5e4), 4)
    assert (left.old, left.new, left.evidence["guard"]) == ("fp16", "bf16", "range")
    assert made.learn(probe(5e4), 5) == []
    (again,) = made.learn(probe(1.0), 400)
    assert again.new == "fp16"
    (bad,) = made.see(401, math.nan, applied=False, first_bad_module="a")
    assert (bad.old, bad.new) == ("fp16", "bf16")


def test_with_memory_as_the_objective_what_is_slower_is_lowered_and_the_bytes_are_said():
    slow = {"bf16": 1e-3, "row": 2e-3, "fp32": 4e-3}
    units = {name: AdaptiveUnit(macs=1e9, seconds=slow, recipes=("row",), inputs=1000) for name in ("a", "b")}
    for objective, recipe in (("time", "bf16"), ("memory", "row")):
        made = AdaptiveController(units, RECIPES["bf16"], replace(SETTINGS, objective=objective), total_steps=1000)
        for _ in range(2):
            made.learn(measured(a={}, b={}), 5)
        decisions = made.decide(10)
        assert recipes(made) == {"a": recipe, "b": recipe}
    assert decisions[0].evidence["saved_bytes"] == 1000
    assert decisions[0].evidence["saved_seconds"] < 0
    assert "taken instead of bf16 to save" in decisions[0].detail
    assert "bytes" in decisions[0].detail or "kiB" in decisions[0].detail or " B" in decisions[0].detail


def test_why_layers_were_not_lowered_is_said_once():
    made = controller(("a", "b", "c"))
    for _ in range(2):
        made.learn(measured(a={}, b={"second": 0.1}, c={"by_row": 0.01}), 5)
    assert made.explained(9) == []
    made.decide(10)
    found = made.explained(10)
    assert {(d.layer, d.old, d.new, d.reason) for d in found} == {
        ("b", "bf16", "bf16", Reason.ALLOCATED), ("c", "bf16", "bf16", Reason.ALLOCATED),
    }  # fmt: skip
    words = {d.layer: d.detail for d in found}
    assert "less than 4 times its cost" in words["b"]
    assert words["c"] == "row: " + "; ".join(
        f"row-balanced error of {operand} is 14.5 times the format's" for operand in ("input", "weight", "grad_output")
    )
    again = controller(("a", "b", "c"))
    again.load_state_dict(json.loads(json.dumps(made.state_dict())))
    for one in (made, again):
        one.decide(20)
        assert one.explained(20) == []


def test_nothing_is_allocated_when_the_rest_of_the_run_cannot_save_what_a_change_costs():
    for passes, lowered in ((0.0, True), (99.0, True), (101.0, False)):
        made = controller(total_steps=1000)
        for _ in range(2):
            made.learn(measured(a={}, b={}), 5)
        made.pass_seconds, made.switch_passes = 0.002, passes  # of each of two; 0.8 ms of 2 can be saved, in 500 steps
        assert bool(made.decide(500)) is lowered
        assert made.learn(measured(a={"mass": -0.02}, b={}), 501) != [] or not lowered, "guards always act"


def test_a_later_allocation_has_to_save_what_its_own_change_costs():
    """Not what all layers together could save: each change compiles blocks anew."""
    for passes, lowered in ((0.0, True), (150.0, True), (250.0, False)):
        made = allocated()
        made.states["b"].recipe, made.states["b"].locked_until = "bf16", 0
        made.pass_seconds, made.switch_passes = 0.002, passes  # b saves 0.4 ms of 2, in some 960 steps 192 passes
        found = [change for step in range(20, 20 + made.settings.confirmations) for change in made.decide(step)]
        assert [(d.layer, d.new) for d in found] == [("b", "row")] * lowered


def test_a_learning_rate_that_jumps_raises_all_and_nothing_is_lowered_while_it_is_high():
    made = allocated()
    for step in (15, 16):
        assert made.see_gradients(step, {}, 1e-3) == []
    found = made.see_gradients(17, {}, 5e-3)
    assert {(d.layer, d.old, d.new, d.reason) for d in found} == {
        ("a", "row", "bf16", Reason.GUARDED), ("b", "row", "bf16", Reason.GUARDED),
    }  # fmt: skip
    assert dict(found[0].evidence) == {
        "guard": "learning_rate", "rate": 5e-3, "highest": 1e-3, "step": 17, "locked_until": 117,
    }  # fmt: skip
    for state in made.states.values():
        state.locked_until = 0
    assert made.decide(20) == []
    made.see_gradients(21, {}, 1e-3)
    for step in range(30, 100, 10):
        made.decide(step)
    assert recipes(made) == {"a": "row", "b": "row"}


def test_a_budget_that_is_exceeded_raises_also_late_in_a_run():
    made = allocated()
    made.pass_seconds, made.switch_passes = 0.002, 1e6
    for _ in range(12):
        made.learn(measured(a={}, b={"second": 0.1}), 15)
    assert [(d.layer, d.new) for d in made.decide(20)] == [("b", "bf16")]


def test_a_state_in_a_recipe_that_is_no_choice_any_more_is_that_of_the_base():
    made = allocated()
    units = {name: AdaptiveUnit(macs=1e9, seconds=SECONDS, recipes=("block",)) for name in ("a", "b")}
    other = AdaptiveController(units, RECIPES["bf16"], SETTINGS, total_steps=1000)
    other.load_state_dict(made.state_dict())
    assert recipes(other) == {"a": "bf16", "b": "bf16"}
    assert other.readings == {}


def test_an_overflow_that_a_probe_saw_is_forgotten_with_the_next_one_that_does_not():
    made = controller()
    for seconds in (math.inf, 1e-5, 1e-5):
        made.learn(measured(a={"second": seconds}, b={}), 5)
    made.decide(10)
    assert recipes(made)["a"] == "row"


def test_the_largest_magnitude_of_the_past_fades():
    made = controller()
    for amax in (100.0, 1.0, 1.0, 1.0, 1.0, 1.0):
        made.learn(measured(a={"amax": amax}, b={}), 5)
    seen = made.readings["a"].spreads[Operand.INPUT]["amax"]
    assert 1.0 < seen < 50.0


def test_what_ceases_to_pay_goes_back_also_late_as_the_code_is_there():
    for total, step in ((1000, 990), (None, 20)):
        made = allocated()
        made.settings, made.total_steps = replace(SETTINGS, pays=1e9), total
        made.pass_seconds, made.switch_passes = 0.002, 1e4
        changes = made.decide(step)
        assert recipes(made) == dict.fromkeys("ab", "bf16")
        assert all("less than" in change.detail for change in changes)


def test_what_ceases_to_pay_is_no_reason_to_compile_when_the_rest_of_the_run_cannot_save_that():
    """A part of a block that goes back leaves a combination that was not there before."""
    for passes, kept in ((0.0, False), (1e4, True)):
        made = in_blocks()
        for name in ("one.b", "two.b"):  # beside which what the others save is nothing
            made.units[name] = replace(made.units[name], seconds={**SECONDS, "bf16": 1e3})
        made.pass_seconds, made.switch_passes = 0.002, passes
        made.decide(990)
        assert recipes(made)["one.b"] == "row"
        assert recipes(made)["one.a"] == ("row" if kept else "bf16")


def in_blocks():
    units = {
        name: AdaptiveUnit(
            macs=1e9, seconds=SECONDS, recipes=("row",), inputs=1000, block=name[:-2] if "." in name else ""
        )
        for name in ("one.a", "one.b", "two.a", "two.b", "head")
    }
    made = AdaptiveController(units, RECIPES["bf16"], replace(SETTINGS, most_at_once=0.2), total_steps=1000)
    for _ in range(2):
        made.learn(measured(**{name: {} for name in units}), 15)
    made.decide(10)
    return made


def test_a_spike_raises_the_whole_block_that_is_compiled_together_and_it_comes_back_together():
    made = in_blocks()
    assert made.lowered == ["one.a", "one.b", "two.a", "two.b", "head"]
    usual = {name: Gradient(norm=1.0) for name in made.units}
    for step in range(16, 60):
        assert made.see_gradients(step, usual, 1e-3) == []
    found = made.see_gradients(60, {**usual, "one.a": Gradient(norm=50.0)}, 1e-3)
    assert [(d.layer, d.new, d.reason) for d in found] == [
        ("one.a", "bf16", Reason.GUARDED), ("one.b", "bf16", Reason.GUARDED),
    ]  # fmt: skip
    assert found[1].evidence["guard"] == "block"
    assert made.states["one.b"].locked_until == 60 + HELD
    moved = [made.decide(step) for step in range(60 + HELD, 60 + HELD + made.settings.confirmations)]
    assert [[d.layer for d in some] for some in moved] == [[], [], ["one.a", "one.b"]], (
        "although one at a time is asked"
    )


def test_two_spikes_in_one_block_raise_each_layer_once():
    units = {
        name: AdaptiveUnit(macs=1e9, seconds=SECONDS, recipes=("row",), inputs=1000, block=name[0])
        for name in (f"{block}{index}" for block in "abcde" for index in range(4))
    }
    made = AdaptiveController(units, RECIPES["bf16"], SETTINGS, total_steps=1000)
    for _ in range(2):
        made.learn(measured(**{name: {} for name in units}), 15)
    made.decide(10)
    usual = {name: Gradient(norm=1.0) for name in units}
    for step in range(16, 60):
        made.see_gradients(step, usual, 1e-3)
    found = made.see_gradients(60, {**usual, "a1": Gradient(norm=50.0), "a2": Gradient(norm=40.0)}, 1e-3)
    assert sorted(change.layer for change in found) == ["a0", "a1", "a2", "a3"]
    assert all((change.old, change.new) == ("row", "bf16") for change in found)
    assert {change.layer for change in found if change.evidence["guard"] == "gradient_spike"} == {"a1", "a2"}
    assert {made.states[change.layer].locked_until for change in found} == {60 + HELD}


def test_a_spike_of_a_layer_outside_of_blocks_raises_it_alone():
    made = in_blocks()
    usual = {name: Gradient(norm=1.0) for name in made.units}
    for step in range(16, 60):
        made.see_gradients(step, usual, 1e-3)
    found = made.see_gradients(60, {**usual, "head": Gradient(norm=50.0)}, 1e-3)
    assert [d.layer for d in found] == ["head"]
