"""Parts of one memory are described as apart where a graph has graphs of its own, and only if they share nothing."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from deepseek_mp.nn.graph_alias import described_apart

WHOLE = torch.arange(64.0).view(4, 16)
PARTS = {
    "rows": ((WHOLE[:2], WHOLE[2:]), True),
    "columns": ((WHOLE[:, :8], WHOLE[:, 8:]), True),
    "columns with a gap": ((WHOLE[:, 12:], WHOLE[:, :8]), True),
    "rows in common": ((WHOLE[:3], WHOLE[2:]), False),
    "columns in common": ((WHOLE[:, :9], WHOLE[:, 8:]), False),
    "columns that run into the next row": ((WHOLE[:, 8:], torch.as_strided(WHOLE, (3, 8), (16, 1), 20)), False),
    "another order": ((WHOLE[:, :8], WHOLE[:, 8:].t()), False),
    "another type": ((WHOLE[:2], WHOLE[2:].view(torch.int16)), False),
    "nothing": ((WHOLE[:0], WHOLE[2:]), False),
    "memories of their own": ((WHOLE[:2], WHOLE[2:].clone()), None),
}


def seen(function, *args, weights):
    """Inputs as the compiler is given them, and as they were."""
    found = []

    def backend(graph, inputs):
        found.append((described_apart(graph, inputs, weights), inputs))
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True)(*args)
    return found[0]


def chosen(x, one, other):
    return torch.cond(x.sum() > 0, lambda x: x + one.sum(), lambda x: x - other.sum(), (x,))


def plain(x, one, other):
    return x + one.sum() - other.sum()


@pytest.mark.parametrize("name", PARTS)
def test_only_what_shares_a_memory_and_no_element_is_described_apart(name):
    parts, apart = PARTS[name]
    made, before = seen(chosen, torch.ones(2), *parts, weights={part.data_ptr() for part in parts})
    changed = [(new, old) for new, old in zip(made, before, strict=True) if new is not old]
    assert len(changed) == (2 if apart else 0)
    assert all(isinstance(new, FakeTensor) for new, _ in changed)
    assert all((new.shape, new.stride(), new.dtype) == (old.shape, old.stride(), old.dtype) for new, old in changed)
    assert len({new.untyped_storage()._cdata for new, _ in changed}) == len(changed)


@pytest.mark.parametrize(("function", "known"), [(plain, True), (chosen, False)], ids=["no graphs", "no weights"])
def test_others_stay_as_they_are(function, known):
    parts = PARTS["rows"][0]
    made, before = seen(function, torch.ones(2), *parts, weights={part.data_ptr() for part in parts} if known else ())
    assert all(new is old for new, old in zip(made, before, strict=True))
