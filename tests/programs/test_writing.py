"""A file takes its place whole, and an exception leaves what was there."""

from __future__ import annotations

import os

import pytest

from deepseek_mp.errors import ConfigError
from deepseek_mp.programs.writing import checked, whole_file


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_it_is_there_once_the_region_ends(tmp_path):
    with whole_file(tmp_path / "a") as file:
        file.write(b"new")
        assert names(tmp_path) != ["a"]
    assert (tmp_path / "a").read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


def test_an_exception_leaves_the_older_file(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(TypeError, match="bytes-like"), whole_file(tmp_path / "a") as file:
        file.writelines([b"new", "no bytes"])
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_what_cannot_be_a_file_is_refused(tmp_path):
    assert checked(tmp_path / "a") == tmp_path / "a"
    with pytest.raises(ConfigError, match=r", a directory\. Allowed: a file"):
        checked(tmp_path)
    with pytest.raises(ConfigError, match="in a directory that does not exist"):
        checked(str(tmp_path / "no" / "a"))


def test_what_the_system_refuses_is_its_own_error(tmp_path):
    with pytest.raises(OSError, match="File name too long"), whole_file(tmp_path / ("long" * 100)) as file:
        file.write(b"new")
    assert names(tmp_path) == []


def test_two_regions_for_one_path_do_not_meet(tmp_path):
    with whole_file(tmp_path / "a") as first:
        first.write(b"first")
        with whole_file(tmp_path / "a") as second:
            second.write(b"second")
        assert (tmp_path / "a").read_bytes() == b"second"
    assert (tmp_path / "a").read_bytes() == b"first"
    assert names(tmp_path) == ["a"]


def test_others_may_read_it_as_any_new_file(tmp_path):
    (tmp_path / "any").write_bytes(b"")
    with whole_file(tmp_path / "a") as file:
        file.write(b"new")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "any").stat().st_mode


@pytest.mark.parametrize("path", [None, 3, b"a"])
def test_what_names_no_path_is_refused(path):
    with pytest.raises(ConfigError, match=r"path=.* of type (NoneType|int|bytes)\. Allowed: text or a Path"):
        checked(path)


class Named:
    """A path of another library."""

    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return self.path


def test_paths_of_other_libraries_are_taken(tmp_path):
    assert checked(Named(str(tmp_path / "a"))) == tmp_path / "a"
    with pytest.raises(ConfigError, match=r"path=.* of type Named\. Allowed: text or a Path"):
        checked(Named(b"a"))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
def test_a_device_or_a_pipe_stays_what_it_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=r"pipe', no file\. Allowed: a file that can be written"):
        checked(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="path='/dev/null', no file"):
        checked("/dev/null")
