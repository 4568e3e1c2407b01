"""A step is made to fit its budget by what costs least, which is recorded; nothing else stays of the trials."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from memory_gauge import MIB, Log, MadeUp, batch, in_force
from torch import Tensor, nn
from torch.nn import functional as F

from deepseek_mp import MixedPrecisionTrainer, WeightStorage
from deepseek_mp.errors import ConfigError
from deepseek_mp.nn import chunked_loss
from deepseek_mp.optim import AdamW, set_storage
from deepseek_mp.optim.offload import OffloadedOptimizer
from deepseek_mp.precision import Reason
from deepseek_mp.trainer import budget, memory_measures, memory_trials
from deepseek_mp.trainer import compile as compile_module
from deepseek_mp.trainer.confirmed_batch import ConfirmedBatch
from deepseek_mp.trainer.fused_loss import FusedLoss
from deepseek_mp.trainer.memory_measures import UNCOUNTED
from deepseek_mp.trainer.memory_report import GIB
from deepseek_mp.trainer.memory_trials import Gauge

pytestmark = pytest.mark.usefixtures("fused_if_asked")


class Model(nn.Module):
    """Runs out of memory above `room` samples in plain steps, in a forward."""

    def __init__(self, room: int = 1000) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.drop = nn.Linear(64, 80), nn.BatchNorm1d(80), nn.Dropout(0.5)
        self.last = nn.Linear(80, 3)
        self.room, self.sizes = room, Log()

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > self.room:
            raise torch.OutOfMemoryError("out of memory")
        return self.last(self.drop(F.relu(self.norm(self.first(x)))))


@pytest.fixture
def gauge(monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    made = MadeUp({"8bit": 300, "activations": 200, "sr": 100}, {"8bit": 0.1, "activations": 0.5, "sr": 0.2})
    monkeypatch.setattr(memory_trials, "Gauge", lambda: made)
    return made


def trainer(mib: float | None = None, model: nn.Module | None = None, mode: str = "bf16", **options: Any) -> Any:
    options = {
        "optimizer": lambda p: torch.optim.AdamW(p, lr=0.01),
        "statistics_every": None,
    } | options
    memory = None if mib is None else mib * MIB / GIB
    model = model or Model()
    return MixedPrecisionTrainer(model, mode, device="cpu", seed=0, emulate=True, memory=memory, **options)


def reasons(run: Any, name: str) -> list[tuple[Reason, str]]:
    found = {Reason.MEMORY_SAVED: True, Reason.MEMORY_LEFT: False}
    return [(reason, line.why) for line in run.memory.lines for reason, t in found.items()
            if line.name == name and line.taken == t]  # fmt: skip


# -- what is chosen --------------------------------------------------------------------------------------


def test_a_step_that_fits_is_left_alone(gauge: MadeUp, caplog: pytest.LogCaptureFixture) -> None:
    plain = trainer()
    expected = [plain.step(batch()).loss for _ in range(3)]
    run = trainer(1000)
    with caplog.at_level(logging.INFO, "deepseek_mp.decisions"):
        assert [run.step(batch()).loss for _ in range(3)] == expected
    assert run.memory.taken == ()
    assert type(run.optimizer) is torch.optim.AdamW
    assert set(gauge.seen) == {()}
    assert "memory_fits: a step holds 0.977 GiB of 0.977 GiB; nothing had to be done" in caplog.text


def test_the_cheapest_by_byte_is_taken_first_and_no_more_than_is_needed(gauge: MadeUp) -> None:
    run = trainer(700)
    run.step(batch())
    assert run.memory.taken == ("states=8bit",)
    assert in_force(run) == ("8bit",)
    assert (run.memory.before_bytes, run.memory.after_bytes) == (1000 * MIB, 700 * MIB)
    assert run.memory.slowdown == pytest.approx(1.1)
    assert reasons(run, "storage=bf16_sr") == [(Reason.MEMORY_LEFT, "others that cost less for each byte suffice")]


def test_measures_are_added_in_the_order_of_their_cost(gauge: MadeUp) -> None:
    run = trainer(600)
    run.step(batch())
    assert run.memory.taken == ("states=8bit", "storage=bf16_sr")
    assert in_force(run) == ("8bit", "sr")
    gauge.costs["sr"] = 1.0  # now the activations cost less for each byte
    other = trainer(500)
    other.step(batch())
    assert other.memory.taken == ("states=8bit", "activations=True")


def test_what_has_become_needless_is_left_out(gauge: MadeUp) -> None:
    gauge.costs = {"sr": 0.0, "8bit": 0.5, "activations": 9.0}
    run = trainer(700)
    run.step(batch())
    assert run.memory.taken == ("states=8bit",)
    assert reasons(run, "storage=bf16_sr") == [(Reason.MEMORY_LEFT, "the step fits without it")]


def test_options_set_by_hand_are_kept_and_weighed_with_nothing(gauge: MadeUp) -> None:
    run = trainer(600, activations=True)  # a plain step holds 800
    run.step(batch())
    assert run.memory.before_bytes == 800 * MIB
    assert run.memory.taken == ("states=8bit",)
    assert reasons(run, "activations=True") == [(Reason.MEMORY_LEFT, "it was set by hand")]


def test_decisions_say_what_was_done_and_why_and_nothing_of_the_trials(
    gauge: MadeUp, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer(600)
    with caplog.at_level(logging.INFO, "deepseek_mp.decisions"):
        run.step(batch())
    lines = [record.getMessage() for record in caplog.records if "memory_" in record.getMessage()]
    assert len(lines) == 1 + len(run.memory.lines)
    assert "(memory_fits: a step holds 0.586 GiB of 0.586 GiB with states=8bit, storage=bf16_sr;" in lines[0]
    assert any("memory_saved: taken states=8bit" in line and "0.293 GiB less and +100 ms" in line for line in lines)
    assert any("activation_memory_budget=0.5 without compile" in line for line in lines)
    assert "loss_" not in "".join(record.getMessage() for record in caplog.records)
    assert str(run.memory).count("\n") == len(run.memory.lines)


def test_a_loss_that_cannot_be_fused_says_why(gauge: MadeUp) -> None:
    gauge.saves["fused"] = 500
    run = trainer(700)
    run.step(batch())
    ((reason, why),) = reasons(run, "fused_loss=auto")
    assert (reason, why) == (Reason.MEMORY_LEFT, "the output takes no more than a chunk, 64 MiB in FP32")


def test_a_measure_whose_step_fails_is_left(gauge: MadeUp) -> None:
    def hold(run: MixedPrecisionTrainer) -> None:
        if "8bit" in in_force(run):
            raise RuntimeError("no kernel")

    gauge.hold = hold
    run = trainer(800)
    run.step(batch())
    assert run.memory.taken == ("activations=True",)
    assert reasons(run, "states=8bit") == [(Reason.MEMORY_LEFT, "RuntimeError: no kernel")]


def test_measures_whose_step_fails_together_do_not_fit(gauge: MadeUp, caplog: pytest.LogCaptureFixture) -> None:
    def hold(run: MixedPrecisionTrainer) -> None:
        if {"8bit", "activations"} <= {*in_force(run)}:
            raise RuntimeError("no kernel for both")

    gauge.hold = hold
    with pytest.raises(ConfigError, match="a budget that a step can be made to fit"):
        trainer(100).step(batch())
    assert "no step can be made with" in caplog.text
    assert "together: RuntimeError: no kernel for both" in caplog.text


def test_an_error_of_a_plain_step_is_the_users(gauge: MadeUp) -> None:
    def hold(_run: MixedPrecisionTrainer) -> None:
        raise RuntimeError("mine")

    gauge.hold = hold
    with pytest.raises(RuntimeError, match="mine"):
        trainer(800).step(batch())


# -- what does not fit -----------------------------------------------------------------------------------


def test_a_budget_out_of_reach_says_what_would_do_and_changes_nothing(gauge: MadeUp) -> None:
    plain = trainer()
    expected = [plain.step(batch()).loss for _ in range(3)]
    run = trainer(300)
    match = r"needs 0.391 GiB with all there is \(states=8bit, storage.*\)\. Allowed.*Pass memory=0.391 or more.*Offl"
    for _ in range(2):
        with pytest.raises(ConfigError, match=match):
            run.step(batch())
    assert in_force(run) == ()
    assert type(run.optimizer) is torch.optim.AdamW
    assert run.memory is None
    run.config = plain.config
    assert [run.step(batch()).loss for _ in range(3)] == expected
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), plain.model.parameters(), strict=True))


def model_with_room(monkeypatch: pytest.MonkeyPatch, *, as_it_is: int, setting: str) -> Model:
    """A model that has room for so many rows, and for all once a setting is in force."""
    model, plain = Model(room=as_it_is), memory_trials.put_in_force

    def opened(run: Any, plan: Any, settings: Any) -> Any:
        model.room = 1000 if getattr(settings, setting) else as_it_is
        return plain(run, plan, settings)

    monkeypatch.setattr(memory_trials, "put_in_force", opened)
    return model


def test_a_step_that_ran_out_of_memory_is_weighed_on_a_part_of_the_batch(
    gauge: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole batch goes through with moments in 8 bits only."""
    model = model_with_room(monkeypatch, as_it_is=40, setting="states")
    run = trainer(750, model)
    run.step(batch(100))
    assert run.memory.before_bytes is None
    assert (run.memory.samples, run.memory.timed_samples) == (100, 25)
    assert run.memory.taken == ("states=8bit",)
    assert model.sizes[:3] == [100, 50, 25]
    assert "more than there is" in str(run.memory)


def test_where_no_step_goes_through_as_it_is_measures_are_taken_in_their_own_order(
    gauge: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(950, model_with_room(monkeypatch, as_it_is=0, setting="storage"))
    run.step(batch(4))
    assert run.memory.taken == ("storage=bf16_sr",)
    assert run.memory.slowdown is None


# -- what is not tried -----------------------------------------------------------------------------------


class BySample(MadeUp):
    """A step holds 300 MiB and 40 for each sample, a quarter of these with activations in FP8. There are `ROOM`."""

    ROOM = 1200

    def __init__(self, costs: dict[str, float]) -> None:
        super().__init__({"8bit": 100, "sr": 50}, costs)
        self.tried: list[tuple[int, tuple[str, ...]]] = []

    def peak(self, step: Callable[[], object], trainer: Any) -> int:
        step()
        samples, here = trainer.model.sizes[-1], in_force(trainer)
        if (samples, here) not in self.tried:
            self.tried.append((samples, here))
        fixed = 300 - sum(self.saves.get(name, 0.0) for name in here)
        peak = fixed + (10 if "activations" in here else 40) * samples
        if peak > self.ROOM:
            raise torch.OutOfMemoryError("out of memory")
        return round(MIB * peak)

    def whole(self, size: int) -> list[tuple[str, ...]]:
        """What was in force in trials of this size."""
        return [here for samples, here in self.tried if samples == size]


DEAR = {"8bit": 0.1, "sr": 0.2, "activations": 20.0}
CHEAP = {"8bit": 0.5, "sr": 1.0, "activations": 0.1}


def by_sample(monkeypatch: pytest.MonkeyPatch, costs: dict[str, float]) -> BySample:
    made = BySample(costs)
    monkeypatch.setattr(memory_trials, "Gauge", lambda: made)
    return made


def known(run: Any, *, samples: int = 64, peak: int = 790) -> None:
    names = ("states=8bit", "storage=bf16_sr", "activations=True")
    limit = round(run.config.memory * GIB)
    run.confirmed = ConfirmedBatch(samples=samples, measures=names, peak_bytes=peak * MIB, limit_bytes=limit)


def test_of_a_part_that_was_weighed_it_is_predicted_which_sets_are_not_worth_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = by_sample(monkeypatch, DEAR)
    run = trainer(1200)
    run.step(batch(64))
    assert run.memory.taken == ("activations=True",)
    assert run.memory.timed_samples == 16
    assert [name for name in ("8bit", "sr") if (name,) in made.whole(64)] == []
    # As it is; all, the first set that can do; and what is left out of it.
    assert made.whole(64) == [(), ("activations", "8bit", "sr"), ("activations", "8bit"), ("activations",)]
    assert made.whole(8) == [()]  # how much it is for a sample


def test_no_more_is_taken_than_a_batch_needs_that_has_as_many_samples_as_were_confirmed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = by_sample(monkeypatch, DEAR)
    run = trainer(1200)
    known(run)
    run.step(batch(64))
    assert run.memory.taken == ("activations=True",)
    assert len(made.whole(64)) == 4


def test_what_was_confirmed_is_not_tried_with_less_where_each_measure_is_predicted_to_be_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = by_sample(monkeypatch, DEAR)
    run = trainer(800)
    known(run)
    run.step(batch(64))
    assert set(run.memory.taken) == {"activations=True", "states=8bit", "storage=bf16_sr"}
    assert made.whole(64) == [(), ("activations", "8bit", "sr")]


@pytest.mark.parametrize("confirmed", [True, False])
def test_what_was_confirmed_comes_before_what_is_predicted_not_to_fit(
    monkeypatch: pytest.MonkeyPatch, *, confirmed: bool
) -> None:
    """All are needed: 790 MiB of 800, and each of them saves 50 or more."""
    made = by_sample(monkeypatch, CHEAP)
    run = trainer(800)
    if confirmed:
        known(run)
    run.step(batch(64))
    assert set(run.memory.taken) == {"activations=True", "states=8bit", "storage=bf16_sr"}
    everything = ("activations", "8bit", "sr")
    fewer = [] if confirmed else [("activations",), ("activations", "8bit")]
    assert made.whole(64)[:1] == [()]
    assert made.whole(64)[1:] in ([*fewer, everything], [*fewer, everything, ("activations", "sr")])
    assert len(made.whole(64)) == 2 or not confirmed


def test_a_smaller_batch_than_was_confirmed_takes_less(monkeypatch: pytest.MonkeyPatch) -> None:
    made = by_sample(monkeypatch, CHEAP)
    run = trainer(800)
    known(run)
    run.step(batch(40))
    assert run.memory.taken == ("activations=True",)
    assert made.whole(40) == [(), ("activations",)]
    made.tried.clear()
    less = trainer(800)
    known(less)
    less.step(batch(52))  # 720 MiB with two of them
    assert less.memory.taken == ("activations=True", "states=8bit")
    assert made.whole(52) == [(), ("activations",), ("activations", "8bit")]


def test_a_batch_that_was_confirmed_and_runs_out_of_memory_is_tried_once_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the rest of the memory lies is never quite the same."""
    made = by_sample(monkeypatch, DEAR)
    run = trainer(800)
    known(run)
    failed: list[int] = []

    def hold(peak: Callable[..., int], step: Callable[[], object], run: Any) -> int:
        found = peak(step, run)
        if run.model.sizes[-1] == 64 and len(in_force(run)) >= 3 and len(failed) < 2:
            failed.append(len(in_force(run)))
            raise torch.OutOfMemoryError("in pieces")
        return found

    monkeypatch.setattr(made, "peak", partial(hold, made.peak))
    run.step(batch(64))
    assert failed == [3, 4]
    assert set(run.memory.taken) == {"activations=True", "states=8bit", "storage=bf16_sr"}


def test_a_part_too_small_to_be_halved_predicts_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = by_sample(monkeypatch, DEAR)
    model = Model()
    model.norm = nn.Identity()  # a BatchNorm needs two samples
    made.ROOM = 360
    run = trainer(350, model)
    run.step(batch(2))
    assert run.memory.timed_samples == 1
    assert made.whole(2)[1] == ("8bit",)
    assert "no step that was tried was applied" not in caplog.text  # none of an empty batch is


# -- what stays ------------------------------------------------------------------------------------------


def test_weights_are_put_back_when_what_steps_left_has_gone_back_to_the_device(
    gauge: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else they lie in pieces of it, and hold what the next steps need in one."""
    done: list[str] = []
    run = trainer(600)

    def held() -> bool:
        return any(isinstance(value, Tensor) for state in run.optimizer.state.values() for value in state.values())

    def stored(optimizer: Any, weight: Tensor, format: Any) -> None:
        done.append(f"stored in {format.value}")
        set_storage(optimizer, weight, format)

    monkeypatch.setattr(memory_trials, "release_memory", lambda _device: done.append("moments" if held() else "free"))
    monkeypatch.setattr(memory_measures, "set_storage", stored)
    run.step(batch())
    back = [number for number, what in enumerate(done) if what == "stored in fp32" and done[number - 1] != what]
    assert back
    assert {done[number - 1] for number in back} == {"free"}


@pytest.mark.parametrize("mib", [1000, 700, 600])
def test_the_first_step_is_that_of_a_run_with_these_options(gauge: MadeUp, mib: int) -> None:
    """Trials leave weights, buffers and random numbers alone, to the bit."""
    plain = trainer()
    expected = plain.step(batch()).loss
    run = trainer(mib)
    assert run.step(batch()).loss == pytest.approx(expected, abs=1e-3 if mib == 600 else 0.0)  # rounded weights
    assert run.steps_applied == 1
    assert run.model.norm.num_batches_tracked == 1
    assert torch.equal(run.model.norm.running_mean, plain.model.norm.running_mean) or mib == 600


def test_callbacks_scheduler_and_average_see_nothing_of_the_trials(gauge: MadeUp) -> None:
    run = trainer(
        600,
        ema_decay=0.5,
        scheduler=lambda opt: torch.optim.lr_scheduler.StepLR(opt, 1, 0.5),
    )
    run.step(batch())
    assert run.scheduler.last_epoch == 1
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.005)
    run.step(batch())
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.0025)
    assert torch.isfinite(torch.tensor(run.evaluate([batch()])["loss"]))
    assert run.model.first.weight.dtype is torch.bfloat16


def test_accumulation_is_chosen_for_once(gauge: MadeUp) -> None:
    run = trainer(700, gradient_accumulation_steps=2)
    run.step(batch())
    tried = len(gauge.seen)
    assert run.step(batch()).status == "applied"
    assert len(gauge.seen) == tried
    assert run.memory.taken == ("states=8bit",)


def test_a_fit_says_it(gauge: MadeUp, tmp_path: Any) -> None:
    run = trainer(700, run_dir=tmp_path)
    result = run.fit([batch()] * 3, epochs=1)
    assert result.memory is run.memory
    assert "with states=8bit" in str(result)
    lines = (tmp_path / "decisions.jsonl").read_text()
    assert lines.count("memory_saved") == 1


# -- who decides about the optimizer ---------------------------------------------------------------------


def test_weights_are_left_to_a_callback_that_stores_them(gauge: MadeUp) -> None:
    run = trainer(700, optimizer=AdamW, callbacks=[WeightStorage()])
    run.step(batch())
    assert reasons(run, "storage=bf16_sr") == [(Reason.MEMORY_LEFT, "WeightStorage decides how weights are stored")]
    assert run.memory.taken == ("states=8bit",)


@pytest.mark.parametrize(
    ("optimizer", "why"),
    [
        (torch.optim.RMSprop, "the optimizer stays PyTorch's: RMSprop is none of PyTorch's AdamW, Adam and SGD"),
        (lambda p: torch.optim.SGD(p, lr=0.1), "the optimizer keeps no moments"),
        (lambda p: AdamW(p, states="8bit"), "it was set by hand"),
    ],
)
def test_an_optimizer_that_cannot_keep_8_bits_says_why(gauge: MadeUp, optimizer: Any, why: str) -> None:
    gauge.saves["8bit"] = 0
    run = trainer(800, optimizer=optimizer)
    run.step(batch())
    assert reasons(run, "states=8bit") == [(Reason.MEMORY_LEFT, why)]


def test_no_weight_is_stored_in_bf16_where_none_is_read_so(gauge: MadeUp) -> None:
    run = trainer(700, mode="fp32")
    run.step(batch())
    assert reasons(run, "storage=bf16_sr") == [(Reason.MEMORY_LEFT, "no layer reads an FP32 weight in BF16")]


def test_an_optimizer_of_ours_gets_8_bits_in_its_groups(gauge: MadeUp) -> None:
    run = trainer(700, optimizer=AdamW)
    run.step(batch())
    assert "exp_avg_codes" in run.optimizer.state[run.model.first.weight]


# -- compiled code ---------------------------------------------------------------------------------------


class Compiled(MadeUp):
    """A step that runs uncompiled holds 2000 MiB, a compiled one 1000, in shares of the budget."""

    compiled = False

    def backend(self, _budget: float | None) -> Callable[..., Any]:
        def compiled(graph: torch.fx.GraphModule, _inputs: Any) -> Callable[..., Any]:
            def run(*args: Any) -> Any:
                self.compiled = True
                return graph(*args)

            return run

        return compiled

    def peak(self, step: Callable[[], object], trainer: MixedPrecisionTrainer) -> int:
        self.compiled = False
        step()
        self.seen.append(("compiled" if self.compiled else "uncompiled",))
        share = trainer.config.activation_memory_budget or 1.0
        return round(MIB * (1000 * share if self.compiled else 2000))

    def seconds(self, step: Callable[[], object], trainer: MixedPrecisionTrainer) -> float:
        step()
        return 2.0 - (trainer.config.activation_memory_budget or 1.0)


@pytest.mark.parametrize(
    ("mib", "taken", "budget"),
    [
        (2000, (), None),
        (1000, (UNCOUNTED,), None),
        (600, (UNCOUNTED, "activation_memory_budget=0.5"), 0.5),
    ],
)
def test_of_compiled_code_no_step_is_counted_if_it_does_not_fit_uncompiled(
    monkeypatch: pytest.MonkeyPatch, mib: int, taken: tuple[str, ...], budget: float | None
) -> None:
    made = Compiled({})
    monkeypatch.setattr(memory_trials, "Gauge", lambda: made)
    monkeypatch.setattr(compile_module, "backend", made.backend)
    run = trainer(mib, nn.Linear(64, 3), "fp32", compile=True, optimizer=torch.optim.RMSprop, monitor_every=2)
    run.step(batch())
    assert run.memory.taken == taken
    assert run.config.activation_memory_budget == budget
    made.seen.clear()
    for _ in range(4):
        made.peak(lambda: run.step(batch()), run)
    assert (("uncompiled",) in made.seen) == (UNCOUNTED not in taken)


# -- really --------------------------------------------------------------------------------------------


def test_logits_that_do_not_fit_are_computed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 1 << 18)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1024))
    limit = 4 * MIB
    options = {"memory": limit / GIB, "statistics_every": None}
    run = MixedPrecisionTrainer(model, "fp32", device="cpu", **options)
    data = torch.randn(512, 4), torch.randint(0, 1024, (512,))
    run.step(data)
    assert run.memory is not None
    assert run.memory.before_bytes is not None
    assert "fused_loss=auto" in run.memory.taken
    assert run.memory.before_bytes > limit > run.memory.after_bytes
    again = Gauge().peak(lambda: run.step(data), run)
    assert again is not None
    assert again <= limit


class Counting(nn.Module):
    """A model whose numbers follow from its calls, and a loss with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.calls, self.hidden = nn.Linear(64, 3), 0, torch.zeros(3)
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out = self.layer(x) * (1 + self.calls / 10) + self.hidden + torch.rand(3, generator=self.generator)
        self.hidden = out.detach().mean(0)
        return out


class Moving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(output, target)
        self.mean.lerp_(loss.detach(), 0.1)
        return loss / (1 + self.mean)


def test_a_model_and_a_loss_that_keep_something_train_as_without() -> None:
    def weights(**options: Any) -> Tensor:
        run = MixedPrecisionTrainer(Counting(), "fp32", device="cpu", loss_fn=Moving(), **options)
        for _ in range(3):
            run.step(batch())
        return run.model.layer.weight.detach()

    assert torch.equal(weights(memory="auto"), weights())


def test_an_empty_batch_tells_nothing_and_the_next_one_does(gauge: MadeUp) -> None:
    run = trainer(800)
    run.step((torch.empty(0, 64), torch.empty(0, dtype=torch.int64)))
    assert run.memory is None
    run.step(batch())
    assert run.memory.samples == 8


def test_who_offloads_already_is_not_told_to() -> None:
    run = MixedPrecisionTrainer(Model(), "fp32", device="cpu", optimizer=OffloadedOptimizer, memory=1e-6)
    with pytest.raises(ConfigError, match=r"find_batch_size finds the largest\)\."):
        run.step(batch())
    plain = MixedPrecisionTrainer(Model(), "fp32", device="cpu", memory=1e-6)
    with pytest.raises(ConfigError, match=r"on the host \(optimizer=optim.offload.OffloadedOptimizer\)\."):
        plain.step(batch())


# -- the trial and the step -------------------------------------------------------------------------------


class Blocks(Model):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for block in self.blocks:
            x = block(x)
        return x


def test_the_first_step_is_computed_by_what_computed_the_trial(
    gauge: MadeUp, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What a trial has decided by the batch is not decided again: a second look might come out otherwise."""
    in_trials, original = [], budget.measure_blocks

    def measure(*args: Any) -> Any:
        in_trials.append(run.memory is None)
        return original(*args)

    monkeypatch.setattr(budget, "measure_blocks", measure)
    run = trainer(700, Blocks(), activation_memory_budget=0.01)
    with caplog.at_level(logging.INFO, "deepseek_mp.decisions"):
        run.step(batch())
        run.step(batch())
    assert run.memory.taken == ("states=8bit",)
    assert run.recomputed_blocks is not None
    assert all(in_trials)
    assert len([r for r in caplog.records if "of 2 blocks are computed again" in r.getMessage()]) == 1


def test_a_loss_whose_scores_are_small_in_a_part_of_the_batch_is_tried_in_the_whole(
    gauge: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measures are weighed on what goes through as it is."""
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 5 * 3 * 4)
    model = model_with_room(monkeypatch, as_it_is=4, setting="options")
    gauge.saves = {"fused": 500}
    run = trainer(600, model)
    run.step(batch())
    assert run.memory.timed_samples == 4
    assert "fused_loss=auto" in run.memory.taken
    assert type(run.stepper.compute) is FusedLoss
    assert run.stepper.compute.layer is run.model.last
