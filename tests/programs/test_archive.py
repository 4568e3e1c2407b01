"""Files of programs: whole or absent, read as they were written, and damaged ones refused."""

from __future__ import annotations

import io
import json
import struct
import zipfile

import pytest
import torch
from torch import nn

from deepseek_mp.errors import CheckpointError, ConfigError
from deepseek_mp.programs import read, write


def program():
    return torch.export.export(nn.Linear(3, 2), (torch.randn(4, 3),))


def test_a_program_and_what_is_said_of_it_come_back(tmp_path):
    kept, about = program(), {"a": [1, None, float("inf")]}
    write(tmp_path / "model.pt2", kept, {"about.json": about})
    found, said = read(tmp_path / "model.pt2", "about.json")
    x = torch.randn(4, 3)
    assert torch.equal(found.module()(x), kept.module(check_guards=False)(x))
    assert said == about
    assert kept.example_inputs is not None
    assert any("stack_trace" in node.meta for node in kept.graph.nodes)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


def test_nothing_of_the_machine_that_wrote_is_in_it(tmp_path):
    write(tmp_path / "model.pt2", program(), {"about.json": 1})
    with zipfile.ZipFile(tmp_path / "model.pt2") as archive:
        for name in archive.namelist():
            assert b".py" not in archive.read(name)
            assert b"sample" not in archive.read(name)


def test_an_older_file_is_replaced_and_stays_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "model.pt2"
    path.write_bytes(b"old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        write(path, program(), {"about.json": 1})
    assert path.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
    monkeypatch.undo()
    write(path, program(), {"about.json": 1})
    assert read(path, "about.json")[1] == 1


def test_a_path_that_cannot_be_a_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r", a directory\. Allowed: a file"):
        write(tmp_path, program(), {})
    with pytest.raises(ConfigError, match="in a directory that does not exist"):
        write(tmp_path / "no" / "model.pt2", program(), {})


def test_a_program_that_has_no_such_file_is_refused(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleDict({"a('b')": nn.Linear(3, 2)})

        def forward(self, x):
            return self.layers["a('b')"](x)

    kept = torch.export.export(Odd(), (torch.randn(4, 3),))
    with pytest.raises(ConfigError, match=r"a program that cannot be saved \(CheckpointError: .*the name"):
        write(tmp_path / "model.pt2", kept, {"about.json": 1})
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_archive_is_refused(tmp_path):
    path = tmp_path / "model.pt2"
    with pytest.raises(CheckpointError, match=r"model\.pt2' \(No such file or directory\)"):
        read(path, "about.json")
    with pytest.raises(CheckpointError, match="Is a directory"):
        read(tmp_path, "about.json")
    path.write_bytes(b"no archive")
    with pytest.raises(CheckpointError, match=r"which cannot be read \(BadZipFile"):
        read(path, "about.json")
    with zipfile.ZipFile(path, "w"):
        pass
    with pytest.raises(CheckpointError, match="which cannot be read"):
        read(path, "about.json")


def test_a_program_of_another_origin_is_refused(tmp_path):
    torch.export.save(program(), tmp_path / "model.pt2")
    with pytest.raises(CheckpointError, match=r"without about\.json.*Read programs of another origin.*Int8Model\.load"):
        read(tmp_path / "model.pt2", "about.json")


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.99])
def test_a_file_cut_short_is_refused(tmp_path, cut):
    path = tmp_path / "model.pt2"
    write(path, program(), {"about.json": 1})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * cut)])
    with pytest.raises(CheckpointError, match="which cannot be read"):
        read(path, "about.json")


def test_a_byte_that_changed_is_found(tmp_path):
    path, kept = tmp_path / "model.pt2", program()
    write(path, kept, {"about.json": 1})
    data = bytearray(path.read_bytes())
    weight = kept.state_dict["weight"].detach().numpy().tobytes()
    data[bytes(data).index(weight)] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="Bad CRC-32"):
        read(path, "about.json")


def test_a_program_of_another_version_of_pytorch_is_refused(tmp_path):
    path = tmp_path / "model.pt2"
    write(path, program(), {"about.json": 1})
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    model = next(name for name in files if name.endswith("models/model.json"))
    changed = json.loads(files[model])
    changed["schema_version"]["major"] = 999
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, json.dumps(changed) if name == model else data)
    with pytest.raises(CheckpointError, match=r"which cannot be read .*read it with the version of PyTorch"):
        read(path, "about.json")


def parts(data):
    """Files, directory and end of an archive; the end says how large the directory is, and where it begins."""
    end = data.rfind(b"PK\5\6")
    size, start = struct.unpack("<II", data[end + 12 : end + 20])
    return data[:start], data[start : start + size], data[end:]


def moved(directory, by):
    """A directory whose files all begin that much later."""
    made, at = b"", 0
    while at < len(directory):
        length = 46 + sum(struct.unpack("<HHH", directory[at + 28 : at + 34]))
        start = struct.unpack("<I", directory[at + 42 : at + 46])[0] + by
        made += directory[at : at + 42] + struct.pack("<I", start) + directory[at + 46 : at + length]
        at += length
    return made


def test_pytorch_reads_the_files_that_were_inspected(tmp_path):
    """Python takes the directory right before the end, PyTorch's reader the one where the end says it begins."""
    path = tmp_path / "model.pt2"
    write(path, program(), {"about.json": 1})
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}

    def packed(change):
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, change(data) if name.endswith("models/model.json") else data)
        return parts(made.getvalue())

    seen, other = packed(bytes), packed(lambda data: data.replace(b"aten.linear.default", b"hub.load"))
    room = len(seen[0])
    start = len(other[0]) + room  # so that no file begins before the whole
    end = seen[2][:12] + struct.pack("<II", len(other[1]), start) + seen[2][20:]
    path.write_bytes(other[0] + bytes(room) + other[1] + seen[0] + moved(seen[1], start - len(seen[0])) + end)
    targets = [str(node.target) for node in read(path, "about.json")[0].graph.nodes]
    assert "aten.linear.default" in targets


def test_a_file_that_is_there_twice_is_refused(tmp_path):
    path = tmp_path / "model.pt2"
    write(path, program(), {"about.json": 1})
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(archive.namelist()[0], b"other")
    with pytest.raises(CheckpointError, match="is in it twice"):
        read(path, "about.json")


def test_an_archive_that_would_fill_the_memory_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "model.pt2"
    write(path, program(), {"about.json": 1})
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, bytes(2**20) if name.endswith("weight_0") else data)
    with pytest.raises(CheckpointError, match="larger than the file"):
        read(path, "about.json")


def test_what_names_no_path_is_refused():
    with pytest.raises(ConfigError, match="path=None of type NoneType"):
        read(None, "about.json")
