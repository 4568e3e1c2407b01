"""Models that torchao has seen are not kept in memory by it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

_CACHES = (
    ("torchao.utils", "_assert_and_get_unique_device"),
    ("torch.ao.quantization.fx.utils", "assert_and_get_unique_device"),
)


@contextmanager
def models_let_go() -> Iterator[None]:
    """A region for torchao's passes: they look up a model's device in caches, which hold the model for ever."""
    try:
        yield
    finally:
        for module, name in _CACHES:
            forget = getattr(getattr(import_module(module), name, None), "cache_clear", None)
            if forget is not None:  # other versions may do without
                forget()
