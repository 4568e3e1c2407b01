"""FP8 training on a GPU with FP8 units: no waiting, the emulation's numbers, compiled code, graphs, memory."""

import time

import pytest
import torch
from no_waiting import no_waiting
from torch import nn
from torch.utils.checkpoint import checkpoint

from deepseek_mp import MixedPrecisionTrainer
from deepseek_mp.backends import capabilities
from deepseek_mp.nn import apply, revert, saturated_tensors
from deepseek_mp.nn.assign import products_of
from deepseek_mp.nn.conv1x1 import conv1x1
from deepseek_mp.nn.delayed import scales_of
from deepseek_mp.nn.functional import low_precision_linear
from deepseek_mp.precision import RECIPES, PrecisionPlan

pytestmark = pytest.mark.gpu
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
hopper = pytest.mark.skipif(not HOPPER, reason="needs an NVIDIA GPU of compute capability 9.0")
DEVICE = torch.device("cuda")
NAMES = ["block", "tensor", "delayed", "row", "row_gw_hp", "mx"]


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, width=256, depth=3, checkpointed=False):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(64, width), nn.Linear(width, 10)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.checkpointed = checkpointed

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x)


def batches(count, size=512):
    generator = torch.Generator("cuda").manual_seed(1)
    return [
        (
            torch.randn(size, 64, device=DEVICE, generator=generator),
            torch.randint(0, 10, (size,), device=DEVICE, generator=generator),
        )
        for _ in range(count)
    ]


def trainer(plan, model=None, **options):
    plan = PrecisionPlan.of(plan, {"stem": "bf16"}) if isinstance(plan, str) else plan
    return MixedPrecisionTrainer(
        model or Model(), plan, loss_fn=nn.functional.cross_entropy, device=DEVICE, progress=False,
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True), **options,
    )  # fmt: skip


def losses(made, data):
    return [float(made.step(batch).loss) for batch in data]


@hopper
@pytest.mark.parametrize("name", NAMES)
def test_steps_in_fp8_do_not_wait_for_the_device(name):
    made = trainer(name, gradient_accumulation_steps=2)
    data = batches(12)
    for batch in data[:6]:
        made.step(batch)
    made.settle()
    with no_waiting():
        for batch in data[6:]:
            made.step(batch)


@hopper
@pytest.mark.parametrize("name", NAMES)
def test_kernels_train_as_the_emulation_does(name):
    data = batches(8)
    fast, emulated = trainer(name), trainer(name, kernels="reference")
    kinds = {d.evidence["product"] for d in fast.plan.decisions if d.new == name}
    assert kinds == {"triton" if name == "mx" else "native"}
    for a, b in zip(losses(fast, data), losses(emulated, data), strict=True):
        assert abs(a - b) < 5e-3 * b


@hopper
@pytest.mark.parametrize("how", [True, "regional"])
@pytest.mark.parametrize("name", ["block", "tensor", "delayed"])
def test_compiled_code_trains_as_eager_code_does(name, how):
    torch._dynamo.reset()
    data = batches(6)
    for a, b in zip(losses(trainer(name, compile=how), data), losses(trainer(name), data), strict=True):
        assert abs(a - b) < 1e-2 * b


@hopper
def test_a_switch_back_compiles_nothing_and_takes_no_time():
    torch._dynamo.reset()
    model = Model().to(DEVICE)
    block, plain = PrecisionPlan.of("block", {"stem": "bf16"}), PrecisionPlan.of("bf16")
    compiled = torch.compile(model)
    x = torch.randn(512, 64, device=DEVICE)

    def run(plan):
        started = time.perf_counter()
        apply(model, plan)
        with torch.autocast("cuda", torch.bfloat16):
            compiled(x).sum().backward()
        torch.cuda.synchronize()
        return time.perf_counter() - started

    for plan in (block, plain):
        run(plan)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    again = [run(plan) for plan in (block, plain, block)]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert max(again) < 1.0
    revert(model)


@hopper
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_can_be_captured_in_a_graph(name):
    how = products_of(RECIPES[name], capabilities(DEVICE), None)
    x = torch.randn(256, 512, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(384, 512, device=DEVICE, requires_grad=True)

    def run():
        return torch.autograd.grad(low_precision_linear(x, weight, None, how).float().square().sum(), (x, weight))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        x.normal_()
        weight.normal_()
    graph.replay()
    for made, expected in zip(captured, run(), strict=True):
        assert torch.equal(made, expected)


@hopper
@pytest.mark.parametrize("name", ["block", "delayed"])
def test_checkpointing_gives_the_same_losses(name):
    data = batches(6)
    assert losses(trainer(name, Model(checkpointed=True)), data) == losses(trainer(name), data)


@hopper
def test_delayed_scales_are_where_the_trained_model_is():
    made = trainer("delayed")
    losses(made, batches(4))
    (scales,) = scales_of(made.model)
    assert scales.top.is_cuda
    assert (scales.top > 0).all()
    assert not saturated_tensors(made.model)


@hopper
def test_activations_kept_for_backward_take_half_of_bf16():
    def kept(plan):
        model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(8)], nn.Linear(2048, 16)).to(DEVICE)
        apply(model, plan)
        x = torch.randn(8192, 2048, device=DEVICE, requires_grad=True)
        with torch.autocast("cuda", torch.bfloat16):
            model(x)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            output = model(x)
        held = torch.cuda.memory_allocated() - before
        del output
        return held

    weights = 8 * 2048 * 2048
    activations = 8 * 8192 * 2048
    assert kept("bf16") > 2 * activations
    assert kept("block") < 1.4 * activations + 1.2 * weights


@hopper
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("name", NAMES)
def test_1x1_convolutions_compute_as_the_reference_does(name, layout):
    generator = torch.Generator("cuda").manual_seed(2)

    def drawn(*shape):
        return torch.randn(shape, device=DEVICE, generator=generator)

    x = drawn(8, 256, 13, 7).bfloat16().contiguous(memory_format=layout).requires_grad_()  # rows that are padded
    weight = (drawn(384, 256, 1, 1) / 16).contiguous(memory_format=layout).requires_grad_()
    bias, gradient = drawn(384).requires_grad_(), drawn(8, 384, 13, 7).bfloat16()
    results = []
    for kernels in (None, "reference"):
        y = conv1x1(x, weight, bias, products_of(RECIPES[name], capabilities(DEVICE), kernels))
        assert y.is_contiguous(memory_format=layout)
        results.append([y.detach(), *torch.autograd.grad(y, (x, weight, bias), gradient)])
    exact = nn.functional.conv2d(x.detach().float(), weight.detach(), bias.detach())
    assert float((results[0][0] - exact).norm() / exact.norm()) < 0.06
    for fast, expected in zip(*results, strict=True):
        assert float((fast.float() - expected.float()).norm() / expected.float().norm()) < 5e-3


@hopper
def test_1x1_convolutions_train_compiled_and_without_waiting():
    torch._dynamo.reset()

    def model():
        torch.manual_seed(0)
        mix = [nn.Conv2d(64, 256, 1), nn.BatchNorm2d(256), nn.ReLU(inplace=True), nn.Conv2d(256, 256, 1)]
        return nn.Sequential(nn.Unflatten(1, (64, 1, 1)), *mix, nn.Flatten(), nn.Linear(256, 10))

    data, plan = batches(8), PrecisionPlan.of("block", {"1": "tensor"})
    eager = trainer(plan, model())
    first = losses(eager, data[:4])
    eager.settle()
    with no_waiting():
        for batch in data[4:]:
            eager.step(batch)
    assert {d.layer: d.new for d in eager.plan.decisions if d.new in ("block", "tensor")} == {
        "1": "tensor",
        "4": "block",
    }
    for a, b in zip(losses(trainer(plan, model(), compile=True), data[:4]), first, strict=True):
        assert abs(a - b) < 1e-2 * b
