"""Profile a model on a few batches, make a plan of the profile, and train with it.

The same function is a target of the command line: deepseek-mp profile examples/profiler.py:setup
"""

from typing import Any

import torch
from torch import nn

from deepseek_mp import MixedPrecisionTrainer, PrecisionProfiler

CLASSES = 16


def setup() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 64, 128, generator=generator)
    layers = [
        nn.Linear(128, 256),
        nn.GELU(),
        nn.Linear(256, 256),
        nn.LayerNorm(256),
        nn.GELU(),
        nn.Linear(256, CLASSES),
    ]
    return {
        "model": nn.Sequential(*layers),
        "loader": [(x, x[:, :CLASSES].argmax(dim=1)) for x in inputs],
        "loss_fn": nn.functional.cross_entropy,
    }


def main() -> None:
    torch.manual_seed(0)
    parts = setup()
    model, loader, loss_fn = parts["model"], parts["loader"], parts["loss_fn"]
    profiler = PrecisionProfiler(model, loss_fn=loss_fn, recipes=["bf16", "row", "nvfp4"])
    report = profiler.analyze(loader, max_batches=16)
    print(report)
    print(f"in FP4 layer 2 would raise the loss by {report['2']['fp4_loss']:.1e} of it")

    # From all recipes, also those that this device only emulates; without recipes, from those it multiplies.
    plan = report.plan(budget=1e-4, noise_budget=0.01, recipes=report.recipes)
    trainer = MixedPrecisionTrainer(model, plan, loss_fn=loss_fn, emulate=True, progress=False)
    result = trainer.fit(loader, epochs=3)
    print(f"loss after training: {result.loss:.3f}")
    for decision in plan.decisions:
        print(f"{decision.layer}: {decision.new}, {decision.evidence['loss']:.1e} of the loss: {decision.detail}")


if __name__ == "__main__":
    main()
