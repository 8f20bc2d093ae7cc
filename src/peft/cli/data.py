"""Text and JSON files as examples for a language model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

#: a text to learn, or (what is given, the answer to learn)
Document = str | tuple[str, str]
#: `input_ids` and `labels`, lists of token ids; labels of -100 are not learnt
Example = dict[str, list[int]]

IGNORED = -100


def read_documents(files: Sequence[str], *, text: str, prompt: str, completion: str) -> list[Document]:
    """The documents in `files`: a text file is one, a .jsonl file holds one in each line, a .json file a list of them.

    Args:
        files: paths.
        text: JSON field of a text.
        prompt: JSON field of what is given.
        completion: JSON field of the answer.

    Raises:
        OSError: a file cannot be read.
        ValueError: a record has none of these fields, or is no JSON.
    """
    documents: list[Document] = []
    for path in map(Path, files):
        content = path.read_text(encoding="utf-8")
        if path.suffix not in (".jsonl", ".json"):
            documents.append(content)
            continue
        try:
            lines = content.splitlines() if path.suffix == ".jsonl" else []
            records = [json.loads(line) for line in lines if line.strip()] if lines else json.loads(content)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        for number, record in enumerate(records, 1):
            if isinstance(record, dict) and text in record:
                documents.append(record[text])
            elif isinstance(record, dict) and prompt in record and completion in record:
                documents.append((record[prompt], record[completion]))
            else:
                found = ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
                raise ValueError(
                    f"{path}, record {number}: no {text!r}, no {prompt!r} with {completion!r}, but {found}."
                    " Name the fields with --text-field, or --prompt-field and --completion-field"
                )
    return documents


def make_examples(
    documents: Iterable[Document], tokenizer: Any, block: int, *, seq2seq: bool = False
) -> tuple[list[Example], int]:
    """(examples of at most `block` tokens, how many answers had to be cut to that).

    Texts are joined, with the end-of-text token between them, and cut into blocks. Of a prompt with an answer the
    answer alone is learnt; where both are too long, the prompt loses its beginning first.

    Raises:
        ValueError: a plain text for an encoder-decoder, or nothing to learn at all.
    """
    eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    stream: list[int] = []
    examples: list[Example] = []
    cut = 0
    for document in documents:
        if isinstance(document, str):
            if seq2seq:
                raise ValueError("an encoder-decoder learns answers to prompts: the data has to be JSON with both")
            stream += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] + eos
            continue
        prompt = tokenizer(document[0], verbose=False)["input_ids"]
        answer = tokenizer(document[1], add_special_tokens=False, verbose=False)["input_ids"] + eos
        cut += len(answer) > block - (not seq2seq)
        answer = answer[: block - (not seq2seq)]
        if seq2seq:
            examples.append({"input_ids": prompt[:block], "labels": answer})
        else:
            if prompt[-1:] == eos:
                prompt = prompt[:-1]
            prompt = prompt[-(block - len(answer)) :]
            examples.append({"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer})
    for start in range(0, len(stream), block):
        tokens = stream[start : start + block]
        if len(tokens) > 1:  # the first token of a block is given, not learnt
            examples.append({"input_ids": tokens, "labels": tokens})
    if not examples:
        raise ValueError("there is no text in the data")
    return examples, cut


def split(examples: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(examples to train on, examples held out), drawn at random."""
    held_out = min(math.ceil(share * len(examples)), len(examples) - 1)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    return [examples[i] for i in sorted(order[held_out:])], [examples[i] for i in sorted(order[:held_out])]


def collate(examples: Sequence[Example], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """One batch: `input_ids`, `attention_mask` and `labels`, each [examples, longest]."""
    fill = {"input_ids": pad, "labels": IGNORED, "attention_mask": 0}
    rows = [{**example, "attention_mask": [1] * len(example["input_ids"])} for example in examples]
    return {
        name: torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=value
        ).to(device)
        for name, value in fill.items()
    }


class Batches:
    """The batches of each optimizer step: every epoch in an order of its own, the same at each call.

    Args:
        examples: what to draw from.
        size: examples of a batch.
        per_step: batches of a step.
        pad: token id to pad with.
        device: where the tensors go.
        seed: of the order.
    """

    def __init__(
        self, examples: Sequence[Example], size: int, per_step: int, pad: int, device: torch.device, seed: int
    ):
        self.examples, self.size, self.per_step, self.pad, self.device, self.seed = (
            examples,
            size,
            per_step,
            pad,
            device,
            seed,
        )
        self._per_epoch = math.ceil(len(examples) / size)
        self._order = lru_cache(2)(self._shuffled)

    @property
    def steps_per_epoch(self) -> float:
        return self._per_epoch / self.per_step

    def _shuffled(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.examples), generator=generator).tolist()

    def __call__(self, step: int) -> list[dict[str, torch.Tensor]]:
        batches = []
        for number in range(step * self.per_step, (step + 1) * self.per_step):
            epoch, place = divmod(number, self._per_epoch)
            chosen = self._order(epoch)[place * self.size : (place + 1) * self.size]
            batches.append(collate([self.examples[i] for i in chosen], self.pad, self.device))
        return batches
