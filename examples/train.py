"""Train a small classifier in the best precision for this machine, and read what was decided."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from deepseek_mp import MixedPrecisionTrainer


def main() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(512, 64)
    labels = inputs[:, :8].argmax(dim=1)
    train = DataLoader(TensorDataset(inputs[:384], labels[:384]), batch_size=32, shuffle=True)
    validation = DataLoader(TensorDataset(inputs[384:], labels[384:]), batch_size=64)
    model = nn.Sequential(nn.Linear(64, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, 8))

    trainer = MixedPrecisionTrainer(
        model,
        precision_mode="auto",
        optimizer=lambda params: torch.optim.AdamW(params, lr=3e-3, fused=True),
        pin={"1": "fp32"},  # the LayerNorm stays in FP32, whatever is measured
        max_grad_norm=1.0,
        seed=0,
    )
    accuracy = lambda output, target: (output.argmax(dim=1) == target).float().mean()  # noqa: E731
    result = trainer.fit(train, epochs=5, val_loader=validation, metrics={"accuracy": accuracy})

    for entry in result.history:
        print(f"epoch {entry['epoch']}: loss {entry['val_loss']:.3f}, accuracy {entry['val_accuracy']:.3f}")
    for decision in result.plan.decisions:
        print(decision)
    print(trainer.monitor.log_precision_usage())


if __name__ == "__main__":
    main()
