import copy

import pytest
import torch
from torch import nn

from deepseek_mp.backends import Capabilities
from deepseek_mp.nn import apply, memory_format_of, revert
from deepseek_mp.precision import RECIPES, PrecisionPlan

CONTIGUOUS = PrecisionPlan(base=RECIPES["fp32"], memory_format="contiguous")
CHANNELS_LAST = PrecisionPlan(base=RECIPES["fp32"], memory_format="channels_last")


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3),
        nn.BatchNorm2d(8),
        nn.ConvTranspose2d(8, 4, 3),
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 3, groups=4),
    )


def _strides(model: nn.Module) -> list[tuple[int, ...]]:
    return [p.stride() for p in model.parameters()]


def test_channels_last_and_back_keep_parameters_and_values(everything: Capabilities) -> None:
    model = _model()
    parameters, values, strides = list(model.parameters()), copy.deepcopy(model.state_dict()), _strides(model)
    optimizer = torch.optim.AdamW(model.parameters())

    apply(model, CHANNELS_LAST, capabilities=everything)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model[0].weight.is_contiguous()
    assert memory_format_of(model) == "channels_last"
    once = _strides(model)
    pointers = [p.data_ptr() for p in model.parameters()]
    apply(model, CHANNELS_LAST, capabilities=everything)
    assert (_strides(model), [p.data_ptr() for p in model.parameters()]) == (once, pointers)

    apply(model, CONTIGUOUS, capabilities=everything)
    assert _strides(model) == strides
    assert memory_format_of(model) == "contiguous"
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], parameters, strict=True))
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name])


def test_a_channels_last_model_computes_the_same(everything: Capabilities) -> None:
    model, x = _model().eval(), torch.randn(2, 4, 9, 9)
    want = model(x)
    apply(model, CHANNELS_LAST, capabilities=everything)
    got = model(x)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(got, want, atol=1e-5)


def test_volumes_take_channels_last_3d_and_sequences_stay(everything: Capabilities) -> None:
    model = nn.Sequential(nn.Conv3d(4, 8, 3), nn.Conv1d(4, 8, 3))
    before = model[1].weight.stride()
    apply(model, CHANNELS_LAST, capabilities=everything)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert not model[0].weight.is_contiguous()
    assert model[1].weight.stride() == before


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
def test_revert_gives_back_the_strides_the_user_had(layout: str, everything: Capabilities) -> None:
    model = _model()
    if layout == "channels_last":
        model.to(memory_format=torch.channels_last)
    elif layout == "permuted":
        model[0].weight.data = model[0].weight.data.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    strides = _strides(model)
    for plan in (CHANNELS_LAST, CONTIGUOUS, CHANNELS_LAST):
        apply(model, plan, capabilities=everything)
    with torch.no_grad():
        model[0].weight += 1  # training in between
    value = model[0].weight.detach().clone()
    revert(model)
    assert _strides(model) == strides
    assert torch.equal(model[0].weight, value)


def test_a_format_by_name_keeps_the_layout_and_a_plan_decides_it(everything: Capabilities) -> None:
    model = _model().to(memory_format=torch.channels_last)
    assert apply(model, "fp32", capabilities=everything).memory_format == "channels_last"
    assert memory_format_of(model) == "channels_last"
    apply(model, CONTIGUOUS, capabilities=everything)
    assert memory_format_of(model) == "contiguous"


def test_a_convolution_weight_shared_by_two_units_is_laid_out_once(everything: Capabilities) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[1].weight = model[0].weight
    strides = model[0].weight.stride()
    apply(model, CHANNELS_LAST, capabilities=everything)
    assert model[0].weight is model[1].weight
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    revert(model)
    assert model[0].weight is model[1].weight
    assert model[0].weight.stride() == strides


def test_an_expanded_weight_is_left_as_it_is(everything: Capabilities) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    model[0].weight = nn.Parameter(torch.randn(4, 1, 3, 3).expand(4, 4, 3, 3), requires_grad=False)
    strides = model[0].weight.stride()
    apply(model, CHANNELS_LAST, capabilities=everything)
    assert model[0].weight.stride() == strides


@pytest.mark.parametrize("kernel", [1, 3])
def test_channels_last_gives_the_strides_that_module_to_gives(kernel: int) -> None:
    """Also to 1x1 kernels, which count as channels_last with other strides: their gradients would be copied."""
    model, theirs = (nn.Sequential(nn.Conv2d(8, 8, kernel)) for _ in range(2))
    before = model[0].weight.stride()
    theirs.to(memory_format=torch.channels_last)
    apply(model, CHANNELS_LAST)
    assert model[0].weight.stride() == theirs[0].weight.stride()
    apply(model, CONTIGUOUS)
    assert model[0].weight.stride() == before
