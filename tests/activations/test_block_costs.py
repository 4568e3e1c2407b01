"""What blocks cost is measured without a trace, and those that cannot run again are found."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from deepseek_mp.activations.block_costs import measure_blocks
from deepseek_mp.activations.block_state import Writes
from deepseek_mp.nn import convert
from deepseek_mp.nn.again import is_computed_again
from deepseek_mp.nn.delayed import place_scales, scales_of
from deepseek_mp.precision import PrecisionPlan

CPU = torch.device("cpu")


class Model(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x.tanh())


def measure(model, x=None, writes=None):
    x = torch.randn(4, 8) if x is None else x
    blocks = {f"blocks.{i}": block for i, block in enumerate(model.blocks)}
    return measure_blocks(model, blocks, lambda: model(x), CPU, Writes() if writes is None else writes)


def bytes_of(cost, numbers):
    return sum(cost.sizes[number] for number in numbers)


def obstacles(cost):
    return [block.obstacle for block in cost.blocks]


def test_bytes_are_those_of_storages_that_are_not_the_model_s():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            return self.down(F.relu(self.up(x)))

    cost = measure(Model(Block(), Block()))
    first, second = cost.blocks
    tensor = 4 * 8 * 4
    # Each keeps its input, and one tensor of twice the width: the ReLU and `down` save the same one.
    assert bytes_of(cost, first.saved) == bytes_of(cost, second.saved) == 3 * tensor
    assert first.inputs <= first.saved
    assert second.inputs <= second.saved
    assert bytes_of(cost, cost.elsewhere) == tensor  # tanh and the head save one
    assert all(block.forward_ms > 0 for block in cost.blocks)
    assert cost.kept_bytes(("blocks.0", "blocks.1")) == 3 * tensor


def test_casts_of_weights_are_not_counted():
    model = Model(nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cost = measure(model)
    assert [bytes_of(cost, block.saved) for block in cost.blocks] == [4 * 8 * 2, 4 * 8 * 2]


def test_nothing_is_left_behind():
    model = Model(*(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)) for _ in range(2)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(4, 8)
    drawn = torch.get_rng_state()
    cost = measure(model, x)
    assert obstacles(cost) == ["", ""]
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all("forward" not in vars(block) for block in model.blocks)
    assert not is_computed_again()


def test_delayed_scales_have_seen_nothing():
    model = Model(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8)))
    convert(model, PrecisionPlan.of("fp32", {"blocks.0.0": "delayed"}), emulate=True)
    place_scales(model)
    measure(model, torch.randn(4, 16))
    assert not any(bool(amax) for scales in scales_of(model) for amax in scales.amax)


def test_who_counts_calls_can_tell():
    model, seen = Model(nn.Sequential(nn.Linear(8, 8))), []
    model.register_forward_hook(lambda *_: seen.append(is_computed_again()))
    measure(model)
    assert seen == [True]


class Growing(nn.Module):
    """Gives another number of rows each time, as attention with a cache does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.cache = nn.Linear(8, 8), []

    def forward(self, x):
        self.cache.append(self.linear(x))
        return torch.stack(self.cache).sum(0)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(F.relu_(x.add_(1)))


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x)


def test_a_block_that_gives_other_numbers_again():
    assert obstacles(measure(Model(Growing(), nn.Sequential(nn.Linear(8, 8))))) == [
        "it gives other numbers when it runs again",
        "",
    ]


def test_a_block_that_writes_to_its_input():
    assert obstacles(measure(Model(nn.Sequential(nn.Linear(8, 8)), InPlace()))) == ["", "it writes to its input"]


def test_an_input_that_is_written_to_later():
    class Residual(Model):
        def forward(self, x):
            x = x.exp()
            for block in self.blocks:
                x += block(x)
            return self.head(x)

    found = obstacles(measure(Residual(nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8)))))
    assert found == ["its input is written to after it has run"] * 2


def test_a_block_inside_a_checkpoint_of_the_model():
    class Checkpointed(Model):
        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return self.head(x)

    cost = measure(Checkpointed(Own(), Own()))
    assert ["saved-tensor hooks of the model's own" in obstacle for obstacle in obstacles(cost)] == [True, True]


def test_a_forward_that_differentiates():
    class Forces(Model):
        def forward(self, x):
            x = x.detach().requires_grad_()
            energy = super().forward(x).square().sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0]

    cost = measure(Forces(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Sequential(nn.Linear(8, 8), nn.Tanh())))
    assert all(block.saved for block in cost.blocks)


def test_an_error_of_the_model_is_the_model_s():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        measure(Model(nn.Sequential(nn.Linear(7, 8))))


def test_buffers_that_are_written_unseen_become_known():
    norm = nn.InstanceNorm1d(8, track_running_stats=True)
    model, writes = Model(nn.Sequential(norm, nn.Linear(8, 8))), Writes()
    cost = measure(model, torch.randn(2, 8, 8), writes)
    assert obstacles(cost) == [""]
    assert {name for module, name in writes.places if module is norm} >= {"running_mean", "running_var"}
    assert torch.equal(norm.running_mean, torch.zeros(8))


def test_a_frozen_block_saves_nothing():
    frozen = nn.Sequential(nn.Linear(8, 8)).requires_grad_(False)
    assert measure(Model(frozen, nn.Sequential(nn.Linear(8, 8)))).blocks[0].saved == frozenset()
