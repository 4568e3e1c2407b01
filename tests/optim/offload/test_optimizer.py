"""`OffloadedOptimizer`: the numbers of AdamW, the order of copies, the window, the state."""

import copy

import pytest
import torch
from fake_device import FakeLanes, backward, offloaded, plain, same, small_model, weights
from torch import nn

from deepseek_mp.controller import LossScaler
from deepseek_mp.errors import ConfigError
from deepseek_mp.optim.offload import HostMemory, OffloadedOptimizer, OffloadSettings, Rates


def train_both(theirs, ours, reference, optimizer, *, steps=5, micro=2, clip=None):
    for _ in range(steps):
        for _ in range(micro):
            backward(theirs, ours)
        if clip is not None:
            nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        reference.step()
        reference.zero_grad()
        optimizer.step()
    optimizer.synchronize()


def test_an_applied_step_releases_its_gradients_at_once(monkeypatch):
    """An interrupt within PyTorch's `zero_grad` would leave gradients that are stepped on twice."""
    model = small_model()
    optimizer = offloaded(model)
    backward(model)

    def pressed(optimizer, set_to_none=True):
        raise RuntimeError("pressed")

    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", pressed)
    optimizer.step()
    assert all(pair.master.grad is None for pair in optimizer.pairs)


@pytest.mark.parametrize("mode", ["sync", "speculative"])
def test_a_scaler_may_step_again_after_a_failure(failing_step, mode):
    """`GradScaler` multiplies its scale by one that it finds, as after a step that has raised."""
    ours, theirs = small_model(), small_model()
    optimizer, reference = offloaded(ours, mode=mode), plain(theirs)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    failing_step.arm(after=0)
    batch = torch.randn(8, 19)
    (4.0 * ours(batch).square().mean()).backward()
    theirs(batch).square().mean().backward()
    with pytest.raises(RuntimeError, match="the host's step failed"):
        scaler.step(optimizer)
    failing_step.undo()
    scaler.step(optimizer)
    reference.step()
    optimizer.synchronize()
    assert optimizer.report.factor == 0.25
    assert same(weights(ours), weights(theirs))


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("undo", [True, False])
def test_fp32_is_adamw_without_chunks_to_the_bit(clip, undo):
    theirs, ours = small_model(), small_model()
    reference, optimizer = plain(theirs), offloaded(ours, max_grad_norm=clip, undo=undo)
    assert len(optimizer.split.host) > 2
    train_both(theirs, ours, reference, optimizer, clip=clip)
    assert same(weights(theirs), weights(ours))
    expected, found = reference.state_dict()["state"], optimizer.state_dict()["state"]
    assert {key: list(value) for key, value in found.items()} == {key: list(value) for key, value in expected.items()}
    assert all(torch.equal(found[i][key], expected[i][key]) for i in expected for key in expected[i])


def test_part_on_the_device_is_adamw_too():
    theirs, ours = small_model(), small_model()
    reference, optimizer = plain(theirs), offloaded(ours, free_bytes=2000)
    assert 0 < optimizer.split.fraction < 1
    train_both(theirs, ours, reference, optimizer)
    assert same(weights(theirs), weights(ours))


@pytest.mark.parametrize("cast", ["host", "device"])
@pytest.mark.parametrize("free_bytes", [None, 2000])
def test_bf16_model_has_fp32_masters(cast, free_bytes):
    """The reference holds FP32 weights, and computes gradients by a model of their rounded values."""
    rounded, ours = small_model(torch.bfloat16), small_model(torch.bfloat16)
    masters = [nn.Parameter(p.detach().float()) for p in rounded.parameters()]
    reference = torch.optim.AdamW(masters, lr=1e-2, fused=True)
    optimizer = offloaded(ours, cast=cast, free_bytes=free_bytes)
    for _ in range(5):
        for _ in range(2):
            backward(rounded, ours)
            for master, p in zip(masters, rounded.parameters(), strict=True):
                master.grad = p.grad.float() if master.grad is None else master.grad + p.grad.float()
                p.grad = None
        reference.step()
        reference.zero_grad()
        with torch.no_grad():
            for master, p in zip(masters, rounded.parameters(), strict=True):
                p.copy_(master)
        optimizer.step()
    optimizer.synchronize()
    assert same(weights(rounded), weights(ours))
    assert all(torch.equal(optimizer.master(p), m) for p, m in zip(ours.parameters(), masters, strict=True))
    assert not same([p.float() for p in weights(ours)], [m.detach() for m in masters])


@pytest.mark.parametrize(
    ("options", "on_host"),
    [
        ({}, False),
        ({"cast": "host"}, True),
        ({"rates": Rates(down=50e9, up=50e9, cpu=130e9)}, False),
        ({"rates": Rates(down=50e9, up=5e9, cpu=130e9)}, True),
        ({"rates": Rates(down=50e9, up=5e9, cpu=130e9), "cast": "device"}, False),
    ],
)
def test_the_device_rounds_unless_the_way_up_is_slow(options, on_host):
    optimizer = offloaded(small_model(torch.bfloat16), **options)
    assert optimizer.casts_on_host == on_host
    assert all((pair.sending is not pair.master) == on_host for pair in optimizer.pairs)


def test_gradients_leave_the_device_while_backward_runs():
    lanes, model = FakeLanes(), small_model()
    optimizer = offloaded(model, lanes)
    backward(model)
    assert all(p.grad is None for p in model.parameters())
    assert lanes.events[:8] == [f"down {number}" for number in range(8)]
    assert sorted(lanes.events[8:]) == [f"land down {number}" for number in range(8)]
    assert all(optimizer.master(p).grad is not None for p in model.parameters())


def test_forward_waits_for_each_chunk_where_it_is_read():
    lanes, model = FakeLanes(), small_model()
    optimizer = offloaded(model, lanes, chunk_bytes=4)
    backward(model)
    optimizer.step()
    lanes.events.clear()
    seen = []
    for layer in model:
        layer.register_forward_pre_hook(lambda *_: seen.append(sum("wait" in event for event in lanes.events)))
    backward(model)
    assert seen == [2, 2, 4, 6, 8]


def test_what_is_read_without_its_module_is_waited_for_at_the_start():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small_model()

        def forward(self, x):
            weight, bias = self.inner[4].weight, self.inner[4].bias
            return nn.functional.linear(self.inner[:4](x), weight, bias)

    model, theirs = Net(), small_model()
    optimizer, reference = offloaded(model), plain(theirs)
    train_both(theirs, model, reference, optimizer)
    assert same(weights(theirs), weights(model))


def test_without_a_model_the_step_waits():
    theirs, ours = small_model(), small_model()
    settings = OffloadSettings(chunk_bytes=1500)
    optimizer = OffloadedOptimizer(ours.parameters(), lr=1e-2, settings=settings, lanes=lambda _: FakeLanes())
    backward(theirs, ours)
    plain(theirs).step()
    optimizer.step()
    assert same(weights(theirs), weights(ours))


def test_groups_and_a_scheduler():
    theirs, ours = small_model(), small_model()

    def groups(model):
        matrices = [p for p in model.parameters() if p.dim() > 1]
        return [
            {"params": matrices, "weight_decay": 0.3},
            {"params": [p for p in model.parameters() if p.dim() < 2], "lr": 1e-3, "weight_decay": 0.0},
        ]

    reference = torch.optim.AdamW(groups(theirs), lr=1e-2, fused=True)
    optimizer = OffloadedOptimizer(groups(ours), lr=1e-2, model=ours, settings=OffloadSettings(chunk_bytes=1500))
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(each, T_max=5) for each in (reference, optimizer)]
    for _ in range(4):
        train_both(theirs, ours, reference, optimizer, steps=1)
        for schedule in schedules:
            schedule.step()
    assert optimizer.param_groups[1]["lr"] < 1e-3
    assert same(weights(theirs), weights(ours))


@pytest.mark.parametrize("free_bytes", [None, 2000])
def test_loss_scaler_steps_and_skips(free_bytes):
    theirs, ours = small_model(), small_model()
    reference, optimizer = plain(theirs), offloaded(ours, free_bytes=free_bytes)
    scaler = LossScaler(1024.0)
    for bad in (False, True, False):
        state = torch.get_rng_state()
        batch = torch.randn(8, 19)
        torch.set_rng_state(state)
        if not bad:
            backward(theirs)
            reference.step()
            reference.zero_grad()
        scaler.scale(ours(batch * (float("inf") if bad else 1)).square().mean()).backward()
        assert scaler.step(optimizer).status == ("skipped" if bad else "applied")
        optimizer.zero_grad()
        torch.set_rng_state(state)
        torch.randn(8, 19)
    optimizer.synchronize()
    assert same(weights(theirs), weights(ours))


def test_pytorchs_scaler_works():
    theirs, ours = small_model(), small_model()
    reference, optimizer = plain(theirs), offloaded(ours)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for _ in range(3):
        state = torch.get_rng_state()
        backward(theirs)
        reference.step()
        reference.zero_grad()
        torch.set_rng_state(state)
        scaler.scale(ours(torch.randn(8, 19)).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    optimizer.synchronize()
    assert same(weights(theirs), weights(ours))


@pytest.mark.parametrize("mode", ["sync", "speculative", "immediate"])
@pytest.mark.parametrize("transposed", [True, False])
def test_gradients_that_others_put_there_through_data_are_stepped_on(mode, transposed):
    """PyTorch moves a tensor to other memory then, which need not have its strides."""
    theirs, ours = small_model(), small_model()
    free = {"undo": False, "check_finite": False} if mode == "immediate" else {}
    reference, optimizer = plain(theirs), offloaded(ours, mode=mode, **free)
    for _ in range(3):
        backward(theirs, ours)
        optimizer.land()
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            gradient = optimizer.master(mine).grad
            twice = 2.0 * gradient
            gradient.data = twice.mT.contiguous().mT if transposed and twice.dim() > 1 else twice
            other.grad.mul_(2.0)  # PyTorch's fused kernel takes no notice of strides
        optimizer.step()
        reference.step()
        reference.zero_grad()
    optimizer.synchronize()
    assert same(weights(ours), weights(theirs))


def test_a_step_ends_the_window():
    """Also where only the model's gradients are set to None."""
    theirs, ours = small_model(), small_model()
    reference, optimizer = plain(theirs), offloaded(ours)
    for _ in range(3):
        backward(theirs, ours)
        reference.step()
        optimizer.step()
        theirs.zero_grad()
        ours.zero_grad()
    optimizer.synchronize()
    assert same(weights(theirs), weights(ours))


def test_zero_grad_forgets_what_is_on_its_way():
    theirs, ours = small_model(), small_model()
    reference, optimizer = plain(theirs), offloaded(ours)
    backward(ours)
    optimizer.zero_grad()
    train_both(theirs, ours, reference, optimizer, steps=1)
    assert same(weights(theirs), weights(ours))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_others_write_into_the_weights_is_kept(dtype):
    theirs, ours = small_model(dtype), small_model(dtype)
    optimizer, other = offloaded(ours), offloaded(theirs)
    backward(theirs, ours)
    optimizer.step()
    other.step()
    before = [optimizer.master(p).detach().clone() for p in ours.parameters()]
    with torch.no_grad():
        optimizer.synchronize()
        ours[0].weight[:3] = 0.5
        ours[2].weight.copy_(ours[2].weight.clone())
    ours.zero_grad()
    backward(ours)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    after = [optimizer.master(p).detach() for p in ours.parameters()]
    assert torch.equal(after[0][:3], torch.full((3, 19), 0.5))
    assert torch.equal(after[0][3:], before[0][3:])
    assert torch.equal(after[2], before[2])


@pytest.mark.parametrize("mode", ["sync", "speculative", "delayed"])
def test_refresh_takes_what_is_written_unseen(mode):
    model = small_model(torch.bfloat16)
    optimizer = offloaded(model, mode=mode, delay_from=0)
    backward(model)
    optimizer.step()
    optimizer.synchronize()
    master = optimizer.master(model[0].weight)
    before = master.detach().clone()
    model[0].weight.data[1] = 0.125
    backward(model)
    optimizer.refresh()
    assert torch.equal(master[1], torch.full((19,), 0.125))
    assert torch.equal(master[2:], before[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("free_bytes", [None, 2000])
@pytest.mark.parametrize("model_first", [True, False])
def test_resumes_to_the_bit(dtype, free_bytes, model_first):
    def fresh():
        model = small_model(dtype)
        return model, offloaded(model, free_bytes=free_bytes)

    def train(model, optimizer, steps):
        for step in steps:
            torch.manual_seed(step)
            backward(model)
            optimizer.step()

    whole, optimizer = fresh()
    train(whole, optimizer, range(6))
    first, optimizer = fresh()
    train(first, optimizer, range(3))
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict()))
    second, optimizer = fresh()
    if model_first:
        second.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    if not model_first:
        second.load_state_dict(saved[0])
    train(second, optimizer, range(3, 6))
    assert same(list(whole.state_dict().values()), list(second.state_dict().values()))


@pytest.mark.parametrize("free_bytes", [None, 2000])
def test_a_loaded_state_brings_its_bf16_weights(free_bytes):
    trained, fresh = small_model(torch.bfloat16), small_model(torch.bfloat16)
    first, second = offloaded(trained, free_bytes=free_bytes), offloaded(fresh, free_bytes=free_bytes)
    backward(trained)
    first.step()
    first.synchronize()
    assert not same(weights(trained), weights(fresh))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert same(weights(trained), weights(fresh))


def test_what_was_frozen_stays_frozen():
    model = small_model()
    model[0].requires_grad_(False)
    offloaded(model)
    assert [p.requires_grad for p in model.parameters()] == [False, False] + [True] * 6


def test_state_goes_to_adamw_and_back():
    ours, theirs = small_model(), small_model()
    optimizer = offloaded(ours)
    for _ in range(3):
        backward(ours)
        optimizer.step()
    theirs.load_state_dict(ours.state_dict())
    reference = plain(theirs)
    reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train_both(theirs, ours, reference, optimizer, steps=2)
    assert same(weights(theirs), weights(ours))
    optimizer.load_state_dict(reference.state_dict())
    train_both(theirs, ours, reference, optimizer, steps=2)
    assert same(weights(theirs), weights(ours))


def test_refuses_states_of_other_rules_and_stays_as_it_was():
    model = small_model()
    optimizer = offloaded(model)
    backward(model)
    optimizer.step()
    optimizer.synchronize()
    before = weights(model)
    for option in ("amsgrad", "maximize"):
        other = torch.optim.AdamW(small_model().parameters(), **{option: True})
        with pytest.raises(ConfigError, match="AdamW without them"):
            optimizer.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(torch.optim.AdamW([nn.Parameter(torch.zeros(1))]).state_dict())
    assert same(before, weights(model))
    assert all(optimizer.state[optimizer.master(p)]["step"] == 1 for p in model.parameters())


def test_a_closure_is_called_with_gradients_first():
    theirs, ours = small_model(), small_model()
    reference, optimizer = plain(theirs), offloaded(ours)
    batch = torch.randn(8, 19)

    def closure():
        loss = ours(batch).square().mean()
        loss.backward()
        return loss

    theirs(batch).square().mean().backward()
    reference.step()
    assert optimizer.step(closure).item() > 0
    optimizer.synchronize()
    assert same(weights(theirs), weights(ours))


def test_close_leaves_a_model_that_trains_on():
    model = small_model()
    optimizer = offloaded(model)
    backward(model)
    optimizer.step()
    optimizer.close()
    backward(model)
    assert all(p.grad is not None for p in model.parameters())


def test_refuses_options():
    with pytest.raises(ConfigError, match="betas"):
        OffloadedOptimizer(small_model().parameters(), betas=(1.0, 0.9))
    with pytest.raises(ConfigError, match=r"settings=\{'mode': 'sync'\}\. Allowed: OffloadSettings"):
        OffloadedOptimizer(small_model().parameters(), settings={"mode": "sync"})
    with pytest.raises(ConfigError, match="does not train"):
        offloaded(small_model()).master(torch.zeros(1))


def test_one_optimizer_after_the_other_in_the_same_memory():
    memory, found = HostMemory(), []
    for _ in range(2):
        model = small_model(torch.bfloat16)
        settings = OffloadSettings(chunk_bytes=1500)
        optimizer = OffloadedOptimizer(model.parameters(), lr=1e-2, model=model, settings=settings, memory=memory)
        for _ in range(3):
            torch.manual_seed(0)
            backward(model)
            optimizer.step()
        kept = {arena.flat.data_ptr() for chunk in optimizer._chunks for arena in chunk.arenas}
        assert memory.free_bytes == 0
        optimizer.close()
        assert memory.free_bytes > 0
        backward(model)
        assert model[0].weight.grad is not None
        found.append((kept, weights(model)))
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])


def test_a_group_that_comes_later_is_refused_and_nothing_changes():
    model, later = small_model(), nn.Linear(5, 5)
    optimizer = offloaded(model)
    with pytest.raises(ConfigError, match=r"groups at the start.*requires_grad=False until then"):
        optimizer.add_param_group({"params": later.parameters()})
    assert len(optimizer.param_groups) == 1


def test_refuses_options_of_a_group():
    model = small_model()
    with pytest.raises(ConfigError, match="lr=-1"):
        OffloadedOptimizer([{"params": model.parameters(), "lr": -1}])
    with pytest.raises(ConfigError, match="groups without parameters"):
        OffloadedOptimizer([{"params": []}])
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
