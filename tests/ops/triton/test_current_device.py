"""Kernels are launched on the device of their tensors, which Triton does not do by itself."""

import ast
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import deepseek_mp.ops
from deepseek_mp.ops.triton.current_device import on_device

FOLDER = Path(deepseek_mp.ops.__file__).parent / "triton"


def is_launch(node):
    """`some_kernel[grid](...)`"""
    called = node.func if isinstance(node, ast.Call) else None
    return isinstance(called, ast.Subscript) and ast.unparse(called.value).endswith("_kernel")


def outside(tree):
    """Launches, and calls of functions of the module that launch, outside of `with on_device(...)`."""
    bare, launching = [], set()

    def visit(node, function, inside):
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if isinstance(node, ast.With):
            inside = inside or any(ast.unparse(item.context_expr).startswith("on_device(") for item in node.items)
        called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in launching
        if not inside and (is_launch(node) or called):
            bare.append((function, node.lineno))
        for child in ast.iter_child_nodes(node):
            visit(child, function, inside)

    visit(tree, "", False)
    launching |= {function for function, _ in bare if function.startswith("_")}
    bare.clear()
    visit(tree, "", False)
    return [(function, line) for function, line in bare if function not in launching]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_every_launch_is_on_the_device_of_its_tensors(path):
    assert not outside(ast.parse(path.read_text(encoding="utf-8")))


def test_a_launch_elsewhere_is_found():
    bare = "def run(x):\n    fill_kernel[(1,)](x)\ndef _in(x):\n    fill_kernel[(1,)](x)\n"
    assert outside(ast.parse(bare)) == [("run", 2)]
    assert outside(ast.parse(bare + "def go(x):\n    _in(x)\n")) == [("run", 2), ("go", 6)]
    assert outside(ast.parse(bare + "def go(x):\n    with on_device(x.device):\n        _in(x)\n")) == [("run", 2)]


@pytest.mark.parametrize(("index", "changes"), [(0, False), (1, True)])
def test_the_current_device_changes_where_it_is_another(monkeypatch, index, changes):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: f"on {device}")
    found = on_device(torch.device("cuda", index))
    assert (found == "on cuda:1") is changes
    assert changes or isinstance(found, nullcontext)
    assert isinstance(on_device(torch.device("cpu")), nullcontext), "where kernels are interpreted"
