"""The largest batch that fits is found, and nothing of the search stays."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from memory_gauge import MIB, Log, MadeUp, in_force
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from deepseek_mp import Callback, MixedPrecisionTrainer
from deepseek_mp.backends import capabilities
from deepseek_mp.errors import ConfigError
from deepseek_mp.nn import chunked_loss
from deepseek_mp.nn.deferred import is_pending
from deepseek_mp.trainer import batch_size, find_batch_size, fused_loss, memory_trials, step, trial_steps
from deepseek_mp.trainer import budget as budget_module
from deepseek_mp.trainer.batch_size import BatchSize
from deepseek_mp.trainer.memory_report import GIB

pytestmark = pytest.mark.usefixtures("fused_if_asked")


class Model(nn.Module):
    """Runs out of memory above `room` samples, in the forward or the backward, or of an error of some backend's."""

    def __init__(self, room: int, where: str = "forward", error: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.drop = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.last = nn.Linear(8, 3)
        self.room, self.where = room, where
        self.error = error or torch.OutOfMemoryError("out of memory")
        self.sizes = Log()

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        x = self.drop(self.norm(self.first(x)))
        if len(x) > self.room and self.where == "forward":
            raise copy.copy(self.error)  # an exception keeps the frames that it came through
        if len(x) > self.room and x.requires_grad:
            x.register_hook(self._fail)
        return self.last(x)

    def _fail(self, _grad: Tensor) -> None:
        raise copy.copy(self.error)


@pytest.fixture(autouse=True)
def _uncollected(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's collector takes longer than a small model's steps."""
    if "memory" not in request.node.name:
        monkeypatch.setattr(trial_steps, "gc", SimpleNamespace(collect=lambda: None))


def make_batch(size: int) -> tuple[Tensor, Tensor]:
    random.random()
    np.random.rand()
    return torch.randn(size, 4), torch.randint(0, 3, (size,))


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.1)


def trainer(model: nn.Module, mode: str = "fp32", **options: Any) -> MixedPrecisionTrainer:
    options = {"optimizer": adam, "emulate": True, "statistics_every": None} | options
    return MixedPrecisionTrainer(model, mode, device="cpu", seed=0, **options)


# -- the search ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [1, 2, 3, 7, 8, 100, 1000])
@pytest.mark.parametrize("start", [1, 3, 64])
@pytest.mark.parametrize("limit", [None, 1, 50, 1000])
def test_the_largest_size_is_found_whatever_the_search_starts_with(room: int, start: int, limit: int | None) -> None:
    asked: list[int] = []
    run = trainer(Model(0))
    found = find_batch_size(
        run, make_batch, start=start, limit=limit, fits=lambda size: asked.append(size) or size <= room
    )
    assert found.size == (room if limit is None else min(room, limit))
    assert found.too_large == (None if limit is not None and room >= limit else room + 1)
    assert [one.size for one in found.tried] == asked
    assert len(asked) == len(set(asked)) <= 24, asked
    assert limit is None or max(asked) <= limit


@pytest.mark.parametrize(("room", "expected"), [(100, 96), (8, 8), (15, 8)])
def test_sizes_are_multiples(room: int, expected: int) -> None:
    asked: list[int] = []
    found = find_batch_size(
        trainer(Model(0)), make_batch, start=20, multiple=8, fits=lambda size: asked.append(size) or size <= room
    )
    assert (found.size, found.too_large) == (expected, expected + 8)
    assert all(size % 8 == 0 for size in asked)


def test_that_nothing_fits_is_an_error() -> None:
    with pytest.raises(ConfigError, match="a batch of 4, the smallest that may be tried, which does not fit"):
        find_batch_size(trainer(Model(0)), make_batch, multiple=4, fits=lambda size: False)


# -- real steps ------------------------------------------------------------------------------------------


def test_data_in_place_of_a_function_that_makes_batches_are_refused() -> None:
    data: Any = torch.utils.data.TensorDataset(*make_batch(8))
    with pytest.raises(ConfigError, match=r"make_batch of type TensorDataset.*a function from a size to a batch"):
        find_batch_size(trainer(Model(8)), data, limit=8)


@pytest.mark.parametrize(("there", "said"), [(20, 1), (12, 1), (64, 0)])
def test_that_the_data_of_a_batch_ran_out_is_said_once(there: int, said: int, caplog: pytest.LogCaptureFixture) -> None:
    inputs, targets = make_batch(there)
    run = trainer(Model(1000))
    assert find_batch_size(run, lambda size: (inputs[:size], targets[:size]), limit=64).size == 64
    assert caplog.text.count(f"make_batch gave {there} samples for a batch of") == said
    assert run.confirmed is not None
    assert run.confirmed.samples == there


def test_a_first_dimension_that_is_none_of_samples_is_no_end_of_the_data(caplog: pytest.LogCaptureFixture) -> None:
    def by_time(size: int) -> tuple[Tensor, Tensor]:
        return torch.randn(16, size, 4), torch.randint(0, 3, (16, size))

    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    run = trainer(model, loss_fn=lambda output, target: nn.functional.cross_entropy(output.mT, target))
    find_batch_size(run, by_time, limit=64)
    assert "make_batch gave" not in caplog.text


def sizes(found: BatchSize) -> list[int]:
    return [one.size for one in found.tried]


def test_the_search_ends_with_a_gap_of_a_64th() -> None:
    found = find_batch_size(trainer(Model(393)), make_batch, start=37, limit=1000)
    assert (found.size, found.too_large) == (392, 397)
    # One step to warm up, ten sizes, and the one that is confirmed; eleven would have been tried to the last sample.
    assert sizes(found) == [37, 37, 74, 148, 296, 592, 444, 370, 407, 388, 397, 392, 392]


@pytest.mark.parametrize("room", [63, 126, 127, 128, 129, 200, 255, 300])
def test_a_size_is_exact_below_128_and_within_a_64th_above(room: int) -> None:
    found = find_batch_size(trainer(Model(room)), make_batch, start=16, limit=400)
    assert found.too_large is not None
    assert found.size <= room < found.too_large
    assert found.too_large - found.size <= max(1, found.size // 64)


def test_sizes_are_tried_beside_memory_that_stays_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training takes a little more now and then. What the search finds beside it is confirmed at once."""
    held: list[weakref.ref[Tensor]] = []
    seen: list[tuple[int, bool]] = []

    def spare(device: torch.device) -> Tensor:
        made = torch.empty(8)
        held.append(weakref.ref(made))
        return made

    class Watched(Model):
        def forward(self, x: Tensor) -> Tensor:
            is_held = any(one() is not None for one in held)
            seen.append((len(x), is_held))
            if is_held and len(x) > 9:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(x)

    monkeypatch.setattr(batch_size, "_spare", spare)
    found = find_batch_size(trainer(Watched(11)), make_batch, limit=64)
    assert found.size == 9
    assert all(is_held for _, is_held in seen)
    assert sizes(found) == [8, 8, 16, 12, 10, 9, 9]
    assert all(one() is None for one in held)


def tried(monkeypatch: pytest.MonkeyPatch, mode: str) -> dict[tuple[str, bool], list[int]]:
    """Sizes by how FP32 products are computed and whether libraries time their algorithms, where 1000 samples fit."""
    seen: dict[tuple[str, bool], list[int]] = {}
    regions: list[tuple[str, bool]] = []

    class Watched(Model):
        def forward(self, x: Tensor) -> Tensor:
            found = seen.setdefault(regions[-1], [])
            if len(x) not in found:
                found.append(len(x))
            return super().forward(x)

    def watched(device: Any, *, fp32: Any, search: bool) -> Any:
        regions.append((fp32, search))
        return nullcontext()

    monkeypatch.setattr(step.backends, "math_mode", watched)
    assert find_batch_size(trainer(Watched(1000), mode), make_batch, start=64, limit=4096).size == 1000
    return seen


@pytest.mark.parametrize(("mode", "other"), [("fp32", "tf32"), ("bf16", "tf32"), ("tf32", "ieee")])
def test_libraries_time_their_algorithms_only_near_the_end(
    mode: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cuDNN takes without timing it must not be what a training goes on with: it keeps both apart by this."""
    found = capabilities("cpu")
    known = replace(found, matmul_formats=found.matmul_formats | {"tf32"})
    monkeypatch.setattr(
        MixedPrecisionTrainer, "capabilities", property(lambda _: known, lambda *_: None), raising=False
    )
    seen = tried(monkeypatch, mode)
    own = "tf32" if mode == "tf32" else "ieee"
    assert seen == {(other, False): [64, 128, 256, 512, 1024, 768, 896, 960], (own, True): [992, 1008, 1000]}


def test_where_libraries_would_not_keep_them_apart_all_sizes_are_tried_as_a_training_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert list(tried(monkeypatch, "bf16")) == [("ieee", True)]


def test_a_size_beside_which_nothing_stays_free_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = Model(64), []

    def spare(device: torch.device) -> None:
        asked.append(len(model.sizes))
        if len(asked) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(batch_size, "_spare", spare)
    found = find_batch_size(trainer(model), make_batch, limit=64)
    assert (found.size, found.too_large, found.tried[2].fits) == (15, 16, False)
    assert 16 not in model.sizes


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("NPU out of memory. Tried to allocate 9 MiB"),
    RuntimeError("CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("level_zero backend failed with error: UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
]


@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_errors_of_all_backends_are_survived(error: Exception) -> None:
    assert find_batch_size(trainer(Model(11, error=error)), make_batch, limit=64).size == 11


def everything(run: MixedPrecisionTrainer) -> dict[str, Any]:
    """All that the search may touch, objects by their identity and values as they are."""
    model, optimizer = run.model, run.optimizer
    return {
        "values": {name: value.tolist() for name, value in model.state_dict().items()},
        "objects": {name: id(value) for name, value in [*model.named_parameters(), *model.named_buffers()]},
        "gradients": [(id(p.grad), None if p.grad is None else p.grad.tolist()) for p in model.parameters()],
        "state": [{k: (id(v), v.tolist()) for k, v in state.items()} for state in optimizer.state.values()],
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
        "optimizer": {k: v for k, v in vars(optimizer).items() if isinstance(v, int | float | None)},
        "hooks": {k: list(v.values()) for k, v in vars(optimizer).items() if "hooks" in k},
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "counts": (run.steps_attempted, run.steps_applied, run.has_stepper and run.stepper.windows_opened),
        "scale": run.scaler.state_dict(),
        "schedule": run.scheduler and run.scheduler.state_dict(),
        "average": run.ema and [value.tolist() for value in run.ema.values.values()],
        "training": [module.training for module in model.modules()],
        "classes": [type(module) for module in model.modules()],
        "monitor": run.monitor.has_sample,
    }


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16"])
def test_everything_is_as_it_was(where: str, before: int, mode: str) -> None:
    class Counting(Callback):
        calls = 0

        def on_step_start(self, trainer: Any, batch: Any) -> None:
            self.calls += 1

        def on_step(self, trainer: Any, facts: Any) -> None:
            self.calls += 1

    counting = Counting()
    run = trainer(
        Model(13, where),
        mode,
        callbacks=[counting],
        ema_decay=0.9,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
    )
    for _ in range(before):
        run.step(make_batch(5))
    for parameter in run.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    run.model.eval()
    run.model.norm.train()
    was, calls = everything(run), counting.calls
    found = find_batch_size(run, make_batch, limit=64)
    assert (found.size, found.too_large) == (13, 14)
    assert everything(run) == was
    assert counting.calls == calls


def test_training_goes_on_as_if_nobody_had_searched() -> None:
    runs = [trainer(Model(13)) for _ in range(2)]
    for run, searches in zip(runs, (True, False), strict=True):
        torch.manual_seed(4)
        for _ in range(3):
            run.step(make_batch(6))
            if searches:
                find_batch_size(run, make_batch, limit=20)
    assert everything(runs[0])["values"] == everything(runs[1])["values"]


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_step_is_a_whole_window(accumulation: int) -> None:
    model = Model(13)
    run = trainer(model, gradient_accumulation_steps=accumulation)
    find_batch_size(run, make_batch, start=4, limit=20)
    # One step to warm up, one for each size, and two that confirm.
    sizes = [4, 4, 8, 16, 12, 14, 13, 13, 13]
    assert model.sizes == [size for size in sizes for _ in range(1 if size > 13 else min(2, accumulation))]


def test_the_optimizer_has_its_state_while_sizes_are_tried() -> None:
    model, seen = Model(13), []
    run = trainer(model)
    model.first.register_forward_hook(lambda *_: seen.append(len(run.optimizer.state)))
    find_batch_size(run, make_batch, limit=2)
    assert seen == [0, 6, 0, 6]  # to warm up, the one size, and what confirms it, as in a training
    assert run.optimizer.state == {}


def test_the_optimizer_s_state_is_made_anew_where_weights_are_stored_in_bf16(budget: float) -> None:
    """How they are stored is part of its state too, and stays."""
    run, seen = trainer(Model(1000), "bf16", memory=budget), []

    def look(*_: Any) -> None:
        if "sr" in in_force(run):
            values = [value for state in run.optimizer.state.values() for value in state.values()]
            seen.append((any(isinstance(value, Tensor) for value in values), bool(values)))

    run.model.first.register_forward_hook(look)
    find_batch_size(run, make_batch, limit=500)
    assert seen[0] == seen[-2] == (False, True)
    assert {*seen[1:-2], seen[-1]} == {(True, True)}


def test_weights_stand_still_meanwhile() -> None:
    model, seen = Model(13), set()
    model.first.register_forward_hook(lambda *_: seen.add(float(model.first.weight.double().sum())))
    find_batch_size(trainer(model), make_batch, limit=20)
    assert len(seen) == 1


class Tight(torch.optim.SGD):
    """Runs out of memory in its own step, for a model that was last called with many samples."""

    model: Any

    def step(self, closure: Any = None) -> Any:
        if self.model.sizes[-1] > 9:
            raise torch.OutOfMemoryError("no room to update")
        return super().step(closure)


def test_the_update_is_part_of_the_step() -> None:
    model = Model(13)
    run = trainer(model, optimizer=lambda params: Tight(params, lr=0.1))
    run.optimizer.model = model
    assert find_batch_size(run, make_batch, limit=64).size == 9


def test_a_size_that_is_not_confirmed_is_made_smaller() -> None:
    class Fragmented(Model):
        """Fits 40 once, and 37 again and again."""

        def forward(self, x: Tensor) -> Tensor:
            again = self.sizes.count(len(x))
            self.room = 40 if again == 0 else 37
            return super().forward(x)

    found = find_batch_size(trainer(Fragmented(0)), make_batch, limit=64)
    assert sizes(found)[-3:] == [40, 39, 37]
    assert (found.size, found.too_large) == (37, 39)


def test_the_first_step_down_is_a_small_one() -> None:
    class Less(Model):
        """Fits once what it does not fit again."""

        def forward(self, x: Tensor) -> Tensor:
            self.room = 256 if len(x) not in self.sizes else self.again
            return super().forward(x)

        again = 250

    found = find_batch_size(trainer(Less(0)), make_batch, start=64, limit=256)
    assert sizes(found)[-2:] == [256, 248]
    Less.again = 240
    found = find_batch_size(trainer(Less(0)), make_batch, start=64, limit=256)
    assert sizes(found)[-3:] == [256, 248, 233]


def test_a_first_size_that_does_not_fit_is_halved() -> None:
    model = Model(5)
    assert find_batch_size(trainer(model), make_batch, start=64, limit=100).size == 5
    assert model.sizes[:5] == [64, 32, 16, 8, 4]


def test_a_batch_of_one_is_tried_only_where_two_do_not_fit() -> None:
    """Batch normalisation refuses one sample."""
    model = Model(13)
    find_batch_size(trainer(model), make_batch, start=2, limit=64)
    assert min(model.sizes) == 2


def test_memory_that_fails_while_the_batch_is_made_counts_too() -> None:
    def tight(size: int) -> Any:
        if size > 6:
            raise MemoryError
        return make_batch(size)

    assert find_batch_size(trainer(Model(13)), tight, limit=64).size == 6


def test_other_errors_are_the_caller_s_and_change_nothing() -> None:
    run = trainer(Model(5, error=ValueError("a mistake")))
    run.step(make_batch(3))
    was = everything(run)
    with pytest.raises(ValueError, match="a mistake"):
        find_batch_size(run, make_batch, limit=64)
    assert everything(run) == was


def test_nothing_is_left_in_memory() -> None:
    run = trainer(Model(13, "backward"))
    run.step(make_batch(3))
    run.settle()

    def alive() -> int:
        gc.collect()
        return sum(isinstance(one, Tensor) for one in gc.get_objects())

    find_batch_size(run, make_batch, limit=64)
    before = alive()
    find_batch_size(run, make_batch, limit=64)
    assert alive() == before


def test_auto_is_tried_in_the_recommended_format_and_stays_unmeasured() -> None:
    run = trainer(Model(13), "auto", pin={"last": "fp32"})
    was = everything(run)
    assert find_batch_size(run, make_batch, limit=64).size == 13
    assert everything(run) == was
    assert not run.has_stepper


def test_a_function_that_makes_the_trainer() -> None:
    assert find_batch_size(lambda: trainer(Model(13)), make_batch, limit=64).size == 13


def test_a_fused_loss_is_part_of_what_is_tried() -> None:
    run = trainer(Model(13), fused_loss=True)
    assert find_batch_size(run, make_batch, limit=64).size == 13


def test_within_an_accumulation_window_it_is_refused() -> None:
    run = trainer(Model(13), gradient_accumulation_steps=2)
    run.step(make_batch(3))
    with pytest.raises(ConfigError, match=r"find_batch_size within an accumulation window.*between optimizer steps"):
        find_batch_size(run, make_batch, limit=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "find_batch_size on a CPU without a limit"),
        ({"start": 0, "limit": 4}, "start=0. Allowed: a whole number from 1"),
        ({"limit": 2.5}, r"limit=2\.5. Allowed"),
        ({"multiple": True, "limit": 4}, "multiple=True. Allowed"),
        ({"multiple": 8, "limit": 4}, "limit=4 with multiple=8"),
    ],
)
def test_arguments_that_are_not_allowed(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_batch_size(trainer(Model(13)), make_batch, **options)


def test_the_result_in_words() -> None:
    assert str(BatchSize(size=8, too_large=9)) == "batch size 8 (9 does not fit; 0 steps tried)"
    assert str(BatchSize(size=8, too_large=None)) == "batch size 8 (the limit; 0 steps tried)"


# -- within a budget ---------------------------------------------------------------------------------------


class BySize(MadeUp):
    """A sample takes 10 MiB, half of them with activations in FP8; the rest of the step 300, 100 with 8-bit states."""

    def peak(self, step: Any, trainer: Any) -> int:
        super().peak(step, trainer)
        here = in_force(trainer)
        sample = 5 if "activations" in here else 10
        return MIB * (sample * trainer.model.sizes[-1] + (100 if "8bit" in here else 300))


@pytest.fixture
def budget(monkeypatch: pytest.MonkeyPatch) -> float:
    made = BySize({}, {"8bit": 0.1, "activations": 5.0, "sr": 0.2})
    for module in (batch_size, memory_trials):
        monkeypatch.setattr(module, "Gauge", lambda: made)
    return 500 * MIB / GIB


def test_a_budget_is_kept_with_all_that_saves_memory(budget: float) -> None:
    run = trainer(Model(1000), "bf16", memory=budget)
    found = find_batch_size(run, make_batch, limit=500)
    assert (found.size, found.too_large, found.as_it_was) == (80, 81, 20)
    assert found.measures == ("fused_loss=auto", "states=8bit", "storage=bf16_sr", "activations=True")
    assert "batch size 80 (81 does not fit" in str(found)
    assert "; 20 without fused_loss=auto, states=8bit, storage=bf16_sr, activations=True)" in str(found)
    assert type(run.optimizer) is torch.optim.AdamW
    assert run.memory is None
    assert run.config.activations is False
    run.step(make_batch(found.size))
    assert run.memory is not None
    assert run.memory.taken == ("states=8bit", "activations=True")


@pytest.mark.parametrize("error", [RuntimeError("no kernel"), SystemError("run_backward without setting an exception")])
def test_a_way_to_save_memory_with_which_no_step_can_be_made_is_left_out(
    budget: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def hold(run: MixedPrecisionTrainer) -> None:
        if "activations" in in_force(run):
            raise error

    made = BySize({}, {"8bit": 0.1, "sr": 0.2})
    made.hold = hold
    for module in (batch_size, memory_trials):
        monkeypatch.setattr(module, "Gauge", lambda: made)
    monkeypatch.setattr(trial_steps, "out_of_memory_count", lambda device: 7)
    run = trainer(Model(1000), "bf16", memory=budget)
    found = find_batch_size(run, make_batch, limit=500)
    assert (found.size, found.as_it_was) == (40, 20)
    assert found.measures == ("fused_loss=auto", "states=8bit", "storage=bf16_sr")
    said = [record.getMessage() for record in caplog.records if "no step can be made" in record.getMessage()]
    whole = "no step can be made with all there is to save memory"
    uncounted = [f"{whole}, not counted"] if isinstance(error, SystemError) else []
    assert [text.split(": ")[1] for text in said] == [whole, *uncounted, "no step can be made with activations=True"]
    assert all(str(error) in text for text in said)
    run.step(make_batch(found.size))
    assert run.memory is not None
    assert run.memory.taken == ("states=8bit",)


class Lost(Model):
    """A counted step with activations in FP8 ends as one does whose error PyTorch's backward has lost."""

    run: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.run is not None and "activations" in in_force(self.run) and _get_current_dispatch_mode_stack():
            raise SystemError("<built-in method run_backward of ...> returned NULL without setting an exception")
        return super().forward(x)


def test_a_step_that_fails_only_where_it_is_counted_is_not_counted(
    budget: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trial_steps, "out_of_memory_count", lambda device: 7)
    model = Lost(1000)
    run = trainer(model, "bf16", memory=budget)
    object.__setattr__(model, "run", run)
    found = find_batch_size(run, make_batch, limit=500)
    assert (found.size, found.as_it_was) == (80, 20)
    assert "activations=True" in found.measures
    run.step(make_batch(found.size))
    assert run.memory is not None
    assert run.memory.taken == ("uncounted", "states=8bit", "activations=True")
    assert not run.stepper.counts
    assert "steps are not counted, as one that was with" in caplog.text


def test_what_stays_free_is_no_part_of_the_budget(budget: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's allocator counts it, as it counts all that is held."""
    held: list[weakref.ref[Tensor]] = []

    def spare(device: torch.device) -> Tensor:
        made = torch.empty(32 * MIB, dtype=torch.uint8)
        held.append(weakref.ref(made))
        return made

    class Counted(BySize):
        def peak(self, step: Any, trainer: Any) -> int:
            return super().peak(step, trainer) + sum(32 * MIB for one in held if one() is not None)

    monkeypatch.setattr(batch_size, "_spare", spare)
    made = Counted({}, {"8bit": 0.1, "activations": 5.0, "sr": 0.2})
    monkeypatch.setattr(batch_size, "Gauge", lambda: made)
    found = find_batch_size(trainer(Model(1000), "bf16", memory=budget), make_batch, limit=500)
    assert (found.size, found.as_it_was) == (80, 20)
    assert len({one.peak_bytes for one in found.tried if one.size == 80}) == 1


def test_the_trainer_takes_no_more_than_a_smaller_batch_needs(budget: float) -> None:
    run = trainer(Model(1000), "bf16", memory=budget)
    find_batch_size(run, make_batch, limit=500)
    run.step(make_batch(40))
    assert run.memory is not None
    assert run.memory.taken == ("states=8bit",)
    again = find_batch_size(run, make_batch, limit=500)
    assert (again.size, again.measures) == (40, ())  # what is in force stays


def test_a_limit_that_fits_as_it_is_needs_nothing(budget: float) -> None:
    found = find_batch_size(trainer(Model(1000), "bf16", memory=budget), make_batch, limit=20)
    assert (found.size, found.too_large, found.measures, found.as_it_was) == (20, None, (), None)


def test_where_nothing_fits_as_it_is_measures_are_tried_all_the_same(budget: float) -> None:
    model = Model(1000)
    model.norm = nn.Identity()  # type: ignore[assignment]  # a BatchNorm needs two samples
    run = trainer(model, "bf16", memory=250 * MIB / GIB)
    found = find_batch_size(run, make_batch, limit=500)
    assert (found.size, found.as_it_was) == (30, 0)


def test_auto_is_tried_in_the_recommended_format(budget: float) -> None:
    run = trainer(Model(1000), "auto", memory=budget, adapt=False)
    found = find_batch_size(run, make_batch, limit=500)
    assert found.as_it_was == 20
    assert found.size >= 40


def test_a_budget_that_not_even_the_smallest_batch_fits_into_says_what_would_do() -> None:
    run = MixedPrecisionTrainer(nn.Linear(64, 4), "fp32", device="cpu", memory=1e-7)
    match = r"a batch of 2, .* fit into 0.00010\d MiB: its step needs 0\.0\d+ MiB with all there is.*memory=0.001 "
    with pytest.raises(ConfigError, match=match):
        find_batch_size(run, lambda size: (torch.ones(size, 64), torch.ones(size, 4)), limit=8, multiple=2)


# -- what a real step does after it --------------------------------------------------------------------------


class Looked(Model):
    """Takes more where hooks look at its modules, as they do in the steps that statistics are taken in."""

    def forward(self, x: Tensor) -> Tensor:
        if self.first._forward_hooks and len(x) > 9:
            raise torch.OutOfMemoryError("no room for statistics")
        return super().forward(x)


def test_what_the_first_step_measures_is_part_of_what_is_tried(caplog: pytest.LogCaptureFixture) -> None:
    run = trainer(Looked(13), statistics_every=50)
    with caplog.at_level("WARNING", "deepseek_mp.monitor"):
        found = find_batch_size(run, make_batch, limit=64)
    assert found.size == 9
    assert caplog.text == ""
    assert run.monitor.alarms == ()
    assert run.step(make_batch(found.size)).status == "applied"


def test_a_step_that_counts_is_part_of_what_is_tried() -> None:
    """Of compiled code it runs uncompiled, and holds what eager code holds; it is the first step of a training."""
    depths = Log()

    class Counted(Model):
        def forward(self, x: Tensor) -> Tensor:
            depths.append(torch._C._len_torch_dispatch_stack())
            if depths[-1] and len(x) > 9:
                raise torch.OutOfMemoryError("no room to count")
            return super().forward(x)

    run = trainer(Counted(13))
    assert find_batch_size(run, make_batch, limit=64).size == 9
    assert run.step(make_batch(9)).status == "applied"


class Scores(Model):
    """Runs out of memory above so many samples where its last layer multiplies for all of them."""

    multiplied = 5

    def __init__(self, room: int) -> None:
        super().__init__(room)
        self.last.register_forward_hook(self._look)

    def _look(self, _layer: nn.Module, args: Any, output: Any) -> None:
        if not is_pending(output) and len(output) > self.multiplied:
            raise torch.OutOfMemoryError("no room for the scores")


def test_a_small_batch_that_was_tried_decides_nothing_for_larger_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 'auto' a loss is fused where its scores are large; the first such batch finds the layer."""
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 5 * 3 * 4)
    monkeypatch.setattr(fused_loss, "COMPARED_ROWS", 1)
    run = trainer(Scores(30), fused_loss="auto")
    found = find_batch_size(run, make_batch, start=2, limit=64)
    assert found.size == 30
    compute: Any = run.stepper.compute
    assert (compute.layer, compute.why) == (None, "")
    assert run.step(make_batch(30)).status == "applied"
    assert compute.layer is run.model.last


def test_what_is_decided_by_batch_is_so_for_a_trainer_that_has_made_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 5 * 3 * 4)
    run = trainer(Scores(30), fused_loss="auto")
    run.step(make_batch(2))  # whose scores are small
    found = find_batch_size(run, make_batch, start=2, limit=64)
    assert found.size == 30
    assert run.step(make_batch(found.size)).status == "applied"


class Blocks(Model):
    def __init__(self) -> None:
        super().__init__(1000)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for block in self.blocks:
            x = block(x)
        return x


def test_blocks_are_chosen_by_each_size_that_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    measured, original = Log(), budget_module.measure_blocks

    def measure(model: Any, *rest: Any) -> Any:
        found = original(model, *rest)
        measured.append(model.sizes[-1])
        return found

    monkeypatch.setattr(budget_module, "measure_blocks", measure)
    run = trainer(Blocks(), activation_memory_budget=0.01)
    find_batch_size(run, make_batch, start=4, limit=20)
    assert measured == [4, 4, 8, 16, 20, 20]  # one to warm up, each size, and to confirm
    run.step(make_batch(20))
    assert measured[-1] == 20
    assert len(measured) == 7


def test_what_is_decided_in_a_trial_is_no_decision_of_the_run(caplog: pytest.LogCaptureFixture) -> None:
    run = trainer(Blocks(), activation_memory_budget=0.01)
    with caplog.at_level("INFO", "deepseek_mp.decisions"):
        find_batch_size(run, make_batch, limit=20)
    assert "recomputed" not in caplog.text


def test_the_trainer_knows_what_was_confirmed(budget: float) -> None:
    run = trainer(Model(1000), "bf16", memory=budget)
    found = find_batch_size(run, make_batch, limit=500)
    assert run.confirmed is not None
    assert (run.confirmed.samples, run.confirmed.measures) == (found.size, found.measures)
    assert run.confirmed.peak_bytes == run.confirmed.limit_bytes == 500 * MIB
    plain = trainer(Model(13))
    find_batch_size(plain, make_batch, limit=64)
    plain.model.room = 0
    with pytest.raises(torch.OutOfMemoryError, match="out of memory") as caught:
        plain.step(make_batch(13))
    assert "find_batch_size saw steps of 13 samples go through" in caught.value.__notes__[0]


def test_the_first_step_takes_what_was_confirmed_where_weighing_finds_less(
    budget: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weighing makes other trials than the search: one of them may fail, or go another way."""
    run = trainer(Model(1000), "bf16", memory=budget)
    found = find_batch_size(run, make_batch, limit=500)
    monkeypatch.setattr(memory_trials, "weigh", lambda base, alone, scale: ())
    assert run.step(make_batch(found.size)).status == "applied"
    assert run.memory is not None
    assert run.memory.taken == found.measures
    assert run.memory.after_bytes <= run.memory.limit_bytes


def test_a_first_step_that_needs_more_than_was_confirmed_says_so(budget: float) -> None:
    run = trainer(Model(1000), "bf16", memory=budget)
    find_batch_size(run, make_batch, limit=500)
    run.model.room = 70  # something else holds memory now
    with pytest.raises(ConfigError, match=r"Before, find_batch_size saw steps of 80 samples go through with .*larger"):
        run.step(make_batch(80))
