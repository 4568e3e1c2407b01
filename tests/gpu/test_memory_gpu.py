"""Memory on a GPU: the loss in chunks, its peak, steps that run out of memory, and the largest batch that fits."""

import gc
from contextlib import nullcontext

import pytest
import torch
from no_waiting import no_waiting
from torch import nn
from torch.nn import functional as F

from deepseek_mp import MixedPrecisionTrainer, find_batch_size
from deepseek_mp.nn import linear_cross_entropy
from deepseek_mp.optim import SGD, AdamW

pytestmark = pytest.mark.gpu
TOKENS, WIDTH, CLASSES = 8192, 512, 50257
CLOSE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def operands():
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, device="cuda", requires_grad=True)
    weight = (0.05 * torch.randn(CLASSES, WIDTH, device="cuda")).requires_grad_()
    target = torch.randint(0, CLASSES, (TOKENS,), device="cuda")
    target[::7] = -100
    return hidden, weight, target


def ordinary(hidden, weight, target):
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def measured(loss_of, dtype):
    """Loss, gradients, and the most bytes above what was there before."""
    hidden, weight, target = operands()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        loss = loss_of(hidden, weight, target)
    gradients = torch.autograd.grad(loss, [hidden, weight], torch.tensor(1024.0, device="cuda"))
    return loss, gradients, torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("dtype", CLOSE)
def test_the_loss_in_chunks_is_pytorch_s_in_a_fraction_of_the_memory(dtype):
    ours, theirs = (measured(function, dtype) for function in (linear_cross_entropy, ordinary))
    torch.testing.assert_close(ours[0], theirs[0], rtol=CLOSE[dtype], atol=0)
    for got, want in zip(ours[1], theirs[1], strict=True):
        assert got.dtype == want.dtype
        assert float((got - want).norm() / want.norm()) < CLOSE[dtype]
    assert ours[2] < theirs[2] / 4


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, WIDTH)
        self.body = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU())
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.body(self.embedding(tokens)))


def batch(size, length=512):
    tokens = torch.randint(0, CLASSES, (size, length + 1), device="cuda")
    return tokens[:, :-1], tokens[:, 1:]


def trainer(fused):
    torch.manual_seed(0)
    return MixedPrecisionTrainer(Model(), "bf16", device="cuda", fused_loss=fused, statistics_every=None)


def test_training_with_a_fused_loss_is_the_same_and_never_waits():
    torch.manual_seed(1)
    data = [batch(8) for _ in range(6)]
    runs = [trainer(fused) for fused in (True, False)]
    losses = [[run.step(part).loss for part in data] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    with no_waiting():
        for part in data[:2]:
            runs[0].step(part)


@pytest.fixture
def small_gpu():
    """A share of the memory, 3 GiB."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(3 * 2**30 / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.usefixtures("small_gpu")
def test_a_fused_loss_leaves_room_for_larger_batches():
    sizes = {}
    for fused in (True, False):
        run = trainer(fused)
        before = [p.clone() for p in run.model.parameters()]
        sizes[fused] = find_batch_size(run, batch, limit=4096).size
        assert all(torch.equal(*pair) for pair in zip(before, run.model.parameters(), strict=True))
        assert run.step(batch(sizes[fused])).status == "applied"
        del run, before
        torch.cuda.empty_cache()
    assert sizes[True] > 3 * sizes[False]


@pytest.mark.usefixtures("small_gpu")
def test_a_step_that_ran_out_of_memory_is_tried_again_within_the_except():
    run = trainer(False)
    run.step(batch(2))
    allocated = torch.cuda.memory_allocated()
    try:
        run.step(batch(1024))
    except torch.OutOfMemoryError:
        assert torch.cuda.memory_allocated() <= allocated + 2**26
        run.step(batch(2))
    assert run.steps_attempted <= 2
    run.settle()
    assert run.steps_applied == 2


def peak_of(run, data, steps=4):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(steps):
        run.step(data)
    run.settle()
    return torch.cuda.max_memory_allocated()


class RanOut(torch.autograd.Function):
    """Has no memory for the backward of many samples."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        if len(gradient) > 8:
            raise torch.OutOfMemoryError("out of memory")
        return gradient


class Branched(nn.Module):
    """The branch that runs out of memory comes first in the backward; the other one saves 64 MiB."""

    def __init__(self):
        super().__init__()
        self.first, self.side, self.last = nn.Linear(512, 4096), nn.Linear(4096, 8), nn.Linear(4096, 8)

    def forward(self, x):
        x = self.first(x).relu()
        return self.side(x) + RanOut.apply(self.last(x))


@pytest.mark.parametrize("counted", [True, False], ids=["counted", "not counted"])
def test_a_backward_that_ran_out_of_memory_holds_none(counted):
    """Of a step that is counted it runs on the caller's thread, where autograd keeps what it had still to do."""
    trainer = MixedPrecisionTrainer(Branched(), "fp32", device="cuda", statistics_every=None)
    batch = torch.randn(4096, 512, device="cuda"), torch.randint(0, 8, (4096,), device="cuda")
    trainer.step((batch[0][:8], batch[1][:8]))
    trainer.settle()
    trainer.stepper.counts, trainer.stepper.flops = counted, None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        trainer.step(batch)
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < 16 << 20


@pytest.mark.parametrize(("compiled", "share"), [(False, 0.8), (True, 0.75)])
def test_a_budget_is_kept_by_what_costs_least(compiled, share):
    """Of a model whose loss is in chunks anyway; eager, moments and masters are nearly all to be saved."""
    data = batch(16)

    def run_with(memory):
        torch.manual_seed(0)
        options = {"statistics_every": None, "compile": compiled, "optimizer": torch.optim.AdamW}
        return MixedPrecisionTrainer(Model(), "bf16", device="cuda", memory=memory, **options)

    plain = run_with(1000)
    before = peak_of(plain, data)
    assert plain.memory.taken == ()
    del plain
    gc.collect()
    run = run_with(share * before / 2**30)
    run.step(data)
    print(run.memory)
    assert run.memory.taken
    assert peak_of(run, data) <= share * before


class Deep(Model):
    """Most of its memory is what backward reads of its blocks."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(*(Block() for _ in range(8)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.wide, self.narrow = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2048), nn.Linear(2048, WIDTH)

    def forward(self, x):
        return x + self.narrow(F.gelu(self.wide(self.norm(x))))


@pytest.mark.usefixtures("small_gpu")
def test_auto_trains_on_batches_that_do_not_fit_as_they_are():
    options = {"statistics_every": None, "optimizer": torch.optim.AdamW, "device": "cuda"}
    plain = find_batch_size(MixedPrecisionTrainer(Deep(), "bf16", **options), batch, limit=4096)
    gc.collect()
    run = MixedPrecisionTrainer(Deep(), "bf16", memory="auto", **options)
    found = find_batch_size(run, batch, limit=4096)
    print(plain, found)
    assert found.measures
    assert found.size > 1.5 * plain.size
    data = batch(found.size)
    assert run.step(data).status == "applied"
    print(run.memory)
    assert peak_of(run, data) <= run.memory.limit_bytes <= 3 * 2**30


@pytest.mark.parametrize("storage", ["bf16_sr", "bf16_kahan"])
@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_a_step_of_moments_in_blocks_that_may_be_skipped_never_waits(kind, storage):
    model = nn.Sequential(nn.Conv2d(64, 128, 3), nn.BatchNorm2d(128), nn.Flatten(), nn.Linear(WIDTH, WIDTH))
    model = model.to("cuda", torch.bfloat16, memory_format=torch.channels_last)
    options = {"momentum": 0.9} if kind is SGD else {}
    optimizer = kind(model.parameters(), lr=0.01, weight_decay=0.1, storage=storage, states="8bit", **options)
    optimizer.found_inf = torch.zeros((), device="cuda")
    kept = []
    for number in range(4):
        kept += [parameter.grad for parameter in model.parameters()]  # so that others get other memory
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter, dtype=torch.float32)
        with no_waiting() if number > 1 else nullcontext():
            optimizer.step()
    assert optimizer.tables


@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_a_rate_on_the_device_does_not_make_a_step_wait(kind):
    weights = [nn.Parameter(torch.randn(64, 64, device="cuda")) for _ in range(3)]
    options = {"momentum": 0.9} if kind is SGD else {}
    optimizer = kind(weights, lr=torch.tensor(0.01, device="cuda"), states="8bit", **options)
    for parameter in weights:
        parameter.grad = torch.randn_like(parameter)
    for number in range(3):
        with no_waiting() if number else nullcontext():
            optimizer.step()
    assert [float(optimizer.state[parameter]["step"]) for parameter in weights] == [3.0] * 3


@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_a_captured_step_has_the_bits_of_one_that_is_not(kind):
    found = []
    for captured in (False, True):
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(shape, device="cuda")) for shape in ((64, 64), (33, 129))]
        options = {"momentum": 0.9} if kind is SGD else {}
        optimizer = kind(weights, lr=0.01, weight_decay=0.1, states="8bit", **options)
        optimizer.found_inf = torch.zeros((), device="cuda")
        for parameter in weights:
            parameter.grad = torch.randn_like(parameter)
        for _ in range(2):
            optimizer.step()
        if captured:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
        for _ in range(3):
            graph.replay() if captured else optimizer.step()
        found.append([parameter.detach().clone() for parameter in weights])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
