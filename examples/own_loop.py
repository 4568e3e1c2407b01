"""A loop of your own: convert the model, scale the loss, step as one transaction, count what ran."""

import torch
from torch import nn

from deepseek_mp import LossScaler, PrecisionMonitor, PrecisionPlan, autocast, convert, revert


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    # The head stays in FP32; emulate=True lets this run on a CPU without BF16 units too.
    plan = convert(model, PrecisionPlan.of("bf16", pin={"2": "fp32"}), emulate=True)
    scaler = LossScaler("none")  # bf16 has the range of FP32; use "dynamic" with fp16
    monitor = PrecisionMonitor(model, optimizer, sample_every=10)

    for step in range(30):
        inputs = torch.randn(32, 64)
        target = inputs[:, :10].argmax(dim=1)
        with autocast("cpu", plan.base.region):
            loss = nn.functional.cross_entropy(model(inputs), target)
        scaler.scale(loss).backward()
        verdict = scaler.step(optimizer, max_grad_norm=1.0)
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}, {verdict.status}, norm {verdict.grad_norm.item():.3f}")

    print(monitor.log_precision_usage())
    monitor.close()
    revert(model)  # the plain model again, with the trained weights


if __name__ == "__main__":
    main()
