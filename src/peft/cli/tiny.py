"""The embedded default: a tiny language model made on the spot, and texts that every Python installation has.

The base model learns English about Python from the language reference (`pydoc_data.topics`). The fine-tuning data is
the source code of a few modules of the standard library, which it is bad at, so that an adapter has something to do.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from peft.cli import models
from peft.cli.options import TABLES
from peft.cli.records import Record
from peft.cli.tasks import Encoder, collator_for
from peft.cli.watch import Watch, console

#: steps that its making takes; PEFT_TINY_STEPS is there for tests
STEPS = int(os.environ.get("PEFT_TINY_STEPS", 500))
BLOCK, END = TABLES.tiny["config"]["max_position_embeddings"], "<|end|>"


def library_sources() -> list[Record]:
    """The source code of some modules of the standard library."""
    found = [find_spec(name) for name in TABLES.tiny["modules"]]
    paths = [Path(spec.origin) for spec in found if spec is not None and spec.origin and spec.origin.endswith(".py")]
    return [(str(path), {"text": path.read_text(encoding="utf-8")}) for path in paths]


def base_model(folder: Path) -> str:
    """Path of the tiny base model in `folder`; made there if it is not there yet."""
    from accelerate import PartialState

    path = folder / f"tiny-{STEPS}"
    with PartialState().main_process_first():
        if not path.is_dir():
            _make(path)
    return str(path)


def _make(path: Path) -> None:
    from pydoc_data.topics import topics

    from tokenizers import ByteLevelBPETokenizer

    library, words, out = models.transformers(), ByteLevelBPETokenizer(), console(stderr=True)
    words.train_from_iterator(list(topics.values()), vocab_size=2048, special_tokens=[END], show_progress=False)
    named = dict(eos_token=END, pad_token=END, model_max_length=BLOCK)
    tokenizer = library.PreTrainedTokenizerFast(tokenizer_object=words._tokenizer, **named)
    library.set_seed(0)
    model = library.LlamaForCausalLM(library.LlamaConfig(vocab_size=len(tokenizer), **TABLES.tiny["config"]))
    out.print(f"Making a model of {model.num_parameters():,} parameters of Python's help texts, once, in {path}")
    records: list[Record] = [(name, {"text": text}) for name, text in topics.items()]
    examples = Encoder("causal-lm", tokenizer, BLOCK)(records).examples
    with models.made_once(path) as unfinished:
        arguments = library.TrainingArguments(
            str(unfinished), max_steps=STEPS, warmup_steps=min(20, STEPS // 2), logging_steps=max(1, STEPS // 10),
            **TABLES.tiny["arguments"],
        )  # fmt: skip
        trainer = library.Trainer(
            model, arguments, collator_for("causal-lm", tokenizer), examples, processing_class=tokenizer,
            callbacks=[Watch(out)],
        )  # fmt: skip
        trainer.remove_callback(library.PrinterCallback)
        trainer.train()
        trainer.save_model()
