"""The table of methods: one row each in registry.json, imported when it is first used."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from peft.errors import UnknownMethodError


class PeftType(str, Enum):
    """The methods, by the name that `adapter_config.json` holds."""

    # soft prompts
    CARTRIDGE = "CARTRIDGE"
    CPT = "CPT"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    PROMPT_TUNING = "PROMPT_TUNING"
    P_TUNING = "P_TUNING"

    # low rank, and what grew out of it
    LORA = "LORA"
    ADALORA = "ADALORA"
    ADAMSS = "ADAMSS"
    DELORA = "DELORA"
    GRALORA = "GRALORA"
    HIRA = "HIRA"
    LILY = "LILY"
    MISS = "MISS"
    PVERA = "PVERA"
    RANDLORA = "RANDLORA"
    SHADOW = "SHADOW"
    TINYLORA = "TINYLORA"
    UNILORA = "UNILORA"
    VBLORA = "VBLORA"
    VERA = "VERA"

    # products of other kinds
    C3A = "C3A"
    DEFT = "DEFT"
    FOURIERFT = "FOURIERFT"
    FROD = "FROD"
    GLORA = "GLORA"
    LOHA = "LOHA"
    LOKR = "LOKR"
    WAVEFT = "WAVEFT"

    # rotations and reflections
    BOFT = "BOFT"
    HRA = "HRA"
    OFT = "OFT"
    OSF = "OSF"
    PSOFT = "PSOFT"
    ROAD = "ROAD"

    # entries, vectors and norms
    BEFT = "BEFT"
    IA3 = "IA3"
    LN_TUNING = "LN_TUNING"
    PEANUT = "PEANUT"
    SHIRA = "SHIRA"
    SUPERTUNING = "SUPERTUNING"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"

    # structure
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    POLY = "POLY"
    XLORA = "XLORA"


class TaskType(str, Enum):
    """What the model is for; decides the class that wraps it.

    SEQ_CLS: classification of a text. SEQ_2_SEQ_LM: text to text. CAUSAL_LM: continuing a text. TOKEN_CLS:
    classification of each token. QUESTION_ANS: finding an answer in a text. FEATURE_EXTRACTION: hidden states.
    """

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


@dataclass
class Row:
    """One method, as the table has it.

    Attributes:
        module: where it is written.
        config_name: its configuration class there.
        model_name: its tuner class there; for soft prompts, its encoder class.
        prefix: beginning of the names of its tensors in a model.
        mixed: whether it may take part in a `PeftMixedModel`; soft prompts may not.
        prompt: whether it is a soft prompt.
        aliases: other public names, and what they are called in the module.
        beyond_reference: fields that huggingface/peft's files do not have; written only where they differ from their
            default.
    """

    module: str
    config_name: str
    model_name: str
    prefix: str
    mixed: bool = True
    prompt: bool = False
    aliases: Sequence[str] = ()
    beyond_reference: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.mixed = self.mixed and not self.prompt

    @cached_property
    def config_class(self) -> type:
        return getattr(import_module(self.module), self.config_name)

    @cached_property
    def model_class(self) -> type:
        return getattr(import_module(self.module), self.model_name)

    @property
    def public_names(self) -> tuple[str, ...]:
        return (self.config_name, self.model_name, *self.aliases)


_ROWS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
METHODS: dict[str, Row] = {name: Row(**row) for name, row in _ROWS.items()}

#: methods that older files call by another name
RENAMED = {"BONE": "MISS"}


def value_of(member: Any) -> Any:
    """The value of an enum's member; other things as they are."""
    return getattr(member, "value", member)


def method_of(peft_type: str | PeftType) -> Row:
    """The row of a method.

    Raises:
        KeyError: there is no such method.
    """
    name = str(value_of(peft_type))
    name = RENAMED.get(name, name)
    if name not in METHODS:
        raise UnknownMethodError(f"Unknown peft_type {name[:50]!r}. This version knows {', '.join(sorted(METHODS))}.")
    return METHODS[name]


def register_peft_method(
    *, name: str, config_cls: type, model_cls: type, prefix: str | None = None, is_mixed_compatible: bool = False
) -> None:
    """Adds a method from outside the library to the table.

    Args:
        name: the method's name in lower case; its upper case must be a [`PeftType`].
        config_cls: its configuration class.
        model_cls: its tuner (or encoder) class.
        prefix: beginning of the names of its tensors; `name + "_"` if None.
        is_mixed_compatible: whether it may take part in a `PeftMixedModel`.

    Raises:
        ValueError: the name is no `PeftType`, or not in lower case.
        KeyError: the method is in the table already.
    """
    if not name.islower():
        raise ValueError(f"The name of a method must be in lower case, got {name!r}.")
    key = name.upper()
    if key not in PeftType.__members__:
        raise ValueError(f"Unknown method {name!r}: {key} is no member of PeftType.")
    if key in METHODS:
        raise KeyError(f"The method {name!r} is registered already.")
    prefix = prefix or f"{name}_"
    row = Row(config_cls.__module__, config_cls.__name__, model_cls.__name__, prefix, is_mixed_compatible)
    row.config_class, row.model_class = config_cls, model_cls
    METHODS[key] = row


class MethodTable(Mapping[PeftType, Any]):
    """The table seen as a mapping from [`PeftType`] to one column of it."""

    def __init__(self, column: str, only: str | None = None):
        self._column, self._only = column, only

    def _rows(self) -> dict[str, Row]:
        return {name: row for name, row in METHODS.items() if self._only is None or getattr(row, self._only)}

    def __getitem__(self, peft_type: str | PeftType) -> Any:
        return getattr(self._rows()[value_of(peft_type)], self._column)

    def __iter__(self) -> Iterator[PeftType]:
        return iter(PeftType(name) for name in self._rows())

    def __len__(self) -> int:
        return len(self._rows())


PEFT_TYPE_TO_CONFIG_MAPPING: Mapping[PeftType, Any] = MethodTable("config_class")
PEFT_TYPE_TO_TUNER_MAPPING: Mapping[PeftType, Any] = MethodTable("model_class")
PEFT_TYPE_TO_PREFIX_MAPPING: Mapping[PeftType, Any] = MethodTable("prefix")
PEFT_TYPE_TO_MIXED_MODEL_MAPPING: Mapping[PeftType, Any] = MethodTable("model_class", only="mixed")
