"""`activation_memory_budget` of a model that is not compiled: repeated blocks are computed again in the backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn

from deepseek_mp.activations.block_costs import measure_blocks
from deepseek_mp.activations.block_state import Writes
from deepseek_mp.activations.checkpointed import recomputed_blocks
from deepseek_mp.activations.choice import BlockChoice, ChosenBlock, choose_blocks
from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.nn import call as calls
from deepseek_mp.nn.loss import LossFn
from deepseek_mp.precision import Decision, PrecisionPlan, Reason
from deepseek_mp.trainer.compile import repeated_blocks
from deepseek_mp.trainer.config import TrainerConfig

if TYPE_CHECKING:
    from deepseek_mp.trainer.loop import MixedPrecisionTrainer

Run = Callable[[calls.Call], calls.Result]
Region = Callable[[calls.Call], AbstractContextManager[object]]


def check_budget(model: nn.Module, config: TrainerConfig) -> None:
    """`ConfigError` for a budget of a model that is not compiled and has no repeated blocks."""
    budget = config.activation_memory_budget
    if budget is not None and not config.compile and not repeated_blocks(model):
        passed = f"activation_memory_budget={budget!r} without compile, on a model without repeated blocks"
        allowed = "two or more modules of one class in a ModuleList or Sequential, which can be computed again"
        raise ConfigError(explain(passed, allowed, "Use compile=True, whose compiler chooses, or activations=True"))


def with_budget(run: Run, trainer: MixedPrecisionTrainer, plan: PrecisionPlan, *, unread: Region = nullcontext) -> Run:
    """`run`, which computes some blocks again in its backward if the trainer is set so.

    Args:
        unread: context for a forward of the model whose output nobody reads.
    """
    budget = trainer.config.activation_memory_budget
    if budget is None or trainer.config.compile:
        return run
    return Budgeted(run, trainer, budget, base=plan.base.name, unread=unread)


def trial_within_budget(
    run: Run, model: nn.Module, config: TrainerConfig, call: calls.Call, device: torch.device
) -> Run:
    """`run` for the trials of `auto`, before there is a plan: within the budget too, of blocks chosen for FP32."""
    budget = config.activation_memory_budget
    if budget is None or config.compile:
        return run
    blocks, writes = _blocks(model), Writes()
    choice = choose_blocks(measure_blocks(model, blocks, lambda: calls.invoke(model, call), device, writes), budget)

    def within(call: calls.Call) -> calls.Result:
        with recomputed_blocks([blocks[name] for name in choice.recomputed], device, writes):
            return run(call)

    return within


def run_within_budget(compute: Run, model: nn.Module, call: calls.Call, loss_fn: LossFn | None) -> calls.Result:
    """`calls.run` of the model and the loss, where a step would be `compute`: within its budget, if it has one."""
    with compute.region() if isinstance(compute, Budgeted) else nullcontext():
        return calls.run(model, call, loss_fn)


def blocks_of(trainer: MixedPrecisionTrainer) -> BlockChoice | None:
    """What was chosen; None before the first step and without a budget."""
    compute = trainer.stepper.compute if trainer.has_stepper else None
    return compute.choice if isinstance(compute, Budgeted) else None


class Budgeted:
    """From a call to its loss, as `run`, within a budget for what the model keeps for its backward.

    The blocks are measured and chosen by the first batch, in a forward that takes no more memory than a step: scores
    that a step does without are not computed there either.
    """

    def __init__(
        self, run: Run, trainer: MixedPrecisionTrainer, budget: float, *, base: str, unread: Region = nullcontext
    ) -> None:
        self.run, self._unread = run, unread
        self._trainer, self._budget, self._base = trainer, budget, base
        self._blocks, self._writes = _blocks(trainer.model), Writes()
        self.choice: BlockChoice | None = None

    def __call__(self, call: calls.Call) -> calls.Result:
        if self.choice is None:
            self._choose(call)
        with self.region():
            return self.run(call)

    def region(self) -> AbstractContextManager[None]:
        """Context for a forward whose backward computes again what was chosen; nothing before that."""
        chosen = () if self.choice is None else self.choice.recomputed
        return recomputed_blocks([self._blocks[name] for name in chosen], self._trainer.device, self._writes)

    def _choose(self, call: calls.Call) -> None:
        trainer = self._trainer

        def forward() -> None:
            with self._unread(call):
                calls.invoke(trainer.model, call)

        cost = measure_blocks(trainer.model, self._blocks, forward, trainer.device, self._writes)
        self.choice = choose_blocks(cost, self._budget)
        trainer.recorder.decided(_decisions(self.choice, self._base))


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    repeated = set(repeated_blocks(model))
    return {name: module for name, module in model.named_modules() if module in repeated}


def _decisions(choice: BlockChoice, base: str) -> list[Decision]:
    blocks = [block for block in choice.blocks if block.recomputed or block.obstacle]
    return [_on_model(choice, base), *(_on_block(block, base) for block in blocks)]


def _on_model(choice: BlockChoice, base: str) -> Decision:
    kept = f"{_mib(choice.bytes_after)} of {_mib(choice.bytes_before)} are kept for the backward"
    allowed = f"{_mib(choice.bytes_allowed)} are allowed"
    count = f"{len(choice.recomputed)} of {len(choice.blocks)} blocks are computed again"
    evidence = {
        "bytes_before": choice.bytes_before,
        "bytes_after": choice.bytes_after,
        "bytes_allowed": choice.bytes_allowed,
        "extra_ms": choice.extra_ms,
    }
    if choice.is_within:
        detail, reason = f"{count}: {kept}, {allowed}", Reason.RECOMPUTED
    else:
        detail, reason = f"{count}, all that frees any, and {kept}, though {allowed}", Reason.NOT_RECOMPUTED
    return Decision(layer="", old=base, new=base, reason=reason, detail=detail, evidence=evidence)


def _on_block(block: ChosenBlock, base: str) -> Decision:
    evidence = {"forward_ms": block.forward_ms, "bytes_freed": block.bytes_freed}
    detail = block.obstacle or f"frees {_mib(block.bytes_freed)} for {block.forward_ms:.3g} ms"
    reason = Reason.NOT_RECOMPUTED if block.obstacle else Reason.RECOMPUTED
    return Decision(layer=block.name, old=base, new=base, reason=reason, detail=detail, evidence=evidence)


def _mib(count: int) -> str:
    return f"{count / 2**20:.3g} MiB"
