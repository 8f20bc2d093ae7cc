"""What engines that serve models take of a saved adapter, and what to do where they do not; the table is serving.yaml.

Read from the engines' own loaders; nothing of them is imported. An engine may *take* what an adapter has, *refuse* it
with an error, or *differ*: load it without a word and compute something else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from peft.registry import METHODS, RENAMED

Verdict = Literal["takes", "refuses", "differs"]
Content = Mapping[str, Any]
Names = Sequence[str]


@dataclass(frozen=True)
class Feature:
    """Something an adapter may have.

    Attributes:
        title: what it is called.
        remedy: a key of `REMEDIES`, what can be done where an engine does not take it.
        field: the field of the configuration file that is set where an adapter has it, if one field says so.
        tensor: an expression for the names of tensors that an adapter with it has, if they say so.
    """

    title: str
    remedy: str = "merge"
    field: str = ""
    tensor: str = ""


@dataclass(frozen=True)
class Finding:
    """What an engine does about something that an adapter may have, the reason, and a key of `REMEDIES`."""

    feature: str
    verdict: Verdict
    why: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.feature}: {self.verdict}, {self.why}; {REMEDIES[self.remedy]}"


@dataclass(frozen=True)
class Engine:
    """One engine.

    Attributes:
        title: its name.
        read: where its rules were read: version and files.
        answers: feature -> what it does; all of `FEATURES`.
        format: what every adapter needs before it can be loaded at all; None where the saved folder is read as it is.
        ranks: what it can be told to have room for; any rank if empty.
    """

    title: str
    read: str
    answers: dict[str, Finding]
    format: Finding | None = None
    ranks: tuple[int, ...] = ()

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Engine:
        """The engine of a row of the table."""
        answers = {key: Finding(FEATURES[key].title, "takes") for key in row["takes"]}
        for verdict in ("refuses", "differs"):
            for key, why in row[verdict].items():
                answers[key] = Finding(FEATURES[key].title, verdict, why, FEATURES[key].remedy)
        needed = Finding("the files", "refuses", row["format"], "format") if "format" in row else None
        return cls(row["title"], row["read"], answers, needed, tuple(row.get("ranks", ())))


_TABLE = yaml.safe_load(Path(__file__).with_name("serving.yaml").read_text(encoding="utf-8"))
#: what can be done -> how
REMEDIES: dict[str, str] = _TABLE["remedies"]
FEATURES = {key: Feature(**row) for key, row in _TABLE["features"].items()}
#: by the name that a command takes
ENGINES = {key: Engine.of(row) for key, row in _TABLE["engines"].items()}


#: whether an adapter has a feature, by its configuration file, where that is more than a field that is set
_SEEN: dict[str, Callable[[Content], bool]] = {
    "bias": lambda content: content.get("bias", "none") != "none",
    "changed_base": lambda content: bool(
        re.match(r"(pissa|olora|corda|lora_ga|loftq)", str(content.get("init_lora_weights")).lower())
    ),
    "pattern": lambda content: isinstance(content.get("target_modules"), str)
    and content["target_modules"].lower() != "all-linear",
}


def _features_of(content: Content, names: Names) -> list[str]:
    """What an adapter has; of one that is no LoRA, or more than one, that is all there is to say."""
    method = str(content.get("peft_type") or "")
    method = RENAMED.get(method, method)
    if method in METHODS and METHODS[method].prompt:
        return ["prompt"]
    if method in ("ADAPTION_PROMPT", "POLY", "XLORA") or content.get("arrow_config"):
        return ["structure"]
    if method != "LORA":
        return ["method"]
    return [
        key
        for key, feature in FEATURES.items()
        if content.get(feature.field)
        or (feature.tensor and any(re.search(feature.tensor, name) for name in names))
        or (key in _SEEN and _SEEN[key](content))
    ]


def findings(engine: str, content: Content, names: Iterable[str] = ()) -> list[Finding]:
    """What an engine does not take as it is; empty where the saved folder can be served.

    Args:
        engine: one of `ENGINES`.
        content: `adapter_config.json`, read.
        names: the names of the adapter's tensors in its file; without them, LoRA on embeddings and on the output layer
            is not seen.

    Returns:
        What is refused, then what differs, and last the engine's format. Of a method that is no LoRA, that alone.

    Raises:
        ValueError: there is no such engine.
    """
    if engine not in ENGINES:
        raise ValueError(f"Unknown engine {engine!r}; there are {', '.join(ENGINES)}.")
    row, has = ENGINES[engine], _features_of(content, tuple(names))
    found = [row.answers[key] for key in has if row.answers[key].verdict != "takes"]
    if {"prompt", "structure", "method"}.intersection(has):
        return found
    rank = _largest_rank(content)
    if row.ranks and rank > row.ranks[-1]:
        found.append(Finding(f"a rank of {rank}", "refuses", f"the largest is {row.ranks[-1]}", "merge"))
    found.sort(key=lambda entry: entry.verdict == "differs")
    return found if row.format is None else [*found, row.format]


def _largest_rank(content: Content) -> int:
    return max([int(content.get("r") or 0), *map(int, (content.get("rank_pattern") or {}).values())])


def options(engine: str, content: Content) -> list[str]:
    """Options that an engine has to be started with for an adapter that it takes.

    Args:
        engine: one of `ENGINES`.
        content: `adapter_config.json`, read.
    """
    rank = _largest_rank(content)
    if engine == "vllm":
        room = next((size for size in ENGINES["vllm"].ranks if size >= rank), 0)
        return ["--enable-lora", *([f"--max-lora-rank {room}"] if room > 16 else [])]  # 16 is what it has anyway
    return ["--enable-lora", f"--max-lora-rank {rank}"] if engine == "sglang" else []
