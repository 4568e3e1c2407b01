"""Compilation: which blocks are repeated, what is called, and that alike blocks are compiled once."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from deepseek_mp import MixedPrecisionTrainer
from deepseek_mp.errors import ConfigError
from deepseek_mp.nn import apply, revert
from deepseek_mp.nn.call import parse_batch, run
from deepseek_mp.precision import PrecisionPlan
from deepseek_mp.trainer.compile import check_compile, compiled_run, repeated_blocks


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.linear(self.norm(x)).relu()


class Other(Block):
    pass


class Deep(nn.Module):
    """A stem, a list of equal blocks, and a head."""

    def __init__(self, depth=4):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
        self.blocks = nn.ModuleList([Block() for _ in range(depth)])

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Stages(nn.Module):
    """Two Sequentials of blocks, as a ResNet has them."""

    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(Block(), Block())
        self.two = nn.Sequential(Other(), nn.ReLU(), Other(), Block())


def names(model):
    found = {id(module): name for name, module in model.named_modules()}
    return [found[id(block)] for block in repeated_blocks(model)]


def pair(width):
    return nn.Sequential(nn.Linear(width, width), nn.ReLU())


@pytest.mark.parametrize(
    ("model", "blocks"),
    [
        (Deep(), ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]),
        (Deep(1), []),
        (Stages(), ["one.0", "one.1", "two.0", "two.2"]),
        (nn.Sequential(Block(), Block()), ["0", "1"]),
        (nn.ModuleList([Block(), Other(), Block()]), ["0", "2"]),
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), []),
        (nn.Sequential(pair(2), pair(2)), ["0", "1"]),
        (nn.Sequential(pair(2), pair(3)), []),
        (nn.Sequential(nn.Sequential(Block(), Block()), nn.Linear(8, 8)), ["0.0", "0.1"]),
        (nn.ModuleList([nn.ModuleList([Block(), Block()]), nn.ModuleList([Other()])]), ["0.0", "0.1"]),
        (nn.Linear(2, 2), []),
    ],
    ids=[
        "list",
        "single",
        "stages",
        "model is the list",
        "mixed",
        "leaves",
        "alike",
        "unlike",
        "nested",
        "lists",
        "leaf",
    ],
)
def test_blocks_of_one_class_in_one_list_are_repeated(model, blocks):
    assert names(model) == blocks


def test_outer_blocks_come_before_the_ones_inside_them():
    inner = [nn.Sequential(Block(), Block()) for _ in range(2)]
    assert names(nn.Sequential(*inner)) == ["0", "1"]


def test_a_block_that_stands_twice_is_compiled_once():
    block = Block()
    assert repeated_blocks(nn.ModuleList([block, block, Block()]))[0] is block
    assert len(repeated_blocks(nn.ModuleList([block, block, Block()]))) == 2


def test_nothing_is_compiled_unless_asked_for():
    model = Deep()
    call = parse_batch(batches()[0])
    result = compiled_run(model, None, False)(call)
    assert torch.equal(result.output, model(*call.args))
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_regional_needs_repeated_blocks_and_says_so_before_anything_is_done():
    check_compile(Deep(1), True)
    check_compile(Deep(), "regional")
    model = Deep(1)
    with pytest.raises(ConfigError, match=r"'regional' on a model without repeated blocks.*Use compile=True"):
        MixedPrecisionTrainer(model, "fp32", compile="regional", device="cpu")
    assert type(model.stem) is nn.Linear
    with pytest.raises(ConfigError, match="'regional' on a model without repeated blocks"):
        MixedPrecisionTrainer(model, "auto", compile="regional", device="cpu")


@pytest.fixture
def eager(monkeypatch):
    """torch.compile and Module.compile with the backend that runs the graphs as they are; the counters at zero."""
    whole, module = torch.compile, nn.Module.compile
    monkeypatch.setattr(torch, "compile", lambda model, **_: whole(model, backend="eager"))
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: module(self, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that torch.compile and Module.compile make; they run as they are."""
    seen, whole, module = [], torch.compile, nn.Module.compile

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **_: whole(function, backend=backend))
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: module(self, backend=backend))
    torch._dynamo.reset()
    yield seen
    torch._dynamo.reset()


def batches():
    inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    return [(inputs, inputs[:, :2].argmax(dim=1))] * 3


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def fitted(how, **options):
    trainer = MixedPrecisionTrainer(Deep(), "bf16", compile=how, device="cpu", emulate=True, optimizer=sgd, **options)
    trainer.fit(batches(), val_loader=batches())
    return trainer


@pytest.mark.parametrize(("how", "graphs"), [("regional", 2), (True, 1)])
def test_equal_blocks_are_compiled_once_and_give_the_same_numbers(eager, how, graphs):
    trainer = fitted(how)
    training = counters["stats"]["unique_graphs"]
    plain = fitted(False)
    assert counters["stats"]["unique_graphs"] == training
    for one, two in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(one, two)
    assert not counters["graph_break"]
    # With 'regional' the loss is a graph of its own. Evaluation runs without gradients: another graph of the blocks,
    # none of the whole model, which is called as it is.
    assert training == graphs + (how == "regional")


@pytest.mark.parametrize("how", [True, "regional", False])
def test_the_report_says_that_compiled_parts_ran_uncompiled(eager, how):
    usage = fitted(how).monitor.log_precision_usage()
    assert usage.compiled_counted_eagerly is bool(how)


def test_only_the_blocks_are_compiled(eager):
    trainer = fitted("regional")
    compiled = [name for name, module in trainer.model.named_modules() if module._compiled_call_impl is not None]
    assert compiled == ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]


def test_pinned_blocks_of_one_kind_make_no_more_graphs_than_kinds(eager):
    fitted("regional", pin={"blocks.3.linear": "fp32"})
    assert counters["stats"]["unique_graphs"] <= 4 + 1  # the loss
    assert not counters["graph_break"]


@pytest.mark.stress
def test_a_model_compiled_by_inductor_trains_like_the_plain_one():
    torch._dynamo.reset()
    compiled, plain = fitted(True), fitted(False)
    for one, two in zip(compiled.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=2e-2, atol=2e-2)
    assert compiled.steps_applied == 3
    torch._dynamo.reset()


def test_a_block_keeps_compiled_code_for_many_plans(graphs):
    """Alternating through more combinations than dynamo's own limit compiles each of them once."""
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])
    compute = compiled_run(model, None, True)
    call = parse_batch((torch.randn(2, 4), torch.randn(2, 4)))
    plans = [PrecisionPlan.of("fp32", {str(i): "bf16" for i in range(4) if code >> i & 1}) for code in range(1, 13)]
    for _ in range(2):
        for plan in plans:
            apply(model, plan)
            compute(call)
    assert len(graphs) == len(plans)
    revert(model)


def test_evaluation_has_room_for_as_many_plans(graphs):
    trainer = fitted("regional")
    before = len(graphs)
    formats = ("fp32", "bf16", "fp16")
    plans = [(base, norm, linear) for base in ("bf16", "fp32") for norm in formats for linear in formats]
    found = []
    for _ in range(2):
        for base, norm, linear in plans:
            trainer.change_plan(base, pin={"blocks.*.norm": norm, "blocks.*.linear": linear})
            trainer.evaluate([(torch.randn(8, 4), torch.randint(0, 2, (8,)))])
        found.append(len(graphs) - before)
    assert found[0] >= len(plans)  # a first block whose input has another type may need code of its own
    assert found[1] == found[0]


class OwnLoss(Deep):
    """Returns its loss beside its output, as models of transformers do."""

    def forward(self, x, labels):
        scores = super().forward(x)
        return {"loss": F.cross_entropy(scores.float(), labels), "logits": scores}


def weighted(output, target):
    return F.cross_entropy(output.float(), target, reduction="sum") / len(target), len(target)


def outputs(graph):
    (found,) = [node for node in graph.graph.nodes if node.op == "output"]
    return [node.meta["example_value"].shape for node in found.args[0]]


@pytest.mark.parametrize(
    ("model", "loss_fn", "batch"),
    [
        (Deep, None, batches()[0]),
        (Deep, weighted, batches()[0]),
        (Deep, nn.CrossEntropyLoss(ignore_index=1), batches()[0]),
        (OwnLoss, None, dict(zip(("x", "labels"), batches()[0], strict=True))),
    ],
    ids=["inferred", "with a count", "module", "own"],
)
@pytest.mark.parametrize("how", [True, "regional"])
def test_compiled_losses_are_those_of_eager_code_and_come_without_the_output(graphs, model, loss_fn, batch, how):
    model, call = model(), parse_batch(batch)
    expected = run(model, call, loss_fn)
    expected.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    result = compiled_run(model, loss_fn, how)(call)
    result.loss.backward()
    torch.testing.assert_close(result.loss, expected.loss)
    assert (int(result.items), result.loss_name, result.output) == (int(expected.items), expected.loss_name, None)
    torch.testing.assert_close([p.grad for p in model.parameters()], gradients)
    if how is True:
        assert len(graphs) == 1
        assert all(shape.numel() == 1 for shape in outputs(graphs[0]))
    else:
        assert len(graphs) == 2 - (model.__class__ is OwnLoss)


class Recording:
    """A loss that keeps what it gave."""

    def __init__(self):
        self.seen = []

    def __call__(self, output, target):
        loss = F.cross_entropy(output.float(), target)
        self.seen.append(loss.detach())
        return loss


@pytest.mark.parametrize("how", [True, "regional"])
def test_a_loss_that_changes_with_each_call_ends_up_beside_the_compiled_model(eager, caplog, how):
    loss = Recording()
    trainer = MixedPrecisionTrainer(
        Deep(), "bf16", compile=how, device="cpu", emulate=True, optimizer=sgd, loss_fn=loss, progress=False
    )
    batch = batches()[0]
    with caplog.at_level("WARNING", logger="deepseek_mp"):
        losses = [trainer.step(batch).loss for _ in range(7)]
        graphs = counters["stats"]["unique_graphs"]
        losses += [trainer.step(batch).loss for _ in range(5)]
    assert counters["stats"]["unique_graphs"] == graphs
    assert [record.message for record in caplog.records if "runs uncompiled from now on" in record.message]
    assert losses == pytest.approx([float(value) for value in loss.seen])


def test_a_loss_that_stays_the_same_stays_compiled(eager, caplog):
    with caplog.at_level("WARNING", logger="deepseek_mp"):
        fitted(True)
    assert not [record for record in caplog.records if "uncompiled" in record.message]


def test_two_trainers_share_no_compiled_code(graphs):
    """Else the second's batch size would make dynamo compile for changing sizes, which is slower."""
    for size in (3, 5):
        compiled_run(Deep(), None, True)(parse_batch((torch.randn(size, 4), torch.randn(size, 2))))
    sizes = [node.meta["example_value"].shape[0] for g in graphs for node in g.graph.nodes if node.op == "placeholder"]
    assert {size for size in sizes if isinstance(size, int)} >= {3, 5}
    assert all(isinstance(size, int) for size in sizes)


@pytest.mark.parametrize("how", ["regional", True])
def test_under_a_budget_no_step_runs_uncompiled_to_be_counted(eager, how):
    trainer = fitted(how, activation_memory_budget=0.5)
    assert not trainer.monitor.has_sample
    assert trainer.stepper.flops is None
    assert trainer.steps_applied == 3
    assert fitted(how).monitor.has_sample
