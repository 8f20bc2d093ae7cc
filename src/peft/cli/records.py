"""Files and data sets as records, what they are for, and what is wrong with them: file, line and field."""

from __future__ import annotations

import csv
import io
import json
import mimetypes
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Message = dict[str, str]
Row = Mapping[str, Any]
#: (where it stands, its fields); of a text file the field is `text`
Record = tuple[str, dict[str, Any]]

TABLES = {".csv": ",", ".tsv": "\t"}
#: names of speakers in the formats that are about -> those of chat templates
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "prompter": "user"}
#: role of a field -> names that it often has; of words, labels go by other names
NAMES = {
    "messages": ("conversations", "conversation"), "text": ("sentence", "transcription"), "image": ("img",),
    "label": ("labels", "fine_label"),
}  # fmt: skip
OF_WORDS = {"label": ("ner_tags", "tags", "labels")}


@dataclass
class Format:
    """A kind of record.

    Attributes:
        tasks: what it is for; the first where the user names none.
        fields: what a record has to have.
        read: the record as the encoder of its task takes it; by default with these fields alone.
    """

    tasks: tuple[str, ...]
    fields: tuple[str, ...]
    read: Callable[[Row], dict[str, Any]] | None = None


def turns_of(value: Any) -> list[Message]:
    """A conversation in OpenAI's or ShareGPT's words as messages with `role` and `content`."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise ValueError(f"a list of turns is needed, got {value!r:.60}")
    turns = []
    for turn in value:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f"a turn has to have role and content (or from and value), got {turn!r}")
        turns.append({"role": ROLES.get(role, role), "content": content})
    return turns


def _chat(messages: list[Message]) -> dict[str, Any]:
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in messages):
        raise ValueError("no turn of the assistant has a text: there is nothing to learn")
    return {"messages": messages}


def _asked(question: str, answer: str, system: str | None = None) -> dict[str, Any]:
    said = {"system": system, "user": question, "assistant": answer}
    return _chat([{"role": role, "content": text} for role, text in said.items() if text is not None])


def _alpaca(row: Row) -> dict[str, Any]:
    question = row["instruction"] + (f"\n\n{row['input']}" if row.get("input") else "")
    return _asked(question, row["output"], row.get("system") or None)


def _answer(row: Row) -> dict[str, Any]:
    if isinstance(row["prompt"], list):
        return _chat([*turns_of(row["prompt"]), *turns_of(row["completion"])])
    return {"prompt": row["prompt"], "completion": row["completion"]}


def _preference(row: Row) -> dict[str, Any]:
    names = [name for name in ("prompt", "chosen", "rejected") if name in row]
    return {name: row[name] if isinstance(row[name], str) else turns_of(row[name]) for name in names}


def _tagged(row: Row) -> dict[str, Any]:
    if None in row["tokens"] or None in row["label"]:
        raise ValueError("null among them")
    if len(row["tokens"]) != len(row["label"]):
        raise ValueError(f"{len(row['tokens'])} tokens, but {len(row['label'])} labels")
    return {"tokens": row["tokens"], "label": row["label"]}


#: by the fields that tell them, the most telling first
FORMATS = (
    Format(("preference",), ("chosen", "rejected"), _preference),
    Format(("chat",), ("messages",), lambda row: _chat(turns_of(row["messages"]))),
    Format(("chat",), ("instruction", "output"), _alpaca),
    Format(("causal-lm", "seq2seq", "chat"), ("prompt", "completion"), _answer),
    Format(("token-classification",), ("tokens", "label"), _tagged),
    Format(("image-classification",), ("image", "label")),
    Format(("speech",), ("audio", "text")),
    Format(("classification", "regression"), ("text", "label")),
    Format(("causal-lm",), ("text",)),
)


def read_records(sources: Sequence[str]) -> list[Record]:
    """All records of files, of folders with images or audio, or of data sets on the hub (`owner/name[:split]`).

    Raises:
        ValueError: a file is not there, is empty, or holds what cannot be read; it says the file and the line.
    """
    records: list[Record] = []
    for source in sources:
        path, before = Path(source), len(records)
        for where, row in _rows(path) if path.is_file() else _data_set(source):
            where = f"{source}, {where}" if where else source
            if not isinstance(row, dict):
                raise ValueError(f"{where}: an object with named fields is needed, got {type(row).__name__}")
            records.append((where, row))
        if len(records) == before:
            raise ValueError(f"{source} is empty: there is nothing in it to read")
    return records


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(place in the file, row) for each"""
    if path.suffix == ".parquet":
        from datasets import Dataset

        yield from _of_data_set(Dataset.from_parquet(str(path)))
        return
    text = text_of(path)
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"line {number}", _json(line, path, number)
    elif path.suffix == ".json":
        content = _json(text, path, 1) if text.strip() else []
        if isinstance(content, dict) and isinstance(content.get("data"), list):
            content = content["data"]
        if not isinstance(content, list):
            raise ValueError(f"{path}: a list of records is needed, got {type(content).__name__}")
        yield from ((f"record {number}", row) for number, row in enumerate(content, 1))
    elif path.suffix in TABLES:
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=TABLES[path.suffix], strict=True)
        try:
            for row in rows:
                if None in row or None in row.values():
                    raise csv.Error(f"not as many columns as the first line names ({len(row)})")
                yield f"line {rows.line_num}", row
        except csv.Error as error:
            raise ValueError(f"{path}, line {rows.line_num}: {error}") from error
    elif text.strip():
        yield "", {"text": text}


def text_of(path: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        ValueError: it is in another encoding; says the line.
    """
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is no UTF-8; if this is a text in another encoding,"
            f" convert it first (iconv -f latin1 -t utf-8)"
        ) from error


def _json(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {line + error.lineno - 1}, column {error.colno}"
        raise ValueError(f"{path}, {where}: not valid JSON ({error.msg})") from error


def first_line(error: Exception) -> str:
    """What an error says first."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _data_set(source: str) -> Iterator[tuple[str, Any]]:
    name, _, split = source.partition(":")
    what: list[Any] = [name]
    where = "is no file here, and no data set that the hub gives"
    if os.path.isdir(name):
        kinds = {(mimetypes.guess_type(file)[0] or "").partition("/")[0] for file in Path(name).rglob("*")}
        found, where = kinds & {"image", "audio"}, "is a folder; name the files in it"
        if len(found) != 1:
            raise ValueError(f"{source} {where} (only one with images, or one with audio, is read as it is)")
        what = [f"{found.pop()}folder", None, name]
    elif name.count("/") > 1 or name.startswith((".", "/", "~")) or Path(name).suffix:
        raise ValueError(f"{source} is not there")
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(*what, split=split or "train")
    except Exception as error:  # of the hub's client there are many
        raise ValueError(f"{source} {where} ({first_line(error)})") from error
    yield from _of_data_set(rows)


def _of_data_set(rows: Any) -> Iterator[tuple[str, Any]]:
    """Rows with the names of classes in place of their numbers, and images and audio as they are stored."""
    from datasets import Audio, ClassLabel, Image

    names = {}
    for field, kind in rows.features.items():
        if isinstance(kind, (Audio, Image)):
            rows = rows.cast_column(field, type(kind)(decode=False))
        if isinstance(kind, ClassLabel):
            names[field] = kind.names
    for number, row in enumerate(rows, 1):
        known = {field: row[field] for field in names if row[field] is not None and row[field] >= 0}
        yield f"row {number}", row | {field: names[field][value] for field, value in known.items()}


def understand(records: Sequence[Record], columns: Mapping[str, str], task: str | None) -> tuple[str, list[Record]]:
    """(the task that the records are for, the records as its encoder takes them).

    Args:
        records: of one kind, as `read_records` gives them.
        columns: role -> name of the field that has it.
        task: what the user wants, or None.

    Raises:
        ValueError: the records are not of a kind that is known, or one of them is not like the first; says which.
    """
    first = _renamed(records[0][1], columns)
    kinds = [kind for kind in FORMATS if first.keys() >= set(kind.fields) and (task is None or task in kind.tasks)]
    if not kinds:
        known = "; ".join(" with ".join(kind.fields) for kind in FORMATS)
        raise ValueError(
            f"{records[0][0]}: the fields {', '.join(map(repr, records[0][1]))} are not those of"
            f" {'a task that is known' if task is None else task}. Known are: {known}. Other names go with --columns,"
            " as --columns text=body,label=class"
        )
    kind, understood = kinds[0], []
    for where, row in records:
        read = _read(kind, where, _renamed(row, columns))
        if task == "chat" and "prompt" in read:
            read = _asked(read["prompt"], read["completion"])
        understood.append((where, read))
    found = "chat" if "messages" in understood[0][1] else kind.tasks[0]
    if "regression" in kind.tasks and all(isinstance(row["label"], float) for _, row in understood):
        found = "regression"
    return task or found, understood


def _renamed(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    """A record with its fields by role: named by the user, or by the names that are about."""
    row = dict(row)
    usual = NAMES | (OF_WORDS if "tokens" in row else {})
    for role, names in [*((role, (name,)) for role, name in columns.items()), *usual.items()]:
        found = next((name for name in names if name in row), None)
        if found and (role not in row or role in columns):
            row[role] = row.pop(found)
    return row


def _read(kind: Format, where: str, row: dict[str, Any]) -> dict[str, Any]:
    for name in kind.fields:
        value = row.get(name)
        if value is None:
            state = "is null" if name in row else f"is not there, but {', '.join(map(repr, row)) or 'nothing'}"
            raise ValueError(f"{where}: field {name!r} {state}")
        if isinstance(value, (str, list)) and not (value.strip() if isinstance(value, str) else value):
            raise ValueError(f"{where}: field {name!r} is empty")
        if name in ("image", "audio") and isinstance(value, str) and not os.path.isfile(value):
            beside = os.path.join(os.path.dirname(where), value)  # beside the file that names it
            row[name] = beside if os.path.isfile(beside) else value
    try:
        read = kind.read(row) if kind.read else {name: row[name] for name in kind.fields}
        read |= {"task_ids": int(row["task_id"])} if "task_id" in row else {}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: {' with '.join(map(repr, kind.fields))}: {error}") from error
    for name in ("text", "prompt", "completion"):
        if name in read and not isinstance(read[name], (str, list)):
            raise ValueError(f"{where}: field {name!r} has to be a text, got {read[name]!r}")
    return read
