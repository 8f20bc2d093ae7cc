"""Files and data sets as records, what they are for, and what is wrong with them: file, line and field."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, cycle
from pathlib import Path
from typing import Any, NamedTuple

from peft.cli.options import TABLES, explained, refuse
from peft.hub import is_path
from peft.values import is_of

Message = dict[str, str]
Row = Mapping[str, Any]
#: (where it stands, its fields); of a text file the field is `text`
Record = tuple[str, dict[str, Any]]

DELIMITERS = {".csv": ",", ".tsv": "\t"}


class Format(NamedTuple):
    """A kind of record.

    Attributes:
        fields: what a record has to have, which tells it.
        tasks: what it is for; the first where the user names none.
        read: name of what reads a record as the encoder of its task takes it; by default with these fields alone.
        also: what it may have.
    """

    fields: Sequence[str]
    tasks: Sequence[str]
    read: str | None = None
    also: Sequence[str] = ()


def turns_of(value: Any) -> list[Message]:
    """A conversation in OpenAI's or ShareGPT's words as messages with `role` and `content`."""
    refuse(not is_of(value, list[dict]), f"a list of turns is needed, got {value!r:.60}")
    turns = []
    for turn in value:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        fits = is_of([role, content], list[str])
        refuse(not fits, f"a turn has to have role and content (or from and value), got {turn!r}")
        turns.append({"role": TABLES.roles.get(role, role), "content": content})
    return turns


def from_system(text: str | None) -> list[Message]:
    """What the system says at the beginning of a conversation, if anything."""
    return [{"role": "system", "content": text}] if text else []


def _asked(texts: Iterable[str], system: str | None = None) -> dict[str, Any]:
    """A conversation of texts by turns, the user's first."""
    turns = zip(cycle(("user", "assistant")), texts, strict=False)
    return {"messages": [*from_system(system), *({"role": role, "content": text} for role, text in turns)]}


def _conversation(row: Row) -> dict[str, Any]:
    return {"messages": [*from_system(row.get("system")), *turns_of(row["messages"])]}


def _question(row: Row) -> str:
    return "\n\n".join(filter(None, (row["instruction"], row.get("input"))))


def _alpaca(row: Row) -> dict[str, Any]:
    return _asked([*chain(*(row.get("history") or ())), _question(row), row["output"]], row.get("system"))


def _answer(row: Row) -> dict[str, Any]:
    if isinstance(row["prompt"], list):
        return {"messages": [*turns_of(row["prompt"]), *turns_of(row["completion"])]}
    return {"prompt": row["prompt"], "completion": row["completion"]}


def _preference(row: Row) -> dict[str, Any]:
    """The pair, and what comes before it: a prompt, Alpaca's instruction, or a conversation."""
    prompt = _question(row) if "instruction" in row else row.get("prompt", row.get("messages"))
    told = {"prompt": prompt, "chosen": row["chosen"], "rejected": row["rejected"]}
    told = {name: [value] if isinstance(value, dict) else value for name, value in told.items() if value is not None}
    return {name: value if isinstance(value, str) else turns_of(value) for name, value in told.items()}


def _tagged(row: Row) -> dict[str, Any]:
    tokens, labels = row["tokens"], row["label"]
    refuse(len(tokens) != len(labels), f"{len(tokens)} tokens, but {len(labels)} labels")
    return {"tokens": tokens, "label": labels}


#: field -> its type, and that in words
KINDS: dict[str, tuple[Any, str]] = dict.fromkeys(("text", "instruction", "input", "output", "system"), (str, "a text"))
KINDS |= dict.fromkeys(("prompt", "completion"), (str | list, "a text or a list of turns"))
KINDS |= {"tokens": (list[str], "a list of words"), "label": (str | int | float | bool, "one value")}
KINDS |= {"history": (list[tuple[str, str]], "a list of pairs of texts")}
LABELS = (list[str] | list[int], "a list, one for each word")

READERS = {read.__name__: read for read in (_preference, _conversation, _alpaca, _answer, _tagged)}
FORMATS = [Format(**row) for row in TABLES.formats]


def read_records(sources: Sequence[str]) -> list[Record]:
    """All records of files, of folders with images or audio, or of data sets on the hub (`owner/name[:split]`).

    Raises:
        ValueError: a file is not there, is empty, or holds what cannot be read; it says the file and the line.
    """
    records: list[Record] = []
    for source in sources:
        before = len(records)
        for place, row in _rows(source):
            where = f"{source}, {place}" if place else source
            given = type(row).__name__
            refuse(not isinstance(row, dict), f"{where}: an object with named fields is needed, got {given}")
            records.append((where, row))
        refuse(len(records) == before, f"{source} is empty: there is nothing in it to read")
    return records


def _rows(source: str) -> Iterator[tuple[str, Any]]:
    """(place in the source, row) for each"""
    path, (name, _, split) = Path(source), source.partition(":")
    if not path.is_file():
        refuse(not source, "--data: the name of a file is empty")
        folder = os.path.isdir(name)
        refuse(not folder and (is_path(name) or Path(name).suffix), f"{source} is not there")
        what = "a folder without data" if folder else "no file here, and no data set that the hub gives"
        yield from _data_set(source, what, name, split=split or "train")
    elif path.suffix == ".parquet":
        yield from _data_set(source, "damaged or no Parquet file", "parquet", data_files=source, split="train")
    elif path.suffix == ".jsonl":
        lines = enumerate(text_of(path).split("\n"), 1)
        yield from ((f"line {number}", _json(line, path, number)) for number, line in lines if line.strip())
    elif path.suffix == ".json":
        content = _json(text_of(path).strip() or "[]", path, 1)
        content = content.get("data", content) if isinstance(content, dict) else content
        refuse(not isinstance(content, list), f"{path}: a list of records is needed, got {type(content).__name__}")
        yield from ((f"record {number}", row) for number, row in enumerate(content, 1))
    elif path.suffix in DELIMITERS:
        yield from _table(path)
    elif (text := text_of(path)).strip():
        yield "", {"text": text}


def _table(path: Path) -> Iterator[tuple[str, Any]]:
    file = io.StringIO(text_of(path), newline="")
    rows = csv.DictReader(file, delimiter=DELIMITERS[path.suffix], strict=True)
    try:
        names = rows.fieldnames or ()
        refuse(len({*names}) < len(names), f"a column is there twice ({', '.join(names)})")
        for row in rows:
            refuse(None in row or None in row.values(), f"not as many columns as the first line names ({len(row)})")
            yield f"line {rows.line_num}", row
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path}, line {rows.line_num}: {error}") from error


def _data_set(source: str, what: str, *names: str, **more: str) -> Iterator[tuple[str, Any]]:
    """What `datasets` loads, with names of classes in place of their numbers, and images and audio as they are stored.

    Raises:
        ValueError: it cannot; says that `source` is `what`.
    """
    import datasets

    datasets.disable_progress_bars()
    with explained(f"{source} is {what}"):
        rows: Any = datasets.load_dataset(*names, **more)
    for field, kind in rows.features.items():
        if isinstance(kind, (datasets.Audio, datasets.Image)):
            rows = rows.cast_column(field, type(kind)(decode=False))
    classes = {field: kind for field, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)}
    for number, row in enumerate(rows, 1):
        known = [field for field in classes if row[field] is not None and row[field] >= 0]
        yield f"row {number}", row | {field: classes[field].int2str(row[field]) for field in known}


def text_of(path: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        ValueError: it is in another encoding; says the line.
    """
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line, byte = data.count(b"\n", 0, error.start) + 1, data[error.start]
        hint = "if it is in another encoding, convert it first (iconv -f latin1 -t utf-8)"
        raise ValueError(f"{path}, line {line}: byte 0x{byte:02x} is no UTF-8; {hint}") from error


def _json(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {line + error.lineno - 1}, column {error.colno}"
        raise ValueError(f"{path}, {where}: not valid JSON ({error.msg})") from error


def understand(records: Sequence[Record], columns: Mapping[str, str], task: str | None) -> tuple[str, list[Record]]:
    """(the task that the records are for, the records as its encoder takes them).

    Args:
        records: of one kind, as `read_records` gives them.
        columns: role -> name of the field that has it.
        task: what the user wants, or None.

    Raises:
        ValueError: the records are not of a kind that is known, or one of them is not like the first; says which.
    """
    where, first = records[0]
    absent = ", ".join(name for name in columns.values() if name not in first)
    refuse(absent, f"{where}: --columns names {absent}, but the fields are {', '.join(first)}")
    kind = _format_of(_renamed(first, columns), task)
    if kind is None:
        known = "; ".join(" with ".join(kind.fields) for kind in FORMATS)
        raise ValueError(
            f"{where}: the fields {', '.join(map(repr, first))} are not those of {task or 'a task that is known'}."
            f" Known are: {known}. Other names go with --columns, as --columns text=body,label=class"
        )
    understood = [(where, _read(kind, where, _renamed(row, columns), task)) for where, row in records]
    found = "chat" if "messages" in understood[0][1] else kind.tasks[0]
    if "regression" in kind.tasks and _are_fractions([row["label"] for _, row in understood]):
        found = "regression"
    return task or found, understood


def _format_of(row: Row, task: str | None) -> Format | None:
    """The first that the fields of a record are of."""
    fits = (kind for kind in FORMATS if row.keys() >= set(kind.fields) and task in (None, *kind.tasks))
    return next(fits, None)


def _are_fractions(labels: Sequence[Any]) -> bool:
    """Whether labels are numbers with a point; tables hold them as text, and write whole ones so, too."""
    import pandas

    numbers, kinds = pandas.to_numeric(pandas.Series(labels, dtype=object), errors="coerce"), {*map(type, labels)}
    return kinds <= {float, str} and numbers.abs().lt(math.inf).all() and (kinds == {float} or (numbers % 1).any())


def unused(row: Row, columns: Mapping[str, str], task: str) -> list[str]:
    """The fields of a record that nothing is learnt from."""
    row = _renamed(row, columns)
    kind: Any = _format_of(row, task)
    used = {*kind.fields, *kind.also, "task_id"}
    return [name for name, value in row.items() if name not in used and value not in (None, "", [])]


def _renamed(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    """A record with its fields by role: named by the user, or by the names that are about."""
    row = dict(row)
    for role, names in [*columns.items(), *(TABLES.columns_of_words if "tokens" in row else TABLES.columns).items()]:
        found = next((name for name in ([names] if role in columns else names.split()) if name in row), None)
        if found and (role not in row or role in columns):
            row[role] = row.pop(found)
    return row


def _read(kind: Format, where: str, row: dict[str, Any], task: str | None) -> dict[str, Any]:
    for name in (*kind.fields, *kind.also):
        value = row.get(name)
        if name in kind.fields and (value is None or value == [] or (isinstance(value, str) and not value.strip())):
            there = f"is not there, but {', '.join(map(repr, row)) or 'nothing'}" if name not in row else "is null"
            raise ValueError(f"{where}: field {name!r} {there if value is None else 'is empty'}")
        of, words = LABELS if name == "label" and "tokens" in row else KINDS.get(name, (object, ""))
        wrong = value is not None and not is_of(value, of)
        refuse(wrong, f"{where}: field {name!r} has to be {words}, got {value!r:.60}")
        if name in ("image", "audio") and isinstance(value, str):
            beside = os.path.join(os.path.dirname(where), value)  # beside the file that names it
            row[name] = beside if os.path.isfile(beside) and not os.path.isfile(value) else value
    number = str(row.get("task_id", 0))
    refuse(not number.isdecimal(), f"{where}: field 'task_id' has to be a number from 0 on, got {number}")
    with explained(f"{where}: {' with '.join(map(repr, kind.fields))}"):
        read = READERS[kind.read](row) if kind.read else {name: row[name] for name in kind.fields}
        if task == "chat" and "prompt" in read:
            read = _asked((read["prompt"], read["completion"]))
        said = [turn["content"] for turn in read.get("messages", ()) if turn["role"] == "assistant"]
        mute = "messages" in read and not "".join(said).strip()
        refuse(mute, "no turn of the assistant has a text: there is nothing to learn")
    return read | ({"task_ids": int(number)} if "task_id" in row else {})
