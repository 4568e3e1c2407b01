"""An archive that asks for code is refused before PyTorch reads it."""

from __future__ import annotations

import io
import json
import zipfile

import pytest
import torch
from torch import nn

from deepseek_mp.errors import CheckpointError
from deepseek_mp.programs import read, write

RUN = "__import__('os').mkdir('ran')"


class Net(nn.Module):
    """With a free size, a constant, text and a structure."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return {"out": torch.einsum("bi,bi->b", self.layer(x), self.layer(x)), "more": [x + torch.ones(3), x.shape[0]]}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "model.pt2"
    shapes = ({0: torch.export.Dim.AUTO},)
    write(path, torch.export.export(Net(), (torch.randn(4, 3),), dynamic_shapes=shapes), {"about.json": 1})
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def changed_json(name, change):
    def changed(files):
        key = next(key for key in files if key.endswith(name))
        value = json.loads(files[key])
        change(value)
        return {**files, key: json.dumps(value).encode()}

    return changed


def program(change):
    return changed_json("models/model.json", change)


def graph(change):
    return program(lambda value: change(value["graph_module"]["graph"]))


def spec(value):
    return value["graph_module"]["module_call_graph"][0]["signature"]


def container(type, context="null"):
    child = {"type": type, "context": context, "children_spec": []}
    return program(lambda value: spec(value).update(out_spec=json.dumps([1, child])))


def expression(text):
    def change(value):
        shape = next(iter(t for t in value["tensor_values"].values() if any("as_expr" in s for s in t["sizes"])))
        next(s for s in shape["sizes"] if "as_expr" in s)["as_expr"]["expr_str"] = text

    return graph(change)


def pickled():
    buffer = io.BytesIO()
    torch.save((torch.ones(1),), buffer)
    return buffer.getvalue()


def meta(config):
    return config["config"]["layer.bias"]["tensor_meta"]


def empty_bias(files):
    """PyTorch fills what is not in a file with zeros, of any size."""
    config = json.loads(next(data for name, data in files.items() if name.endswith("weights_config.json")))
    stored = f"/weights/{config['config']['layer.bias']['path_name']}"
    return {name: b"" if name.endswith(stored) else data for name, data in files.items()}


HOSTILE = {
    "operation": (graph(lambda g: g["nodes"][0].update(target="torch.hub.load")), r"the operation 'torch\.hub\.load'"),
    "package": (graph(lambda g: g["nodes"][0].update(target="torch.ops.other.f.default")), "the operation"),
    "file": (graph(lambda g: g["nodes"][0].update(target="torch.ops.aten.from_file.default")), "the operation"),
    "writer": (graph(lambda g: g["nodes"][0].update(target="torch.ops.aten.save")), "the operation"),
    "assembler": (
        graph(lambda g: g["nodes"][0].update(target="torch.ops.higher_order.inline_asm_elementwise")),
        "the operation",
    ),
    "attribute": (graph(lambda g: g["nodes"][0].update(target="torch.ops.aten.add.default;x")), "the operation"),
    "no text": (graph(lambda g: g["nodes"][0].update(target={"a": 1})), "the operation"),
    "function": (graph(lambda g: g["nodes"][0].update(target="_operator.methodcaller")), "the operation"),
    "size": (expression(RUN), "the size .__import__"),
    "attribute of a size": (expression("Symbol.evalf"), "the size"),
    "range": (program(lambda p: p["range_constraints"].update({RUN: {"min_val": 1, "max_val": 2}})), "the name"),
    "guard": (program(lambda p: p.update(guards_code=[RUN])), "guards, which are code"),
    "input": (graph(lambda g: g["inputs"][-1]["as_tensor"].update(name="x y")), "an input 'x y'"),
    "name": (graph(lambda g: g["nodes"][0].update(name=f"x={RUN}")), "the name"),
    "description": (graph(lambda g: g["nodes"][0]["metadata"].update(torch_fn="a")), "descriptions of nodes"),
    "import": (container("collections.defaultdict", json.dumps({"default_factory_module": "os"})), "a structure of"),
    "enumeration": (container("builtins.dict", json.dumps([{"__enum__": True, "fqn": "os:x"}])), "a structure of"),
    "named tuple": (container("a.B"), r"a structure of 'a\.B'"),
    "weight": (
        changed_json("weights_config.json", lambda v: v["config"]["layer.bias"].update(use_pickle=True)),
        "'layer.bias', which is pickled",
    ),
    "object": (
        changed_json("weights_config.json", lambda v: v["config"]["layer.bias"].update(path_name="opaque_obj_0")),
        "'layer.bias', which is pickled",
    ),
    "device": (
        changed_json("weights_config.json", lambda v: meta(v).update(device={"type": "meta", "index": None})),
        "'layer.bias', which has no values",
    ),
    "nothing": (empty_bias, "'layer.bias', which has no values"),
    "examples": (lambda f: {**f, next(k for k in f if "sample_inputs" in k): pickled()}, "example inputs, which are"),
    "compiled": (lambda f: {**f, f"{next(iter(f)).split('/')[0]}/data/aotinductor/model/a.so": b""}, "the file"),
    "older": (lambda f: {**f, "serialized_exported_program.json": b"{}"}, "the file"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_asks_for_code_is_refused_and_does_not_run(files, case, tmp_path, monkeypatch):
    change, match = HOSTILE[case]
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("model.pt2", "w") as archive:
        for name, data in change(files).items():
            archive.writestr(name, data)
    with pytest.raises(CheckpointError, match=f"an archive with .*{match}"):
        read("model.pt2", "about.json")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


def test_the_same_archive_without_changes_is_read(files, tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt2", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    found, _ = read(tmp_path / "model.pt2", "about.json")
    assert found.module(check_guards=False)(torch.randn(7, 3))["more"][1] == 7
