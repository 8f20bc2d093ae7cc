"""Files and data sets as records, what they are for, and what is wrong with them: file, line and field."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Message = dict[str, str]
#: (where it stands, its fields); of a text file the field is `text`
Record = tuple[str, dict[str, Any]]

TABLES = {".csv": ",", ".tsv": "\t"}
#: names of speakers in the formats that are about -> those of chat templates
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "prompter": "user"}
#: columns of a classification by the names that they often have
LABELS, TEXTS = ("label", "labels"), ("text", "sentence")


@dataclass
class Format:
    """A kind of record.

    Attributes:
        task: what it is for.
        fields: what a record has to have.
        read: the record as the encoder of its task takes it.
    """

    task: str
    fields: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]


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


def _chat(messages: Sequence[Message]) -> dict[str, Any]:
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in messages):
        raise ValueError("no turn of the assistant has a text: there is nothing to learn")
    return {"messages": list(messages)}


def _asked(row: Mapping[str, Any]) -> list[Message]:
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]


def _alpaca(row: Mapping[str, Any]) -> dict[str, Any]:
    question = row["instruction"] + (f"\n\n{row['input']}" if row.get("input") else "")
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return _chat([*system, *_asked({"prompt": question, "completion": row["output"]})])


def _answer(row: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(row["prompt"], list):
        return _chat([*turns_of(row["prompt"]), *turns_of(row["completion"])])
    return {"prompt": row["prompt"], "completion": row["completion"]}


def _preference(row: Mapping[str, Any]) -> dict[str, Any]:
    names = [name for name in ("prompt", "chosen", "rejected") if name in row]
    return {name: row[name] if isinstance(row[name], str) else turns_of(row[name]) for name in names}


def _tagged(row: Mapping[str, Any]) -> dict[str, Any]:
    if None in row["tokens"] or None in row["label"]:
        raise ValueError("null among them")
    if len(row["tokens"]) != len(row["label"]):
        raise ValueError(f"{len(row['tokens'])} tokens, but {len(row['label'])} labels")
    return {"tokens": row["tokens"], "label": row["label"]}


#: by the fields that tell them, the most telling first
FORMATS = (
    Format("preference", ("chosen", "rejected"), _preference),
    Format("chat", ("messages",), lambda row: _chat(turns_of(row["messages"]))),
    Format("chat", ("instruction", "output"), _alpaca),
    Format("answer", ("prompt", "completion"), _answer),
    Format("token-classification", ("tokens", "label"), _tagged),
    Format("classification", ("text", "label"), lambda row: {"text": row["text"], "label": row["label"]}),
    Format("causal-lm", ("text",), lambda row: {"text": row["text"]}),
)

#: tasks that take records of another name, too
SERVED_BY = {
    "causal-lm": ("answer", "causal-lm"), "seq2seq": ("answer",), "chat": ("chat", "answer"),
    "regression": ("classification",),
}  # fmt: skip


def read_records(sources: Sequence[str]) -> list[Record]:
    """All records of files, or of data sets on the hub (`owner/name`, or `owner/name:split`).

    Raises:
        ValueError: a file is not there, is empty, or holds what cannot be read; it says the file and the line.
    """
    records: list[Record] = []
    for source in sources:
        path = Path(source)
        found = list(_rows(path) if path.is_file() else _from_hub(source))
        if not found:
            raise ValueError(f"{source} is empty: there is nothing in it to read")
        records += found
    return records


def _rows(path: Path) -> Iterator[Record]:
    if path.suffix == ".parquet":
        from datasets import Dataset

        for number, row in enumerate(Dataset.from_parquet(str(path)), 1):
            yield f"{path}, row {number}", row
        return
    text = text_of(path)
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{path}, line {number}", _object(_json(line, path, number), f"{path}, line {number}")
    elif path.suffix == ".json":
        content = _json(text, path, 1) if text.strip() else []
        if isinstance(content, dict) and isinstance(content.get("data"), list):
            content = content["data"]
        if not isinstance(content, list):
            raise ValueError(f"{path}: a list of records is needed, got {type(content).__name__}")
        for number, row in enumerate(content, 1):
            yield f"{path}, record {number}", _object(row, f"{path}, record {number}")
    elif path.suffix in TABLES:
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=TABLES[path.suffix], strict=True)
        try:
            for row in rows:
                where = f"{path}, line {rows.line_num}"
                if None in row or None in row.values():
                    raise ValueError(f"{where}: not as many columns as the first line names ({len(row)})")
                yield where, row
        except csv.Error as error:
            raise ValueError(f"{path}, line {rows.line_num}: {error}") from error
    elif text.strip():
        yield str(path), {"text": text}


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
        raise ValueError(
            f"{path}, line {line + error.lineno - 1}, column {error.colno}: not valid JSON ({error.msg})"
        ) from error


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: an object with named fields is needed, got {type(row).__name__}")
    return row


def first_line(error: Exception) -> str:
    """What an error says first."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _from_hub(source: str) -> Iterator[Record]:
    name, _, split = source.partition(":")
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or Path(name).suffix or os.path.isdir(name):
        what = "is a folder; name the files in it" if os.path.isdir(name) else "is not there"
        raise ValueError(f"{source} {what}")
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split=split or "train")
    except Exception as error:  # of the hub's client there are many
        reason = first_line(error)
        raise ValueError(f"{source} is no file here, and no data set that the hub gives ({reason})") from error
    for number, row in enumerate(rows, 1):
        yield f"{source}, row {number}", row


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
    kinds = [kind for kind in FORMATS if all(name in first for name in kind.fields)]
    if task is not None:
        kinds = [kind for kind in kinds if kind.task in SERVED_BY.get(task, (task,))]
    if not kinds:
        known = "; ".join(" with ".join(kind.fields) for kind in FORMATS)
        raise ValueError(
            f"{records[0][0]}: the fields {', '.join(map(repr, records[0][1]))} are not those of"
            f" {'a task that is known' if task is None else task}. Known are: {known}. Other names go with --columns,"
            " as --columns text=body,label=class"
        )
    kind = kinds[0]
    understood = []
    for where, row in records:
        understood.append((where, _read(kind, where, _renamed(row, columns))))
    found = kind.task
    if found == "answer" and task == "chat":
        understood = [(where, row if "messages" in row else _chat(_asked(row))) for where, row in understood]
    if found == "answer":
        found = "chat" if "messages" in understood[0][1] else "causal-lm"
    elif found == "classification":
        found = task or ("regression" if all(isinstance(row["label"], float) for _, row in understood) else found)
    return found, understood


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A record with its fields by role: named by the user, or by the names that are about."""
    row = dict(row)
    for role, name in columns.items():
        if name in row:
            row[role] = row.pop(name)
    pairs = [("messages", ("conversations", "conversation"))]
    if "tokens" in row:
        pairs.append(("label", ("ner_tags", "tags")))
    if any(name in row for name in LABELS) and "tokens" not in row:
        pairs += [("text", TEXTS)]
    for role, names in [*pairs, ("label", LABELS)]:
        found = next((name for name in names if name in row), None)
        if role not in row and found:
            row[role] = row.pop(found)
    return row


def _read(kind: Format, where: str, row: Mapping[str, Any]) -> dict[str, Any]:
    for name in kind.fields:
        if row.get(name) is None:
            state = "is null" if name in row else f"is not there, but {', '.join(map(repr, row)) or 'nothing'}"
            raise ValueError(f"{where}: field {name!r} {state}")
        if isinstance(row[name], (str, list)) and not (row[name].strip() if isinstance(row[name], str) else row[name]):
            raise ValueError(f"{where}: field {name!r} is empty")
    try:
        read = kind.read(row) | ({"task_ids": int(row["task_id"])} if "task_id" in row else {})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: {' with '.join(map(repr, kind.fields))}: {error}") from error
    for name in ("text", "prompt", "completion"):
        if name in read and not isinstance(read[name], (str, list)):
            raise ValueError(f"{where}: field {name!r} has to be a text, got {read[name]!r}")
    return read
