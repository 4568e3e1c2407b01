"""Real data that needs no download: scikit-learn's digits, and the text of Python's own library.

Loaders give pairs of plain tensors. Batch `i` of epoch `e` depends on the seed, `e` and `i` alone,
so a loader can go on from a saved position (`state_dict`) with exactly the batches it would have given.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from deepseek_mp.errors import ConfigError, LoaderError, explain

Pair = tuple[Tensor, Tensor]


class Batches:
    """Batches of one epoch, again and again; a subclass says what batch `index` of `epoch` is."""

    def __init__(self, count: int) -> None:
        if count < 1:
            raise LoaderError(explain("data for no batch at all", "one batch or more", "Make the batches smaller"))
        self.count = count
        self._epoch = 0
        self._next = 0

    def batch(self, epoch: int, index: int) -> Pair:
        """Inputs and targets of one batch."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Pair]:
        """The rest of the current epoch; a complete pass moves on to the next epoch."""
        while self._next < self.count:
            index = self._next
            self._next += 1
            yield self.batch(self._epoch, index)
        self._epoch, self._next = self._epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """The position: the epoch, and the index of the next batch."""
        return {"epoch": self._epoch, "next": self._next}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a position that `state_dict` gave."""
        self._epoch, self._next = state["epoch"], state["next"]


class ExampleBatches(Batches):
    """Batches of the examples in two tensors of equal length, in a new order every epoch.

    With `seed=None` the order is that of the tensors and the last batch may be short; otherwise
    short batches are left out, so that every step has the same shape.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, *, batch_size: int, seed: int | None) -> None:
        full = len(inputs) // batch_size
        super().__init__(full if seed is not None or len(inputs) % batch_size == 0 else full + 1)
        self.inputs, self.targets, self.batch_size, self.seed = inputs, targets, batch_size, seed

    def batch(self, epoch: int, index: int) -> Pair:
        span = slice(index * self.batch_size, (index + 1) * self.batch_size)
        if self.seed is None:
            return self.inputs[span], self.targets[span]
        order = torch.randperm(len(self.inputs), generator=seeded(self.seed, epoch))[span]
        return self.inputs[order], self.targets[order]


class TextWindows(Batches):
    """`count` batches of random windows of a text: bytes [B, T] and the bytes that follow them [B, T].

    `text` is uint8. With `fixed=True` every epoch has the same windows, as validation needs.
    """

    def __init__(
        self, text: Tensor, *, batch_size: int, length: int, count: int, seed: int, fixed: bool = False
    ) -> None:
        if len(text) <= length:
            raise LoaderError(
                explain(f"a text of {len(text)} bytes", f"more than {length} (one window)", "Use a longer text")
            )
        super().__init__(count)
        self.text, self.batch_size, self.length, self.seed, self.fixed = text, batch_size, length, seed, fixed

    def batch(self, epoch: int, index: int) -> Pair:
        generator = seeded(self.seed, 0 if self.fixed else epoch, index)
        starts = torch.randint(len(self.text) - self.length, (self.batch_size, 1), generator=generator)
        windows = self.text[starts + torch.arange(self.length + 1)].long()
        return windows[:, :-1], windows[:, 1:]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Training batches, and validation batches that are the same every time."""

    train: Batches
    validation: Batches


def digits(*, batch_size: int = 64, seed: int = 0) -> Data:
    """The 1797 images of scikit-learn's digits, a fifth of them for validation.

    Inputs are [B, 1, 8, 8] fp32 in [0, 1], targets [B] int64 in 0..9.
    `ConfigError` says what to install when scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ConfigError(
            explain(
                "the digits come with scikit-learn, which is not installed",
                "the extra that the demo needs",
                "Run pip install 'deepseek-mp[demo]'",
            )
        ) from error
    images, labels = load_digits(return_X_y=True)
    inputs = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16
    targets = torch.from_numpy(labels).long()
    order = torch.randperm(len(inputs), generator=seeded(seed))
    inputs, targets = inputs[order], targets[order]
    held_out = len(inputs) // 5
    return Data(
        train=ExampleBatches(inputs[held_out:], targets[held_out:], batch_size=batch_size, seed=seed),
        validation=ExampleBatches(inputs[:held_out], targets[:held_out], batch_size=batch_size, seed=None),
    )


def library_text(*, limit: int = 2**21) -> Tensor:
    """The first `limit` bytes of the modules of Python's standard library, in the order of their names, uint8.

    The text differs a little between Python releases. `LoaderError` if the library has no source files.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    text = bytearray()
    for path in sorted(folder.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= limit:
            break
    if not text:
        raise LoaderError(
            explain(
                f"no Python source in {folder}",
                "a Python whose standard library is installed as files",
                "Use another Python installation",
            )
        )
    return torch.frombuffer(text[:limit], dtype=torch.uint8)


def library_windows(
    *, batch_size: int = 16, length: int = 128, count: int = 100, validation_count: int = 8, seed: int = 0
) -> Data:
    """Windows of the standard library's text; its last tenth is for validation only."""
    text = library_text()
    split = len(text) - len(text) // 10
    windows = partial(TextWindows, batch_size=batch_size, length=length, seed=seed)
    return Data(
        train=windows(text[:split], count=count),
        validation=windows(text[split:], count=validation_count, fixed=True),
    )


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator whose state depends on the numbers, in order."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 1) % 2**63
    return torch.Generator().manual_seed(mixed)
