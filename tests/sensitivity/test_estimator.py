"""Is the estimate right? Predictions against true changes of the loss, on batches held out from the estimate.

Rank correlation is that of the predicted change with the size of the true one, over pairs of unit and recipe.
"""

from statistics import mean, stdev

import pytest
import torch
from scipy.stats import spearmanr

from deepseek_mp.nn import units
from deepseek_mp.nn.call import parse_batch, run
from deepseek_mp.nn.unit import multiplies, original_class
from deepseek_mp.precision import RECIPES
from deepseek_mp.sensitivity import Probe, can_estimate
from deepseek_mp.sensitivity.truth import losses_in
from deepseek_mp.workloads.data import digits, library_windows
from deepseek_mp.workloads.gpt import GPTConfig, byte_gpt, next_byte_loss
from deepseek_mp.workloads.resnet import class_loss, small_resnet


def endless(loader):
    while True:
        yield from loader


def compared(model, loss_fn, batches, recipes, *, steps, calibration, held_out):
    """Predicted change by (unit, recipe), and the true one with its standard error, also of all units ("", recipe).

    The model is trained first.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        x, y = next(batches)
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    modules = {name: module for name, module in units(model).items() if multiplies(original_class(module))}
    probe = Probe(modules, [RECIPES[name] for name in recipes], items=64)
    for _ in range(calibration):
        call = parse_batch(next(batches))
        with probe.watching(call):
            found = run(model, call, loss_fn)
            probe.loss_is(found, loss_fn)
            found.loss.backward()
    readings = probe.read()
    cases = {
        (name, recipe): {module: RECIPES[recipe]}
        for name, module in modules.items()
        for recipe in recipes
        if can_estimate(module, RECIPES[recipe])
    }
    predicted = {key: readings[key[0]].effects[key[1]].loss_change for key in cases}
    together = {("", recipe): dict.fromkeys(modules.values(), RECIPES[recipe]) for recipe in recipes}
    true = {key: [] for key in (*cases, *together)}
    for _ in range(held_out):
        call = parse_batch(next(batches))
        _, changes = losses_in(lambda call=call: run(model, call, loss_fn).loss, {**cases, **together})
        for key, change in changes.items():
            true[key].append(change)
    return predicted, {key: (mean(values), stdev(values) / held_out**0.5) for key, values in true.items()}


def rank_correlation(predicted, true, recipes):
    keys = [key for key in predicted if key[1] in recipes]
    return spearmanr([predicted[key] for key in keys], [abs(true[key][0]) for key in keys])[0]


def captured(predicted, true, recipe, count):
    """What the units that are predicted to mind a recipe most do change the loss, over what the best choice would."""
    units = [key for key in predicted if key[1] == recipe]
    change = {key: abs(true[key][0]) for key in units}
    chosen = sorted(units, key=predicted.get)[-count:]
    return sum(change[key] for key in chosen) / sum(sorted(change.values())[-count:])


@pytest.mark.stress
def test_a_small_gpt():
    recipes = ("bf16", "fp16", "tensor", "block", "nvfp4")
    torch.manual_seed(0)
    counts = {"steps": 500, "calibration": 12, "held_out": 24}
    data = library_windows(length=64, batch_size=16, count=sum(counts.values()))
    model = byte_gpt(GPTConfig(width=64, heads=4, layers=3, context=64))
    predicted, true = compared(model, next_byte_loss, endless(data.train), recipes, **counts)
    found = {kind: rank_correlation(predicted, true, {kind}) for kind in recipes}
    found["all"] = rank_correlation(predicted, true, recipes)
    print({kind: round(float(value), 3) for kind, value in found.items()})
    # 0.83 to 0.93 by the processor's instructions and how long the model was trained, which small effects depend on,
    # and 0.25 at most where predictions are exchanged at random. Of the 13 units alone it is 0.4 to 0.8: the held-out
    # batches cannot tell most of them apart. Those that matter they can.
    assert found["all"] >= 0.75
    assert captured(predicted, true, "nvfp4", 3) >= 0.9
    for recipe in ("tensor", "block", "nvfp4"):
        total = sum(value for (_, kind), value in predicted.items() if kind == recipe)
        change, error = true["", recipe]
        print(recipe, total, change, error)
        # What FP8 changes is little more than what the held-out batches can tell; what FP4 changes is plain.
        unsure = 0 if recipe == "nvfp4" else 2 * error
        assert (change - unsure) / 2 < total < 2 * (change + unsure)


def test_a_small_resnet():
    recipes = ("bf16", "fp16", "tensor")
    torch.manual_seed(0)
    counts = {"steps": 60, "calibration": 16, "held_out": 24}
    predicted, true = compared(small_resnet(width=16), class_loss, endless(digits().train), recipes, **counts)
    found = rank_correlation(predicted, true, recipes)
    print(found)
    assert found >= 0.75
