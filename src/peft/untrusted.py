"""Files are not trusted: what a configuration that comes out of one may say, and what of it is believed.

An adapter is downloaded from anybody, so nothing that its files say may run code, import a module, load from a place
that the caller did not name, or take time or memory without bound. Types and ranges are checked for every
configuration (`config`); what is said here holds for those out of files.
"""

from __future__ import annotations

import copy
import json
import os
import stat
from collections.abc import Iterable, Mapping
from typing import Any

from peft import patterns
from peft.errors import AdapterFileError, warn
from peft.values import field_types, is_of, leaves, shown

#: bytes that a configuration may have, and how deep lists and mappings in it may lie in each other
MAX_BYTES, MAX_DEPTH = 16 << 20, 50
#: fields that say where something is loaded from, or how: what a file says there is not acted upon
PLACES = (
    "tokenizer_name_or_path", "tokenizer_kwargs", "prompt_tuning_init_state_dict_path", "adapters", "corda_config"
)  # fmt: skip
#: modules that a file may name to have layers imported from
MODULES = ("megatron.core",)
#: what counts rounds of a computation, and how many a file may ask for
ROUNDS = {"loftq_iter": 100, "num_cayley_neumann_terms": 100, "encoder_num_layers": 100, "xlora_depth": 100}
#: parts of the names of integer fields that are no sizes
_NO_SIZES = ("seed", "key", "step", "tinit", "tfinal", "deltaT", "mask", "interval", "period")


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        AdapterFileError: there is none, or one that is too large or too deep.
    """
    where = os.fspath(path)
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise AdapterFileError(f"{where} is no file.")
    with open(path, "rb") as file:
        text = file.read(MAX_BYTES + 1)
    return parse_json(text, where)


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """The mapping that a text is; `where` says for messages where it comes from.

    Raises:
        AdapterFileError: it is none, or one that is too large or too deep.
    """
    if len(text) > MAX_BYTES:
        raise AdapterFileError(f"{where} is larger than {MAX_BYTES >> 20} MiB, which no configuration is.")
    try:
        content = json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise AdapterFileError(f"{where} is not text in UTF-8: {error}") from error
    except RecursionError:
        raise AdapterFileError(f"{where} has lists or mappings in each other without end.") from None
    except ValueError as error:
        raise AdapterFileError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise AdapterFileError(f"{where} holds a {type(content).__name__}, not a mapping of fields.")
    for field, value in content.items():
        if _depth(value) > MAX_DEPTH:
            raise AdapterFileError(
                f"{where}: {shown(field)} has lists or mappings in each other more than {MAX_DEPTH} deep."
            )
    return content


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        nested = [entry for entry in level if isinstance(entry, (list, dict))]
        level = [inner for outer in nested for inner in (outer.values() if isinstance(outer, dict) else outer)]
        depth += 1
    return depth


def without_idle_fields(content: Mapping[str, Any], source: str | os.PathLike) -> dict[str, Any]:
    """What a configuration says, without the numbers of layers where they have no effect in what it describes.

    They are an error where somebody asks for them; huggingface/peft writes them into files all the same.
    """
    given = [name for name in ("layers_to_transform", "layers_pattern") if content.get(name) not in (None, [], "")]
    idle = given if isinstance(content.get("target_modules"), str) or given == ["layers_pattern"] else []
    if idle:
        warn(
            f"The configuration in {os.fspath(source)!r} sets {' and '.join(idle)}, which had no effect beside"
            f" target_modules={content.get('target_modules')!r} and is left out."
        )
    return {name: value for name, value in content.items() if name not in idle}


def note_source(config: Any, source: str | os.PathLike, fields: Iterable[str], believed: Iterable[str] = ()) -> None:
    """Lets a configuration know which of its `fields` a file has said, those in `believed` aside.

    Raises:
        ValueError: it names a module to import, or asks for more rounds than a file may.
    """
    said = [field for field in fields if field not in set(believed)]
    module = getattr(config, "megatron_core", None)
    if "megatron_core" in said and module not in (None, *MODULES):
        raise ValueError(
            f"megatron_core={shown(module)} names a module to import; a file may name {', '.join(MODULES)} only."
        )
    for field, limit in ROUNDS.items():
        for owner in (config, getattr(config, "loftq_config", None)):
            value = owner.get(field) if isinstance(owner, Mapping) else getattr(owner, field, None)
            if isinstance(value, int) and value > limit:
                raise ValueError(f"{field}={value} is more than the {limit} that a file may ask for.")
    start = str(getattr(config, "init_lora_weights", ""))
    if start.startswith("pissa_niter_") and len(start) > len("pissa_niter_99"):
        raise ValueError(f"init_lora_weights={shown(start)} asks for more than the 99 rounds that a file may ask for.")
    there = [field for field in PLACES if field in said and hasattr(config, field)]
    places = {field: copy.deepcopy(getattr(config, field)) for field in there}
    config.__dict__["_said_by"] = (os.fspath(source), places)


def check_allowed(config: Any, field: str) -> None:
    """Called before a field that names a place, or how to load from it, is acted upon.

    Raises:
        ValueError: it is a file that says so, not the caller.
    """
    if is_said_by_file(config, field):
        source, value = config._said_by[0], getattr(config, field)
        raise ValueError(
            f"{field}={shown(value)} is what the adapter_config.json of {source!r} says, and a file may not say from"
            f" where, or how, something else is loaded. If that is what you want, say so yourself:"
            f" PeftConfig.from_pretrained({source!r}, {field}=...), or set config.{field}."
        )


def is_said_by_file(config: Any, field: str) -> bool:
    """Whether the value of a field that names a place is the one that a file has said."""
    places: dict[str, Any] = getattr(config, "_said_by", ("", {}))[1]
    value = getattr(config, field)
    return field in places and bool(value) and value == places[field]


def _expressions(config: Any) -> list[tuple[str, str]]:
    """The regular expressions in a configuration, each with its field."""
    found = []
    for field in ("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern"):
        value = getattr(config, field, None)
        if isinstance(value, str):
            found.append((field, value))
        elif field == "layers_pattern":
            found += [(field, entry) for entry in value or ()]
    for field in getattr(config, "pattern_fields", ()):
        found += [(field, pattern) for pattern in getattr(config, field, None) or ()]
    return found


def check_expressions(config: Any) -> None:
    """Raises ValueError where a field that may hold a regular expression holds none."""
    for field, pattern in _expressions(config):
        try:
            patterns.check(str(pattern))
        except patterns.PatternError as error:
            raise ValueError(f"{field}: {error}.") from None


def check_sizes(config: Any, sizes: Iterable[int], tensors: int, modules: int) -> None:
    """Checks what a file asks for against what there is: before anything is made that large.

    Args:
        config: the configuration.
        sizes: the dimensions of the tensors in the file and of the model's.
        tensors: how many tensors the file has.
        modules: how many modules the model has.

    Raises:
        ValueError: more than tensors or model account for.
    """
    owner: Any = type(config)
    kinds, most = field_types(owner), max(sizes, default=0)
    for field, kind in kinds.items():
        value = getattr(config, field, None)
        if any(part in field for part in _NO_SIZES) or value == getattr(type(config), field, None):
            continue
        if is_of(1, kind) and not is_of(0.5, kind) and isinstance(value, int) and not isinstance(value, bool):
            _need(value <= most, f"{field}={value}", f"no tensor of the file or the model has a size above {most}")
        elif isinstance(value, (list, tuple, set, Mapping)) and field not in ("auto_mapping", "megatron_config"):
            room = max(1000, 2 * modules, most if is_of([1], kind) else 0)
            _need(len(value) <= room, f"{field} with {len(value)} entries", f"the model has {modules} modules")
    for field in getattr(config, "pattern_fields", ()):
        if "alpha" not in field:
            ranks = [leaf for leaf in leaves(dict(getattr(config, field, None) or {})) if isinstance(leaf, int)]
            largest = max(ranks, default=0)
            _need(largest <= most, f"{field} with {largest}", f"no tensor has a size above {most}")
    layers = sum(max(0, end - start) for start, end in getattr(config, "layer_replication", None) or ())
    room = max(tensors, modules)
    _need(layers <= room, f"layer_replication with {layers} layers", f"there are {tensors} tensors, {modules} modules")


def _need(holds: bool, what: str, found: str) -> None:
    if not holds:
        raise ValueError(f"{what} is more than can be: {found}.")
