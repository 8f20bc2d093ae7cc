"""The tasks: which head a model needs, how a record becomes numbers, how the outcome is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peft.cli.records import Message, Record

IGNORED = -100
Example = dict[str, Any]
#: the usual format where a tokenizer has no chat template
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class Task:
    """A task.

    Attributes:
        peft: its name for `task_type`.
        auto: class of transformers that loads a model with the head for it.
        mapping: table of transformers with the model types that have such a head.
    """

    peft: str
    auto: str
    mapping: str


_CAUSAL = Task("CAUSAL_LM", "AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
_SEQUENCE = Task(
    "SEQ_CLS", "AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"
)  # fmt: skip
_TOKENS = Task("TOKEN_CLS", "AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES")
_SEQ2SEQ = Task("SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES")
TASKS = {
    "causal-lm": _CAUSAL, "chat": _CAUSAL, "preference": _CAUSAL, "seq2seq": _SEQ2SEQ,
    "classification": _SEQUENCE, "regression": _SEQUENCE, "token-classification": _TOKENS,
}  # fmt: skip


@dataclass
class Encoded:
    """Records as numbers.

    Attributes:
        examples: `input_ids` with `labels` or `label`; the records' own fields for the task preference.
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
        tokenizer: of the model.
        length: tokens of one example at most.
        numbered: whether examples say their `task_ids`, as methods for several tasks need.
    """

    def __init__(self, task: str, tokenizer: Any, length: int, numbered: bool = False):
        self.task, self.tokenizer, self.length, self.numbered = task, tokenizer, length, numbered
        self.labels: list[str] = []
        self.end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []

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
            self.labels = self._names(row["label"] for _, row in records)
        encode: Callable[[Mapping[str, Any]], tuple[Example, bool]] = {
            "chat": self._chat, "causal-lm": self._answer, "seq2seq": self._pair,
            "token-classification": self._tokens,
        }.get(self.task, self._sequence)  # fmt: skip
        found = Encoded([], labels=self.labels)
        for where, row in records:
            try:
                example, cut = encode(row)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{where}: {error.args[0] if error.args else error}") from error
            if self.numbered:
                example["task_ids"] = row.get("task_ids", 0)
            learns = "label" in example or any(label != IGNORED for label in example["labels"])
            found.cut += cut
            found.dropped += not learns
            if learns:
                found.examples.append(example)
        if not found.examples:
            raise ValueError(f"nothing is left to learn within --max-length {self.length} tokens")
        return found

    def _ids(self, text: str, special: bool = False) -> list[int]:
        return self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    def _blocks(self, texts: Iterable[str]) -> Encoded:
        """Texts one after the other, with the end-of-text token between them, cut into blocks."""
        stream = [token for text in texts for token in self._ids(text) + self.end]
        blocks = [stream[start : start + self.length] for start in range(0, len(stream), self.length)]
        # the first token of a block is given, not learnt
        task = {"task_ids": 0} if self.numbered else {}
        return Encoded([{"input_ids": block, "labels": block, **task} for block in blocks if len(block) > 1])

    def _answer(self, row: Mapping[str, Any]) -> tuple[Example, bool]:
        """The answer alone is learnt; where both are too long, the prompt loses its beginning first."""
        prompt, answer = self._ids(row["prompt"], special=True), self._ids(row["completion"]) + self.end
        if prompt[-1:] == self.end:
            prompt = prompt[:-1]
        cut = len(answer) > self.length - 1
        answer = answer[: self.length - 1]
        prompt = prompt[-(self.length - len(answer)) :]
        return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}, cut

    def _pair(self, row: Mapping[str, Any]) -> tuple[Example, bool]:
        prompt, answer = self._ids(row["prompt"], special=True), self._ids(row["completion"]) + self.end
        cut = max(len(prompt), len(answer)) > self.length
        return {"input_ids": prompt[: self.length], "labels": answer[: self.length]}, cut

    def _chat(self, row: Mapping[str, Any]) -> tuple[Example, bool]:
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
        return {"input_ids": ids[: self.length], "labels": labels[: self.length]}, len(ids) > self.length

    def _template(self, messages: Sequence[Message], prompt: bool) -> list[int]:
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # of the template's own
            raise ValueError(f"the tokenizer's chat template refuses the conversation: {error}") from error
        return self._ids(text)

    def _names(self, labels: Iterable[Any]) -> list[str]:
        flat = (entry for label in labels for entry in (label if isinstance(label, list) else [label]))
        names = set(map(str, flat))
        return sorted(names, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))

    def _number(self, label: Any) -> int:
        if str(label) not in self.labels:
            raise ValueError(f"label {label!r} is not one of {', '.join(self.labels)}")
        return self.labels.index(str(label))

    def _sequence(self, row: Mapping[str, Any]) -> tuple[Example, bool]:
        ids = self._ids(row["text"], special=True)
        try:
            label = float(row["label"]) if self.task == "regression" else self._number(row["label"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"field 'label': {error}") from error
        return {"input_ids": ids[: self.length], "label": label}, len(ids) > self.length

    def _tokens(self, row: Mapping[str, Any]) -> tuple[Example, bool]:
        """The first piece of each word has its label, the others are not learnt."""
        encoded = self.tokenizer(row["tokens"], is_split_into_words=True, verbose=False)
        labels, before = [], None
        for word in encoded.word_ids():
            labels.append(IGNORED if word is None or word == before else self._number(row["label"][word]))
            before = word
        ids = encoded["input_ids"]
        return {"input_ids": ids[: self.length], "labels": labels[: self.length]}, len(ids) > self.length


def shown(example: Example, tokenizer: Any) -> str:
    """An example as rich text: what is learnt is green, the rest is grey."""
    from rich.markup import escape

    parts: list[tuple[bool, list[int]]] = []
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        learnt = label != IGNORED
        if not parts or parts[-1][0] != learnt:
            parts.append((learnt, []))
        parts[-1][1].append(token)
    styles = {True: "green", False: "dim"}
    return "".join(f"[{styles[learnt]}]{escape(tokenizer.decode(ids))}[/]" for learnt, ids in parts)


def metrics_for(task: str) -> Callable[[Any], dict[str, float]] | None:
    """What `Trainer` calls with predictions and labels: accuracy and F1, or the errors of a regression."""
    if "classification" not in task and task != "regression":
        return None
    import numpy as np
    from sklearn.metrics import accuracy_score, f1_score, mean_squared_error, r2_score

    def measure(outcome: Any) -> dict[str, float]:
        scores = outcome.predictions[0] if isinstance(outcome.predictions, tuple) else outcome.predictions
        wanted = np.asarray(outcome.label_ids)
        if task == "regression":
            scores, wanted = scores.reshape(-1), wanted.reshape(-1)
            r2 = float(r2_score(wanted, scores)) if len(wanted) > 1 else 0.0
            return {"rmse": float(mean_squared_error(wanted, scores)) ** 0.5, "r2": r2}
        found, wanted = scores.argmax(-1).reshape(-1), wanted.reshape(-1)
        found, wanted = found[wanted != IGNORED], wanted[wanted != IGNORED]
        return {"accuracy": accuracy_score(wanted, found), "f1": f1_score(wanted, found, average="macro")}

    return measure


def collator_for(task: str, tokenizer: Any) -> Any:
    """What makes batches of examples."""
    import transformers

    if TASKS[task].peft == "SEQ_CLS":
        return transformers.DataCollatorWithPadding(tokenizer)
    if task == "token-classification":
        return transformers.DataCollatorForTokenClassification(tokenizer)
    return transformers.DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
