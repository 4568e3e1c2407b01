"""Train a classifier for INT8, convert it, and load the file of integers without the library that made it."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from deepseek_mp import QuantizationAwareTrainer
from deepseek_mp.qat import Int8Model

CLASSES = 4


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Noise, with a bright quarter: which one is the class."""
    made = []
    for _ in range(count):
        images, quarters = torch.randn(32, 1, 8, 8), torch.randint(CLASSES, (32,))
        for image, quarter in zip(images, quarters.tolist(), strict=True):
            row, column = 4 * (quarter // 2), 4 * (quarter % 2)
            image[:, row : row + 4, column : column + 4] += 1
        made.append((images, quarters))
    return made


def network() -> nn.Module:
    convolution = [nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*convolution, nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, CLASSES))


def main() -> None:
    torch.manual_seed(0)
    data, test = batches(40), batches(4)
    images, labels = (torch.cat(parts) for parts in zip(*test, strict=True))
    trainer = QuantizationAwareTrainer(network(), example_inputs=data[0][0], keep=["6"], progress=False)
    print(f"loss {trainer.fit(data, epochs=2).loss:.3f}")
    int8 = trainer.convert()
    trainer.close()
    for decision in int8.decisions:
        print(f"{decision.layer}: {decision.new}, {decision.detail or decision.reason.value}")

    with TemporaryDirectory() as folder:
        path = Path(folder) / "classifier.pt2"
        int8.save(path)
        loaded = Int8Model.load(path)
    # loaded(images) compiles INT8 kernels first; the graph itself says the same.
    accuracy = (loaded.reference(images).argmax(1) == labels).float().mean()
    print(f"accuracy in INT8, from the file: {accuracy:.2f}")


if __name__ == "__main__":
    main()
