"""A trainer computes the loss in chunks where that is the same, and says why where it does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from own_function import Twice
from scored import Classifier, batches, train, trainer
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from deepseek_mp import MixedPrecisionTrainer
from deepseek_mp.errors import ConfigError
from deepseek_mp.nn import computes_cross_entropy
from deepseek_mp.precision import Reason
from deepseek_mp.trainer import fused_loss
from deepseek_mp.trainer.fused_loss import FusedLoss
from deepseek_mp.workloads.gpt import GPTConfig, byte_gpt, next_byte_loss

SMALL = GPTConfig(width=16, heads=2, layers=1, context=12)


class FirstNamed(Classifier):
    """The last layer to run is not the last one of the model's modules."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.body = self._modules.pop("body")


def text(steps: int = 3) -> list[tuple[Tensor, Tensor]]:
    tokens = torch.randint(0, 256, (steps, 3, 13), generator=torch.Generator().manual_seed(5))
    return [(part[:, :-1], part[:, 1:]) for part in tokens]


def model_of(kind: type[nn.Module] | str) -> nn.Module:
    torch.manual_seed(0)
    return byte_gpt(SMALL) if kind == "gpt" else Classifier()


def fused(run: MixedPrecisionTrainer) -> FusedLoss:
    assert isinstance(run.stepper.compute, FusedLoss)
    return run.stepper.compute


LOSSES = [
    None,
    F.cross_entropy,
    nn.CrossEntropyLoss(),
    nn.CrossEntropyLoss(label_smoothing=0.1),
    nn.CrossEntropyLoss(reduction="sum"),
]


@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("loss_fn", LOSSES, ids=lambda loss: getattr(loss, "__name__", str(loss)))
def test_training_is_the_same_as_without(mode: str, loss_fn: Any, chunks: list[Any]) -> None:
    runs = [
        trainer(model_of("classifier"), mode, loss_fn=loss_fn, fused_loss=on, emulate=True, loss_scale_policy=64.0)
        for on in (True, False)
    ]
    losses = [train(run, batches()) for run in runs]
    close = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-3}[mode]
    assert losses[0] == pytest.approx(losses[1], rel=close)
    for ours, theirs in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=close, atol=close)
    assert chunks == [(6, 8)] * 3


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_language_model_with_a_tied_head(accumulation: int, chunks: list[Any]) -> None:
    runs = [
        trainer(model_of("gpt"), loss_fn=next_byte_loss, fused_loss=on, gradient_accumulation_steps=accumulation)
        for on in (True, False)
    ]
    losses = [train(run, text(4)) for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(runs[0].model.state_dict(), runs[1].model.state_dict(), rtol=1e-4, atol=1e-6)
    assert len(chunks) == 4
    assert fused(runs[0]).layer is runs[0].model.head


def watched(run: MixedPrecisionTrainer, monkeypatch: pytest.MonkeyPatch) -> list[tuple[nn.Module, int]]:
    """The linear layers that multiply from now on, and how many rows."""
    seen: list[tuple[nn.Module, int]] = []
    kind = type(run.model.head)
    original = kind.forward

    def forward(unit: Any, x: Tensor) -> Any:
        seen.append((unit, len(x)))
        return original(unit, x)

    monkeypatch.setattr(kind, "forward", forward)
    return seen


def test_the_last_layer_multiplies_a_few_rows_in_the_first_step_and_none_later(monkeypatch: Any) -> None:
    monkeypatch.setattr(fused_loss, "COMPARED_ROWS", 2)
    run = trainer(model_of("classifier"), fused_loss=True)
    rows = watched(run, monkeypatch)
    train(run, batches())
    assert rows == [(run.model.body, 6), (run.model.head, 2), (run.model.body, 6), (run.model.body, 6)]


def test_a_last_layer_that_is_not_the_last_one_named_is_found_in_the_first_step(monkeypatch: Any) -> None:
    torch.manual_seed(0)
    run = trainer(FirstNamed(), fused_loss=True)
    rows = watched(run, monkeypatch)
    losses = train(run, batches())
    assert fused(run).layer is run.model.head
    assert [(unit is run.model.head) for unit, _ in rows] == [False, True, False, False]
    torch.manual_seed(0)
    assert losses == pytest.approx(train(trainer(FirstNamed()), batches()), rel=1e-6)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Compiled blocks run as they were captured."""
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: lambda graph, inputs, **_: graph.forward)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("budget", [None, 0.5], ids=["first step counted", "first step compiled"])
def test_beside_blocks_that_are_compiled(chunks: list[Any], budget: float | None) -> None:
    deep = replace(SMALL, layers=2)
    losses = []
    for options in ({"fused_loss": True, "compile": "regional", "activation_memory_budget": budget}, {}):
        torch.manual_seed(0)
        losses.append(train(trainer(byte_gpt(deep), loss_fn=next_byte_loss, **options), text()))
    assert len(chunks) == 3
    assert counters["stats"]["unique_graphs"] == 1, "one of the two blocks, as without a fused loss"
    assert not counters["graph_break"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_what_was_found_is_a_decision_of_the_run(tmp_path: Any) -> None:
    run = trainer(model_of("classifier"), fused_loss=True, run_dir=tmp_path)
    run.fit(batches())
    (path,) = tmp_path.glob("**/decisions.jsonl")
    assert path.read_text().count(f'"{Reason.LOSS_FUSED.value}"') == 1
    assert '"head"' in path.read_text()


def looked_at(module: nn.Module, args: Any, output: Tensor) -> None:
    module.mean = output.detach().mean()


def changed(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


def changed_in_place(module: nn.Module, args: Any, output: Tensor) -> None:
    output.mul_(2)


@pytest.mark.parametrize("where", ["head", ""])
@pytest.mark.parametrize("hook", [looked_at, changed, changed_in_place])
def test_a_hook_that_comes_later_sees_the_output_and_is_obeyed(where: str, hook: Any, chunks: list[Any]) -> None:
    runs = [trainer(model_of("classifier"), fused_loss=on) for on in (True, False)]
    for run in runs:
        run.step(batches()[0])
        run.model.get_submodule(where).register_forward_hook(hook)
    losses = [train(run, batches()) for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(chunks) == 1


def test_hooks_of_the_last_layer_run_once_and_change_its_input(chunks: list[Any]) -> None:
    losses, sizes = [], []
    for on in (True, False):
        model = model_of("classifier")
        model.head.register_forward_pre_hook(lambda _module, args: (args[0] * 10,))
        model.head.register_forward_hook(lambda _module, _args, output: sizes.append(len(output)))
        losses.append(train(trainer(model, fused_loss=on), batches()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert sizes == [6] * 6
    assert chunks


def test_a_weight_that_is_changed_after_its_product_is_refused() -> None:
    model = model_of("classifier")
    run = trainer(model, fused_loss=True)
    run.step(batches()[0])

    def halved(output: Tensor) -> Tensor:
        with torch.no_grad():
            model.head.weight.mul_(0.5)
        return output

    model.after = halved
    with pytest.raises(ConfigError, match=r"input or weight was changed in place.*fused_loss=False"):
        run.step(batches()[1])


@pytest.mark.parametrize("fused", [False, True])
def test_an_output_that_is_read_when_the_step_is_over_is_an_error(*, fused: bool) -> None:
    """The weights are others by then."""
    model, kept = model_of("classifier"), list[Tensor]()
    model.head.register_forward_hook(lambda _module, _args, output: kept.append(output))
    run = trainer(model, fused_loss=True, optimizer=lambda params: torch.optim.SGD(params, lr=0.5, fused=fused))
    run.step(batches()[0])
    assert kept[0].shape == (6, 7)
    with pytest.raises(ConfigError, match=r"read after a fused loss was computed.*Read it in the hook"):
        kept[0].argmax(1)


def test_a_parametrised_layer_is_not_computed_again_to_look_at_it() -> None:
    weights = []
    for on in ("auto", False):
        model = model_of("classifier")
        model.body = nn.utils.parametrizations.spectral_norm(model.body)
        train(trainer(model, fused_loss=on), batches(1))
        weights.append(model.body.parametrizations.weight.original)
    assert torch.equal(*weights)


def test_a_backward_hook_that_comes_later_is_obeyed(chunks: list[Any]) -> None:
    runs = [trainer(model_of("classifier"), fused_loss=on) for on in (True, False)]
    seen: list[Tensor] = []
    for run in runs:
        run.step(batches()[0])
        run.model.register_full_backward_hook(lambda module, grads, out: seen.append(out[0].clone()))
    losses = [train(run, batches(1)) for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(*seen)


def test_an_output_that_goes_into_a_function_later_has_the_ordinary_loss(chunks: list[Any]) -> None:
    runs = [trainer(model_of("classifier"), fused_loss=on) for on in (True, False)]
    for run in runs:
        run.step(batches()[0])
        run.model.after = Twice.apply
    losses = [train(run, batches()) for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(chunks) == 1


def off(detail: str, *, model: Any = None, loss_fn: Any = None, data: Any = None, **options: Any) -> Any:
    return pytest.param(model, loss_fn, data, options, detail, id=detail[:50])


def _times_two(output: Tensor) -> Tensor:
    return output * 2


def _in_place(output: Tensor) -> Tensor:
    return output.mul_(2)


@computes_cross_entropy()
def wrong_mark(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target) * 2


OFF = [
    off("output is not, as it is, that of the last linear layer", model=lambda: Classifier(_times_two)),
    off("output is not, as it is, that of the last linear layer", model=lambda: Classifier(lambda y: {"logits": y}),
        loss_fn=computes_cross_entropy()(lambda output, target: F.cross_entropy(output["logits"], target))),
    off("output is not, as it is, that of the last linear layer", model=lambda: Classifier(_in_place)),
    off("the last layer's output was changed in place", model=lambda: FirstNamed(_in_place)),
    off("the loss of some rows is", loss_fn=wrong_mark),
    off("loss_fn is not known to be the cross entropy", loss_fn=lambda output, target: F.cross_entropy(output, target)),
    off("the loss weighs its classes", loss_fn=nn.CrossEntropyLoss(weight=torch.ones(7))),
    off("the target is not one whole number", data=[(x, torch.randn(6, 7)) for x, _ in batches()]),
    off("the last layer runs in fp32", mode="bf16", pin={"head": "fp32"}),
]  # fmt: skip


def required(model: nn.Module, data: list[Any], mode: str = "fp32", **options: Any) -> None:
    """It is refused when the trainer is made, or in the first step."""
    train(trainer(model, mode, fused_loss=True, **options), data)


@pytest.mark.parametrize(("model", "loss_fn", "data", "options", "detail"), OFF)
def test_where_it_cannot_be_it_says_why_and_trains_as_ever(
    model: Any, loss_fn: Any, data: Any, options: Any, detail: str, monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.setattr(fused_loss, "chunk_bytes", lambda device: 0)
    caplog.set_level("INFO")
    losses = []
    for on in ("auto", False):
        torch.manual_seed(0)
        run = trainer((model or Classifier)(), **({"loss_fn": loss_fn, "fused_loss": on} | options))
        losses.append(train(run, data or batches(2)))
    assert losses[0] == losses[1]
    lines = [record.getMessage() for record in caplog.records if "loss_not_fused" in record.getMessage()]
    assert len(lines) == 1
    assert detail in lines[0]
    torch.manual_seed(0)
    with pytest.raises(ConfigError, match=r"fused_loss=True, but .*Use fused_loss='auto' or False"):
        required((model or Classifier)(), data or batches(1), loss_fn=loss_fn, **options)


def test_a_model_compiled_whole_has_the_loss_in_it(caplog: Any) -> None:
    caplog.set_level("INFO")
    run = trainer(model_of("classifier"), fused_loss="auto", compile=True)
    assert not isinstance(run.stepper.compute, FusedLoss)
    assert "loss_not_fused: a model compiled whole has the loss in it" in caplog.text
    with pytest.raises(ConfigError, match="fused_loss=True, but a model compiled whole has the loss in it"):
        trainer(model_of("classifier"), fused_loss=True, compile=True)


def test_auto_leaves_a_small_output_alone(caplog: Any, chunks: list[Any]) -> None:
    caplog.set_level("INFO")
    train(trainer(model_of("classifier"), fused_loss="auto"), batches())
    assert "the output takes no more than a chunk, 64 MiB" in caplog.text
    assert chunks == []


def test_a_batch_without_labels_tells_nothing(chunks: list[Any]) -> None:
    run = trainer(model_of("classifier"), fused_loss=True)
    inputs, labels = batches()[0]
    assert run.step((inputs, torch.full_like(labels, -100))).status == "no_grads"
    assert fused(run).layer is None
    run.step((inputs, labels))
    assert len(chunks) == 1


def test_it_follows_the_plan(chunks: list[Any]) -> None:
    run = trainer(model_of("classifier"), fused_loss=True)
    train(run, batches())
    run.change_plan("bf16", pin={"head": "fp32"})
    train(run, batches())
    assert len(chunks) == 3
    run.change_plan("bf16", pin={})
    train(run, batches())
    assert len(chunks) == 6


@pytest.mark.parametrize("accumulation", [1, 2])
def test_beside_weights_that_are_cast_in_one_pass(accumulation: int, chunks: list[Any], monkeypatch: Any) -> None:
    monkeypatch.setattr("deepseek_mp.trainer.step.SLOWER_IN_ONE_PASS", ())
    options: dict[str, Any] = {"loss_fn": next_byte_loss, "gradient_accumulation_steps": accumulation, "emulate": True}
    runs = [trainer(model_of("gpt"), "bf16", fused_loss=on, **options) for on in (True, False)]
    losses = [train(run, text(6)) for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert len(chunks) == 6
    assert runs[0].model.embedding.weight.grad is None


def test_a_region_of_the_model_s_own_around_the_last_layer(chunks: list[Any]) -> None:
    class Own(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.body(x).tanh()
            with torch.autocast("cpu", enabled=False):
                return self.head(hidden.float())

    losses = []
    for on in (True, False):
        torch.manual_seed(0)
        losses.append(train(trainer(Own(), "bf16", fused_loss=on, emulate=True), batches()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)
    assert len(chunks) == 3


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_last_layer_within_checkpointing(reentrant: bool, chunks: list[Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(fused_loss, "chunk_bytes", lambda device: 0)

    class Checkpointed(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            def block(h: Tensor) -> Tensor:
                return self.head(h.tanh())

            return checkpoint(block, self.body(x), use_reentrant=reentrant)

    runs = []
    for on in ("auto", False):
        torch.manual_seed(0)
        runs.append(trainer(Checkpointed(), fused_loss=on))
    losses = [train(run, batches()) for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(runs[0].model.state_dict(), runs[1].model.state_dict())
    assert len(chunks) == (0 if reentrant else 3)


def test_statistics_of_the_last_layer_do_not_compute_its_output(chunks: list[Any]) -> None:
    run = trainer(model_of("classifier"), fused_loss=True, statistics_every=1)
    train(run, batches(6))
    assert len(chunks) == 6


class Named(Classifier):
    """Gives its scores as a field of a mapping, as models of transformers do, and its caller takes them out."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Classifier(lambda output: {"logits": output})
        self.body = self.head = None

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)["logits"]


def test_statistics_do_not_compute_an_output_that_is_inside_of_another(chunks: list[Any]) -> None:
    """The first step watches all modules: what it computes is decided for good in it."""
    run = trainer(Named(), fused_loss=True, statistics_every=1)
    train(run, batches(6))
    assert len(chunks) == 6
    assert fused(run).layer is run.model.inner.head


def test_evaluation_sees_the_output() -> None:
    run = trainer(model_of("classifier"), fused_loss=True)
    run.fit(batches())
    shapes = []
    run.evaluate(batches(), metrics={"rows": lambda output, target: shapes.append(output.shape) or output.sum()})
    assert shapes == [(6, 7)] * 3
    assert type(run.predict(batches()[0])) is Tensor


def test_a_skipped_step_is_replayed_as_ever() -> None:
    run = trainer(model_of("classifier"), fused_loss=True)
    run.step(batches()[0])
    inputs, labels = batches()[1]
    result = run.step((inputs.fill_(torch.nan), labels))
    assert (result.status, result.first_bad_module) == ("skipped", "(batch)")


@pytest.mark.parametrize("wrong", ["yes", 2])
def test_other_options_are_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"fused_loss=.* Allowed: None, False, True, 'auto'"):
        trainer(model_of("classifier"), fused_loss=wrong)
