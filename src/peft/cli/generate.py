"""`peft generate`: text from a model, with an adapter or without."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch

from peft.cli import models
from peft.cli.options import explained, refuse
from peft.cli.records import from_system, read_records, turns_of
from peft.helpers import check_if_peft_model


def run(options: Any, *_: Any) -> None:
    refuse(options.prompt is not None and options.prompts, "either --prompt or --prompts, not both")
    asked = list(_questions(options))  # what is wrong with them is said before a model is loaded
    name = options.adapter
    if (name not in (models.SMOLLM, models.TINY) or os.path.isdir(name)) and check_if_peft_model(name):
        model = models.load_adapted(name, options)
        tokenizer = models.tokenizer_of(name, model)
    else:
        base = models.locate(name)
        auto = models.writer_of(models.config_of(base)).auto
        model, tokenizer = models.load_base(base, auto, **models.placed(options)), models.load_processor(base)
    chat = bool(tokenizer.chat_template) if options.chat is None or not asked else options.chat
    mute = not tokenizer.chat_template and (options.chat or not asked)
    refuse(mute, "the tokenizer has no chat template: no --chat, and --prompt is needed")
    lost = options.system and not chat
    refuse(lost, "--system is said in a chat: it needs --chat, and a tokenizer with a chat template")
    system = from_system(options.system)
    for messages in asked:
        last = messages[-1]["content"]
        text = write(model, tokenizer, [*system, *messages] if chat else last, options)
        if options.prompts:
            print(json.dumps({"prompt": last, "answer": text}, ensure_ascii=False), flush=True)
    with suppress(EOFError):  # a conversation on a terminal, until an empty line or the end of input
        while not asked and (line := input("> ").strip()):
            system = [*system, {"role": "user", "content": line}]
            system.append({"role": "assistant", "content": write(model, tokenizer, system, options)})


def _questions(options: Any) -> Iterator[list[dict[str, str]]]:
    """What is asked, as conversations."""
    if options.prompts:
        for where, row in read_records([options.prompts]):
            lines = [row["prompt"]] if "prompt" in row else str(row.get("text", "")).splitlines()
            refuse(not lines and "messages" not in row, f"{where}: neither prompt nor messages, but {', '.join(row)}")
            asked = [[{"role": "user", "content": line}] for line in lines if line is None or line.strip()]
            with explained(where):
                yield from map(turns_of, [row["messages"]] if "messages" in row else asked)
    elif options.prompt is not None or not sys.stdin.isatty():
        text = sys.stdin.read() if options.prompt in (None, "-") else options.prompt
        refuse(not text, "the prompt is empty")
        yield [{"role": "user", "content": text}]


def write(model: Any, tokenizer: Any, asked: Any, options: Any) -> str:
    """What the model writes: the answer to a conversation, or a text and how it goes on; printed while it comes.

    Args:
        model: in transformers' way, adapted or not.
        tokenizer: of the model.
        asked: a text, or messages with `role` and `content`.
        options: how to draw; with `prompts`, nothing is printed.
    """
    library, chat, answers = models.transformers(), not isinstance(asked, str), model.config.is_encoder_decoder
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True) if chat else asked
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not chat, return_token_type_ids=False)
    streamer = library.TextStreamer(tokenizer, skip_prompt=chat or answers, skip_special_tokens=True)
    torch.manual_seed(options.seed)
    tokens = model.generate(
        **inputs.to(model.device), do_sample=options.temperature > 0, temperature=options.temperature,
        top_k=options.top_k, max_new_tokens=options.max_new_tokens, pad_token_id=tokenizer.pad_token_id,
        streamer=None if options.prompts else streamer,
    )[0]  # fmt: skip
    start = inputs["input_ids"].shape[1] if chat and not answers else 0
    return tokenizer.decode(tokens[start:], skip_special_tokens=True)
