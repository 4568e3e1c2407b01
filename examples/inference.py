"""Serve a trained model in its fastest form, save it, and load it as a machine without the model's code would."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from deepseek_mp import inference, optimize_for_inference
from deepseek_mp.inference import Form, Served

CLASSES = 10


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.hidden, self.head = nn.Linear(16 * 36, 512), nn.Linear(512, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(self.features(images).flatten(1)).relu())


def main() -> None:
    torch.manual_seed(0)
    model, images = Classifier(), torch.randn(16, 3, 8, 8)

    # compile=True tries torch.compile too, which takes some ten seconds for each format.
    fast, plan, card = optimize_for_inference(model, images, budget=1e-3, compile=False, seconds=0.2)
    print(card)
    print(f"taken: {plan.form.name}, divergence {card.chosen.error:.1e} of {plan.budget:g} nats")

    with TemporaryDirectory() as folder:
        path = Path(folder) / "classifier.pt2"
        fast.save(path)  # a graph and tensors: no code, no pickle
        loaded = inference.load(path, images.device)
        same = torch.equal(loaded(images[:5]), fast(images[:5]))
        print(f"from a file of {path.stat().st_size / 2**20:.1f} MiB: the same bits for 5 images: {same}")
        print(f"inputs: {loaded.signature}")

        # A form of your own: weights of large linear layers in 8 bits.
        small = Served(model, Form(format="bf16", linear="int8_weights"), images.device)
        small.save(path, images)
        formats = inference.load(path, images.device).formats
        for name in ("model.hidden.q", "model.head.weight"):
            print(f"{name}: {formats[name]['format']}")


if __name__ == "__main__":
    main()
