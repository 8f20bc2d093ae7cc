"""Where names live: those that are public, and those that were once importable from old paths; a table, names.json.

`install` makes them importable, and lets what lies below a folder load when it is first asked for as an attribute:
`import peft; peft.tuners.lora.layer.Linear` works. Nothing is imported before it is asked for, and nothing in this
library uses them.

A row of the file is `path: {home: names}`, with blanks between the names (and between paths with the same ones), and
`old=new` where a name is another there now; `like` adds the names of groups.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

from peft.registry import METHODS
from peft.target_tables import DEFAULT_TARGETS

_FILE: dict[str, dict[str, dict[str, str]]] = json.loads(Path(__file__).with_name("names.json").read_text("utf-8"))
_FILE["groups"]["targets"] = {
    "peft.target_tables": " ".join(
        f"TRANSFORMERS_MODELS_TO_{method.replace('_', '')}_TARGET_MODULES_MAPPING=DEFAULT_TARGETS[{method}]"
        for method in DEFAULT_TARGETS
    )
}


def _homes(row: Mapping[str, str]) -> dict[str, str]:
    """Name -> `home:name` there now, of a row of the file."""
    found: dict[str, str] = {}
    for group in row.get("like", "").split():
        found |= _homes(_FILE["groups"][group])
    for home, names in row.items():
        for name in names.split() if home != "like" else ():
            old, _, new = name.partition("=")
            found[old] = f"{home}:{new or old}"
    return found


def _table(section: str) -> dict[str, dict[str, str]]:
    return {path: _homes(row) for paths, row in _FILE[section].items() for path in paths.split()}


#: public name -> where it lives
PUBLIC = _table("public names")["peft"]
#: old path -> name there -> where it lives now
OLD_PATHS = _table("old paths")
#: names that files of today once had, and that nothing in them needs
MORE_NAMES = _table("more names")
#: methods that classes once had, and that nothing here calls; class -> name there -> a function of its objects
OLD_METHODS = _table("old methods")

#: a path that was a method's folder, or a file in it -> the file that has all of the method
METHOD_PATHS = {
    f"peft.tuners.{method.module.rpartition('.')[2]}{part}": method.module
    for method in METHODS.values()
    if method.module not in ("peft.tuners.lora", "peft.tuners.shadow", "peft.xlora")
    for part in ("", ".config", ".layer", ".model")
}

_WITH_OLD_METHODS = frozenset(path.partition(":")[0] for path in OLD_METHODS)

#: folders whose modules load on attribute access
FOLDERS = ("peft.optimizers", "peft.tuners", "peft.tuners.lora", "peft.tuners.shadow")


def submodule(package: str, name: str) -> ModuleType:
    """The module `name` of a package, imported if need be.

    Raises:
        AttributeError: there is no such module.
    """
    path = f"{package}.{name}"
    if not name.startswith("__"):
        try:
            return import_module(path)
        except ModuleNotFoundError as error:
            if error.name != path:
                raise
    raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=sys.modules.get(package))


def _parts(home: str) -> tuple[ModuleType, str, str]:
    """(module, name, key or empty) of `module:name` or `module:name[key]`."""
    module, _, name = home.partition(":")
    name, _, key = name.partition("[")
    return import_module(module), name, key.removesuffix("]")


def _value_at(home: str) -> Any:
    """What stands there."""
    module, name, key = _parts(home)
    return getattr(module, name)[key] if key else getattr(module, name)


def _put_at(home: str, value: Any) -> None:
    """Puts something there, and wherever it has been imported to."""
    module, name, key = _parts(home)
    if key:
        getattr(module, name)[key] = value
        return
    before = getattr(module, name)
    setattr(module, name, value)
    for path, loaded in list(sys.modules.items()):  # those that have imported it call the new one, too
        if path.partition(".")[0] == "peft" and vars(loaded).get(name) is before:
            setattr(loaded, name, value)


class OldPath(ModuleType):
    """A module without names of its own: reading or setting one does so where it lives; deleting undoes the setting.

    So what replaces a function under its old path replaces it for this library too.
    """

    def _home(self, name: str) -> str:
        """Where a name lives, as the table has it; empty if nowhere."""
        path = self.__name__
        if path in OLD_PATHS:
            return OLD_PATHS[path].get(name, "")
        below = f"{path}.{name}"
        if name.startswith("__") or below in OLD_PATHS or below in METHOD_PATHS:
            return ""
        return f"{METHOD_PATHS[path]}:{name}"

    def __getattr__(self, name: str) -> Any:
        if name == "__all__":  # `from peft.utils import *`
            return [known for known in dir(self) if not known.startswith("_")]
        home = self._home(name)
        return _value_at(home) if home else submodule(self.__name__, name)

    def __setattr__(self, name: str, value: Any) -> None:
        home = self._home(name)
        # What the import system sets, such as submodules, is this module's own; so is a name of nothing here.
        if home and not isinstance(value, ModuleType) and hasattr(*_parts(home)[:2]):
            self._before(name).append(_value_at(home))
            _put_at(home, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        home = self._home(name)
        if home and name not in self.__dict__ and self._before(name):
            # As of a module without a name of its own: what shines through when the replacement is taken away.
            _put_at(home, self._before(name).pop())
        else:
            super().__delattr__(name)

    def _before(self, name: str) -> list[Any]:
        """The values that were replaced under this name, the latest last."""
        return self.__dict__.setdefault("__replaced__", {}).setdefault(name, [])

    def __dir__(self) -> list[str]:
        path = self.__name__
        names = OLD_PATHS[path] if path in OLD_PATHS else dir(import_module(METHOD_PATHS[path]))
        return sorted({*super().__dir__(), *names})


class OldMethod:
    """A method of old: looked up when somebody asks for it."""

    def __init__(self, home: str):
        self.home = home

    def __get__(self, instance: Any, owner: type) -> Any:
        function = _value_at(self.home)
        return function if instance is None else MethodType(function, instance)


class FileLoader(SourceFileLoader):
    """Loads a file as it is; then what is below it, and what it once had, can be asked for as an attribute."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        own = module.__dict__.get("__getattr__")

        def load(name: str) -> Any:
            if own is not None:
                try:
                    return own(name)
                except AttributeError:
                    pass
            more = MORE_NAMES.get(module.__name__, {})
            return _value_at(more[name]) if name in more else submodule(module.__name__, name)

        module.__dict__["__getattr__"] = load
        for path, methods in OLD_METHODS.items():
            home, _, kind = path.partition(":")
            for name, function in methods.items() if home == module.__name__ else ():
                setattr(module.__dict__[kind], name, OldMethod(function))


class OldPathFinder:
    """Finds the old paths, and the files that have names or modules of old, for `sys.meta_path`."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        one_file = METHOD_PATHS.get(name) == name
        if name in FOLDERS or one_file or name in MORE_NAMES or name in _WITH_OLD_METHODS:
            spec = PathFinder.find_spec(name, path)
            if spec is not None and one_file and spec.submodule_search_locations is None:
                # The file as it is, but as a package, so that what is below it is looked for at all.
                spec.submodule_search_locations = []
            if spec is not None and type(spec.loader) is SourceFileLoader:
                spec.loader = FileLoader(spec.loader.name, spec.loader.path)
            return spec
        if name in OLD_PATHS or name in METHOD_PATHS:
            spec = ModuleSpec(name, self, origin=__file__, is_package=True)  # type: ignore[arg-type]
            spec.has_location = True
            return spec
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return OldPath(spec.name, f"An old path; see `{__name__}` for where its names live now.")

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


def install() -> None:
    """Makes the old paths importable."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != __name__]
    sys.meta_path.insert(0, OldPathFinder())
