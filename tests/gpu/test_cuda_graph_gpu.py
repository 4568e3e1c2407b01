"""FP8 training recorded as a CUDA graph, by hand and by torch.compile: a replay computes what eager code does."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from deepseek_mp.errors import FormatError
from deepseek_mp.nn import apply, update_scales
from deepseek_mp.nn.delayed import scales_of
from deepseek_mp.precision import RECIPES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs torch.cuda, whose graphs these are"),
]
DEVICE = torch.device("cuda")
# `fp8` stands for one of the others; FNUZ is the FP8 of devices whose graphs are not CUDA's.
NAMES = [name for name, recipe in RECIPES.items() if not recipe.is_plain and name != "fp8" and "fnuz" not in name]
WIDTH, CLASSES, ROWS = 256, 16, 512
WARMUP = 3


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def converted(name):
    """A model whose blocks run in the recipe, always with the same weights."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), nn.Linear(WIDTH, CLASSES)).to(DEVICE)
    try:
        plan = apply(model, name)
    except FormatError as error:
        pytest.skip(f"the device does not run {name}: {error}")
    kinds = {decision.evidence["product"] for decision in plan.decisions if decision.new == name}
    if kinds == {"reference"}:
        pytest.skip(f"the device has no product for {name}, only its emulation")
    return model


def batches(count):
    generator = torch.Generator(DEVICE).manual_seed(1)
    return [
        (
            torch.randn(ROWS, WIDTH, device=DEVICE, generator=generator),
            torch.randint(0, CLASSES, (ROWS,), device=DEVICE, generator=generator),
        )
        for _ in range(count)
    ]


def gradients(model, x, y):
    """One step but for the optimizer's: the loss and all gradients; delayed scales move on."""
    # Not cached: a cast that a run before left behind would be read from memory that is not the graph's.
    with torch.autocast(DEVICE.type, torch.bfloat16, cache_enabled=False):
        loss = nn.functional.cross_entropy(model(x), y)
    found = torch.autograd.grad(loss, list(model.parameters()))
    update_scales(model)
    return [loss.detach(), *found]


def capture(run):
    """The graph of a call of `run`, and the tensors that its replays write; run before, on a stream of its own."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph, outputs


def state(model):
    """All that delayed scaling keeps, by layer and name; empty without it."""
    return {name: value.clone() for scales in scales_of(model) for name, value in scales.tensors().items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_replayed_step_has_the_bits_of_an_eager_one(name):
    recorded, eager = converted(name), converted(name)
    first, *others = batches(4)
    x, y = (tensor.clone() for tensor in first)
    graph, outputs = capture(lambda: gradients(recorded, x, y))
    for _ in range(WARMUP):
        gradients(eager, *first)
    assert bool(scales_of(recorded)) == RECIPES[name].name.startswith("delayed")
    seen = []
    for inputs in others:
        x.copy_(inputs[0])
        y.copy_(inputs[1])
        graph.replay()
        expected = gradients(eager, *inputs)
        for made, wanted in zip(outputs, expected, strict=True):
            assert torch.equal(made, wanted)
        kept, wanted = state(recorded), state(eager)
        assert kept.keys() == wanted.keys()
        for place in kept:
            assert torch.equal(kept[place], wanted[place]), place
        seen.append(float(outputs[0]))
    assert len(set(seen)) == len(seen)  # the new inputs were read


def trained(name, mode):
    """The losses of some steps of the compiled model, each read before the next may write over it."""
    torch._dynamo.reset()
    model = converted(name)
    call = torch.compile(model, mode=mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    found = []
    for x, y in batches(4):
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = nn.functional.cross_entropy(call(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_scales(model)
        found.append(loss.item())
    return found


@pytest.fixture
def _fresh_compiler():
    """What is compiled, is compiled anew, and its graphs are gone afterwards."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("name", ["block", "tensor", "delayed"])
def test_graphs_of_the_compiler_train_as_its_plain_code_does(name):
    """The first step only runs, the second is recorded, and those after it are replayed."""
    plain, recorded = trained(name, None), trained(name, "reduce-overhead")
    if name != "delayed":  # whose casts write maxima that are not the graph's own, which the compiler may refuse
        assert counters["inductor"]["cudagraph_skips"] == 0
    assert recorded == pytest.approx(plain, rel=2e-3)
