"""The tasks: which head a model needs, how a record becomes numbers, how the outcome is measured."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from peft.cli.options import TABLES, explained, refuse
from peft.cli.records import Message, Record, Row

IGNORED = -100
Example = dict[str, Any]


class Task(NamedTuple):
    """A task.

    Attributes:
        auto: class of transformers that loads a model with the head for it.
        encode: what makes an example of a record: a method of `Encoder`.
        peft: its name for `task_type`, if there is one.
        processor: class of transformers that loads what makes numbers of its data.
        measures: what is measured on what is held out, beside the loss.
    """

    auto: str
    encode: str
    peft: str | None = None
    processor: str = "AutoTokenizer"
    measures: Sequence[str] = ()


TASKS = {name: Task(**row) for name, row in TABLES.tasks.items()}


@dataclass
class Encoded:
    """Records as numbers.

    Attributes:
        examples: `input_ids` with `labels` or `label`; the records' own fields for the task preference, and images and
            audio as they are stored.
        cut: how many of them are not whole.
        dropped: how many had nothing left to learn.
    """

    examples: list[Example]
    cut: int = 0
    dropped: int = 0


class Encoder:
    """Turns the records of a task into numbers.

    Args:
        task: one of `TASKS`.
        tokenizer: of the model; the processor that has it, for speech.
        length: tokens of one example at most.
        numbered: whether examples say their `task_ids`, as methods for several tasks need.

    Attributes:
        labels: names of the classes, in the order of their numbers; those of the first records that are encoded.
    """

    def __init__(self, task: str, tokenizer: Any, length: int, numbered: bool = False):
        self.task, self.tokenizer, self.length, self.numbered = task, tokenizer, length, numbered
        self.labels: list[str] = []
        self.end = [end] if (end := getattr(tokenizer, "eos_token_id", None)) is not None else []

    def __call__(self, records: Sequence[Record]) -> Encoded:
        """The records as numbers.

        Raises:
            ValueError: one of them does not fit the task or the tokenizer; says which.
        """
        if self.task == "preference":
            return Encoded([row for _, row in records])
        if self.task == "causal-lm" and all("text" in row for _, row in records):
            return self._some(Encoded(self._blocks(row["text"] for _, row in records)))
        if "classification" in self.task and not self.labels:
            self.labels = _names(row["label"] for _, row in records)
        encode: Callable[[Row], Example] = getattr(self, TASKS[self.task].encode)
        found = Encoded([])
        for where, row in records:
            with explained(where):  # of tokenizers and their templates, too
                example = encode(row)
            lists = {name: value for name, value in example.items() if isinstance(value, list)}
            example |= {name: value[: self.length] for name, value in lists.items()}
            example |= {"task_ids": row.get("task_ids", 0)} if self.numbered else {}
            learns = "label" in example or any(label != IGNORED for label in example["labels"])
            found.cut += example.pop("cut", False) or any(len(value) > self.length for value in lists.values())
            found.dropped += not learns
            found.examples += [example] * learns
        return self._some(found)

    def _some(self, found: Encoded) -> Encoded:
        refuse(not found.examples, f"nothing is left to learn within --max-length {self.length} tokens")
        return found

    def _ids(self, text: str, special: bool = False) -> list[int]:
        return self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    def _blocks(self, texts: Iterable[str]) -> list[Example]:
        """Texts one after the other, with the end-of-text token between them, cut into blocks."""
        stream = [token for text in texts for token in self._ids(text) + self.end]
        blocks = [stream[start : start + self.length] for start in range(0, len(stream), self.length)]
        # the first token of a block is given, not learnt
        task = {"task_ids": 0} if self.numbered else {}
        return [{"input_ids": block, "labels": block, **task} for block in blocks if len(block) > 1]

    def _answer(self, row: Row) -> Example:
        """The answer alone is learnt; where both are too long, the prompt loses its beginning first."""
        prompt, answer = self._ids(row["prompt"], special=True), self._ids(row["completion"]) + self.end
        if prompt[-1:] == self.end:
            prompt = prompt[:-1]
        kept = prompt[-max(1, self.length - len(answer)) :]
        cut = len(kept) < len(prompt)
        return {"input_ids": kept + answer, "labels": [IGNORED] * len(kept) + answer, "cut": cut}

    def _pair(self, row: Row) -> Example:
        return {"input_ids": self._ids(row["prompt"], special=True), "labels": self._ids(row["completion"]) + self.end}

    def _chat(self, row: Row) -> Example:
        """The conversation in the tokenizer's template; what the assistant says is learnt, with the end of its turn."""
        messages: list[Message] = row["messages"]
        ids: list[int] = []
        labels: list[int] = []
        for number, turn in enumerate(messages):
            if turn["role"] != "assistant":
                continue
            asked, said = self._template(messages[:number], True), self._template(messages[: number + 1], False)
            # without words that a template leads an answer in with, and the answer itself then does not have
            differ = (i for i, (one, other) in enumerate(zip(asked, said, strict=False)) if one != other)
            asked = asked[: next(differ, None)]
            rewritten = asked[: len(ids)] != ids
            refuse(rewritten, "the chat template changes earlier turns of a conversation; split it into single ones")
            labels += [IGNORED] * (len(asked) - len(labels)) + said[len(asked) :]
            ids = said
        return {"input_ids": ids, "labels": labels}

    def _template(self, messages: Sequence[Message], prompt: bool) -> list[int]:
        return self._ids(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))

    def _number(self, label: Any) -> int:
        refuse(str(label) not in self.labels, f"label {label!r} is not one of {', '.join(self.labels)}")
        return self.labels.index(str(label))

    def _sequence(self, row: Row) -> Example:
        label = float(row["label"]) if self.task == "regression" else self._number(row["label"])
        return {"input_ids": self._ids(row["text"], special=True), "label": label}

    def _tokens(self, row: Row) -> Example:
        """The first piece of each word has its label, the others are not learnt."""
        encoded = self.tokenizer(row["tokens"], is_split_into_words=True, verbose=False)
        words = encoded.word_ids()
        firsts = [word is not None and word != before for word, before in zip(words, [None, *words], strict=False)]
        labels = [self._number(row["label"][w]) if first else IGNORED for w, first in zip(words, firsts, strict=True)]
        return {"input_ids": encoded["input_ids"], "labels": labels}

    def _image(self, row: Row) -> Example:
        return {"image": _stored(row["image"]), "label": self._number(row["label"])}

    def _speech(self, row: Row) -> Example:
        import soundfile  # noqa: F401  needed in training, and missed here

        return {"audio": _stored(row["audio"]), "labels": self.tokenizer.tokenizer(row["text"])["input_ids"]}


def _names(labels: Iterable[Any]) -> list[str]:
    """The classes in their order: by number, then by name."""
    names = {str(entry) for label in labels for entry in (label if isinstance(label, list) else [label])}
    return sorted(names, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))


def _stored(value: Any) -> dict[str, Any]:
    """An image or audio as `datasets` has it, its file checked to be there."""
    value = {"path": value, "bytes": None} if isinstance(value, str) else value
    stored = isinstance(value, dict)
    refuse(not stored, f"images and audio are paths of files, or what `datasets` stores of them, got {value!r:.60}")
    absent = value.get("bytes") is None and "array" not in value and not os.path.isfile(value["path"])
    refuse(absent, f"there is no file {value.get('path')}")
    return value


def shown(example: Example, tokenizer: Any) -> str:
    """An example as rich text: what is learnt is green, the rest is grey."""
    from itertools import groupby

    from rich.markup import escape

    parts = groupby(zip(example["labels"], example["input_ids"], strict=True), lambda pair: pair[0] != IGNORED)
    texts = ((learnt, tokenizer.decode([token for _, token in part])) for learnt, part in parts)
    return "".join(f"[{'green' if learnt else 'dim'}]{escape(text)}[/]" for learnt, text in texts)


def measures(task: str, processor: Any) -> dict[str, Any]:
    """What `Trainer` takes to measure the outcome of a task: accuracy and F1; errors of a regression; of words."""
    heard = "wer" in TASKS[task].measures
    if not heard and not {"accuracy", "rmse"}.intersection(TASKS[task].measures):
        return {}
    tokenizer: Any = getattr(processor, "tokenizer", None)
    import numpy as np
    from sklearn.metrics import accuracy_score, f1_score, r2_score, root_mean_squared_error

    def measure(outcome: Any) -> dict[str, float]:
        found, wanted = outcome.predictions, np.asarray(outcome.label_ids)
        if heard:
            wanted, found = (np.where(ids == IGNORED, tokenizer.pad_token_id, ids) for ids in (wanted, found))
            ctc = task == "ctc"  # whose tokenizer takes letters in a row for one, unless a blank is between them
            said = tokenizer.batch_decode(wanted, **({"group_tokens": False} if ctc else {"skip_special_tokens": True}))
            return {"wer": word_error_rate(said, tokenizer.batch_decode(found, skip_special_tokens=not ctc))}
        found, wanted = found.reshape(-1), wanted.reshape(-1)
        if task == "regression":
            r2 = float(r2_score(wanted, found)) if len(wanted) > 1 else 0.0
            return {"rmse": float(root_mean_squared_error(wanted, found)), "r2": r2}
        found, wanted = found[wanted != IGNORED], wanted[wanted != IGNORED]
        return {"accuracy": accuracy_score(wanted, found), "f1": f1_score(wanted, found, average="macro")}

    def likeliest(scores: Any, labels: Any) -> Any:
        return (scores[0] if isinstance(scores, tuple) else scores).argmax(-1)

    scores = task not in ("regression", "speech")  # speech is generated
    return {"compute_metrics": measure, "preprocess_logits_for_metrics": likeliest if scores else None}


def word_error_rate(wanted: Iterable[str], found: Iterable[str]) -> float:
    """Words to replace, leave out and put in to make what is wanted of what was found, per word that is wanted."""
    errors = total = 0
    for said, heard in ((one.split(), other.split()) for one, other in zip(wanted, found, strict=True)):
        row = list(range(len(heard) + 1))  # edits from no word to the first so many of `heard`
        for i, word in enumerate(said, 1):
            before, row[0] = row[0], i
            for j, other in enumerate(heard, 1):
                before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (word != other))
        errors, total = errors + row[-1], total + len(said)
    return errors / max(1, total)


def collator_for(task: str, processor: Any, start: int | None = None) -> Any:
    """What makes batches of examples.

    Args:
        task: one of `TASKS`.
        processor: of the model: the tokenizer, or what reads images or audio.
        start: the token that the model itself puts before what it writes.
    """
    import transformers

    if TASKS[task].processor == "AutoImageProcessor":
        return partial(_images, processor)
    if TASKS[task].processor == "AutoProcessor":
        return partial(_sounds, processor, start)
    one_label = TASKS[task].peft == "SEQ_CLS"
    return (transformers.DataCollatorWithPadding if one_label else transformers.DataCollatorForSeq2Seq)(processor)


def _images(processor: Any, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    import torch
    from datasets import Image

    images = [Image().decode_example(row["image"]).convert("RGB") for row in rows]
    return {**processor(images, return_tensors="pt"), "labels": torch.tensor([row["label"] for row in rows])}


def _sounds(processor: Any, start: int | None, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    import torch

    extractor, rate = processor.feature_extractor, processor.feature_extractor.sampling_rate
    # whisper's encoder takes 30 seconds, neither more nor less
    padding = "max_length" if hasattr(extractor, "nb_max_frames") else True
    sounds = [_samples(row["audio"], rate) for row in rows]
    batch = extractor(sounds, sampling_rate=rate, padding=padding, return_tensors="pt")
    labels = [torch.tensor(row["labels"][row["labels"][0] == start :]) for row in rows]
    return {**batch, "labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)}


def _samples(audio: Mapping[str, Any], rate: int) -> Any:
    """What was recorded, as one channel at `rate` samples a second."""
    import numpy as np
    from scipy.signal import resample_poly

    if audio.get("array") is not None:
        samples, found = np.asarray(audio["array"], dtype=np.float32), audio["sampling_rate"]
    else:
        import soundfile

        file = io.BytesIO(audio["bytes"]) if audio["bytes"] else audio["path"]
        samples, found = soundfile.read(file, dtype="float32")
    samples = samples.mean(-1) if samples.ndim > 1 else samples
    return samples if found == rate else resample_poly(samples, rate, found).astype(np.float32)
