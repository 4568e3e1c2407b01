"""Stop and continue bit by bit, then load the weights into the plain model without this package."""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from deepseek_mp import MixedPrecisionTrainer


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 4))


def main() -> None:
    inputs = torch.randn(256, 32, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(inputs, inputs[:, :4].argmax(dim=1))

    def loader() -> DataLoader:
        return DataLoader(data, batch_size=16, shuffle=True)

    # emulate=True lets this run on a CPU without BF16 units too.
    straight = MixedPrecisionTrainer(make_model(), "bf16", seed=7, emulate=True)
    straight.fit(loader(), epochs=4)

    with tempfile.TemporaryDirectory() as run_dir:
        first = MixedPrecisionTrainer(make_model(), "bf16", seed=7, emulate=True, run_dir=run_dir)
        first.fit(loader(), epochs=2)
        second = MixedPrecisionTrainer(make_model(), "bf16", emulate=True, run_dir=run_dir)
        second.fit(loader(), epochs=4, resume=run_dir)  # epochs counts the whole run: two more
        saved = second.save(Path(run_dir))

        plain = make_model()
        load_model(plain, saved / "model.safetensors")

    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name
    print(f"continued run equals the uninterrupted one; {len(plain.state_dict())} tensors in the plain model")


if __name__ == "__main__":
    main()
