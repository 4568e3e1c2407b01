"""Finds out that a tensor was saved before, so that it is held once."""

from __future__ import annotations

from weakref import WeakValueDictionary

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from deepseek_mp.activations.stored import Stored, version_of
from deepseek_mp.ops.own_work import own_work

Key = tuple[StorageWeakRef, int, object, tuple[int, ...], tuple[int, ...], object]


class Entry:
    """What autograd is given for a saved tensor; it lives as long as the nodes that saved the tensor."""

    __slots__ = ("__weakref__", "key", "stored")

    def __init__(self, stored: Stored, key: Key | None = None) -> None:
        self.stored = stored
        self.key = key
        """Holds a weak reference to the storage: while the entry lives, no other storage can have its identity, also
        when the memory of this one has been freed and given to another tensor."""


class Saved:
    """The entries of one form that are alive, by the tensors they stand for."""

    def __init__(self) -> None:
        self._entries: WeakValueDictionary[Key, Entry] = WeakValueDictionary()

    def find(self, key: Key) -> Entry | None:
        return self._entries.get(key)

    def add(self, key: Key, entry: Entry) -> None:
        self._entries[key] = entry


def key_of(x: Tensor) -> Key:
    """What a plain tensor is now: its storage, the version of its values, and which of them it shows."""
    return StorageWeakRef(x.untyped_storage()), version_of(x), x.dtype, tuple(x.shape), x.stride(), x.storage_offset()


def restore(entry: Entry) -> Tensor:
    """The saved tensor."""
    with own_work():
        return entry.stored.restore()
