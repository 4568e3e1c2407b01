"""FP8 in the linear layers, on a device with FP8 units or emulated: what runs in it, what does not, and why."""

import torch
from torch import nn

from deepseek_mp import MixedPrecisionTrainer, PrecisionPlan
from deepseek_mp.backends import capabilities, default_device

CLASSES = 8


def network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(128, 256),
        nn.GELU(),
        nn.Linear(256, 256),
        nn.GELU(),
        nn.Linear(256, 200),  # 200 is no multiple of 128, what block scales need
        nn.GELU(),
        nn.Linear(200, CLASSES),
    )


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    inputs = torch.randn(count, 64, 128)
    return [(x, x[:, :CLASSES].argmax(dim=1)) for x in inputs]


def train(plan: PrecisionPlan, *, emulate: bool) -> MixedPrecisionTrainer:
    torch.manual_seed(0)
    trainer = MixedPrecisionTrainer(network(), plan, emulate=emulate, progress=False)
    result = trainer.fit(batches(100), epochs=3)
    print(f"{plan.base}: loss {result.loss:.3f}")
    return trainer


def main() -> None:
    native = "fp8_e4m3" in capabilities(default_device()).matmul_formats
    plan = PrecisionPlan.of("block", pin={"0": "bf16"})  # 1x128 and 128x128 scales, as DeepSeek-V3 trains
    trainer = train(plan, emulate=not native)
    train(PrecisionPlan.of("bf16"), emulate=not native).close()
    for decision in trainer.plan.decisions:
        kernels = " ".join(f"{op}={name}" for op, name in decision.evidence.items())
        print(f"{decision.layer}: {decision.new} ({decision.reason.value}) {kernels}")
    trainer.close()


if __name__ == "__main__":
    main()
