"""Files and data sets as records, what they are for, and what is wrong with them: file, line and field."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peft.cli.options import TABLES, refuse
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
        tasks: what it is for; the first where the user names none.
        fields: what a record has to have.
        read: the record as the encoder of its task takes it; by default with these fields alone.
        also: what it may have.
    """

    tasks: tuple[str, ...]
    fields: tuple[str, ...]
    read: Callable[[Row], dict[str, Any]] | None = None
    also: tuple[str, ...] = ()


def turns_of(value: Any) -> list[Message]:
    """A conversation in OpenAI's or ShareGPT's words as messages with `role` and `content`."""
    fits = isinstance(value, list) and all(isinstance(turn, dict) for turn in value)
    refuse(not fits, f"a list of turns is needed, got {value!r:.60}")
    turns = []
    for turn in value:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f"a turn has to have role and content (or from and value), got {turn!r}")
        turns.append({"role": TABLES.roles.get(role, role), "content": content})
    return turns


def _chat(messages: list[Message]) -> dict[str, Any]:
    answers = any(turn["role"] == "assistant" and turn["content"].strip() for turn in messages)
    refuse(not answers, "no turn of the assistant has a text: there is nothing to learn")
    return {"messages": messages}


def _asked(
    question: str, answer: str, system: str | None = None, earlier: Sequence[Sequence[str]] = ()
) -> dict[str, Any]:
    said = [("system", system)] if system else []
    for one, other in [*earlier, (question, answer)]:
        said += [("user", one), ("assistant", other)]
    return _chat([{"role": role, "content": str(text)} for role, text in said])


def _conversation(row: Row) -> dict[str, Any]:
    before = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return _chat(turns_of([*before, *row["messages"]] if isinstance(row["messages"], list) else row["messages"]))


def _question(row: Row) -> str:
    return "\n\n".join(filter(None, (row["instruction"], row.get("input"))))


def _alpaca(row: Row) -> dict[str, Any]:
    return _asked(_question(row), row["output"], row.get("system"), row.get("history") or ())


def _answer(row: Row) -> dict[str, Any]:
    if isinstance(row["prompt"], list):
        return _chat([*turns_of(row["prompt"]), *turns_of(row["completion"])])
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

#: by the fields that tell them, the most telling first
FORMATS = (
    Format(("preference",), ("chosen", "rejected"), _preference, ("prompt", "messages", "instruction", "input")),
    Format(("chat",), ("messages",), _conversation, ("system",)),
    Format(("chat",), ("instruction", "output"), _alpaca, ("input", "system", "history")),
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
            words = f"{where}: an object with named fields is needed, got {type(row).__name__}"
            refuse(not isinstance(row, dict), words)
            records.append((where, row))
        refuse(len(records) == before, f"{source} is empty: there is nothing in it to read")
    return records


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(place in the file, row) for each"""
    if path.suffix == ".parquet":
        from datasets import Dataset

        try:
            rows = Dataset.from_parquet(str(path))
        except Exception as error:  # of pyarrow
            raise ValueError(f"{path} is damaged or no Parquet file: {first_line(error)}") from error
        yield from _of_data_set(rows)
        return
    text = text_of(path)
    if path.suffix == ".jsonl":
        lines = enumerate(text.split("\n"), 1)
        yield from ((f"line {number}", _json(line, path, number)) for number, line in lines if line.strip())
    elif path.suffix == ".json":
        content = _json(text, path, 1) if text.strip() else []
        content = content.get("data", content) if isinstance(content, dict) else content
        refuse(not isinstance(content, list), f"{path}: a list of records is needed, got {type(content).__name__}")
        yield from ((f"record {number}", row) for number, row in enumerate(content, 1))
    elif path.suffix in DELIMITERS:
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=DELIMITERS[path.suffix], strict=True)
        try:
            names = rows.fieldnames or ()
            refuse(len({*names}) < len(names), f"a column is there twice ({', '.join(names)})")
            for row in rows:
                refuse(None in row or None in row.values(), f"not as many columns as the first line names ({len(row)})")
                yield f"line {rows.line_num}", row
        except (csv.Error, ValueError) as error:
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
        line, byte = data.count(b"\n", 0, error.start) + 1, data[error.start]
        hint = "if it is in another encoding, convert it first (iconv -f latin1 -t utf-8)"
        raise ValueError(f"{path}, line {line}: byte 0x{byte:02x} is no UTF-8; {hint}") from error


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
    refuse(not source, "--data: the name of a file is empty")
    name, _, split = source.partition(":")
    refuse(not os.path.isdir(name) and (is_path(name) or Path(name).suffix), f"{source} is not there")
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # of the hub's client there are many
        what = "a folder without data" if os.path.isdir(name) else "no file here, and no data set that the hub gives"
        raise ValueError(f"{source} is {what} ({first_line(error)})") from error
    yield from _of_data_set(rows)


def _of_data_set(rows: Any) -> Iterator[tuple[str, Any]]:
    """Rows with the names of classes in place of their numbers, and images and audio as they are stored."""
    from datasets import Audio, ClassLabel, Image

    for field, kind in rows.features.items():
        if isinstance(kind, (Audio, Image)):
            rows = rows.cast_column(field, type(kind)(decode=False))
    classes = {field: kind.names for field, kind in rows.features.items() if isinstance(kind, ClassLabel)}
    for number, row in enumerate(rows, 1):
        known = [field for field in classes if row[field] is not None and row[field] >= 0]
        yield f"row {number}", row | {field: classes[field][row[field]] for field in known}


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
    first = _renamed(first, columns)
    kinds = [kind for kind in FORMATS if first.keys() >= set(kind.fields) and task in (None, *kind.tasks)]
    if not kinds:
        known = "; ".join(" with ".join(kind.fields) for kind in FORMATS)
        raise ValueError(
            f"{where}: the fields {', '.join(map(repr, records[0][1]))} are not those of"
            f" {task or 'a task that is known'}. Known are: {known}. Other names go with --columns,"
            " as --columns text=body,label=class"
        )
    understood = [(where, _read(kinds[0], where, _renamed(row, columns))) for where, row in records]
    if task == "chat":
        asked = ((where, row, row.get("prompt")) for where, row in understood)
        understood = [(where, _asked(prompt, row["completion"]) if prompt else row) for where, row, prompt in asked]
    found = "chat" if "messages" in understood[0][1] else kinds[0].tasks[0]
    if "regression" in kinds[0].tasks and _are_fractions([row["label"] for _, row in understood]):
        found = "regression"
    return task or found, understood


def _are_fractions(labels: Sequence[Any]) -> bool:
    """Whether labels are numbers with a point; tables hold them as text, and write whole ones so, too."""
    try:
        numbers = [float(label) for label in labels if isinstance(label, (float, str))]
    except ValueError:
        return False
    said = not any(isinstance(label, str) for label in labels) or any(number % 1 for number in numbers)
    return said and len(numbers) == len(labels) and all(map(math.isfinite, numbers))


def unused(row: Row, columns: Mapping[str, str], task: str) -> list[str]:
    """The fields of a record that nothing is learnt from."""
    row = _renamed(row, columns)
    kind = next(kind for kind in FORMATS if row.keys() >= set(kind.fields) and task in kind.tasks)
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


def _read(kind: Format, where: str, row: dict[str, Any]) -> dict[str, Any]:
    for name in (*kind.fields, *kind.also):
        value = row.get(name)
        if name in kind.fields and (value is None or value == [] or (isinstance(value, str) and not value.strip())):
            there = f"is not there, but {', '.join(map(repr, row)) or 'nothing'}" if name not in row else "is null"
            raise ValueError(f"{where}: field {name!r} {there if value is None else 'is empty'}")
        of, words = LABELS if name == "label" and "tokens" in row else KINDS.get(name, (object, ""))
        wrong = value is not None and not is_of(value, of)
        refuse(wrong, f"{where}: field {name!r} has to be {words}, got {value!r:.60}")
        if name in ("image", "audio") and isinstance(value, str) and not os.path.isfile(value):
            beside = os.path.join(os.path.dirname(where), value)  # beside the file that names it
            row[name] = beside if os.path.isfile(beside) else value
    task = str(row.get("task_id", 0))
    refuse(not task.isdecimal(), f"{where}: field 'task_id' has to be a number from 0 on, got {task}")
    try:
        read = kind.read(row) if kind.read else {name: row[name] for name in kind.fields}
    except ValueError as error:
        raise ValueError(f"{where}: {' with '.join(map(repr, kind.fields))}: {error}") from error
    return read | ({"task_ids": int(task)} if "task_id" in row else {})
