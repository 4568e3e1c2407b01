"""A compiled graph takes and gives what the graph does, compiles once for sizes, and looks at inputs alone."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from deepseek_mp.qat import compiled
from deepseek_mp.qat.compiled import CompiledGraph


class Nested(nn.Module):
    """Containers on both sides, a constant among the inputs, one tensor given twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, pair, *, mask, scale):
        out = self.layer(pair[0]) * scale
        return {"out": out, "rest": [out, pair[1] + mask["m"], None]}


def exported(model, args, kwargs=None, *, free=False):
    dims = ({0: torch.export.Dim.AUTO},) if free else None
    return torch.export.export(model, args, kwargs, dynamic_shapes=dims).module(check_guards=False)


@pytest.fixture
def made(monkeypatch):
    """The graphs that were compiled; they run as they are."""
    found = []

    def compile(graph, inputs):
        found.append((graph, inputs, torch._inductor.config.freezing, torch.is_autocast_enabled("cpu")))
        return graph

    monkeypatch.setattr(compiled, "inductor_compile", compile)
    return found


def test_containers_keywords_and_constants_are_those_of_the_graph(made):
    model, x, m = Nested(), torch.randn(3, 4), torch.randn(3, 4)
    kwargs = {"mask": {"m": m}, "scale": 2.0}
    graph = exported(model, ((x, m),), kwargs)
    run, expected = CompiledGraph(graph), model((x, m), **kwargs)
    for found in (run((x, m), **kwargs), run((x, m), scale=2.0, mask={"m": m})):
        torch.testing.assert_close(found["out"], expected["out"])
        assert not found["out"].requires_grad
        torch.testing.assert_close(found["rest"], expected["rest"])
    torch.testing.assert_close(graph((x, m), **kwargs)["out"], expected["out"])  # is as it was
    assert len(made) == 1
    assert len(made[0][1]) == 3


def test_it_compiles_once_for_shapes_strides_dtypes_and_threads(made, monkeypatch):
    run = CompiledGraph(exported(nn.Sequential(nn.ReLU()), (torch.randn(4, 4),)))
    for x in (torch.randn(4, 4), torch.randn(4, 4), torch.randn(4, 4).t(), torch.randn(4, 4).double()):
        assert torch.equal(run(x), x.relu())
    assert len(made) == 3
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    run(torch.randn(4, 4))
    assert len(made) == 4


def batch_sizes(made):
    """Of the graphs that were compiled; None: free."""
    return [size if isinstance(size := x.shape[0], int) else None for _, (x,), *_ in made]


def test_the_second_size_is_compiled_for_all_others(made):
    run = CompiledGraph(exported(nn.Sequential(nn.ReLU()), (torch.randn(4, 4),), free=True))
    for size in (4, 7, 4, 9, 1, 1, 64, 0):
        x = torch.randn(size, 4)
        assert torch.equal(run(x), x.relu())
    assert batch_sizes(made) == [4, None, 1, 0]
    run(torch.randn(5, 4).double())
    run(torch.randn(6, 4).double())
    assert batch_sizes(made)[4:] == [5, None]


def test_sizes_beyond_what_code_assumes_get_code_of_their_own(made, monkeypatch):
    compile = compiled.inductor_compile

    def assuming(graph, inputs):
        bool(inputs[0].shape[0] < 16)
        return compile(graph, inputs)

    monkeypatch.setattr(compiled, "inductor_compile", assuming)
    run = CompiledGraph(exported(nn.Sequential(nn.ReLU()), (torch.randn(4, 4),), free=True))
    for size in (4, 7, 9, 20, 5, 30, 16):
        run(torch.randn(size, 4))
    assert batch_sizes(made) == [4, None, None]


def test_where_sizes_cannot_be_free_each_is_compiled(made, monkeypatch):
    compile, asked = compiled.inductor_compile, []

    def only_fixed(graph, inputs):
        asked.append(inputs)
        if not isinstance(inputs[0].shape[0], int):
            raise RuntimeError("no kernel")
        return compile(graph, inputs)

    monkeypatch.setattr(compiled, "inductor_compile", only_fixed)
    run = CompiledGraph(exported(nn.Sequential(nn.ReLU()), (torch.randn(4, 4),), free=True))
    for size in (4, 7, 9):
        x = torch.randn(size, 4)
        assert torch.equal(run(x), x.relu())
    assert batch_sizes(made) == [4, 7, 9]
    assert len(asked) == 4


def test_where_code_for_free_sizes_fails_each_is_compiled_and_state_moves_once(monkeypatch):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            return x * self.calls

    def fails_beyond(graph, inputs):
        def run(x):
            if not isinstance(inputs[0].shape[0], int):
                assert len(x) < 8, "expected stride 1"
            return graph(x)

        return run

    monkeypatch.setattr(compiled, "inductor_compile", fails_beyond)
    run = CompiledGraph(exported(Counts(), (torch.randn(4, 4),), free=True))
    for calls, size in enumerate((4, 7, 9, 7, 5, 9), start=1):
        x = torch.randn(size, 4)
        assert torch.equal(run(x), x * calls)
    assert len(set(map(id, run._programs.values()))) == 4, "4, free, 9 and 5"


def test_inputs_that_no_code_takes_leave_sizes_free(made):
    run = CompiledGraph(exported(nn.Embedding(4, 2), (torch.zeros(4, dtype=torch.long),), free=True))
    run(torch.zeros(4, dtype=torch.long))
    with pytest.raises(IndexError, match="out of range"):
        run(torch.full((7,), 9))
    for size in (8, 9):
        run(torch.zeros(size, dtype=torch.long))
    assert batch_sizes(made) == [4, None, 7]


def test_weights_are_constants_for_the_compiler_and_autocast_is_off(made):
    run = CompiledGraph(exported(nn.Linear(2, 2), (torch.randn(2, 2),)))
    with torch.autocast("cpu"):
        run(torch.randn(2, 2))
    assert made[0][2:] == (True, False)
    assert not torch._inductor.config.freezing


def test_a_callers_autocast_does_not_reach_operations_that_are_not_compiled():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(8, 8, batch_first=True)

        def forward(self, x):
            return self.lstm(x)[0]

    x = torch.randn(2, 3, 8)
    run = CompiledGraph(exported(Recurrent().eval(), (x,)))
    expected = run(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_views_that_stand_for_other_values_are_read_as_these(dtype):
    z = torch.randn(4, 4, dtype=torch.complex64).conj()
    x = z if dtype.is_complex else z.imag
    run = CompiledGraph(exported(nn.Tanhshrink(), (x.clone(),)))
    torch.testing.assert_close(run(x), x - x.tanh())


def test_compiled_it_computes_what_the_graph_does():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.GELU()).eval(), torch.randn(2, 8)
    run = CompiledGraph(exported(model, (x,), free=True))
    for size in (2, 3, 20):
        x = torch.randn(size, 8)
        torch.testing.assert_close(run(x), model(x))


def test_threads_compile_one_after_another_and_sizes_once(monkeypatch):
    inside, most, sizes = [], [], []

    def slow(module, inputs):
        inside.append(1)
        most.append(len(inside))
        sizes.append(len(inputs[0]))
        time.sleep(0.02)
        inside.pop()
        return module

    monkeypatch.setattr(compiled, "inductor_compile", slow)
    run = CompiledGraph(exported(nn.Sequential(nn.ReLU()), (torch.randn(4, 4),)))
    inputs = [torch.randn(4, 4), torch.randn(4, 4), torch.randn(4, 4).double(), torch.randn(4, 4).double()]
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(run, inputs))
    assert all(torch.equal(found, x.relu()) for found, x in zip(outputs, inputs, strict=True))
    assert max(most) == 1
    assert len(sizes) == 2
