"""What a run did to fit into memory, taken over from its checkpoint: nothing is measured again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from deepseek_mp.errors import CheckpointError, explain
from deepseek_mp.optim import StateFormat, StoredOptimizer
from deepseek_mp.optim.takeover import why_not
from deepseek_mp.trainer.assembly import computation
from deepseek_mp.trainer.memory_measures import UNCOUNTED, Settings, allowed_options, own_optimizer, settings_of
from deepseek_mp.trainer.memory_report import MemoryReport, in_gib, limit_of

if TYPE_CHECKING:
    from deepseek_mp.trainer.loop import MixedPrecisionTrainer

log = logging.getLogger("deepseek_mp")


def saved_memory(trainer: MixedPrecisionTrainer) -> dict[str, Any] | None:
    """What a checkpoint keeps of it."""
    return None if trainer.memory is None else trainer.memory.to_json()


def adopt(trainer: MixedPrecisionTrainer, saved: Mapping[str, Any]) -> Callable[[], None]:
    """Set the trainer's options and its optimizer as the checkpoint's run had them; gives what takes it back.

    Only where `memory` is asked for and nothing was chosen yet. Weights get their storage with the rest of the
    optimizer's state.
    """
    config, report = trainer.config, None if saved.get("memory") is None else MemoryReport.from_json(saved["memory"])
    if config.memory is None or trainer.memory is not None:
        return lambda: None
    settings = Settings() if report is None else settings_of(report.taken)
    kept, lost = allowed_options(trainer, settings)
    if lost:
        log.warning("resumed without %s, which this run does not allow: %s", *lost)
    undone = _optimizer_as_saved(trainer, saved)
    trainer.config, trainer.memory = kept, report
    if report is not None and config.memory != "auto" and limit_of(config.memory, None) != report.limit_bytes:
        log.warning("resumed with what was chosen for %s, whatever memory is now", in_gib(report.limit_bytes))

    def undo() -> None:
        trainer.config, trainer.memory = config, None
        undone()

    return undo


def _optimizer_as_saved(trainer: MixedPrecisionTrainer, saved: Mapping[str, Any]) -> Callable[[], None]:
    """Make the optimizer one of ours if the checkpoint's was, with its form of moments."""
    states = [group["options"].get("states") for group in saved["optimizer"]["groups"]]
    own = isinstance(trainer.optimizer, StoredOptimizer)
    if None in states or trainer.optimizer.state or (not own and why_not(trainer.optimizer)):
        return lambda: None
    return own_optimizer(trainer.optimizer, states=StateFormat.EIGHT_BIT in states)


def compute_anew(trainer: MixedPrecisionTrainer) -> None:
    """What computes a step, of a trainer that had a plan before the options of a checkpoint came."""
    if trainer.memory is None:
        return
    log.info("resumed: %s", trainer.memory.summary)
    if UNCOUNTED in trainer.memory.taken:
        trainer.stepper.counts = False
    if trainer.memory.taken:
        trainer.stepper.compute = computation(trainer, trainer.plan)


def check_optimizer(trainer: MixedPrecisionTrainer, saved: Mapping[str, Any]) -> None:
    """`CheckpointError` if the checkpoint has moments in 8 bits, and this run's optimizer cannot hold such."""
    states = [group["options"].get("states") for group in saved["optimizer"]["groups"]]
    if StateFormat.EIGHT_BIT in states and not isinstance(trainer.optimizer, StoredOptimizer):
        name = type(trainer.optimizer).__name__
        kind = saved["optimizer"]["type"]
        passed = f"a checkpoint of deepseek_mp.optim.{kind} with moments in 8 bits, and an optimizer torch.optim.{name}"
        change = "Pass memory='auto', or the optimizer that the run was saved with"
        raise CheckpointError(explain(passed, "the optimizer of the checkpoint", change))
