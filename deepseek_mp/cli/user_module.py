"""The module that TARGET names, imported from its file or by its name, and the function in it."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from deepseek_mp.cli.user_errors import explained
from deepseek_mp.errors import ConfigError, explain, suggest

FORM = "module:function or file.py:function"


def find_module(place: str) -> ModuleType:
    """Import a module by its name, or from a file; `ConfigError` if there is none, or it raises something."""
    return _file(Path(place)) if place.endswith(".py") or "/" in place or "\\" in place else _module(place)


def _file(path: Path) -> ModuleType:
    if not path.is_file() or path.suffix != ".py":
        near = [other.name for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
        change = f"Correct the path.{suggest(path.name, near)}"
        raise ConfigError(explain(f"no Python file {str(path)!r}", FORM, change))
    _put_first(path.resolve().parent)
    # Under its own name if that is free, so that workers of a loader find it when they unpickle.
    name = path.stem if path.stem not in sys.modules else f"target_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None and spec.loader is not None, "a path that ends in .py has a loader"  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with explained(f"{path} could not be run:", str(path.resolve())):
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return module


def _module(name: str) -> ModuleType:
    _put_first(Path.cwd())
    with explained(f"module {name!r} could not be imported:", None):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not f"{name}.".startswith(f"{error.name}."):
                raise  # it is there, and imports what is not
            raise ConfigError(explain(f"no module {name!r}", FORM, "Start beside it, or name its file")) from None


def _put_first(folder: Path) -> None:
    """On the import path for good: the user's code, and workers of a loader, may import more from there."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def find_function(module: ModuleType, name: str, place: str) -> Callable[[], Any]:
    """The function of a module, which can be called without arguments; `ConfigError` if there is none."""
    found: Any = getattr(module, name, None)
    if not callable(found):
        own = [key for key, value in vars(module).items() if _is_own(value, module)]
        passed = f"no function {name!r} in {place}" if found is None else f"{name!r} in {place} is {found!r}"
        allowed = f"a function of it: {', '.join(own)}" if own else "a function of it without arguments"
        raise ConfigError(explain(passed, allowed, f"Name one.{suggest(name, own)}"))
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        passed, allowed = f"{place}:{name} needs arguments ({error})", "a function that is called without"
        raise ConfigError(explain(passed, allowed, "Give its parameters defaults")) from error
    return cast("Callable[[], Any]", found)


def _is_own(value: object, module: ModuleType) -> bool:
    return inspect.isfunction(value) and value.__module__ == module.__name__
