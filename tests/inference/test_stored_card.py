"""A form and a card are the same after JSON."""

from __future__ import annotations

import json

import pytest

from deepseek_mp.inference import Card, Energy, Form, Latency, ServingPlan, Trial
from deepseek_mp.inference.layer_plan import LayerChoice, LayerPlan
from deepseek_mp.inference.stored_card import card_from_json, form_from_json

FORM = Form(format="bf16", channels_last=True, compiled=True)
TIMED = Trial(
    form=FORM,
    latency=Latency(median_ms=1.5, p95_ms=2.0, runs=7),
    error=1e-4,
    weight_bytes=3,
    peak_bytes=9,
    energy=Energy(joules=2.0, idle_watts=60.0, calls=3, window_s=1.0),
    why="taken",
)


def through_json(value):
    return json.loads(json.dumps(value.to_json()))


LAYERS = LayerPlan(why="two", choices=(LayerChoice(layer="a", kind="fp8", why="taken", saved_us=2.0, error=1e-5),))


@pytest.mark.parametrize("layers", [None, LAYERS])
def test_a_card_is_the_same(layers):
    trials = (TIMED, Trial(form=Form(), problem="out of memory"))
    plan = ServingPlan(form=FORM, budget=1e-3, metric="kl", trials=trials, layers=layers)
    card = Card(model="Net", device="a device", batch_size=4, plan=plan)
    assert card_from_json(through_json(card)) == card


def test_a_form_is_the_same_and_what_is_none_is_refused():
    assert form_from_json(through_json(FORM)) == FORM
    with pytest.raises(TypeError, match="speed"):
        form_from_json({"format": "bf16", "speed": 2})
    with pytest.raises(KeyError, match="layers"):
        card_from_json({"trials": []})
