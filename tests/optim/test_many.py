"""Parameters that one kernel steps together: which they are, in how many launches, and what their tables say."""

import copy
import ctypes

import pytest
import torch
from torch import nn

from deepseek_mp.optim import SGD, AdamW, adamw, set_storage, sgd
from deepseek_mp.optim.stored import COMPENSATION, STREAM

SHAPES = [(64, 64), (32, 16, 3, 3), (33, 129), (20,), (32,)]


@pytest.fixture
def launches(monkeypatch):
    """What kernels for many are given; those for one fail."""
    given = []

    def alone(*_):
        raise AssertionError("stepped alone")

    for module, rule in ((adamw, "adamw"), (sgd, "sgd")):
        monkeypatch.setattr(module, f"fused_{rule}", lambda _: alone)
        monkeypatch.setattr(module, f"{rule}_of_many", lambda _: given.append)
    return given


def gradient(parameter):
    return torch.randn_like(parameter, dtype=torch.float32)


def optimizer_of(kind=AdamW, storage="bf16_kahan", shapes=SHAPES, **options):
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for parameter in params:
        if parameter.dim() == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)
    rule = {"momentum": 0.9} if kind is SGD else {}
    optimizer = kind(params, states="8bit", seed=7, **rule | options)
    for parameter in params:
        set_storage(optimizer, parameter, storage)
        parameter.grad = gradient(parameter)
    return optimizer, params


def at(address, count, dtype):
    """The values at an address."""
    size = count * torch.empty(0, dtype=dtype).element_size()
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype)


def in_order(tensor):
    """The values as they lie in memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


@pytest.mark.parametrize("kind", [AdamW, SGD])
@pytest.mark.parametrize("storage", ["fp32", "bf16_kahan", "bf16_sr"])
def test_tables_say_where_everything_of_a_parameter_lies(launches, kind, storage):
    optimizer, params = optimizer_of(kind, storage)
    optimizer.step()
    by_address = {parameter.data_ptr(): parameter for parameter in params}
    for now in launches:
        assert now.storage == storage
        assert now.seed == 7
        assert now.step == 1
        for line, address in zip(now.table.lines.tolist(), now.table.grads.tolist(), strict=True):
            parameter = by_address.pop(line[0])
            state, count = optimizer.state[parameter], parameter.numel()
            assert line[2] == count
            assert line[4] == state.get(STREAM, 0)
            assert now.gradient is parameter.grad.dtype
            assert torch.equal(at(line[0], count, parameter.dtype), in_order(parameter))
            assert torch.equal(at(address, count, now.gradient), in_order(parameter.grad))
            assert line[1] == (state[COMPENSATION].data_ptr() if storage == "bf16_kahan" else 0)
            assert now.permuted == (parameter.dim() == 4)
            assert line[5:7] == ([16, 9] if now.permuted else [line[5], 1])
            names = ["momentum_buffer"] if kind is SGD else ["exp_avg", "exp_avg_sq"]
            keys = [name + part for name in names for part in ("_codes", "_scales")] if now.in_blocks else names
            places = line[8:12] if now.in_blocks else line[8:12:2]
            assert places[: len(keys)] == [state[key].data_ptr() for key in keys]
            assert now.in_blocks == (parameter.dim() > 1)
    assert not by_address


def test_a_launch_for_each_kind_of_parameter(launches):
    optimizer, _ = optimizer_of()
    for _ in range(2):
        launches.clear()
        optimizer.step()
        # (64, 64) | channels_last | (33, 129), no multiple of 16 | (20,) | (32,)
        assert sorted(len(now.table.lines) for now in launches) == [1, 1, 1, 1, 1]
    assert len(optimizer.tables) == 5
    launches.clear()
    alike, _ = optimizer_of(shapes=[(64, 64), (32, 256), (128, 64)])
    alike.step()
    assert [len(now.table.lines) for now in launches] == [3]
    assert launches[0].table.programs == 4 + 8 + 8


@pytest.mark.parametrize("rate", [1e-2, torch.tensor(1e-2)])
def test_parameters_that_have_made_other_numbers_of_steps_have_launches_of_their_own(launches, rate):
    optimizer, params = optimizer_of(shapes=[(64, 64)] * 3, lr=rate)
    params[1].grad = None
    optimizer.step()
    params[1].grad = gradient(params[1])
    launches.clear()
    optimizer.step()
    found = [(now.step, now.table.lines[:, 0].tolist(), now.size) for now in launches]
    one, late, three = (parameter.data_ptr() for parameter in params)
    assert [(step, places) for step, places, _ in found] == [(2, [one, three]), (1, [late])]
    assert found[0][2] == pytest.approx(1e-2 / (1 - 0.9**2))
    assert found[1][2] == pytest.approx(1e-2 / (1 - 0.9))


@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_where_the_device_counts_one_launch_has_vectors_of_numbers(launches, kind):
    optimizer, params = optimizer_of(kind, shapes=[(64, 64)] * 3)
    params[0].grad = None
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    params[0].grad = gradient(params[0])
    launches.clear()
    optimizer.step()
    (now,) = launches
    order = [now.table.lines[:, 0].tolist().index(parameter.data_ptr()) for parameter in params]
    assert now.step[now.table.lines[:, 7]][order].tolist() == [1, 2, 2]
    assert now.skip is not None


def left_over(optimizer, monkeypatch):
    """Shapes of the parameters that are stepped in another way."""
    seen = []
    monkeypatch.setattr(adamw, "fused_adamw", lambda _: lambda parameter, *_: seen.append(parameter.shape))
    batches = optimizer._step_batch
    monkeypatch.setattr(optimizer, "_step_batch", lambda group, batch: [seen.append(p.shape) for p in batch.params])
    optimizer.step()
    monkeypatch.setattr(optimizer, "_step_batch", batches)
    return [tuple(shape) for shape in seen]


def test_what_does_not_fit_is_stepped_as_before(launches, monkeypatch):
    optimizer, params = optimizer_of(shapes=[(64, 64), (65, 64), (32, 16, 3, 3), (33,), (20,), (30,)])
    params[1].data = params[1].data.t().contiguous().t()
    params[2].grad = params[2].grad.contiguous()
    optimizer.watch([params[3]])
    params[5].grad = None
    assert sorted(left_over(optimizer, monkeypatch)) == [(32, 16, 3, 3), (33,), (65, 64)]
    assert sorted(now.table.lines[0, 2].item() for now in launches) == [20, 64 * 64]


@pytest.mark.parametrize("options", [{"states": "fp32"}, {"foreach": False}])
def test_whole_moments_are_stepped_so_beside_blocks_only(launches, monkeypatch, options):
    optimizer, _ = optimizer_of(shapes=[(20,), (32,)])
    optimizer.param_groups[0] |= options
    assert left_over(optimizer, monkeypatch) == [(20,), (32,)]
    assert not launches


def test_none_is_stepped_together_where_there_is_no_kernel(launches, monkeypatch):
    monkeypatch.setattr(adamw, "fused_adamw", lambda _: None)
    optimizer, _ = optimizer_of()
    optimizer.step()
    assert not launches


def test_tables_follow_what_moves_and_stay_where_nothing_does(launches):
    optimizer, (weight,) = optimizer_of(shapes=[(64, 64)])
    optimizer.step()
    (table,) = optimizer.tables.values()
    lines = table.lines
    optimizer.step()
    assert table.lines is lines
    weight.data = weight.data.clone()
    optimizer.step()
    assert table.lines[0, 0] == weight.data_ptr()
    set_storage(optimizer, weight, "fp32")
    optimizer.step()
    assert launches[-1].storage == "fp32"
    assert launches[-1].table.lines[0, 1] == 0


def test_copies_and_loaded_states_have_tables_of_their_own(launches):
    optimizer, params = optimizer_of()
    optimizer.step()
    other = copy.deepcopy(optimizer)
    assert not other.tables
    optimizer.load_state_dict(optimizer.state_dict())
    launches.clear()
    optimizer.step()
    held = {optimizer.state[p]["exp_avg_codes"].data_ptr() for p in params if p.dim() > 1}
    assert {place for now in launches if now.in_blocks for place in now.table.lines[:, 8].tolist()} == held
