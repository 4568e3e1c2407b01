"""Looks into an archive of `torch.export` before PyTorch reads it: it has to be data, a graph and tensors alone.

PyTorch's own reading trusts the file. It unpickles tensors of unusual types, custom objects and example inputs; it
takes any function below `torch` for an operation; it evaluates sizes as Python expressions; it writes names into code
that it runs; and it imports modules that a structure names. None of that is in an archive that `write` makes, so
whatever asks for it is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any
from zipfile import ZipFile, ZipInfo

from deepseek_mp.errors import CheckpointError, explain

FILES = re.compile(
    r"(data/(weights|constants)/(weight|tensor)_\d+|data/weights/model_weights_config\.json"
    r"|data/constants/model_constants_config\.json|models/model\.json|data/sample_inputs/model\.pt"
    r"|extra/[\w.-]+|archive_format|archive_version|byteorder|\.data/\w+|\.format_version|\.storage_alignment)"
)
"""All that an archive has, below its one folder; compiled code, custom objects and torch 2.7's format are not in."""
OPERATIONS = re.compile(
    r"torch\.ops\.aten(?!\.(from_file|save|set_grad_enabled|manual_seed|seed)\b)(\.\w+)+"
    r"|torch\.ops\.(prims|deepseek_mp|quantized_decomposed)(\.\w+)+"
    r"|torch\.ops\.higher_order\.(wrap\w*|cond|while_loop|map_impl|scan|associative_scan|flex_attention|\w*functionalized\w*)"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)"
    r"|torch\.sym_\w+|math\.(ceil|floor|trunc|sqrt)"
)
"""Not among them: what reads or writes files, changes the process, or takes code for the device as text."""
PLAIN = re.compile(r"[\w.+ -]*")
"""Names of modules, tensors and versions: nothing that could end a string of Python, or call."""
CONTAINERS = (None, "builtins.tuple", "builtins.list", "builtins.dict")
_EXPRESSION = re.compile(r"[\w(),=' +*/<>.-]*")
_WORD = re.compile(r"[^\W\d]\w*")
_SYMBOL = re.compile(r"z?[su]f?\d+")
_KNOWN = frozenset("""
    Symbol Integer Float Rational Half One NegativeOne Zero Add Mul Pow Max Min Mod Eq Ne Lt Le Gt Ge Equality
    Unequality StrictLessThan LessThan StrictGreaterThan GreaterThan And Or Not Where FloorDiv ModularIndexing
    PythonMod CleanDiv CeilDiv CeilToInt FloorToInt TruncToInt TruncToFloat RoundToInt ToFloat IntTrueDiv
    FloatTrueDiv PowByNatural FloatPow LShift RShift Identity IsNonOverlappingAndDenseIndicator true false
    BooleanTrue BooleanFalse True False positive integer nonnegative nonzero real precision evaluate oo int_oo
""".split())  # noqa: SIM905 # fmt: skip
"""Words of sizes: symbols and numbers of sympy, and PyTorch's functions of them."""


def inspect(archive: ZipFile) -> None:
    """Pass over an archive that is data alone.

    Raises:
        CheckpointError: it is no archive of one program, or asks for code.
        KeyError, ValueError: a file of it is missing or is no JSON.
    """
    root = archive.namelist()[0].split("/")[0] if archive.namelist() else ""
    for name in archive.namelist():
        if not name.startswith(f"{root}/") or not FILES.fullmatch(name.removeprefix(f"{root}/")):
            raise _refused(f"the file {name!r}")
    for kind in ("weights", "constants"):
        config = json.loads(archive.read(f"{root}/data/{kind}/model_{kind}_config.json"))
        for name, entry in config["config"].items():
            if entry["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", entry["path_name"]):
                raise _refused(f"{name!r}, which is pickled")
            _check_plain(name)
            _check_tensor(name, entry["tensor_meta"], archive.getinfo(f"{root}/data/{kind}/{entry['path_name']}"))
    if archive.read(f"{root}/data/sample_inputs/model.pt"):
        raise _refused("example inputs, which are pickled")
    _check_program(json.loads(archive.read(f"{root}/models/model.json")))


def _check_tensor(name: str, meta: dict[str, Any], file: ZipInfo) -> None:
    """With values, in the file: what has none there PyTorch makes of zeros, as large as it says."""
    absent = not file.file_size and 0 not in [size["as_int"] for size in meta["sizes"]]
    if absent or meta["device"]["type"] == "meta":
        raise _refused(f"{name!r}, which has no values")


def _check_program(program: dict[str, Any]) -> None:
    if program["guards_code"]:
        raise _refused("guards, which are code")
    for key, value in _pairs("", program):
        _check_plain(key)
        if key == "target" and not (isinstance(value, str) and OPERATIONS.fullmatch(value)):
            raise _refused(f"the operation {value!r}")
        if key == "expr_str":
            _check_expression(value)
        elif key in ("in_spec", "out_spec"):
            _check_structure(json.loads(value)[1])
        elif key == "metadata" and value:
            raise _refused("descriptions of nodes")
        elif isinstance(value, str) and key not in ("target", "as_string"):
            _check_plain(value)
    inputs = program["graph_module"]["graph"]["inputs"]
    for key, value in _pairs("", inputs):
        if key == "name" and not value.isidentifier():
            raise _refused(f"an input {value!r}")


def _pairs(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every value of a JSON tree with the key that it is under, containers included."""
    yield key, value
    if isinstance(value, dict):
        for inner, child in value.items():
            yield from _pairs(inner, child)
    elif isinstance(value, list):
        for child in value:
            yield from _pairs(key, child)


def _check_plain(text: str) -> None:
    if not PLAIN.fullmatch(text):
        raise _refused(f"the name {text!r}")


def _check_expression(text: str) -> None:
    unknown = [word for word in _WORD.findall(text) if word not in _KNOWN and not _SYMBOL.fullmatch(word)]
    if unknown or not _EXPRESSION.fullmatch(text):
        raise _refused(f"the size {text!r}")


def _check_structure(spec: dict[str, Any]) -> None:
    context = spec["context"] if spec["context"] is None else json.loads(spec["context"])
    names = context or []
    plain = isinstance(names, list) and all(isinstance(name, str | int) for name in names)
    if spec["type"] not in CONTAINERS or not plain:
        raise _refused(f"a structure of {spec['type']!r}")
    for child in spec["children_spec"]:
        _check_structure(child)


def _refused(what: str) -> CheckpointError:
    passed = f"an archive with {what}"
    allowed = "a graph of known operations, and plain tensors"
    return CheckpointError(explain(passed, allowed, "Read it with torch.export.load, if you trust who made it"))
