"""A run, checked in everything that is cheap, before a weight is loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from peft.cli import models, tiny
from peft.cli.options import ALIASES, RATES
from peft.cli.parse import OptionError, init_types, method_named
from peft.cli.records import Record, read_records, understand
from peft.cli.tasks import TASKS, Encoder, shown
from peft.registry import METHODS

#: optimizers of this library
OPTIMIZERS = ("loraplus", "lorafa", "riemannian")
#: task -> the one that models without a head for it have for the same records
OTHERWISE = {"causal-lm": "seq2seq", "speech": "ctc"}


@dataclass
class Plan:
    """A run, checked, before its model is loaded.

    Attributes:
        options: of the command.
        base: folder or hub id of the base model.
        task: name in `TASKS`.
        tokenizer: of the base model, or its processor.
        training, held_out: data sets; `held_out` is None where nothing is.
        config: of the method.
        arguments: of the trainer.
        labels: names of the classes.
        trainer: (library, class) of the trainer.
        total: optimizer steps.
    """

    options: Any
    base: str
    task: str
    tokenizer: Any
    training: Any
    held_out: Any
    config: Any
    arguments: Any
    labels: Sequence[str]
    trainer: tuple[str, str]
    total: int


def prepare(options: Any, fields: Mapping[str, Any], trainer: Mapping[str, Any], out: Any) -> Plan:
    """Reads the data and the model's configuration, and checks everything that can be without its weights.

    Raises:
        ValueError: something does not fit; says what.
    """
    method = method_named(options.method)
    _check_options(options)
    configured = configure(method, fields, "CAUSAL_LM", 100)  # a wrong field is said before anything is read
    options = replace(options, data=_absolute(options.data), eval_data=_absolute(options.eval_data))
    records = read_records(options.data) if options.data else tiny.library_sources()
    task, records = understand(records, options.columns, options.task)
    base = models.locate(options.model, out.print) if options.model else tiny.base_model(models.cache(), out)
    if options.model:
        options = replace(options, model=base)
    config = models.config_of(base)
    if options.task is None and task not in models.tasks_of(config):
        task = OTHERWISE.get(task, task)
    models.check_task(config, task)
    if task == "seq2seq" and "prompt" not in records[0][1]:
        raise ValueError(f"{records[0][0]}: an encoder-decoder learns answers: records need prompt and completion")
    if TASKS[task].peft is None and METHODS[method].prompt:
        raise OptionError(f"{options.method}: soft prompts are for models that read text, not for {task}")
    if TASKS[task].processor == "AutoProcessor" and find_spec("soundfile") is None:
        raise ImportError(f"the task {task} needs soundfile: pip install soundfile")
    tokenizer = models.load_processor(base, TASKS[task].processor, options.chat_template)
    chats = task == "chat" or isinstance(records[0][1].get("prompt"), list)
    if chats and not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of {base} has no chat template: --chat-template chatml, or a file with one")

    known = {"layers": config.get_text_config(), "tokenizer_name_or_path": base}
    virtual = getattr(configured, "num_virtual_tokens", None) or 0
    length = min(options.max_length, models.longest(config, tokenizer) - virtual)
    numbered = not {"num_tasks", "n_tasks"}.isdisjoint(init_types(METHODS[method].config_class))
    encoder = Encoder(task, tokenizer, length, numbered)
    training, held_out = _data_sets(options, encoder, records, out)
    total = steps_of(options, len(training))
    if options.warmup_steps >= total:
        raise OptionError(f"--warmup-steps {options.warmup_steps:g} is not less than the {total} steps of the run")
    lr = options.lr if options.lr is not None else learning_rate(method, config)
    classes = _trainer_classes(options, task, method, fields)
    arguments = _arguments(replace(options, lr=lr), trainer, classes, held_out is not None, total)
    tasks = 1 + max((row.get("task_ids", 0) for _, row in records), default=0)
    adapter = configure(method, fields, TASKS[task].peft, total, num_tasks=tasks, n_tasks=tasks, **known)
    out.print(
        f"{task} with {options.method} on {base}: {len(training):,} examples of up to {length} tokens,"
        f" {len(held_out or ()):,} held out; {total:,} steps; learning rate {lr:.2g}"
        + (" (by the rule in --help)" if options.lr is None else "")
    )
    return Plan(
        options, base, task, tokenizer, training, held_out, adapter, arguments, encoder.labels, classes[:2], total
    )


def _absolute(files: Sequence[str]) -> list[str]:
    return [os.path.abspath(file) if os.path.isfile(file) else file for file in files]


def _check_options(options: Any) -> None:
    bits, held_out = options.load_in_4bit or options.load_in_8bit, options.eval_split or options.eval_data
    for fault, message in (
        (not 0 <= options.eval_split < 1, f"--eval-split takes a share from 0 up to 1, got {options.eval_split}"),
        (getattr(options, "patience", None) and not held_out,
         "--patience counts evaluations, and nothing is held out to evaluate on: see --eval-split"),
        (options.load_in_4bit and options.load_in_8bit, "--load-in-4bit and --load-in-8bit exclude each other"),
        (bits and find_spec("bitsandbytes") is None,
         "--load-in-4bit and --load-in-8bit need bitsandbytes: pip install bitsandbytes"),
    ):  # fmt: skip
        if fault:
            raise OptionError(message)


def configure(
    method: str, fields: Mapping[str, Any], task: str | None, total: int, layers: Any = None, **known: Any
) -> Any:
    """The configuration of a method, with what can be known filled in."""
    config_class = METHODS[method].config_class
    known = {"num_tasks": 1, "n_tasks": 1, **known, "total_step": total, "num_virtual_tokens": 20, "adapter_len": 10}
    known |= {"task_type": task, "adapter_layers": max(1, getattr(layers, "num_hidden_layers", 2) - 2)}
    own = {*init_types(config_class), "task_type"}
    return config_class(**{name: value for name, value in known.items() if name in own} | dict(fields))


def learning_rate(method: str, config: Any) -> float:
    """The default of `--lr`; see there for the papers."""
    width = getattr(config.get_text_config(), "hidden_size", 4096)
    return RATES.get(method, 2e-4 * 4096 / width * (10 if method == "VERA" else 1))


def _data_sets(options: Any, encoder: Encoder, records: Sequence[Record], out: Any) -> tuple[Any, Any]:
    """(examples to train on, examples held out or None)"""
    from datasets import Dataset

    encoded, names = encoder(records), encoder.labels
    examples, total = encoded.examples, len(encoded.examples) + encoded.dropped
    if encoded.cut:
        out.print(f"{encoded.cut:,} of {total:,} examples are cut: --max-length is {encoder.length} tokens")
    if encoded.dropped:
        out.print(f"{encoded.dropped:,} of {total:,} examples are left out: nothing to learn is left of them")
    if len(names) == 1:
        raise ValueError(f"all {len(examples)} records have the label {names[0]!r}: there is nothing to tell apart")
    if encoder.task in ("chat", "causal-lm"):
        out.print(f"An example; what is learnt is green:\n{shown(examples[0], encoder.tokenizer)}", markup=True)
    data = Dataset.from_list(examples)
    if options.eval_data:
        _, others = understand(read_records(options.eval_data), options.columns, options.task or encoder.task)
        return data, Dataset.from_list(encoder(others).examples)
    held_out = min(math.ceil(options.eval_split * len(examples)), len(examples) - 1)
    parts = data.train_test_split(held_out, seed=options.seed) if held_out else {"train": data}
    return parts["train"], parts.get("test")


def steps_of(options: Any, examples: int) -> int:
    """Optimizer steps of a run."""
    batches = math.ceil(examples / (options.batch_size * int(os.environ.get("WORLD_SIZE", 1))))
    return options.max_steps or math.ceil(options.epochs * math.ceil(batches / options.grad_accum))


def _trainer_classes(options: Any, task: str, method: str, fields: Mapping[str, Any]) -> tuple[str, str, str]:
    """(library, class of the trainer, class of its arguments).

    trl's computes the loss from the weight of the output layer itself, which soft prompts and an adapted head rule out.

    Raises:
        OptionError: what is asked for is done by trl, and does not fit it.
    """
    head = bool(fields.get("modules_to_save")) or "lm_head" in str(fields.get("target_modules"))
    by_hand = METHODS[method].prompt or head
    if options.optim in OPTIMIZERS and "LORA" not in method:
        raise OptionError(f"--optim {options.optim} is made for the two factors of LoRA, not for {options.method}")
    if task != "preference" and not options.packing and (task != "chat" or by_hand):
        return "transformers", "Trainer", "TrainingArguments"
    what = "--packing" if options.packing else f"the task {task}"
    if by_hand:
        raise OptionError(f"{what} is done by trl, which takes no soft prompt and no adapted output layer")
    if options.packing and task not in ("chat", "causal-lm"):
        raise OptionError(f"--packing is for language models, not for {task}")
    if find_spec("trl") is None:
        raise ImportError(f"{what} needs trl: pip install trl")
    return ("trl", "DPOTrainer", "DPOConfig") if task == "preference" else ("trl", "SFTTrainer", "SFTConfig")


def _arguments(options: Any, given: Mapping[str, Any], classes: Sequence[str], evaluates: bool, total: int) -> Any:
    """The arguments of the trainer; what the user gave under its own names comes last.

    Raises:
        OptionError: they do not fit each other.
    """
    made = getattr(import_module(classes[0]), classes[2])
    here = {name: getattr(options, ALIASES.get(name, name), None) for name in init_types(made)}
    every = getattr(options, "eval_steps", None) or max(1, math.ceil(total / 10))
    values: dict[str, Any] = {name: value for name, value in here.items() if value is not None} | {
        "resume_from_checkpoint": None,
        "per_device_eval_batch_size": options.batch_size,
        "optim": "adamw_torch" if options.optim in OPTIMIZERS else options.optim,
        "bf16": options.dtype == "bfloat16",
        "fp16": options.dtype == "float16" and options.device != "cpu",
        "use_cpu": models.device_of(options.device).type == "cpu",
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if options.gradient_checkpointing else None,
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "logging_steps": max(1, total // 200),
        "save_steps": every,
        "save_total_limit": 2,
    }
    if classes[0] == "transformers":
        values |= {"remove_unused_columns": False, "label_names": ["labels"]}
    if evaluates:
        values |= {"eval_strategy": "steps", "eval_steps": every, "eval_on_start": True, "load_best_model_at_end": True}
    try:
        return made(**values | dict(given))
    except (ValueError, TypeError) as error:
        raise OptionError(str(error)) from error
