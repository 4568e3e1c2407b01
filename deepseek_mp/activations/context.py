"""`compressed_activations`: the region around a forward in which saved tensors are compressed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from deepseek_mp.activations.account import Account
from deepseek_mp.activations.session import Session
from deepseek_mp.activations.settings import ActivationSettings
from deepseek_mp.activations.sharing import restore

_forwards: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""How often each model has been looked at, so that every forward draws other random numbers."""


@contextmanager
def compressed_activations(
    model: nn.Module, settings: ActivationSettings | None = None, *, number: int | None = None
) -> Iterator[Account]:
    """Hold what the forward inside saves for its backward in fewer bytes.

    The backward may run inside or after. In a region inside another the inner one's settings hold. What is saved in
    other threads is not touched, and a region in each thread is independent of the others.

    Args:
        model: whose parameters and buffers are left alone, and whose modules the record and `settings.keep` name.
        settings: which tensors, and how; None: the defaults.
        number: of this forward in the run: stochastic rounding follows from it and the seed alone. None: counted up
            by model in this process, so that a resumed run draws other numbers.

    Yields:
        The account, whose `record()` says what was saved in which form.
    """
    if number is None:
        number = _forwards.get(model, 0)
        _forwards[model] = number + 1
    session = Session(model, settings or ActivationSettings(), number)
    try:
        with saved_tensors_hooks(session.pack, restore), session:
            yield session.account
    finally:
        session.end()
