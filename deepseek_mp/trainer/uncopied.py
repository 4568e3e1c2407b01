"""What is not copied or pickled: a trainer, which others hold on to and which holds hooks, threads and open files."""

from __future__ import annotations

from typing import NoReturn, SupportsIndex

from deepseek_mp.errors import ConfigError, explain


class Uncopied:
    """`copy`, `deepcopy`, `pickle` and `torch.save` of an object of this class are a `ConfigError`."""

    def __reduce_ex__(self, _protocol: SupportsIndex) -> NoReturn:
        change = "Copy trainer.model, or call trainer.save and load it into another trainer"
        raise ConfigError(explain("a copy of a trainer", "copies of its model, and its checkpoints", change))
