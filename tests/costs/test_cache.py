"""The cost cache: what is kept, what is ignored, and that nothing it does stops a run."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytest

from deepseek_mp.costs import cache as module
from deepseek_mp.costs.cache import CostCache, cache_folder

KEY = {"device": "x", "unit": "Linear", "format": "bf16"}


def use(cache: CostCache) -> None:
    """Read and write twice: a cache complains once, however often it is used."""
    for number in (0, 1):
        cache.get(KEY)
        cache.put(KEY, number)
        cache.save()


def test_what_was_saved_is_found_by_the_next_process(tmp_path: Path) -> None:
    first = CostCache(tmp_path / "deep" / "folder")
    first.put(KEY, {"median_ms": 1.5})
    first.save()
    assert CostCache(tmp_path / "deep" / "folder").get(KEY) == {"median_ms": 1.5}
    assert CostCache(tmp_path / "deep" / "folder").get({**KEY, "format": "fp16"}) is None


def test_the_order_of_the_keys_fields_does_not_matter(tmp_path: Path) -> None:
    cache = CostCache(tmp_path)
    cache.put(KEY, 1)
    assert cache.get(dict(reversed(KEY.items()))) == 1


def test_two_processes_keep_each_others_entries(tmp_path: Path) -> None:
    one, two = CostCache(tmp_path), CostCache(tmp_path)
    assert one.get(KEY) is None
    assert two.get(KEY) is None
    one.put({"a": 1}, 1)
    two.put({"b": 2}, 2)
    one.save()
    two.save()
    both = CostCache(tmp_path)
    assert (both.get({"a": 1}), both.get({"b": 2})) == (1, 2)


def test_the_oldest_entries_go_when_the_file_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ENTRIES", 3)
    cache = CostCache(tmp_path)
    for number in range(5):
        cache.put({"n": number}, number)
    cache.save()
    kept = CostCache(tmp_path)
    assert [kept.get({"n": number}) for number in range(5)] == [None, None, 2, 3, 4]


def test_without_a_disk_nothing_is_written(tmp_path: Path) -> None:
    cache = CostCache(tmp_path, disk=False)
    cache.put(KEY, 1)
    cache.save()
    assert cache.get(KEY) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not json",
        "[]",
        "{}",
        '{"version": 1}',
        '{"version": 99, "entries": {}}',
        '{"version": 1, "entries": {"0": 3}}',
        '{"version": 1, "entries": {"0": {"key": {"a": 1}, "value": 2}}}',
        "\x00\xff",
    ],
)
def test_a_file_that_is_not_a_cache_is_ignored_with_one_warning(tmp_path: Path, text: str) -> None:
    (tmp_path / "costs.json").write_text(text, encoding="latin-1")
    cache = CostCache(tmp_path)
    with pytest.warns(UserWarning, match="costs are measured again") as warned:
        use(cache)
    assert len(warned) == 1
    assert CostCache(tmp_path).get(KEY) == 1, "it is replaced by a good one"


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = CostCache(tmp_path / "file" / "folder")
    with pytest.warns(UserWarning, match="cannot be") as warned:
        use(cache)
    assert len(warned) == 1
    assert cache.get(KEY) == 1


def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = CostCache(tmp_path)
    cache.put(KEY, 1)
    cache.save()

    def fail(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    cache.put(KEY, 2)
    with pytest.warns(UserWarning, match="disk full"):
        cache.save()
    assert [path.name for path in tmp_path.iterdir()] == ["costs.json"]
    assert CostCache(tmp_path).get(KEY) == 1


def test_a_value_that_cannot_be_used_is_forgotten(tmp_path: Path) -> None:
    cache = CostCache(tmp_path)
    cache.put(KEY, "nonsense")
    with pytest.warns(UserWarning, match="measured again"):
        cache.discard(KEY)
    assert cache.get(KEY) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.discard(KEY)


def test_the_file_says_what_each_number_is(tmp_path: Path) -> None:
    cache = CostCache(tmp_path)
    cache.put(KEY, 1)
    cache.save()
    (entry,) = json.loads((tmp_path / "costs.json").read_text())["entries"].values()
    assert entry == {"key": KEY, "value": 1}


def test_the_folder_follows_the_variable_then_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder({"DEEPSEEK_MP_CACHE": "/there"}) == Path("/there")
    assert cache_folder({"DEEPSEEK_MP_CACHE": "off"}) is None
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_folder({"XDG_CACHE_HOME": "/cache"}) == Path("/cache/deepseek_mp")
    assert cache_folder({}) == Path.home() / ".cache" / "deepseek_mp"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder({}) == Path.home() / "Library" / "Caches" / "deepseek_mp"
    monkeypatch.setattr(sys, "platform", "win32")
    assert cache_folder({"LOCALAPPDATA": "/local"}) == Path("/local/deepseek_mp")


def test_off_keeps_costs_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_MP_CACHE", "off")
    assert CostCache().file is None


def test_others_may_read_the_file_as_any_new_one(tmp_path: Path) -> None:
    cache = CostCache(tmp_path)
    cache.put(KEY, 1)
    cache.save()
    (tmp_path / "any").write_text("")
    assert (tmp_path / "costs.json").stat().st_mode == (tmp_path / "any").stat().st_mode
