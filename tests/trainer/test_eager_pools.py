"""Max pools of uncompiled steps: PyTorch's numbers, fewer bytes, and a model that is as it was."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from deepseek_mp import MixedPrecisionTrainer
from deepseek_mp.activations import ActivationSettings
from deepseek_mp.precision import PrecisionPlan
from deepseek_mp.trainer import assembly, eager_pools, planning
from deepseek_mp.trainer.eager_pools import EagerPools


@pytest.fixture(autouse=True)
def _small_pools_too(monkeypatch):
    monkeypatch.setattr(eager_pools, "LEAST_BYTES", 0)


def reference(_device, _dtype):
    return "reference"


def channels_last(*shape, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), **options).to(
        memory_format=torch.channels_last
    )


def stem(**options):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1, **options),
        nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 5),
    ).to(memory_format=torch.channels_last)  # fmt: skip


def seeded(make):
    torch.manual_seed(0)
    return make()


class Saved:
    """What forwards inside save for their backwards, by type."""

    def __init__(self):
        self.types, self.bytes = [], 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)

    def _pack(self, x):
        self.types.append(x.dtype)
        self.bytes += x.nbytes
        return x

    def __enter__(self):
        self._hooks.__enter__()
        return self

    def __exit__(self, *error):
        self._hooks.__exit__(*error)


def saved_by(pool, x, compile=False):
    """The types that the pool saves inside of the context."""
    with EagerPools(pool, compile, reference).in_force(), Saved() as saved:
        pool(x)
    return saved.types


def is_ours(pool, x, **options):
    return saved_by(pool, x, **options) == [torch.uint8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_numbers_are_pytorch_s_and_a_byte_is_kept_for_each_output(dtype, ceil_mode):
    pool = nn.MaxPool2d(3, 2, 1, ceil_mode=ceil_mode)
    x = channels_last(2, 8, 11, 12).to(dtype).requires_grad_()
    expected = pool(x)
    with EagerPools(pool, False, reference).in_force(), Saved() as saved:
        values = pool(x)
    assert torch.equal(values, expected)
    assert values.stride() == expected.stride()
    assert (saved.types, saved.bytes) == ([torch.uint8], values.numel())
    wide = x.detach().float().requires_grad_()
    g = torch.randn(values.shape)
    (found,) = torch.autograd.grad(values, x, g.to(dtype))
    (summed,) = torch.autograd.grad(pool(wide), wide, g.to(dtype).float())
    assert torch.equal(found, summed.to(dtype))


class OwnPool(nn.MaxPool2d):
    def forward(self, input):
        return super().forward(input) + 1


class Renamed(nn.MaxPool2d):
    """A subclass that computes as its base does."""


def test_which_modules_are_known():
    x = channels_last(2, 8, 6, 6).requires_grad_()
    assert is_ours(nn.MaxPool2d(2), x)
    assert is_ours(Renamed(2), x)
    assert not is_ours(OwnPool(2), x)
    pool = nn.MaxPool2d(2)
    pool.forward = lambda input: F.max_pool2d(input, 2)
    own = pool.forward
    assert not is_ours(pool, x)
    assert pool.forward is own


class OwnTensor(torch.Tensor):
    """Knows of operations what PyTorch's do."""


STAYING = {
    "a tensor of its own class": (nn.MaxPool2d(2), channels_last(2, 8, 6, 6).as_subclass(OwnTensor).requires_grad_()),
    "no gradient": (nn.MaxPool2d(2), channels_last(2, 8, 6, 6)),
    "contiguous": (nn.MaxPool2d(2), torch.randn(2, 8, 6, 6, requires_grad=True)),
    "indices": (nn.MaxPool2d(2, return_indices=True), channels_last(2, 8, 6, 6).requires_grad_()),
    "dilation": (nn.MaxPool2d(2, dilation=2), channels_last(2, 8, 6, 6).requires_grad_()),
}


@pytest.mark.parametrize("case", STAYING)
def test_pools_that_stay(case):
    pool, x = STAYING[case]
    assert not is_ours(pool, x)


def test_pools_that_only_evaluate_or_are_traced_stay():
    pool, x = nn.MaxPool2d(2), channels_last(2, 8, 6, 6).requires_grad_()
    with torch.no_grad():
        assert saved_by(pool, x) == []

    def inside(x):
        return pool(x.to(memory_format=torch.channels_last))

    with EagerPools(pool, False, lambda *_: pytest.fail("asked")).in_force():
        torch.jit.trace(inside, x)
        make_fx(inside)(x)
        with torch.inference_mode():
            pool(x)


def test_what_is_too_small_has_pytorch_s_error():
    pool = nn.MaxPool2d(4)
    with EagerPools(pool, False, reference).in_force(), pytest.raises(RuntimeError, match="Output size is too small"):
        pool(channels_last(2, 8, 3, 3).requires_grad_())
    pool = nn.MaxPool2d(2, 1, 1)
    with EagerPools(pool, False, reference).in_force(), pytest.raises(RuntimeError, match="optional 0 dim batch size"):
        pool(torch.zeros(2, 0, 6, 8).permute(0, 3, 1, 2).requires_grad_())


LAYOUTS = {
    "channels_last": torch.randn(2, 6, 4, 8).permute(0, 3, 1, 2),
    "part of the channels": torch.randn(2, 6, 4, 16).permute(0, 3, 1, 2)[:, :8],
    "columns outside of rows": torch.randn(2, 4, 6, 8).permute(0, 3, 2, 1),
    "an image, repeated": torch.randn(1, 6, 4, 8).permute(0, 3, 1, 2).expand(2, 8, 6, 4),
    "one image without a batch before": torch.randn(6, 4, 8).permute(2, 0, 1)[None],
    "no images": torch.randn(0, 6, 4, 8).permute(0, 3, 1, 2),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_outputs_lie_in_memory_as_pytorch_s(case):
    pool, x = nn.MaxPool2d(2), LAYOUTS[case].requires_grad_()
    with EagerPools(pool, False, reference).in_force():
        values = pool(x)
    assert values.stride() == pool(x).stride()


def test_without_kernels_pools_stay():
    pool, x = nn.MaxPool2d(2), channels_last(2, 8, 6, 6).requires_grad_()
    with EagerPools(pool, False).in_force(), Saved() as saved:
        pool(x)
    assert torch.int64 in saved.types  # a CPU has no kernel


def test_transforms_of_torch_func_find_pytorch_s_pool():
    pool, x = nn.MaxPool2d(2), channels_last(2, 8, 6, 6)
    expected = torch.func.grad(lambda x: pool(x).square().sum())(x)
    weight = x.clone().requires_grad_()
    with EagerPools(pool, False, lambda *_: pytest.fail("asked")).in_force():
        assert torch.equal(torch.func.grad(lambda x: pool(x).square().sum())(x), expected)
        torch.vmap(pool)(weight[None])
        torch.func.jvp(pool, (x,), (x,))
        with forward_ad.dual_level():
            dual = pool(forward_ad.make_dual(weight, x))
            assert forward_ad.unpack_dual(dual).tangent is not None


def test_second_derivatives_are_pytorch_s():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(3, 2, 1), nn.Tanh()).to(memory_format=torch.channels_last)
    x = channels_last(2, 3, 9, 9).requires_grad_()

    def penalty():
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), list(model.parameters()))

    expected = penalty()
    with EagerPools(model, False, reference).in_force():
        found = penalty()
    torch.testing.assert_close(found, expected)


def test_a_checkpointed_pool_keeps_the_same_tensors_again():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2)).to(memory_format=torch.channels_last)
    x = channels_last(2, 3, 9, 9).requires_grad_()
    model(x).square().sum().backward()
    expected, x.grad = x.grad, None
    with EagerPools(model, False, reference).in_force():
        checkpoint(model, x, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)


def test_afterwards_the_model_is_as_it_was():
    model = stem()
    before = [dict(vars(module)) for module in model.modules()]
    pools = EagerPools(model, False, reference)
    with pools.in_force(), pools.in_force(compiled_too=True):
        assert "forward" in vars(model[3])
    with pytest.raises(RuntimeError, match="channels"), pools.in_force():
        model(torch.zeros(1, 2, 3, 4))  # other channels than the model has
    assert [dict(vars(module)) for module in model.modules()] == before
    pickle.loads(pickle.dumps(model))
    copy.deepcopy(model)


def test_a_forward_that_somebody_puts_there_meanwhile_stays():
    pool = nn.MaxPool2d(2)
    own = functools.partial(F.max_pool2d, kernel_size=2)
    with EagerPools(pool, False, reference).in_force():
        pool.forward = own
    assert pool.forward is own


def test_of_two_trainers_at_once_the_last_takes_it_away():
    """What is checkpointed in one must find the same pool again when the other, on its own thread, has ended."""
    pool = nn.MaxPool2d(2)
    first, second = (EagerPools(pool, False, reference).in_force() for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert is_ours(pool, channels_last(2, 8, 6, 6).requires_grad_())
    assert "forward" in vars(pool)
    second.__exit__(None, None, None)
    assert "forward" not in vars(pool)


def test_copies_made_within_a_step_pool_by_themselves_and_files_know_nothing_of_it():
    model = nn.Sequential(nn.MaxPool2d(2))
    with EagerPools(model, False, reference).in_force():
        copied, read = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    copied[0].kernel_size = 3
    assert copied(channels_last(2, 8, 6, 6).requires_grad_()).shape == (2, 8, 2, 2)
    assert "deepseek_mp" not in vars(read[0])["forward"].__func__.__module__


def test_compiled_parts_are_left_alone_but_where_they_run_uncompiled():
    model, x = nn.Sequential(nn.MaxPool2d(2), nn.Sequential(nn.MaxPool2d(2))), channels_last(2, 8, 9, 9)
    model[1].compile(backend="eager")
    pools = EagerPools(model, "regional", reference)
    with pools.in_force():
        assert ["forward" in vars(pool) for pool in (model[0], model[1][0])] == [True, False]
        with pools.in_force(compiled_too=True):
            assert ["forward" in vars(pool) for pool in (model[0], model[1][0])] == [True, True]
    assert not is_ours(model[0], x.requires_grad_(), compile=True)


def test_code_that_the_user_compiles_has_pytorch_s_pool():
    """What is captured has it; whose backend this is decides what becomes of it."""
    torch._dynamo.reset()
    pool, x, graphs = nn.MaxPool2d(2), channels_last(2, 8, 6, 6).requires_grad_(), []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    call = torch.compile(lambda x: pool(x) * 2, backend=backend, fullgraph=True)
    with EagerPools(pool, False, reference).in_force():
        assert torch.equal(call(x), F.max_pool2d(x, 2) * 2)
    assert "deepseek_mp" not in str(graphs[0].code)


class CompiledFunction(nn.Module):
    """Compiles a function, so that no module is compiled."""

    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool2d(2)
        self._call = torch.compile(lambda x: self.pool(x) * 2, backend="eager")

    def forward(self, x):
        return self._call(x)


def test_a_function_that_the_user_compiles_is_not_compiled_again_for_each_trainer_or_trial():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, x = CompiledFunction(), channels_last(2, 8, 6, 6).requires_grad_()
    for _ in range(4):
        with EagerPools(model, False, reference).in_force():
            model(x).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# -- in a trainer ---------------------------------------------------------------------------------


@pytest.fixture
def with_kernels(monkeypatch):
    """Trainers made now find an implementation; gives the types that it was asked for."""
    asked = []

    def choose(_device, dtype):
        asked.append(dtype)
        return "reference"

    for module in (assembly, planning):
        monkeypatch.setattr(module, "EagerPools", functools.partial(EagerPools, choose=choose))
    return asked


def train(make, mode, **options):
    torch.manual_seed(0)
    model = make()
    trainer = MixedPrecisionTrainer(
        model, mode, device="cpu", optimizer=torch.optim.SGD(model.parameters(), 0.1), progress=False, **options
    )
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(3):
        x = torch.randn(4, 3, 12, 12, generator=generator).to(memory_format=torch.channels_last)
        losses.append(trainer.step((x, torch.randint(0, 5, (4,), generator=generator))).loss)
    trainer.settle()
    return trainer, losses


@pytest.mark.parametrize(("mode", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_steps_use_them_in_every_mode_and_evaluation_does_not(mode, dtype, monkeypatch, request):
    expected, plain = train(stem, mode)
    asked = request.getfixturevalue("with_kernels")
    trainer, losses = train(stem, mode)
    assert set(asked) == {dtype}
    assert len(asked) == 3
    assert losses == pytest.approx(plain, rel=1e-6 if mode == "fp32" else 2e-2)
    assert trainer.stepper.flops == expected.stepper.flops
    assert "forward" not in vars(trainer.model[3])
    trainer.evaluate([(channels_last(4, 3, 12, 12), torch.zeros(4, dtype=torch.long))])
    assert len(asked) == 3


def test_a_plan_is_measured_with_them(with_kernels, monkeypatch):
    counts = []

    def choose_plan(_model, run, **_):
        run().backward()
        counts.append(len(with_kernels))
        return PrecisionPlan.of("fp32")

    monkeypatch.setattr(planning, "choose_plan", choose_plan)
    train(stem, "auto")
    assert counts == [1]
    assert len(with_kernels) == 4


def test_blocks_are_chosen_for_a_plan_s_trials_with_them(with_kernels, monkeypatch):
    def choose_plan(*_args, **_options):
        assert with_kernels
        return PrecisionPlan.of("fp32")

    monkeypatch.setattr(planning, "choose_plan", choose_plan)
    train(Blocks, "auto", activation_memory_budget=0.3)


def test_the_monitor_says_that_ours_ran(with_kernels):
    trainer, _ = train(stem, "bf16")
    ops = trainer.monitor.log_precision_usage().ops
    assert "deepseek_mp::max_pool2d" in ops
    assert "deepseek_mp::max_pool2d_backward" in ops
    assert not any("max_pool2d_with_indices" in name for name in ops)


class Blocks(nn.Sequential):
    """Repeated blocks with a pool each."""

    def __init__(self):
        blocks = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.MaxPool2d(3, 1, 1), nn.Tanh()) for _ in range(3)]
        body = nn.Conv2d(3, 8, 1), nn.Sequential(*blocks), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
        super().__init__(*body)
        self.to(memory_format=torch.channels_last)


def test_blocks_that_are_computed_again_train_as_without(with_kernels):
    _, expected = train(Blocks, "fp32")
    del with_kernels[:]
    trainer, losses = train(Blocks, "fp32", activation_memory_budget=0.3)
    assert trainer.recomputed_blocks.recomputed
    assert len(with_kernels) > 9  # again in the backward
    assert losses == expected


def test_compressed_activations_hold_the_offsets_as_they_are(with_kernels):
    settings = ActivationSettings(min_bytes=64)
    trainer, losses = train(stem, "bf16", activations=settings)
    _, expected = train(stem, "bf16")
    assert losses == pytest.approx(expected, rel=0.05)
    saved = [entry for entry in trainer.activations.saved if entry.module == "3"]
    assert [(entry.operation, entry.form, entry.reason) for entry in saved] == [("max_pool2d", "kept", "narrow")]
    assert saved[0].bytes_after == 4 * 16 * 5 * 5


@pytest.mark.parametrize("how", [True, "regional"])
def test_compiled_trainers_use_them_in_counted_steps_only(how, with_kernels):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    train(Blocks, "fp32", compile=how)  # the first step is counted, and runs uncompiled
    assert len(with_kernels) == 3
    whole = 1 if how is True else 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == whole


@pytest.mark.parametrize(("least", "ours"), [(2 * 16 * 8 * 8 * 4, True), (2 * 16 * 8 * 8 * 4 + 1, False)])
def test_small_pools_stay_which_would_take_the_host_longer_than_they_save_the_device(least, ours, monkeypatch):
    monkeypatch.setattr(eager_pools, "LEAST_BYTES", least)
    pool, x = nn.MaxPool2d(2), channels_last(2, 16, 8, 8).requires_grad_()
    with EagerPools(pool, False, reference).in_force(), Saved() as saved:
        pool(x)
    assert (torch.uint8 in saved.types) is ours
