"""The embedded default: a tiny language model made on the spot, and texts that every Python installation has.

The base model learns English about Python from the language reference (`pydoc_data.topics`). The fine-tuning data is
the source code of a few modules of the standard library, which it is bad at, so that an adapter has something to do.
"""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from peft.cli.data import Batches, make_examples, split
from peft.cli.loop import evaluate, optimize, progress
from peft.cli.models import transformers

BASE_STEPS = 500
BLOCK = 128
END = "<|end|>"
MODULES = (
    "argparse ast bisect calendar collections configparser csv dataclasses fractions functools gzip heapq"
    " json.decoder json.encoder pathlib queue random shlex shutil statistics string tempfile textwrap threading typing"
)


def language_reference() -> list[str]:
    """The texts of Python's `help()`."""
    from pydoc_data.topics import topics

    return list(topics.values())


def library_sources() -> list[str]:
    """The source code of some modules of the standard library."""
    found = [find_spec(name) for name in MODULES.split()]
    paths = [Path(spec.origin) for spec in found if spec is not None and spec.origin and spec.origin.endswith(".py")]
    return [path.read_text(encoding="utf-8") for path in paths]


def _make_tokenizer(texts: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=2048, special_tokens=[END], initial_alphabet=alphabet, show_progress=False),
    )
    return transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, model_max_length=BLOCK
    )


def _make_model(vocab_size: int) -> Any:
    config = transformers().LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=BLOCK,
        tie_word_embeddings=True,
        initializer_range=0.08,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return transformers().LlamaForCausalLM(config)


def base_model(folder: Path, console: Any, steps: int | None = None) -> str:
    """Path of the tiny base model in `folder`; made there if it is not there yet."""
    steps = BASE_STEPS if steps is None else steps
    path = (folder / f"tiny-base-{steps}").absolute()
    if path.is_dir():
        console.print(f"Base model: the tiny one in {os.path.relpath(path)}")
        return str(path)
    torch.manual_seed(0)
    texts = language_reference()
    tokenizer = _make_tokenizer(texts)
    examples, held_out = split(make_examples(texts, tokenizer, BLOCK)[0], 0.05, seed=0)
    model = _make_model(len(tokenizer))
    console.print(f"Base model: a Llama of {model.num_parameters():,} parameters, made now from Python's help texts")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = transformers().get_linear_schedule_with_warmup(optimizer, min(20, steps // 2), steps)
    batches = Batches(examples, 8, 1, tokenizer.pad_token_id, torch.device("cpu"), seed=0)
    before = evaluate(model, held_out, 8, tokenizer.pad_token_id)
    with progress(console, "making it", steps) as advance:
        for _, loss in optimize(model, batches, optimizer, scheduler, range(steps), max_grad_norm=1.0):
            advance(f"loss {loss:.2f}")
    after = evaluate(model, held_out, 8, tokenizer.pad_token_id)
    console.print(f"  loss on held-out help texts: {before:.2f} -> {after:.2f}")
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    try:
        unfinished.rename(path)
    except OSError:  # another process was faster
        shutil.rmtree(unfinished)
    return str(path)
