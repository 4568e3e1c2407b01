"""Where nobody has said how the loss is computed, it is in chunks for large scores, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from own_function import Twice
from scored import Classifier, batches, train, trainer
from torch import Tensor, nn
from torch.nn import functional as F

from deepseek_mp import find_batch_size
from deepseek_mp.nn import chunked_loss
from deepseek_mp.trainer import fused_loss
from deepseek_mp.trainer.memory_measures import possible


def model(after: Any = lambda output: output) -> Classifier:
    torch.manual_seed(0)
    return Classifier(after)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than six rows of scores are large."""
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 4 * 6 * 7)


def my_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target)


@pytest.mark.parametrize(("mode", "is_fused"), [("fp32", True), ("bf16", True), ("fp16", False)])
def test_large_scores_are_computed_in_chunks_without_being_asked(
    monkeypatch: pytest.MonkeyPatch, caplog: Any, chunks: list[Any], mode: str, is_fused: bool
) -> None:
    """In FP16 it would cost a product."""
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 4 * 6 * 7 - 1)
    caplog.set_level("INFO")
    train(trainer(model(), mode, emulate=True), batches())
    assert len(chunks) == (3 if is_fused else 0)
    assert ("loss_fused" in caplog.text) == is_fused


def test_of_small_scores_nothing_is_tried_and_nothing_is_said(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 4 * 6 * 8)  # its widest layer
    monkeypatch.setattr(fused_loss, "deferring", None)
    train(trainer(model()), batches())
    assert "fused" not in caplog.text


@pytest.mark.parametrize("is_large", [True, False])
def test_a_loss_that_is_not_known_is_told_of_where_it_matters(
    monkeypatch: pytest.MonkeyPatch, caplog: Any, is_large: bool
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 1 if is_large else 1 << 20)
    train(trainer(model(), loss_fn=my_loss), batches())
    assert caplog.text.count("loss_not_fused") == is_large
    assert ("computes_cross_entropy" in caplog.text) == is_large


def test_targets_that_are_no_labels_are_none_of_its_business(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 1)
    trainer(model(), loss_fn=F.mse_loss).step((torch.randn(6, 4), torch.randn(6, 7)))
    assert "fused" not in caplog.text


def test_a_model_compiled_whole_is_told_of_where_it_matters(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 1)
    train(trainer(model(), compile=True), batches())
    assert caplog.text.count("loss_not_fused: a model compiled whole has the loss in it") == 1


class Lent(nn.Module):
    """Its model multiplies by weights of another kind, made anew in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model()

    def forward(self, x: Tensor) -> Any:
        lent = {name: 2 * value for name, value in self.inner.named_parameters()}
        return torch.func.functional_call(self.inner, lent, (x,))


MODELS: list[Any] = [model, lambda: model(Twice.apply), Lent]


@pytest.mark.parametrize("make", MODELS)
def test_training_is_the_same(make: Any, large: None) -> None:
    runs = [trainer(make(), fused_loss=on) for on in (None, False)]
    losses = [train(run, batches(size=8)) for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(runs[0].model.state_dict(), runs[1].model.state_dict())


@pytest.mark.parametrize(("mode", "is_done"), [("bf16", True), ("fp16", False)])
def test_what_a_trainer_does_by_itself_is_no_measure(mode: str, is_done: bool) -> None:
    run = trainer(model(), mode, emulate=True)
    measures, why = possible(run, run.plan)
    assert ("fused_loss=auto" in {measure.name for measure in measures}) != is_done
    assert why.get("fused_loss=auto") == ("where it is possible, this is done anyway" if is_done else None)


class WithLoss(Classifier):
    """Takes its labels and gives its loss, as models of transformers do."""

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        logits = super().forward(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_a_model_that_computes_its_loss_itself_is_told_of_the_function(large: None, caplog: Any) -> None:
    caplog.set_level("INFO")
    losses = []
    for on in (None, False):
        torch.manual_seed(0)
        run = trainer(WithLoss(), fused_loss=on)
        losses.append(train(run, [{"x": x, "labels": labels} for x, labels in batches(size=8)]))
    assert losses[0] == losses[1]
    assert caplog.text.count("loss_not_fused: the model computes its loss itself") == 1
    assert "linear_cross_entropy" in caplog.text


OPTIONS: list[dict[str, Any]] = [
    {"statistics_every": 1, "monitor_every": 1},
    {"gradient_accumulation_steps": 2, "max_grad_norm": 1.0},
    {"activations": True},
    {"memory": 4.0},
    {"ema_decay": 0.9},
]


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
def test_nothing_of_the_trainer_s_own_keeps_the_output(
    options: dict[str, Any], mode: str, large: None, chunks: list[Any]
) -> None:
    run = trainer(model(), mode, emulate=True, **options)
    run.step(batches(size=8)[0])
    chunks.clear()  # of trials
    train(run, batches(size=8))
    assert len(chunks) == 3


@pytest.mark.parametrize("is_first", [True, False])
def test_an_output_that_somebody_keeps_can_be_read_when_the_step_is_over(
    is_first: bool, large: None, chunks: list[Any]
) -> None:
    run, kept = trainer(model()), list[Tensor]()
    if not is_first:
        run.step(batches(size=8)[0])
    run.model.register_forward_hook(lambda _module, _args, output: kept.append(output))
    train(run, batches(size=8))
    assert [output.argmax(1).shape for output in kept] == [(8,)] * 3
    assert len(chunks) == (0 if is_first else 1)


def test_a_small_batch_has_the_ordinary_loss_and_a_larger_one_has_not(large: None, chunks: list[Any]) -> None:
    """In whatever order they come: a run that is continued does what it would have done."""
    run = trainer(model())
    sizes = [5, 6, 8, 6, 9, 5]
    train(run, [batches(size=size)[0] for size in sizes])
    assert [shape[0] for shape in chunks] == [8, 9]


def test_a_larger_batch_that_is_tried_changes_nothing_for_small_ones(large: None) -> None:
    runs = [trainer(model()) for _ in range(2)]
    losses = []
    for run, tries in zip(runs, (True, False), strict=True):
        run.step(batches()[0])
        if tries:
            find_batch_size(run, lambda size: batches(size=size)[0], start=16, limit=16)
        losses.append(train(run, batches()))
    assert losses[0] == losses[1]


def test_what_it_is_told_of_small_scores_it_says_once(large: None, caplog: Any) -> None:
    caplog.set_level("INFO")
    run = trainer(model(), fused_loss="auto")
    train(run, [batches(size=size)[0] for size in (4, 5, 6)])
    assert caplog.text.count("loss_not_fused") == 1


def test_it_is_left_while_the_plan_is_fp16(large: None, chunks: list[Any]) -> None:
    run = trainer(model(), "fp16", emulate=True)
    train(run, batches(size=8))
    assert len(chunks) == 0
    run.change_plan("fp32")
    train(run, batches(size=8))
    assert len(chunks) == 3
    run.change_plan("fp16")
    train(run, batches(size=8))
    assert len(chunks) == 3


class OnTwo(nn.DataParallel):
    """As on two devices, but that its forward needs none."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.device_ids = [0, 1]

    def forward(self, x: Tensor) -> Any:
        return self.module(x)


def test_replicas_of_a_model_multiply_by_their_own_weights(large: None) -> None:
    """What stands in for the forward of a layer would be copied with it, and multiply by the layer's own weight."""
    parallel, seen = OnTwo(model()), list[bool]()
    head = parallel.module.head
    parallel.module.body.register_forward_hook(lambda _module, _args, _output: seen.append("forward" in vars(head)))
    train(trainer(parallel), batches(size=8))
    assert not any(seen)
