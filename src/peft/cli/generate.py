"""`peft generate`: text from a model, with an adapter or without."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from peft.cli import models
from peft.cli.options import Generate
from peft.cli.records import read_records, turns_of


def run(options: Generate, *_: Any) -> int:
    asked = list(_questions(options))  # what is wrong with them is said before a model is loaded
    model, tokenizer = _load(options)
    chat = bool(tokenizer.chat_template) if options.chat is None else options.chat
    if chat and not tokenizer.chat_template:
        raise ValueError("--chat: the tokenizer has no chat template")
    system = [{"role": "system", "content": options.system}] if options.system else []
    if options.prompts:
        for messages in asked:
            text = write(model, tokenizer, [*system, *messages] if chat else messages[-1]["content"], options)
            print(json.dumps({"prompt": messages[-1]["content"], "answer": text}, ensure_ascii=False), flush=True)
    elif asked:
        write(model, tokenizer, [*system, *asked[0]] if chat else asked[0][-1]["content"], options, stream=True)
    else:
        talk(model, tokenizer, system, options)
    return 0


def _questions(options: Generate) -> Iterator[list[dict[str, str]]]:
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


def _load(options: Generate) -> tuple[Any, Any]:
    """(an adapted or plain model, its tokenizer)"""
    name = options.adapter
    if (os.path.isdir(name) and not os.path.isfile(os.path.join(name, "adapter_config.json"))) or name == models.SMOLLM:
        base = models.locate(name, lambda words: print(words, file=sys.stderr))
        task = models.writer_of(models.config_of(base)).auto
        dtype, device = models.dtype_of(options.dtype), models.device_of(options.device)
        return models.load_base(base, task, dtype=dtype, device=device), models.load_tokenizer(base)
    model = models.load_adapted(name, model=options.model, dtype=options.dtype, device=options.device)
    return model, models.load_tokenizer(model.get_base_model().name_or_path, name)


def talk(model: Any, tokenizer: Any, messages: list[dict[str, str]], options: Generate) -> None:
    """A conversation on a terminal, until an empty line or the end of input."""
    if not tokenizer.chat_template:
        raise ValueError("--prompt is needed: the tokenizer has no chat template to talk in")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            line = ""
        if not line:
            return
        messages = [*messages, {"role": "user", "content": line}]
        messages.append({"role": "assistant", "content": write(model, tokenizer, messages, options, stream=True)})


def write(model: Any, tokenizer: Any, asked: Any, options: Generate, stream: bool = False) -> str:
    """What the model writes: the answer to a conversation, or a text and how it goes on.

    Args:
        model: in transformers' way, adapted or not.
        tokenizer: of the model.
        asked: a text, or messages with `role` and `content`.
        options: how to draw.
        stream: print it while it comes.
    """
    library, chat = models.transformers(), not isinstance(asked, str)
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True) if chat else asked
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not chat).to(model.device)
    inputs.pop("token_type_ids", None)
    whole = not chat and not model.config.is_encoder_decoder
    draw: dict[str, Any] = dict(do_sample=False, temperature=None, top_p=None, top_k=None)
    if options.temperature > 0:
        draw = dict(do_sample=True, temperature=options.temperature, top_k=options.top_k)
    if stream:
        draw["streamer"] = library.TextStreamer(tokenizer, skip_prompt=not whole, skip_special_tokens=True)
    torch.manual_seed(options.seed)
    model.eval()
    with torch.no_grad():
        tokens = model.generate(
            **inputs, max_new_tokens=options.max_new_tokens, pad_token_id=tokenizer.pad_token_id, **draw
        )[0]
    start = 0 if whole or model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    return tokenizer.decode(tokens[start:], skip_special_tokens=True)
