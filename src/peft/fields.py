"""What a configuration is, as data: the fields that all have, their checks, and what files hold of them."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from enum import Enum
from typing import Any, ClassVar

from peft.errors import warn
from peft.html import table
from peft.patterns import get_pattern_key
from peft.registry import METHODS, PeftType, TaskType, method_of, value_of
from peft.values import Range, check_value, dataclass_in, enum_in, field_types, is_of, noted, shown
from peft.version import __version__


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: sets as sorted lists, enums by value, sub-configurations as mappings."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return value


@dataclass
class Settings:
    """Base of the settings that are a field of a configuration; checked when they are made, as its other fields are.

    Raises:
        TypeError, ValueError: a value is of another type, or out of range.
    """

    def __post_init__(self) -> None:
        kind: Any = type(self)
        for name, of in field_types(kind).items():
            check_value(name, getattr(self, name), of, kind.__name__)
        for name, limits in noted(kind, Range).items():
            limits.check(name, getattr(self, name))


def as_settings(name: str, value: Any, kind: type) -> Any:
    """`value` as an instance of the class of settings `kind`: itself, or built from a mapping (as JSON has it).

    Raises TypeError where it is neither, or a field is unknown or of another type.
    """
    if value is None or isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a {kind.__name__} or a mapping of its fields, got {type(value).__name__}.")
    known = field_types(kind)
    for field in value:
        if field not in known:
            raise TypeError(f"{name} has no field {shown(field)}; a {kind.__name__} has {', '.join(known)}.")
    try:
        return kind(**value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


@dataclass
class ConfigFields:
    """The fields that every configuration has, and what holds for all fields.

    Args:
        task_type: one of [`TaskType`], or None; decides which class `get_peft_model` returns.
        peft_type: the method, one of [`PeftType`]; set by the subclasses.
        auto_mapping: base model class and library, written for models without a task type.
        peft_version: the library version that wrote the file.
    """

    task_type: str | TaskType | None = None
    peft_type: str | PeftType | None = None
    auto_mapping: dict | None = None
    peft_version: str | None = None

    #: the method of the class, which says it as `class HRAConfig(LayerConfig, peft_type=PeftType.HRA)`
    _method: ClassVar[PeftType | None] = None
    #: whether the base weights of embeddings that an adapter targets are stored along with it
    stores_embeddings: ClassVar[bool] = True
    #: fields that only matter in this process; never written
    runtime_fields: ClassVar[Collection[str]] = ()
    #: fields that map names of modules (or regular expressions for their ends) to values of their own -> the field that
    #: these are values of; names that match no module are warned of
    pattern_fields: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, peft_type: PeftType | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._method = peft_type or cls._method

    def __post_init__(self) -> None:
        self._check_fields()
        self.check()

    def check(self) -> None:
        """Checks what types and ranges do not say, of several fields together; may fill in what follows from others.

        Raises:
            ValueError: they do not go together.
        """

    def _check_fields(self) -> None:
        """Checks the fields, as far as each can be judged on its own.

        Raises:
            TypeError: a value is of another type than its field.
            ValueError: a number is out of range, or there is no such task.
        """
        own_class: Any = type(self)
        self.peft_type = self._method or self.peft_type
        kinds = field_types(own_class)
        for field in fields(self):
            value, kind = getattr(self, field.name), kinds.get(field.name, Any)
            if value is None and not any(is_of(one, kind) for one in (None, 0, 0.5, False, "")):
                continue  # an empty list or mapping, as older files say it
            check_value(field.name, value, kind, own_class.__name__)
            known = enum_in(kind) if field.name not in ("task_type", "peft_type") else None
            if known is not None and isinstance(value, str):
                if value not in [*known]:
                    names = ", ".join(member.value for member in known)
                    raise ValueError(f"{field.name}={value!r} is not known; use one of {names}.")
                setattr(self, field.name, known(value))
            if "dropout" in field.name and isinstance(value, (int, float)) and not 0 <= value <= 1:
                raise ValueError(f"{field.name} is a probability: at least 0 and at most 1; got {value}.")
            if field.name == "modules_to_save" and "" in (value or ()):
                raise ValueError(f"{field.name} has an empty name in it: {shown(value)}.")
        for name, limits in noted(own_class, Range).items():
            for value, where in self._values_of(name):
                limits.check(name, value, where)
        known = [task.value for task in TaskType]
        if self.task_type is not None and self.task_type not in known:
            raise ValueError(f"Invalid task type: {self.task_type!r}. Use one of {', '.join(known)}, or None.")
        if self.peft_version is None:
            self.peft_version = __version__

    def at(self, key: str) -> Any:
        """The configuration as it is for the module `key`: with the values that patterns have for that one."""
        if not self.pattern_fields:
            return self
        own = copy.copy(self)
        for pattern, field in self.pattern_fields.items():
            entries = getattr(self, pattern) or {}
            own.__dict__[field] = entries.get(get_pattern_key(entries, key), getattr(self, field))
        return own

    def _values_of(self, name: str) -> list[tuple[Any, str]]:
        """A field's value, and those of single modules, each with where it stands."""
        found = [(getattr(self, name), "")]
        for pattern in (pattern for pattern, varied in self.pattern_fields.items() if varied == name):
            found += [(value, f" for {key!r} in {pattern}") for key, value in (getattr(self, pattern) or {}).items()]
        return found

    def to_dict(self) -> dict[str, Any]:
        """The fields that a file has, by name; sub-configurations as dictionaries."""
        return {name: value for name, value in asdict(self).items() if name in self._written()}

    def _written(self) -> set[str]:
        """Names of the fields that a file has."""
        row = METHODS.get(value_of(self._method))
        beyond = {"left_out", *(row.beyond_reference if row else ())}
        names = {f.name for f in fields(self)}.difference(self.runtime_fields)
        return {name for name in names if name not in beyond or not self._is_default(name)}

    def _is_default(self, name: str) -> bool:
        f = self.__dataclass_fields__[name]
        return getattr(self, name) == (f.default_factory() if f.default_factory is not MISSING else f.default)

    def to_json_dict(self) -> dict[str, Any]:
        """What `adapter_config.json` holds."""
        return {name: plain(value) for name, value in self.to_dict().items()}

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> Any:
        """The configuration of the class that `kwargs["peft_type"]` names (this class where it is absent).

        Fields the class does not know, as files of later versions may have, are left out with a warning.

        Raises:
            KeyError: an unknown `peft_type`.
        """
        config_class: Any = method_of(kwargs["peft_type"]).config_class if kwargs.get("peft_type") else cls
        known = {f.name for f in fields(config_class) if f.init}
        given = {key: value for key, value in kwargs.items() if key in known}
        dropped = sorted(set(kwargs) - known)
        for key, value in given.items():
            inner = dataclass_in(field_types(config_class).get(key))
            if inner is not None and isinstance(value, Mapping):
                given[key] = {name: entry for name, entry in value.items() if name in field_types(inner)}
                dropped += [f"{key}.{name}" for name in value if name not in field_types(inner)]
        if dropped:
            written_by = kwargs.get("peft_version")
            warn(
                f"{config_class.__name__} has no field {', '.join(map(shown, dropped[:20]))}; ignored. The file"
                f" was written by version {shown(written_by or 'unknown')}, this is {__version__}: a newer one may be"
                " needed."
            )
        return config_class(**given)

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """The content of a file as this version has it; raises ValueError where the file is too old to be read."""
        return kwargs

    def _repr_html_(self) -> str:
        """The fields that differ from their defaults, for notebooks."""
        names = [f.name for f in fields(self) if not self._is_default(f.name)]
        rows = [(name, repr(plain(getattr(self, name)))) for name in names]
        return table(type(self).__name__, ("field", "value"), rows)

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the adapter is a soft prompt rather than a change of layers."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Whether the method is adaption prompt (Llama-Adapter)."""
        return False
