"""Which of an optimizer's parameters which kernels step, and what is left."""

import pytest
import torch
from torch import nn

from deepseek_mp.optim import SGD, AdamW
from deepseek_mp.optim.fused import KernelRule
from deepseek_mp.optim.kernels import KernelOptimizer

SHAPES = {"whole": (20,), "blocks": (64, 64), "odd": (64, 65)}


class Kernels(AdamW):
    """Records what is stepped how."""

    def __init__(self, *args, together, **options):
        super().__init__(*args, **options)
        self.stepped, self._with = {"together": [], "alone": []}, together

    def _kernel_rule(self, group):
        def alone(parameter, *_):
            self.stepped["alone"].append(tuple(parameter.shape))

        def many(shapes):
            self.stepped["together"] += shapes

        def make(table, **_):
            return sorted(table.lines[:, 2].tolist())

        return KernelRule(
            alone=lambda _: alone, together=lambda _: many if self._with else None, make=make, options={},
            moments=("exp_avg", "exp_avg_sq"), steps_of=lambda about: [Step() for _ in about.batch.params],
            numbers_of=lambda about: {"step": [1] * len(about.batch.params)},
        )  # fmt: skip


class Step:
    compensation = None


@pytest.mark.parametrize("together", [True, False])
def test_many_at_once_where_that_is_possible_and_else_one_by_one(together):
    params = {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
    params["odd"].data = params["odd"].data.t().contiguous().t()
    optimizer = Kernels(params.values(), states="8bit", together=together)
    for parameter in params.values():
        parameter.grad = torch.ones_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in params.items()}
    optimizer.step()
    assert sorted(optimizer.stepped["together"]) == ([20, 64 * 64] if together else [])
    assert optimizer.stepped["alone"] == ([(64, 65)] if together else [(64, 64), (64, 65)])
    moved = [name for name, parameter in params.items() if not torch.equal(parameter, before[name])]
    assert moved == ([] if together else ["whole"]), "what no kernel steps is stepped by plain operations"


@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_devices_without_kernels_step_by_plain_operations(kind):
    assert issubclass(kind, KernelOptimizer)
    for device in ("cpu", "meta"):
        weight = nn.Parameter(torch.randn(20, device=device))
        optimizer = kind([weight, nn.Parameter(torch.randn(64, 64, device=device))], states="8bit")
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert optimizer.state[weight]["step"] == 1
