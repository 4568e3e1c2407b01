"""`HostChunk`: gradients that arrive, a step that can be put back, weights that are sent."""

from collections import Counter

import pytest
import torch
from fake_device import FakeLanes
from torch import nn

from deepseek_mp.optim.offload import host_chunk, rule
from deepseek_mp.optim.offload.crew import Crew
from deepseek_mp.optim.offload.host_chunk import HostChunk, Member, Memory
from deepseek_mp.optim.offload.pieces import Piece
from deepseek_mp.optim.offload.verdict import AS_IT_IS, Scaling

GROUP = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}


def chunk_of(*parameters, **options):
    memory = {"wire": None, "pin": False, "undo": True, "cast_on_host": True, "two_gradients": False}
    chunk = HostChunk(0, [Member(parameter=p, group=0) for p in parameters], Memory(**{**memory, **options}))
    for slot in chunk.slots:
        slot.adopt()
    return chunk


def send_gradient(chunk, lanes, value):
    for slot in chunk.slots:
        source = torch.full(slot.parameter.shape, value, dtype=slot.parameter.dtype)
        slot.mark, slot.pending = lanes.down(slot.wire, source), True


def parameters(dtype=torch.float32):
    return nn.Parameter(torch.ones(2, 3, dtype=dtype)), nn.Parameter(torch.zeros(5, dtype=dtype))


@pytest.mark.parametrize(
    ("dtype", "wire", "expected"),
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
    ],
)
def test_the_wires_format(dtype, wire, expected):
    chunk = chunk_of(*parameters(dtype), wire=wire)
    assert {slot.wire.dtype for slot in chunk.slots} == {expected}
    assert {slot.total.dtype for slot in chunk.slots} == {torch.float32}


def test_gradients_add_up_in_fp32():
    """In BF16 the second one would be lost."""
    chunk, lanes = chunk_of(*parameters(torch.bfloat16)), FakeLanes()
    for value in (256.0, 0.5):
        send_gradient(chunk, lanes, value)
        chunk.land(lanes)
    assert all(torch.equal(slot.master.grad, torch.full(slot.master.shape, 256.5)) for slot in chunk.slots)


@pytest.mark.parametrize("measure", [False, True])
def test_adding_up_that_failed_halfway_goes_on_where_it_was(monkeypatch, measure):
    """As after an interrupt, too: what was added is not added again."""
    monkeypatch.setattr(host_chunk, "BLOCK", 4)
    chunk, lanes = chunk_of(*parameters(), crew=Crew(1)), FakeLanes()
    send_gradient(chunk, lanes, 1.0)
    chunk.land(lanes)
    real, calls = Piece.add, iter(range(100))

    def add(piece, *given, **options):
        if next(calls) == 2:
            raise KeyboardInterrupt("pressed")
        real(piece, *given, **options)

    monkeypatch.setattr(Piece, "add", add)
    for value in (2.0, 4.0):
        send_gradient(chunk, lanes, value)
        if value == 2.0:
            with pytest.raises(KeyboardInterrupt, match="pressed"):
                chunk.land(lanes, measure=measure)
        chunk.land(lanes, measure=measure)
    assert all(torch.equal(slot.master.grad, torch.full(slot.master.shape, 7.0)) for slot in chunk.slots)
    if measure:
        assert torch.cat(chunk.norms()).norm().item() == pytest.approx(7.0 * 11**0.5)


def test_an_interrupt_just_behind_the_addition_does_not_let_it_be_made_twice(monkeypatch):
    """Python notices one when PyTorch comes back, which is where nearly all of the time goes."""
    chunk, lanes = chunk_of(*parameters(), crew=Crew(1)), FakeLanes()
    send_gradient(chunk, lanes, 1.0)
    chunk.land(lanes)
    real, calls = Piece.add, iter(range(100))

    def add(piece, *given, **options):
        real(piece, *given, **options)
        if next(calls) == 0:
            raise KeyboardInterrupt("pressed")

    monkeypatch.setattr(Piece, "add", add)
    send_gradient(chunk, lanes, 2.0)
    with pytest.raises(KeyboardInterrupt, match="pressed"):
        chunk.land(lanes)
    chunk.land(lanes)
    assert all(torch.equal(slot.master.grad, torch.full(slot.master.shape, 3.0)) for slot in chunk.slots)


def test_an_interrupt_when_all_is_added_loses_nothing(monkeypatch):
    chunk, lanes = chunk_of(*parameters(), crew=Crew(1)), FakeLanes()
    send_gradient(chunk, lanes, 2.0)
    real = HostChunk._used

    def used(chunk, slots):
        real(chunk, list(slots)[:1])
        raise KeyboardInterrupt("pressed")

    monkeypatch.setattr(HostChunk, "_used", used)
    with pytest.raises(KeyboardInterrupt, match="pressed"):
        chunk.land(lanes)
    assert all(torch.equal(slot.master.grad, torch.full(slot.master.shape, 2.0)) for slot in chunk.slots)


def test_what_was_added_in_part_and_discarded_is_no_more(monkeypatch):
    monkeypatch.setattr(host_chunk, "BLOCK", 4)
    chunk, lanes = chunk_of(*parameters(), crew=Crew(1)), FakeLanes()
    real, calls = Piece.add, iter(range(100))

    def add(piece, *given, **options):
        if next(calls) == 2:
            raise KeyboardInterrupt("pressed")
        real(piece, *given, **options)

    monkeypatch.setattr(Piece, "add", add)
    send_gradient(chunk, lanes, 2.0)
    with pytest.raises(KeyboardInterrupt, match="pressed"):
        chunk.land(lanes)
    chunk.discard(lanes)
    send_gradient(chunk, lanes, 3.0)
    chunk.land(lanes)
    assert all(torch.equal(slot.master.grad, torch.full(slot.master.shape, 3.0)) for slot in chunk.slots)


def test_what_is_discarded_is_not_added():
    chunk, lanes = chunk_of(*parameters()), FakeLanes()
    send_gradient(chunk, lanes, 1.0)
    chunk.discard(lanes)
    chunk.land(lanes)
    assert not chunk.has_gradients
    assert "land down 0" in lanes.events


@pytest.mark.parametrize("steps_before", [0, 2])
def test_restore_brings_back_everything(steps_before):
    chunk, lanes, states = chunk_of(*parameters()), FakeLanes(), {}
    send_gradient(chunk, lanes, 1.0)
    chunk.land(lanes)
    with torch.no_grad():
        for _ in range(steps_before):
            chunk.step([GROUP], states, chunk.gradients(), AS_IT_IS)
        before = [slot.master.detach().clone() for slot in chunk.slots]
        kept = {id(p): {key: value.clone() for key, value in state.items()} for p, state in states.items()}
        chunk.step([GROUP], states, chunk.gradients(), Scaling(clip=0.5))
        assert not torch.equal(before[0], chunk.slots[0].master)
        chunk.restore(states)
    assert all(torch.equal(value, slot.master) for value, slot in zip(before, chunk.slots, strict=True))
    assert {id(p): list(state) for p, state in states.items()} == {key: list(state) for key, state in kept.items()}
    assert all(torch.equal(state[key], kept[id(p)][key]) for p, state in states.items() for key in state)
    assert not chunk.kept


def test_the_factor_leaves_gradients_as_they_are():
    chunk, lanes = chunk_of(*parameters()), FakeLanes()
    send_gradient(chunk, lanes, 1.0)
    chunk.land(lanes)
    states = {}
    with torch.no_grad():
        chunk.step([GROUP], states, chunk.gradients(), Scaling(clip=0.5))
    assert torch.equal(chunk.slots[0].master.grad, torch.ones(2, 3))
    assert torch.allclose(states[chunk.slots[0].master]["exp_avg"], torch.full((2, 3), 0.05))


@pytest.mark.parametrize("cast_on_host", [True, False])
def test_weights_are_rounded_to_nearest(cast_on_host):
    chunk, lanes = chunk_of(*parameters(torch.bfloat16), cast_on_host=cast_on_host), FakeLanes()
    slot = chunk.slots[0]
    assert (slot.sending is slot.master) is not cast_on_host
    with torch.no_grad():
        slot.master.fill_(1 + 1.5 * 2**-8)
        chunk.send(lanes)
        chunk.freed(lanes)
    assert torch.equal(slot.parameter, torch.full((2, 3), 1 + 2**-7, dtype=torch.bfloat16))
    assert not slot.written


def test_the_memory_of_an_upload_is_not_overwritten():
    chunk, lanes = chunk_of(*parameters(torch.bfloat16)), FakeLanes()
    with torch.no_grad():
        for value in (2.0, 3.0):
            chunk.slots[0].master.fill_(value)
            chunk.send(lanes)
    assert lanes.events == ["up 0", "land up 0", "up 1"]
    assert torch.equal(chunk.slots[0].parameter, torch.full((2, 3), 2.0, dtype=torch.bfloat16))


@pytest.mark.parametrize("cast_on_host", [True, False])
def test_nobody_is_woken_for_weights_that_are_sent_as_they_are(monkeypatch, cast_on_host):
    chunk, given = chunk_of(*parameters(torch.bfloat16), cast_on_host=cast_on_host), []
    monkeypatch.setattr(chunk._crew, "run", given.append)
    chunk.send(FakeLanes())
    assert [len(tasks) for tasks in given] == [2 if cast_on_host else 0]


def test_what_was_rounded_before_a_restore_is_not_sent():
    chunk, lanes = chunk_of(*parameters(torch.bfloat16)), FakeLanes()
    send_gradient(chunk, lanes, 1.0)
    chunk.land(lanes)
    states = {}
    with torch.no_grad():
        chunk.step([GROUP], states, chunk.gradients(), AS_IT_IS)
        chunk.restore(states)
        chunk.send(lanes)
        chunk.freed(lanes)
    assert torch.equal(chunk.slots[0].parameter, torch.ones(2, 3, dtype=torch.bfloat16))


def test_handed_over_gradients_keep_their_memory():
    chunk, lanes = chunk_of(*parameters(), two_gradients=True), FakeLanes()
    send_gradient(chunk, lanes, 1.0)
    chunk.land(lanes)
    handed = chunk.hand_over()
    assert not chunk.has_gradients
    send_gradient(chunk, lanes, 2.0)
    chunk.land(lanes)
    slot = chunk.slots[0]
    assert torch.equal(handed[slot], torch.ones(2, 3))
    assert torch.equal(slot.master.grad, torch.full((2, 3), 2.0))


def test_is_complete_without_what_is_frozen():
    first, second = parameters()
    chunk = chunk_of(first, second)
    chunk.coming.add(chunk.slots[0])
    assert not chunk.is_complete
    second.requires_grad_(False)
    assert chunk.is_complete


SHAPES = ((70,), (3, 40), (16,), (8, 2), (64,))


def many(dtype):
    generator = torch.Generator().manual_seed(5)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divisor", [1.0, 3.0])
def test_blocks_give_the_numbers_of_one_piece(monkeypatch, dtype, divisor):
    """Some parameters are larger than a block, some share one, and one has no gradient."""
    found = []
    for block in (32, 1 << 20):
        monkeypatch.setattr(host_chunk, "BLOCK", block)
        chunk, lanes, states = chunk_of(*many(dtype)), FakeLanes(), {}
        with torch.no_grad():
            for value in (0.3, 0.7):
                send_gradient(chunk, lanes, value)
                chunk.land(lanes)
                chunk.slots[3].master.grad = None
                chunk.freed(lanes)
                chunk.step([GROUP], states, chunk.gradients(), Scaling(divisor=divisor))
                chunk.send(lanes)
            chunk.freed(lanes)
        numbers = [value for slot in chunk.slots for value in states.get(slot.master, {}).values()]
        found.append([*numbers, *(slot.master.detach() for slot in chunk.slots), *(s.parameter for s in chunk.slots)])
    assert len(found[0]) == 4 * 3 + 2 * 5
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def assert_put_back(monkeypatch, *, block, fails, changed=False, **options):
    """The second step fails in block number `fails`; afterwards all is as after the first.

    `changed`: the first slot was written before.
    """
    monkeypatch.setattr(host_chunk, "BLOCK", block)
    chunk, lanes, states = chunk_of(*many(torch.float32), **options), FakeLanes(), {}
    send_gradient(chunk, lanes, 1.0)
    chunk.land(lanes)
    with torch.no_grad():
        chunk.step([GROUP], states, chunk.gradients(), AS_IT_IS)
        before = [slot.master.detach().clone() for slot in chunk.slots]
        kept = [value.clone() for state in states.values() for value in state.values()]
        real, calls = rule.step, iter(range(100))

        def step(*given):
            real(*given)
            if next(calls) == fails:
                raise RuntimeError("failed")

        monkeypatch.setattr(rule, "step", step)
        with pytest.raises(RuntimeError, match="failed"):
            chunk.step([GROUP], states, chunk.gradients(), AS_IT_IS)
        assert not (changed and torch.equal(before[0], chunk.slots[0].master))
        chunk.restore(states)
    assert all(torch.equal(value, slot.master) for value, slot in zip(before, chunk.slots, strict=True))
    assert all(map(torch.equal, kept, [value for state in states.values() for value in state.values()]))


@pytest.mark.parametrize("fails", range(7))
def test_a_step_that_fails_in_any_block_is_put_back(monkeypatch, fails):
    assert_put_back(monkeypatch, block=32, fails=fails)


def test_gradients_larger_than_a_block_add_up(monkeypatch):
    monkeypatch.setattr(host_chunk, "BLOCK", 32)
    chunk, lanes = chunk_of(*many(torch.bfloat16)), FakeLanes()
    for value in (256.0, 0.5):
        send_gradient(chunk, lanes, value)
        chunk.land(lanes)
    assert all(torch.equal(slot.master.grad, torch.full(slot.master.shape, 256.5)) for slot in chunk.slots)


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_several_threads_give_the_numbers_of_one(monkeypatch, threads):
    """And what somebody else has put into states and gradients counts."""
    found = []
    for crew in (Crew(1), Crew(threads)):
        monkeypatch.setattr(host_chunk, "BLOCK", 16)
        chunk, lanes, states = chunk_of(*many(torch.bfloat16), crew=crew), FakeLanes(), {}
        with torch.no_grad():
            for value in (0.3, 0.7, 0.1):
                send_gradient(chunk, lanes, value)
                chunk.land(lanes)
                send_gradient(chunk, lanes, 0.01)
                chunk.slots[1].master.grad = chunk.slots[1].master.grad.t().contiguous().t()
                chunk.land(lanes)
                assert torch.allclose(chunk.slots[1].master.grad, torch.tensor(value + 0.01), rtol=1e-2)
                chunk.freed(lanes)
                chunk.step([GROUP], states, chunk.gradients(), Scaling(divisor=3.0))
                chunk.send(lanes)
                state = states[chunk.slots[0].master]
                state["exp_avg"] = state["exp_avg"] * 0.5
                for slot in chunk.slots:
                    slot.master.grad = None
        assert all(state["step"] == 3 for state in states.values())
        numbers = [value for slot in chunk.slots for value in states[slot.master].values()]
        found.append([*numbers, *(slot.master.detach() for slot in chunk.slots)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_team_has_the_bits_of_pytorch_s_adamw():
    """Its threads share the operations on a block, which is as many times as large."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape)) for shape in ((1200, 1000), (700, 33), (5,))]
    expected = [nn.Parameter(weight.detach().clone()) for weight in weights]
    crew = Crew(8)
    chunk, states = chunk_of(*weights, crew=crew), {}
    optimizer = torch.optim.AdamW(expected, lr=GROUP["lr"], fused=True)
    optimizer.param_groups[0].update({key: value for key, value in GROUP.items() if key != "params"})
    assert crew.width == 2
    with torch.no_grad():
        for _ in range(2):
            for slot, parameter in zip(chunk.slots, expected, strict=True):
                parameter.grad = torch.randn_like(parameter)
                slot.master.grad = slot.total.copy_(parameter.grad)
            chunk.step([GROUP], states, chunk.gradients(), AS_IT_IS)
            optimizer.step()
    assert all(torch.equal(slot.master, parameter) for slot, parameter in zip(chunk.slots, expected, strict=True))


def test_a_failure_of_one_thread_is_put_back_with_what_others_did(monkeypatch):
    assert_put_back(monkeypatch, block=16, fails=6, changed=True, crew=Crew(3))


def kept_ahead(monkeypatch, **options):
    """A chunk after one step, whose state before the next step is copied while nothing else is to be done."""
    monkeypatch.setattr(host_chunk, "BLOCK", 16)
    chunk, lanes, states = chunk_of(*many(torch.float32), crew=Crew(2), **options), FakeLanes(), {}
    send_gradient(chunk, lanes, 1.0)
    chunk.land(lanes)
    with torch.no_grad():
        chunk.step([GROUP], states, chunk.gradients(), AS_IT_IS)
    chunk.keep_ahead()
    chunk._ahead.end()
    keep = Counter()
    monkeypatch.setattr(
        host_chunk.Piece, "keep", lambda piece, real=host_chunk.Piece.keep: (keep.update([1]), real(piece))
    )
    return chunk, states, keep


def everything(chunk, states):
    numbers = [value.clone() for state in states.values() for value in state.values()]
    return [*numbers, *(slot.master.detach().clone() for slot in chunk.slots)]


@pytest.mark.parametrize("write", ["nothing", "a weight", "a moment", "another moment"])
def test_what_was_kept_ahead_is_not_kept_again_unless_it_was_written(monkeypatch, write):
    chunk, states, keep = kept_ahead(monkeypatch)
    master = chunk.slots[1].master
    with torch.no_grad():
        if write == "a weight":
            master[0, 0] = 7.0
        elif write == "a moment":
            states[master]["exp_avg"].mul_(0.5)
        elif write == "another moment":
            states[master]["exp_avg"] = states[master]["exp_avg"] * 0.5
        before = everything(chunk, states)
        chunk.step([GROUP], states, chunk.gradients(), AS_IT_IS)
        assert (sum(keep.values()) == 0) == (write == "nothing")
        assert not torch.equal(before[-1], chunk.slots[-1].master)
        chunk.restore(states)
    assert all(map(torch.equal, before, everything(chunk, states)))


def test_a_step_that_is_made_again_needs_no_new_copy(monkeypatch):
    chunk, states, keep = kept_ahead(monkeypatch)
    before = everything(chunk, states)
    for clip in (1.0, 0.5, 0.25):
        chunk.step([GROUP], states, chunk.gradients(), Scaling(clip=clip))
        chunk.restore(states)
        assert all(map(torch.equal, before, everything(chunk, states)))
    assert sum(keep.values()) == 0
    chunk.step([GROUP], states, chunk.gradients(), AS_IT_IS)
    second = everything(chunk, states)
    chunk.step([GROUP], states, chunk.gradients(), AS_IT_IS)
    assert sum(keep.values()) > 0  # of another state
    chunk.restore(states)
    assert all(map(torch.equal, second, everything(chunk, states)))


def test_a_step_that_comes_while_the_state_is_copied_ahead(monkeypatch):
    """Each block is kept once, by whoever comes to it first."""
    chunk, states, _ = kept_ahead(monkeypatch)
    for _ in range(20):
        before = everything(chunk, states)
        chunk.keep_ahead()
        chunk.step([GROUP], states, chunk.gradients(), AS_IT_IS)
        chunk.restore(states)
        assert all(map(torch.equal, before, everything(chunk, states)))
        chunk.step([GROUP], states, chunk.gradients(), AS_IT_IS)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("write", ["nothing", "counted", "data", "another one", "landed again"])
def test_norms_are_those_of_the_gradients_as_they_are(monkeypatch, threads, write):
    """Taken as they land; again of those that were written since."""
    monkeypatch.setattr(host_chunk, "BLOCK", 16)
    chunk, lanes = chunk_of(*many(torch.bfloat16), crew=Crew(threads)), FakeLanes()
    for slot, source in zip(chunk.slots, many(torch.bfloat16), strict=True):
        slot.mark, slot.pending = lanes.down(slot.wire, source.detach()), True
    taken, real = [], host_chunk.Piece.norms
    monkeypatch.setattr(host_chunk.Piece, "norms", lambda *args: (taken.append(1), real(*args))[1])
    chunk.land(lanes, measure=True)
    assert len(taken) == sum(-(-slot.total.numel() // 16) for slot in chunk.slots)
    taken.clear()
    grad = chunk.slots[1].master.grad
    if write == "counted":
        grad[0, 0] = 50.0
    elif write == "data":
        grad.data.mul_(3.0)
    elif write == "another one":
        chunk.slots[1].master.grad = grad * 2.0
    elif write == "landed again":
        send_gradient(chunk, lanes, 1.0)
        chunk.land(lanes)
    norm = torch.stack(chunk.norms()).square().sum().sqrt()
    expected = torch.cat([slot.master.grad.flatten() for slot in chunk.slots]).double().norm().float()
    assert torch.allclose(norm, expected, rtol=1e-5)
    assert (not taken) == (write == "nothing")
