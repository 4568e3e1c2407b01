"""The card shows the chosen form first, with all others beside it."""

import json
from dataclasses import replace

from deepseek_mp.inference import Card, Energy, Form, Latency, LayerChoice, LayerPlan, ServingPlan, Trial


def card():
    def trial(form, ms, **others):
        return Trial(form=form, latency=Latency(median_ms=ms, p95_ms=2 * ms, runs=5), error=0.0, why="so", **others)

    energy = Energy(joules=3.0, idle_watts=100.0, window_s=10.0, calls=1000)
    trials = (
        trial(Form(), 4.0, weight_bytes=2 << 20),
        trial(Form(format="bf16"), 2.0, weight_bytes=1 << 20, peak_bytes=3 << 20, energy=energy),
        Trial(form=Form(format="fp16"), problem="out of memory", why="out of memory"),
    )
    plan = ServingPlan(form=Form(format="bf16"), budget=1e-3, metric="kl", trials=trials)
    return Card(model="Net", device="a device", batch_size=8, plan=plan)


def test_a_table_of_all_forms_and_their_reasons():
    head, columns, _, bf16, fp32, fp16, _, *reasons = str(card()).splitlines()
    assert head == "Net on a device, batches of 8; error by kl"
    assert columns.replace(" ", "") == "formmsp95mspersecondweightsMiBpeakMiBJJaboveidleerror"
    assert bf16.split() == ["bf16", "2", "4", "4000", "1", "3", "3", "2", "0"]
    assert fp32.split() == ["fp32", "4", "8", "2000", "2", "0"]
    assert fp16.split() == ["fp16"]
    assert [line.split(maxsplit=1) for line in reasons] == [["bf16", "so"], ["fp32", "so"], ["fp16", "out of memory"]]


def test_a_plan_is_shown_as_its_reasons():
    assert str(card()).endswith("\n\n" + str(card().plan))
    assert [line.split(maxsplit=1)[0] for line in str(card().plan).splitlines()] == ["bf16", "fp32", "fp16"]


def test_kinds_by_layer_come_last():
    found = card()
    layers = LayerPlan(why="one of them", choices=(LayerChoice(layer="head", kind="fp8", why="faster"),))
    found = replace(found, plan=replace(found.plan, layers=layers))
    assert str(found).splitlines()[-5:] == ["", *layers.lines(120)]
    assert found.to_json()["layers"] == layers.to_json()
    assert card().to_json()["layers"] is None


def test_it_fits_the_terminal():
    assert max(map(len, card().text(40).splitlines())) <= 40


def test_the_chosen_trial_and_json():
    found = card()
    assert found.chosen.form.format == "bf16"
    read = json.loads(json.dumps(found.to_json()))
    assert read["form"]["format"] == "bf16"
    assert len(read["trials"]) == 3
    assert (read["model"], read["batch_size"], read["budget"], read["metric"]) == ("Net", 8, 1e-3, "kl")
