"""The tasks: which head a model needs, how a record becomes numbers, how the outcome is measured."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from peft.cli import options
from peft.cli.records import Message, Record, Row

IGNORED = -100
Example = dict[str, Any]
#: the usual format where a tokenizer has no chat template
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Task(NamedTuple):
    """A task.

    Attributes:
        auto: class of transformers that loads a model with the head for it.
        peft: its name for `task_type`, if there is one.
        processor: class of transformers that loads what makes numbers of its data.
    """

    auto: str
    peft: str | None = None
    processor: str = "AutoTokenizer"


TASKS = {name: Task(**row) for name, row in options.TASKS.items()}


@dataclass
class Encoded:
    """Records as numbers.

    Attributes:
        examples: `input_ids` with `labels` or `label`; the records' own fields for the task preference, and images and
            audio as they are stored.
        cut: how many of them are not whole.
        dropped: how many had nothing left to learn.
        labels: names of the classes, in the order of their numbers.
    """

    examples: list[Example]
    cut: int = 0
    dropped: int = 0
    labels: list[str] = field(default_factory=list)


class Encoder:
    """Turns the records of a task into numbers.

    Args:
        task: one of `TASKS`.
        tokenizer: of the model; the processor that has it, for speech.
        length: tokens of one example at most.
        numbered: whether examples say their `task_ids`, as methods for several tasks need.
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
            return self._blocks(row["text"] for _, row in records)
        if "classification" in self.task and not self.labels:
            self.labels = _names(row["label"] for _, row in records)
        encode: Callable[[Row], tuple[Example, int]] = {
            "chat": self._chat, "causal-lm": self._answer, "seq2seq": self._pair, "token-classification": self._tokens,
            "image-classification": self._image, "speech": self._speech, "ctc": self._speech,
        }.get(self.task, self._sequence)  # fmt: skip
        found = Encoded([], labels=self.labels)
        for where, row in records:
            try:
                example, tokens = encode(row)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{where}: {error.args[0] if error.args else error}") from error
            example |= {"task_ids": row.get("task_ids", 0)} if self.numbered else {}
            learns = "label" in example or any(label != IGNORED for label in example["labels"])
            found.cut += tokens > self.length
            found.dropped += not learns
            if learns:
                found.examples.append(example)
        if not found.examples:
            raise ValueError(f"nothing is left to learn within --max-length {self.length} tokens")
        return found

    def _ids(self, text: str, special: bool = False) -> list[int]:
        return self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    def _cut(self, ids: list[int], labels: list[int]) -> tuple[Example, int]:
        """The beginnings of both, and how long the longer one is."""
        longest = max(len(ids), len(labels))
        return {"input_ids": ids[: self.length], "labels": labels[: self.length]}, longest

    def _blocks(self, texts: Iterable[str]) -> Encoded:
        """Texts one after the other, with the end-of-text token between them, cut into blocks."""
        stream = [token for text in texts for token in self._ids(text) + self.end]
        blocks = [stream[start : start + self.length] for start in range(0, len(stream), self.length)]
        # the first token of a block is given, not learnt
        task = {"task_ids": 0} if self.numbered else {}
        return Encoded([{"input_ids": block, "labels": block, **task} for block in blocks if len(block) > 1])

    def _answer(self, row: Row) -> tuple[Example, int]:
        """The answer alone is learnt; where both are too long, the prompt loses its beginning first."""
        prompt, answer = self._ids(row["prompt"], special=True), self._ids(row["completion"]) + self.end
        if prompt[-1:] == self.end:
            prompt = prompt[:-1]
        tokens, answer = 1 + len(answer), answer[: self.length - 1]
        prompt = prompt[-(self.length - len(answer)) :]
        return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}, tokens

    def _pair(self, row: Row) -> tuple[Example, int]:
        return self._cut(self._ids(row["prompt"], special=True), self._ids(row["completion"]) + self.end)

    def _chat(self, row: Row) -> tuple[Example, int]:
        """The conversation in the tokenizer's template; what the assistant says is learnt, with the end of its turn."""
        messages: list[Message] = row["messages"]
        ids: list[int] = []
        labels: list[int] = []
        for number, turn in enumerate(messages, 1):
            if turn["role"] != "assistant":
                continue
            asked = self._template(messages[: number - 1], True)
            said = self._template(messages[:number], False)
            if said[: len(asked)] != asked:  # a template that leads an answer in with words of its own
                asked = asked[: next(i for i, token in enumerate(asked) if token != said[i : i + 1][0])]
            if asked[: len(ids)] != ids:
                raise ValueError("the chat template changes earlier turns of a conversation; split it into single ones")
            labels += [IGNORED] * (len(asked) - len(labels)) + said[len(asked) :]
            ids = said
        return self._cut(ids, labels)

    def _template(self, messages: Sequence[Message], prompt: bool) -> list[int]:
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # of the template's own
            raise ValueError(f"the tokenizer's chat template refuses the conversation: {error}") from error
        return self._ids(text)

    def _number(self, label: Any) -> int:
        if str(label) not in self.labels:
            raise ValueError(f"label {label!r} is not one of {', '.join(self.labels)}")
        return self.labels.index(str(label))

    def _sequence(self, row: Row) -> tuple[Example, int]:
        ids = self._ids(row["text"], special=True)
        try:
            label = float(row["label"]) if self.task == "regression" else self._number(row["label"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"field 'label': {error}") from error
        return {"input_ids": ids[: self.length], "label": label}, len(ids)

    def _tokens(self, row: Row) -> tuple[Example, int]:
        """The first piece of each word has its label, the others are not learnt."""
        encoded = self.tokenizer(row["tokens"], is_split_into_words=True, verbose=False)
        words = encoded.word_ids()
        firsts = [word is not None and word != before for word, before in zip(words, [None, *words], strict=False)]
        labels = [self._number(row["label"][w]) if first else IGNORED for w, first in zip(words, firsts, strict=True)]
        return self._cut(encoded["input_ids"], labels)

    def _image(self, row: Row) -> tuple[Example, int]:
        return {"image": _stored(row["image"]), "label": self._number(row["label"])}, 0

    def _speech(self, row: Row) -> tuple[Example, int]:
        ids = self.tokenizer.tokenizer(row["text"])["input_ids"]
        return {"audio": _stored(row["audio"]), "labels": ids[: self.length]}, len(ids)


def _names(labels: Iterable[Any]) -> list[str]:
    """The classes in their order: by number, then by name."""
    names = {str(entry) for label in labels for entry in (label if isinstance(label, list) else [label])}
    return sorted(names, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))


def _stored(value: Any) -> dict[str, Any]:
    """An image or audio as `datasets` has it, its file checked to be there."""
    value = {"path": value, "bytes": None} if isinstance(value, str) else value
    if not isinstance(value, dict):
        raise ValueError(f"images and audio are paths of files, or what `datasets` stores of them, got {value!r:.60}")
    if value.get("bytes") is None and "array" not in value and not os.path.isfile(value["path"]):
        raise ValueError(f"there is no file {value['path']}")
    return value


def shown(example: Example, tokenizer: Any) -> str:
    """An example as rich text: what is learnt is green, the rest is grey."""
    from itertools import groupby

    from rich.markup import escape

    pairs = zip(example["labels"], example["input_ids"], strict=True)
    parts = [
        (learnt, tokenizer.decode([token for _, token in part]))
        for learnt, part in groupby(pairs, lambda pair: pair[0] != IGNORED)
    ]
    return "".join(f"[{'green' if learnt else 'dim'}]{escape(text)}[/]" for learnt, text in parts)


def metrics_for(task: str) -> Callable[[Any], dict[str, float]] | None:
    """What `Trainer` calls with predictions and labels: accuracy and F1, or the errors of a regression."""
    if "classification" not in task and task != "regression":
        return None
    import numpy as np
    from sklearn.metrics import accuracy_score, f1_score, r2_score, root_mean_squared_error

    def measure(outcome: Any) -> dict[str, float]:
        scores = outcome.predictions[0] if isinstance(outcome.predictions, tuple) else outcome.predictions
        wanted = np.asarray(outcome.label_ids).reshape(-1)
        if task == "regression":
            r2 = float(r2_score(wanted, scores.reshape(-1))) if len(wanted) > 1 else 0.0
            return {"rmse": float(root_mean_squared_error(wanted, scores.reshape(-1))), "r2": r2}
        found = scores.argmax(-1).reshape(-1)[wanted != IGNORED]
        wanted = wanted[wanted != IGNORED]
        return {"accuracy": accuracy_score(wanted, found), "f1": f1_score(wanted, found, average="macro")}

    return measure


def collator_for(task: str, processor: Any, start: int | None = None) -> Any:
    """What makes batches of examples.

    Args:
        task: one of `TASKS`.
        processor: of the model: the tokenizer, or what reads images or audio.
        start: the token that the model itself puts before what it writes.
    """
    import transformers

    if TASKS[task].peft == "SEQ_CLS":
        return transformers.DataCollatorWithPadding(processor)
    if task == "token-classification":
        return transformers.DataCollatorForTokenClassification(processor)
    if task == "image-classification":
        return lambda rows: _images(rows, processor)
    if TASKS[task].processor == "AutoProcessor":
        return lambda rows: _sounds(rows, processor, start)
    return transformers.DataCollatorForSeq2Seq(processor, label_pad_token_id=IGNORED)


def _images(rows: Sequence[Mapping[str, Any]], processor: Any) -> Mapping[str, Any]:
    import torch
    from datasets import Image

    images = [Image().decode_example(row["image"]).convert("RGB") for row in rows]
    return {**processor(images, return_tensors="pt"), "labels": torch.tensor([row["label"] for row in rows])}


def _sounds(rows: Sequence[Mapping[str, Any]], processor: Any, start: int | None) -> Mapping[str, Any]:
    import torch

    extractor = processor.feature_extractor
    fixed = hasattr(extractor, "nb_max_frames")  # whisper's encoder takes 30 seconds, neither more nor less
    sounds = [_samples(row["audio"], extractor.sampling_rate) for row in rows]
    batch = extractor(
        sounds, sampling_rate=extractor.sampling_rate, padding="max_length" if fixed else True, return_tensors="pt"
    )
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
