"""What is refused before anything is measured."""

import pytest
import torch
from torch import nn

from deepseek_mp.errors import BatchError, ConfigError, LoaderError, PlanError
from deepseek_mp.ops.storage_marks import mark_master
from deepseek_mp.profiler.arguments import (
    check_batches,
    check_count,
    check_masters,
    check_model,
    check_unused,
    ordered_recipes,
)


@pytest.mark.parametrize(("model", "named"), [(None, "a NoneType"), (nn.Linear, "the class Linear")])
def test_a_model_is_a_module(model, named):
    check_model(nn.Identity())
    with pytest.raises(ConfigError, match=f"{named} as model"):
        check_model(model)


def test_trained_parameters_in_16_bits_are_refused_unless_looked_after():
    model = nn.Linear(2, 2, bias=False).bfloat16()
    with pytest.raises(PlanError, match="'weight', which is trained and stored in"):
        check_masters(model)
    mark_master(model.weight)
    check_masters(model)
    check_masters(nn.Linear(2, 2).half().requires_grad_(False))


X, Y = torch.zeros(4, 2), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize("batches", [X, {"x": X}, (X, Y), (X, X), [X, Y]])
def test_one_batch_is_refused(batches):
    with pytest.raises(BatchError, match="batches that are one batch"):
        check_batches(batches)


@pytest.mark.parametrize("batches", [[X, X[:2]], [X], [(X, Y), (X, Y)], iter([(X, Y)]), []])
def test_several_batches_are_taken(batches):
    check_batches(batches)


def test_what_cannot_be_iterated_is_refused():
    with pytest.raises(LoaderError, match="batches 5"):
        check_batches(5)


@pytest.mark.parametrize("value", [0, True, 2.5, "3"])
def test_a_count_is_a_whole_number(value):
    check_count("verify", 1, 1)
    with pytest.raises(ConfigError, match=r"verify=.*a whole number from 1 on"):
        check_count("verify", value, 1)


def test_unused_arguments_are_named():
    check_unused({"a": False}, "here")
    with pytest.raises(ConfigError, match=r"^a, c here"):
        check_unused({"a": True, "b": False, "c": True}, "here")


def test_formats_go_from_the_highest_to_the_lowest():
    assert list(ordered_recipes(("fp32", "tf32", "fp16", "bf16", "row"))) == ["fp32", "tf32", "fp16", "bf16", "row"]
    with pytest.raises(ConfigError, match="from the highest to the lowest"):
        ordered_recipes(("fp32", "row", "bf16"))
    with pytest.raises(PlanError, match="'bf17'"):
        ordered_recipes(("fp32", "bf17"))
