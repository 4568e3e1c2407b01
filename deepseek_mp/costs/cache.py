"""Keeps measured costs on disk, so that a model is timed once per device and library version.

One JSON file holds entries `digest of key -> {key, value}`. The key says everything that a time
depends on (device, libraries, unit, format), so nothing ever has to be invalidated: another driver of
the work is another key. A file that cannot be read or written costs the time of measuring again and
one warning, never an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek_mp.records.durable import beside

CACHE_VERSION = 1
MAX_ENTRIES = 20_000
VARIABLE = "DEEPSEEK_MP_CACHE"
"""Environment variable: the folder of the cache, or `off` to keep it in memory only."""


def cache_folder(environment: Mapping[str, str] | None = None) -> Path | None:
    """The folder of the cache: `$DEEPSEEK_MP_CACHE`, else the user's cache folder; None for `off`."""
    env = os.environ if environment is None else environment
    chosen = env.get(VARIABLE, "")
    if chosen:
        return None if chosen.lower() == "off" else Path(chosen).expanduser()
    if sys.platform == "win32":
        base = Path(env.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "deepseek_mp"


class CostCache:
    """Costs by key: `get`, `put`, and `save`, which writes what was put.

    `path` is the folder of the file; None takes `cache_folder()`. With `disk=False` nothing is read
    or written.
    """

    def __init__(self, path: str | Path | None = None, *, disk: bool = True) -> None:
        folder = (cache_folder() if path is None else Path(path)) if disk else None
        self.file = None if folder is None else folder / "costs.json"
        self._warned = False
        self._dirty = False
        self._entries: dict[str, dict[str, Any]] | None = None

    def get(self, key: Mapping[str, Any]) -> Any:
        """The value stored under the key, or None."""
        entry = self._loaded().get(_digest(key))
        return None if entry is None else entry["value"]

    def put(self, key: Mapping[str, Any], value: Any) -> None:
        """Store a JSON value; it is in the file once `save` was called."""
        self._loaded()[_digest(key)] = {"key": dict(key), "value": value}
        self._dirty = True

    def discard(self, key: Mapping[str, Any]) -> None:
        """Forget a value that turned out to be unusable."""
        if self._loaded().pop(_digest(key), None) is not None:
            self._dirty = True
            self._warn("holds an entry that cannot be used; it is measured again")

    def save(self) -> None:
        """Write what was put since the last save, keeping what other processes wrote meanwhile."""
        if not self._dirty or self.file is None:
            return
        mine = self._loaded()
        merged = {**self._read(self.file), **mine}
        kept = dict(list(merged.items())[-MAX_ENTRIES:])
        text = json.dumps({"version": CACHE_VERSION, "entries": kept}, separators=(",", ":"))
        try:
            _write(self.file, text)
        except OSError as error:
            self._warn(f"cannot be written ({error}); costs are kept in memory")
        self._dirty = False

    def _loaded(self) -> dict[str, dict[str, Any]]:
        if self._entries is None:
            self._entries = {} if self.file is None else self._read(self.file)
        return self._entries

    def _read(self, file: Path) -> dict[str, dict[str, Any]]:
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            self._warn(f"cannot be read ({error}); costs are measured again")
            return {}
        entries = data.get("entries") if isinstance(data, dict) and data.get("version") == CACHE_VERSION else None
        if not isinstance(entries, dict) or not all(_is_entry(digest, entry) for digest, entry in entries.items()):
            self._warn("is not a cache of this release; costs are measured again")
            return {}
        return entries

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"the cost cache {self.file} {what}", stacklevel=3)


def _digest(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:32]


def _is_entry(digest: str, entry: object) -> bool:
    """Whether the entry was stored under the digest of its own key."""
    if not isinstance(entry, dict) or not isinstance(entry.get("key"), dict) or "value" not in entry:
        return False
    return _digest(entry["key"]) == digest


def _write(file: Path, text: str) -> None:
    """Write beside the file and rename over it: a reader sees the old text or the new, never a part."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(file)
    try:
        with temporary.open("x", encoding="utf-8") as stream:
            stream.write(text)
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
