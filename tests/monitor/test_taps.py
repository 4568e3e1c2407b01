"""The counts equal an independent trace and belong to the right layer and phase; nothing is left behind."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as global_hooks
from torch.optim import optimizer as optimizers
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from deepseek_mp.backends import math_mode
from deepseek_mp.monitor import PrecisionMonitor, Usage
from deepseek_mp.ops.own_work import is_own_work


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Every test ends with PyTorch as it was: no mode, no global hook, no optimizer hook."""
    torch.manual_seed(0)
    yield
    assert torch._C._len_torch_dispatch_stack() == 0
    assert not global_hooks._global_forward_hooks
    assert not global_hooks._global_forward_pre_hooks
    assert not optimizers._global_optimizer_pre_hooks
    assert not optimizers._global_optimizer_post_hooks


# ---------------------------------------------------------------- models


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.max_pool2d(F.relu(x + self.bn2(self.conv2(x))), 2)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self, recompute: bool | None = None) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.blocks = nn.ModuleList([Block(8), Block(8)])
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight  # tied
        self.recompute = recompute
        """Checkpoint the blocks, reentrantly or not; None for no checkpointing."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x) if self.recompute is None else checkpoint(block, x, use_reentrant=self.recompute)
        return self.head(self.norm(x))


def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 4))
    return model, torch.randn(3, 6), torch.randint(4, (3,))


def conv_net() -> tuple[nn.Module, Tensor, Tensor]:
    return ConvNet(), torch.randn(2, 3, 8, 8), torch.randint(5, (2,))


def transformer(recompute: bool | None = None) -> tuple[nn.Module, Tensor, Tensor]:
    tokens = torch.randint(11, (2, 6))
    return Transformer(recompute), tokens, tokens


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


# ---------------------------------------------------------------- the independent trace

NO_COMPUTATION = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


class Trace(TorchDispatchMode):
    """Every operation dispatched, by phase and format, written without the monitor's rules.

    The phase is what the test says it is. The format is that of the data the operation works on:
    of its floating inputs, or of its result where they differ, are narrower, or there are none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "forward"
        self.seen: Counter[tuple[str, str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        alias_only = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not alias_only and name not in NO_COMPUTATION and not is_own_work():  # statistics are the monitor's own
            self.seen[(*self.named(name, args, result), self.phase)] += 1
        return result

    def named(self, name: str, args: Any, result: Any) -> tuple[str, str]:
        inputs = [t for arg in args for t in (arg if isinstance(arg, list) else [arg]) if isinstance(t, Tensor)]
        results = [t for t in (result if isinstance(result, tuple | list) else [result]) if isinstance(t, Tensor)]
        if name == "_to_copy" and inputs[0].dtype != results[0].dtype:
            return "cast", f"{NAMES.get(results[0].dtype, 'integer')}<-{NAMES.get(inputs[0].dtype, 'integer')}"
        dtypes = {t.dtype for t in inputs if t.is_floating_point()}
        result = next((t.dtype for t in results if t.is_floating_point()), None)
        if len(dtypes) == 1 and (result is None or result.itemsize <= next(iter(dtypes)).itemsize):
            return name, NAMES[dtypes.pop()]
        return name, "integer" if result is None else NAMES[result]


def counted(usage: Usage) -> Counter[tuple[str, str, str]]:
    """The monitor's counts in the form of the trace's."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for op, cells in usage.ops.items():
        for format, count in cells.items():
            counts[op, format, "forward"] += count.forward
            counts[op, format, "backward"] += count.backward
    return +counts


def step(model: nn.Module, inputs: Tensor, target: Tensor, region: AbstractContextManager[Any]) -> Tensor:
    with region:
        return loss_of(model(inputs), target)


def traced_step(model: nn.Module, inputs: Tensor, target: Tensor, region: AbstractContextManager[Any]) -> Trace:
    with Trace() as trace:
        loss = step(model, inputs, target, region)
        trace.phase = "backward"
        loss.backward()
    return trace


@contextmanager
def region(format: str, device: str = "cpu") -> Iterator[None]:
    """Autocast to the format, off for fp32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[format]
    with torch.autocast(device, dtype, enabled=dtype is not None):
        yield


def on(device: str, made: tuple[nn.Module, Tensor, Tensor]) -> tuple[nn.Module, Tensor, Tensor]:
    model, inputs, target = made
    return model.to(device), inputs.to(device), target.to(device)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MODELS = [mlp, conv_net, transformer, lambda: transformer(recompute=False), lambda: transformer(recompute=True)]
MODEL_NAMES = ["mlp", "conv_net", "transformer", "checkpointed", "checkpointed_reentrant"]


@pytest.mark.parametrize("make", MODELS, ids=MODEL_NAMES)
@pytest.mark.parametrize("format", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("form", ["sample", "standalone"])
@pytest.mark.parametrize("device", DEVICES)
def test_counts_equal_an_independent_trace(make: Callable[[], Any], format: str, form: str, device: str) -> None:
    model, inputs, target = on(device, make())
    exact = math_mode(device, fp32="ieee", search=False)  # the trace has no other name for fp32 products
    with exact, PrecisionMonitor(model, sample_every=1 if form == "standalone" else None) as monitor:
        for _ in range(2):  # the second accumulates into gradients
            with monitor.sample() if form == "sample" else nullcontext():
                trace = traced_step(model, inputs, target, region(format, device))
            usage = monitor.log_precision_usage()
            assert counted(usage) == trace.seen
            assert usage.sampled_steps == usage.steps == 1
    assert any(phase == "backward" for _, _, phase in trace.seen)


@pytest.mark.parametrize("form", ["sample", "standalone"])
def test_counts_equal_a_trace_outside_the_monitor_too(form: str) -> None:
    """Neither mode removes the other when the trace begins first and ends first."""
    model, inputs, target = conv_net()
    monitor = PrecisionMonitor(model, sample_every=1 if form == "standalone" else None)
    with Trace() as outer, monitor.sample() if form == "sample" else nullcontext():
        loss = step(model, inputs, target, nullcontext())
        outer.phase = "backward"
        loss.backward()
    usage = monitor.log_precision_usage()
    assert counted(usage) == outer.seen
    monitor.close()


def test_eager_eval_takes_the_fast_path_while_it_is_counted() -> None:
    """`nn.TransformerEncoderLayer` runs one fused operation in eval, unless a module has a hook."""
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 2)).eval()
    tokens = torch.randn(2, 3, 8)
    with PrecisionMonitor(model, sample_every=1) as monitor, torch.no_grad():
        with Trace() as trace:
            model(tokens)
        usage = monitor.log_precision_usage()
    assert counted(usage) == trace.seen
    assert usage.layers["0"]["_transformer_encoder_layer_fwd"]["fp32"].forward == 1
    assert (usage.steps, usage.eval_steps, usage.sampled_eval_steps) == (0, 1, 1)


# ---------------------------------------------------------------- layers


def test_layers_of_the_forward_and_of_its_backward() -> None:
    model, tokens, target = transformer()
    with PrecisionMonitor(model) as monitor:
        step(model, tokens, target, nullcontext()).backward()
        layers = monitor.log_precision_usage().layers
    for name in ("blocks.0.qkv", "blocks.0.mlp.0", "blocks.1.out"):
        assert layers[name]["addmm"]["fp32"].forward == 1
        assert layers[name]["mm"]["fp32"].backward == 2  # dgrad and wgrad
    assert layers["blocks.1.mlp.1"]["gelu_backward"]["fp32"].backward == 1
    assert layers["blocks.0"]["_scaled_dot_product_flash_attention_for_cpu"]["fp32"].forward == 1
    assert layers["blocks.0"]["_scaled_dot_product_flash_attention_for_cpu_backward"]["fp32"].backward == 1
    assert layers["tokens"]["embedding_dense_backward"]["fp32"].backward == 1
    assert layers[""]["nll_loss_backward"]["fp32"].backward == 1
    assert layers["head"]["mm"]["fp32"].forward == 1


def test_gradients_accumulate_in_the_layer_of_their_parameter() -> None:
    model, inputs, target = mlp()
    with PrecisionMonitor(model, sample_every=None) as monitor:
        step(model, inputs, target, nullcontext()).backward()
        with monitor.sample():
            step(model, inputs, target, nullcontext()).backward()
        layers = monitor.log_precision_usage().layers
    assert layers["0"]["add_"]["fp32"].backward == layers["3"]["add_"]["fp32"].backward == 2  # weight and bias


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_a_recomputed_forward_counts_in_the_backward_of_its_layers(reentrant: bool, device: str) -> None:
    model, tokens, target = on(device, transformer(recompute=reentrant))
    with PrecisionMonitor(model) as monitor:
        step(model, tokens, target, region("bf16", device)).backward()
        usage = monitor.log_precision_usage()
    for name in ("blocks.0.qkv", "blocks.0.mlp.0", "blocks.1.out"):
        assert usage.layers[name]["addmm"]["bf16"].forward == 1
        assert usage.layers[name]["addmm"]["bf16"].backward == 1
        assert usage.layers[name]["mm"]["bf16"].backward == 2
    assert usage.steps == usage.sampled_steps == 1


def test_a_checkpointed_model_is_one_step() -> None:
    model, inputs, _ = mlp()
    with PrecisionMonitor(model, sample_every=1) as monitor:
        checkpoint(model, inputs, use_reentrant=False).sum().backward()
        usage = monitor.log_precision_usage()
    assert usage.steps == usage.sampled_steps == 1
    assert usage.layers["0"]["addmm"]["fp32"].forward == usage.layers["0"]["addmm"]["fp32"].backward == 1
    assert usage.layers["0"]["mm"]["fp32"].backward == 1  # also after the recomputation has ended


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0].sinh()


class Passed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()  # computes nothing

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.sinh()


@pytest.mark.parametrize("function", [Squared, Passed])
def test_an_autograd_function_of_the_user(function: type[torch.autograd.Function]) -> None:
    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function.apply(x)

    model = nn.Sequential(nn.Linear(3, 3), Layer(), nn.Tanh())
    with PrecisionMonitor(model) as monitor:
        model(torch.randn(2, 3)).sum().backward()
        layers = monitor.log_precision_usage().layers
    assert layers["1"]["sinh"]["fp32"].backward == 1


# ---------------------------------------------------------------- several passes, other modes


def test_two_backwards_of_one_forward() -> None:
    model, inputs, target = mlp()
    with PrecisionMonitor(model) as monitor, Trace() as trace:
        output = model(inputs)
        first, second = loss_of(output, target), output.square().mean()
        trace.phase = "backward"
        first.backward(retain_graph=True)
        second.backward()
        usage = monitor.log_precision_usage()
    assert counted(usage) == trace.seen


def test_a_gradient_penalty_is_a_backward_within_the_step() -> None:
    model, inputs, _ = mlp()
    inputs.requires_grad_()
    with PrecisionMonitor(model) as monitor, Trace() as trace:
        (grad,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
        grad.square().sum().backward()
        usage = monitor.log_precision_usage()
    assert usage.ops["tanh_backward"]["fp32"].backward >= 2
    assert usage.layers["1"]["tanh_backward"]["fp32"].backward >= 1
    total = sum(count.total for cells in usage.ops.values() for count in cells.values())
    penalty = 3  # pow, sum and what is between them stand after the first backward, outside the model
    assert sum(trace.seen.values()) - penalty <= total <= sum(trace.seen.values())


def test_a_mode_pushed_during_the_step_stays_until_its_own_end() -> None:
    model, inputs, target = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = PrecisionMonitor(model, sample_every=1)
    loss = step(model, inputs, target, nullcontext())
    with Trace() as trace:
        loss.backward()
        optimizer.step()  # ends the step, below the trace
        assert torch._C._len_torch_dispatch_stack() == 1
        torch.ones(2).cosh()
    assert trace.seen["cosh", "fp32", "forward"] == 1
    monitor.close()


@pytest.mark.gpu
def test_a_sampled_step_does_not_wait_for_the_device() -> None:
    model, inputs, target = on("cuda", transformer(recompute=True))
    module = torch.get_device_module("cuda")
    with PrecisionMonitor(model, sample_every=1) as monitor:
        step(model, inputs, target, region("bf16", "cuda")).backward()
        monitor.log_precision_usage()
        module.set_sync_debug_mode("error")
        try:
            step(model, inputs, target, region("bf16", "cuda")).backward()
        finally:
            module.set_sync_debug_mode("default")
        usage = monitor.log_precision_usage()
    assert usage.layers["blocks.0.qkv"]["mm"]["bf16"].backward == 2


def test_no_tensor_is_kept_alive() -> None:
    model, inputs, target = transformer()
    with PrecisionMonitor(model, sample_every=1) as monitor:
        output = model(inputs)
        kept = weakref.ref(output)
        loss_of(output, target).backward()
        del output
        gc.collect()
        assert kept() is None
        monitor.log_precision_usage()


def test_a_tensor_subclass_is_counted_by_what_it_does_inside() -> None:
    model, inputs, _ = mlp()
    with PrecisionMonitor(model) as monitor:
        model(TwoTensor(inputs, inputs.clone()))
        usage = monitor.log_precision_usage()
    assert usage.layers["0"]["addmm"]["fp32"].forward == 2  # one for each of the two


def test_an_operation_that_raises_did_not_run() -> None:
    model, inputs, _ = mlp()
    with PrecisionMonitor(model) as monitor:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(inputs[:, :3])
        assert "addmm" not in monitor.log_precision_usage().ops
