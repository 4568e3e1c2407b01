"""The file of an exported program: a .pt2 archive of a graph, tensors and JSON about them, which holds no code."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from torch import fx
from torch.ao.quantization.fx import _decomposed as _registered  # noqa: F401 - operations of INT8 graphs
from torch.export import ExportedProgram

from deepseek_mp.errors import CheckpointError, ConfigError, explain, first_line
from deepseek_mp.programs.exporting import EXPORTING
from deepseek_mp.programs.inspection import inspect
from deepseek_mp.programs.writing import as_path, checked, whole_file

_KEPT = ("val",)
"""What nodes keep of their descriptions; others name files and code of the machine that exported."""


def write(path: str | Path, program: ExportedProgram, about: Mapping[str, Any]) -> None:
    """Write the program and the JSON values about it, whole or not at all.

    Args:
        path: of the file; an older one there is replaced.
        program: what `torch.export` made.
        about: by name of the file in the archive, like 'decisions.json', a value for JSON.

    Raises:
        ConfigError: the path is a directory or lies in none, or the program holds what no archive can.
    """
    target = checked(path)
    data = _bytes(program, {name: json.dumps(value, allow_nan=True) for name, value in about.items()})
    with whole_file(target) as file:
        file.write(data)


def read(path: str | Path, name: str) -> tuple[ExportedProgram, Any]:
    """The program of a file that `write` wrote, on the CPU, and the JSON value in it under `name`.

    Nothing in the file is executed while it is read: one that asks for it is refused (see `inspection`).

    Raises:
        CheckpointError: the file is missing, damaged, or none of these.
        ConfigError: the path is none.
    """
    path = as_path(path)
    passed, allowed = f"{str(path)!r}", "a .pt2 file that was saved with this package"
    try:
        data = _written_again(path)
        with ZipFile(data) as archive:
            root = archive.namelist()[0].split("/")[0]
            if f"{root}/extra/{name}" not in archive.namelist():
                loaders = "inference.load, Int8Model.load or torch.export.load"
                change = f"Read programs of another origin with the counterpart of what saved them: {loaders}"
                raise CheckpointError(explain(f"{passed}, without {name}", allowed, change))
            inspect(archive)
            about = json.loads(archive.read(f"{root}/extra/{name}"))
        with EXPORTING, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data.seek(0)
            return torch.export.load(data), about
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(explain(f"{passed} ({error.strerror})", allowed, "Name another file")) from error
    except Exception as error:  # whatever a damaged file makes its readers raise
        why = first_line(error)
        change = "Save it again, or read it with the version of PyTorch that wrote it"
        raise CheckpointError(explain(f"{passed}, which cannot be read ({why})", allowed, change)) from error


def _written_again(path: str | Path) -> io.BytesIO:
    """The archive with the files that Python's reader finds in it, each once.

    PyTorch's reader looks for them in other ways: an archive can be made in which it finds others than were inspected.
    """
    made = io.BytesIO()
    with ZipFile(path) as archive, ZipFile(made, "w") as copy:
        names = archive.namelist()
        # PyTorch does not compress: of a file that is, a few bytes may become all of the memory.
        if sum(part.file_size for part in archive.infolist()) > Path(path).stat().st_size:
            raise BadZipFile("what is in it is larger than the file")
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise BadZipFile(f"{twice} is in it twice")
        for name in names:
            copy.writestr(name, archive.read(name))
    return made


def _bytes(program: ExportedProgram, about: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    try:
        with EXPORTING, _bare(program), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter, about tensors that are not contiguous
            torch.export.save(program, buffer, extra_files=dict(about))
        with ZipFile(buffer) as archive:
            inspect(archive)
    except Exception as error:  # whatever a program that has no such form makes its writer raise
        why = first_line(error)
        passed = f"a program that cannot be saved ({why})"
        raise ConfigError(explain(passed, "known operations and plain tensors", "Rewrite what it names")) from error
    return buffer.getvalue()


@contextmanager
def _bare(program: ExportedProgram) -> Iterator[None]:
    """The program without example inputs, checks as code, and descriptions that name the code of this machine."""
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, fx.GraphModule)]
    metas = [(node, node.meta) for graph in graphs for node in graph.nodes]
    kept = program._example_inputs, program._guards_code  # noqa: SLF001 - there is no public way to leave them out
    try:
        program._example_inputs, program._guards_code = None, []  # noqa: SLF001
        for node, meta in metas:
            node.meta = {key: value for key, value in meta.items() if key in _KEPT}
        yield
    finally:
        program._example_inputs, program._guards_code = kept  # noqa: SLF001
        for node, meta in metas:
            node.meta = meta
