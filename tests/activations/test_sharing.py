from __future__ import annotations

import torch

from deepseek_mp.activations.sharing import Entry, Saved, key_of, restore
from deepseek_mp.activations.stored import Kept


def test_a_key_tells_views_versions_and_types_apart():
    x = torch.zeros(4, 4)
    assert key_of(x) == key_of(x.detach())
    for other in (x.t(), x[:2], x[2:], x.view(16), x.view(torch.int32), torch.zeros(4, 4)):
        assert key_of(other) != key_of(x)
    before = key_of(x)
    x.add_(1)
    assert key_of(x) != before


def test_an_entry_is_found_as_long_as_it_lives():
    saved, x = Saved(), torch.zeros(4)
    entry = Entry(Kept(x), key_of(x))
    saved.add(entry.key, entry)
    assert saved.find(key_of(x)) is entry
    assert restore(entry).data_ptr() == x.data_ptr()
    del entry
    assert saved.find(key_of(x)) is None


def test_memory_that_is_used_again_is_another_tensor():
    saved = Saved()
    entries, places = [], set()
    for value in range(50):
        x = torch.full((1000,), float(value))
        places.add(x.data_ptr())
        assert saved.find(key_of(x)) is None
        entries.append(Entry(Kept(torch.full((1000,), float(value))), key_of(x)))
        saved.add(entries[-1].key, entries[-1])
        del x
    assert len(places) < 50  # or the test shows nothing
    assert [restore(entry)[0].item() for entry in entries] == list(range(50))
