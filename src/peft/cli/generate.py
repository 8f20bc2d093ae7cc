"""`peft generate`: text from a model, with an adapter or without."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from peft.cli import models
from peft.cli.records import read_records, turns_of


def run(options: Any, *_: Any) -> None:
    asked = list(_questions(options))  # what is wrong with them is said before a model is loaded
    model, tokenizer = _load(options)
    chat = bool(tokenizer.chat_template) if options.chat is None else options.chat
    if chat and not tokenizer.chat_template:
        raise ValueError("--chat: the tokenizer has no chat template")
    system = [{"role": "system", "content": options.system}] if options.system else []
    draw = {name: getattr(options, name) for name in ("max_new_tokens", "temperature", "top_k", "seed")}
    for messages in asked:
        last, stream = messages[-1]["content"], not options.prompts
        text = write(model, tokenizer, [*system, *messages] if chat else last, **draw, stream=stream)
        if not stream:
            print(json.dumps({"prompt": last, "answer": text}, ensure_ascii=False), flush=True)
    if not asked:
        talk(model, tokenizer, system, **draw)


def _questions(options: Any) -> Iterator[list[dict[str, str]]]:
    """What is asked, as conversations."""
    if options.prompts:
        for where, row in read_records([options.prompts]):
            if "messages" in row or "prompt" in row:
                try:
                    yield turns_of(row.get("messages", [{"role": "user", "content": row.get("prompt")}]))
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from error
            elif Path(options.prompts).suffix in (".jsonl", ".json", ".csv", ".tsv"):
                raise ValueError(f"{where}: neither prompt nor messages, but {', '.join(row)}")
            else:
                yield from ([{"role": "user", "content": line}] for line in row["text"].splitlines() if line.strip())
    elif options.prompt is not None or not sys.stdin.isatty():
        text = sys.stdin.read() if options.prompt in (None, "-") else options.prompt
        if not text:
            raise ValueError("the prompt is empty")
        yield [{"role": "user", "content": text}]


def _load(options: Any) -> tuple[Any, Any]:
    """(an adapted or plain model, its tokenizer)"""
    name = options.adapter
    if (os.path.isdir(name) and not os.path.isfile(os.path.join(name, "adapter_config.json"))) or name == models.SMOLLM:
        base = models.locate(name, lambda words: print(words, file=sys.stderr))
        task = models.writer_of(models.config_of(base)).auto
        return models.load_base(base, task, **models.placed(options)), models.load_processor(base)
    model = models.load_adapted(name, options)
    return model, models.tokenizer_of(name, model)


def talk(model: Any, tokenizer: Any, messages: list[dict[str, str]], **draw: Any) -> None:
    """A conversation on a terminal, until an empty line or the end of input."""
    if not tokenizer.chat_template:
        raise ValueError("--prompt is needed: the tokenizer has no chat template to talk in")
    with suppress(EOFError):
        while line := input("> ").strip():
            messages = [*messages, {"role": "user", "content": line}]
            messages.append({"role": "assistant", "content": write(model, tokenizer, messages, **draw, stream=True)})


def write(
    model: Any, tokenizer: Any, asked: Any, max_new_tokens: int, temperature: float = 0.0, top_k: int = 50,
    seed: int = 0, stream: bool = False,
) -> str:  # fmt: skip
    """What the model writes: the answer to a conversation, or a text and how it goes on.

    Args:
        model: in transformers' way, adapted or not.
        tokenizer: of the model.
        asked: a text, or messages with `role` and `content`.
        max_new_tokens, temperature, top_k, seed: how to draw, as the command's options say.
        stream: print it while it comes.
    """
    library, chat = models.transformers(), not isinstance(asked, str)
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True) if chat else asked
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not chat).to(model.device)
    inputs.pop("token_type_ids", None)
    answers = model.config.is_encoder_decoder
    draw: dict[str, Any] = dict(do_sample=False, temperature=None, top_p=None, top_k=None)
    if temperature > 0:
        draw = dict(do_sample=True, temperature=temperature, top_k=top_k)
    if stream:
        draw["streamer"] = library.TextStreamer(tokenizer, skip_prompt=chat or answers, skip_special_tokens=True)
    torch.manual_seed(seed)
    model.eval()
    with torch.no_grad():
        tokens = model.generate(
            **inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **draw
        )[0]
    start = inputs["input_ids"].shape[1] if chat and not answers else 0
    return tokenizer.decode(tokens[start:], skip_special_tokens=True)
