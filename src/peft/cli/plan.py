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
from peft.cli.options import Base
from peft.cli.parse import OptionError, init_types, method_named
from peft.cli.records import Record, read_records, understand
from peft.cli.tasks import TASKS, Encoder, shown
from peft.registry import METHODS

#: learning rates from the papers of the methods, see `Base.lr`; for others the rule for weights holds
RATES: dict[str, float] = {
    "IA3": 3e-3, "PROMPT_TUNING": 0.3, "MULTITASK_PROMPT_TUNING": 0.3, "CPT": 1e-2, "P_TUNING": 1e-2,
    "PREFIX_TUNING": 1e-2, "ADAPTION_PROMPT": 1e-2,
}  # fmt: skip
#: optimizers of this library
OPTIMIZERS = ("loraplus", "lorafa", "riemannian")
#: options by the names that the trainer has for them
PASSED = {
    "output": "output_dir", "batch_size": "per_device_train_batch_size", "grad_accum": "gradient_accumulation_steps",
    "epochs": "num_train_epochs", "schedule": "lr_scheduler_type", "neftune_noise_alpha": "neftune_noise_alpha",
    "report_to": "report_to", "push_to_hub": "push_to_hub", "seed": "seed", "warmup_steps": "warmup_steps",
}  # fmt: skip


@dataclass
class Plan:
    """A run, checked, before its model is loaded.

    Attributes:
        options: of the command.
        fields: of the method's configuration, as the user gave them.
        base: folder or hub id of the base model.
        task: name in `TASKS`.
        tokenizer: of the base model.
        training, held_out: data sets; `held_out` is None where nothing is.
        config: of the method.
        arguments: of the trainer.
        labels: names of the classes.
        trainer: (library, class) of the trainer.
    """

    options: Any
    fields: Mapping[str, Any]
    base: str
    task: str
    tokenizer: Any
    training: Any
    held_out: Any
    config: Any
    arguments: Any
    labels: Sequence[str]
    trainer: tuple[str, str]


def prepare(options: Base, fields: Mapping[str, Any], trainer: Mapping[str, Any], out: Any) -> Plan:
    """Reads the data and the model's configuration, and checks everything that can be without its weights.

    Raises:
        ValueError: something does not fit; says what.
    """
    method = method_named(options.method)
    _check_numbers(options, fields)
    configure(method, fields, "CAUSAL_LM", 100)  # a wrong field is said before anything is read
    options = replace(options, data=_absolute(options.data), eval_data=_absolute(options.eval_data))
    records = read_records(options.data) if options.data else tiny.library_sources()
    data_task, records = understand(records, options.columns, options.task)
    base = models.locate(options.model, out.print) if options.model else tiny.base_model(models.cache(), out)
    if options.model:
        options = replace(options, model=base)
    config = models.config_of(base)
    answers = "prompt" in records[0][1] and data_task == "causal-lm"
    task = options.task or ("seq2seq" if answers and config.is_encoder_decoder else data_task)
    if task == "seq2seq" and not answers:
        raise ValueError(f"{records[0][0]}: an encoder-decoder learns answers: records need prompt and completion")
    models.check_task(config, task)
    tokenizer = models.load_tokenizer(base, template=options.chat_template)
    if not tokenizer.chat_template and (task == "chat" or isinstance(records[0][1].get("prompt"), list)):
        raise ValueError(f"the tokenizer of {base} has no chat template: --chat-template chatml, or a file with one")

    layers = config.get_text_config()
    virtual = getattr(configure(method, fields, TASKS[task].peft, 100), "num_virtual_tokens", None) or 0
    positions = getattr(layers, "max_position_embeddings", None) or tokenizer.model_max_length
    length = min(options.max_length, tokenizer.model_max_length - virtual, positions - virtual)
    numbered = not {"num_tasks", "n_tasks"}.isdisjoint(init_types(METHODS[method].config_class))
    encoder = Encoder(task, tokenizer, length, numbered)
    training, held_out = _data_sets(options, encoder, records, out)
    lr = options.lr if options.lr is not None else learning_rate(method, config)
    classes = _trainer_classes(options, task, method, fields)
    arguments = _arguments(options, trainer, classes, held_out is not None, len(training), lr)
    total = steps_of(arguments, len(training))
    if arguments.warmup_steps >= total:
        raise OptionError(f"--warmup-steps {arguments.warmup_steps:g} is not less than the {total} steps of the run")
    tasks = 1 + max((row.get("task_ids", 0) for _, row in records), default=0)
    config = configure(
        method, fields, TASKS[task].peft, total, layers, tokenizer_name_or_path=base, num_tasks=tasks, n_tasks=tasks
    )
    out.print(
        f"{task} with {options.method} on {base}: {len(training):,} examples of up to {length} tokens,"
        f" {len(held_out or ()):,} held out; {total:,} steps; learning rate {lr:.2g}"
        + (" (by the rule in --help)" if options.lr is None else "")
    )
    return Plan(
        options, fields, base, task, tokenizer, training, held_out, config, arguments, encoder.labels, classes[:2]
    )


def _absolute(files: Sequence[str]) -> list[str]:
    return [os.path.abspath(file) if os.path.isfile(file) else file for file in files]


def _check_numbers(options: Base, fields: Mapping[str, Any]) -> None:
    names = ("epochs", "max_steps", "batch_size", "grad_accum", "lr", "max_length", "eval_steps", "patience")
    numbers = [(name, getattr(options, name, None)) for name in names]
    if options.method.lower() != "oft":  # where 0 leaves the rank to the size of the blocks
        numbers.append(("r", fields.get("r")))
    for name, value in numbers:
        if value is not None and not value > 0:
            raise OptionError(f"--{name.replace('_', '-')} has to be more than 0, got {value}")
    if not 0 <= options.eval_split < 1:
        raise OptionError(f"--eval-split takes a share from 0 up to 1, got {options.eval_split}")
    if getattr(options, "patience", None) and not (options.eval_split or options.eval_data):
        raise OptionError("--patience counts evaluations, and nothing is held out to evaluate on: see --eval-split")
    if options.load_in_4bit and options.load_in_8bit:
        raise OptionError("--load-in-4bit and --load-in-8bit exclude each other")
    if (options.load_in_4bit or options.load_in_8bit) and find_spec("bitsandbytes") is None:
        raise OptionError("--load-in-4bit and --load-in-8bit need bitsandbytes: pip install bitsandbytes")


def configure(method: str, fields: Mapping[str, Any], task: str, total: int, layers: Any = None, **known: Any) -> Any:
    """The configuration of a method, with what can be known filled in."""
    config_class = METHODS[method].config_class
    depth = getattr(layers, "num_hidden_layers", 2)
    known = {"num_tasks": 1, "n_tasks": 1, **known, "total_step": total, "num_virtual_tokens": 20, "adapter_len": 10}
    known |= {"task_type": task, "adapter_layers": max(1, depth - 2)}
    own = {*init_types(config_class), "task_type"}
    return config_class(**{name: value for name, value in known.items() if name in own} | dict(fields))


def learning_rate(method: str, config: Any) -> float:
    """The default of `--lr`; see there for the papers."""
    width = getattr(config.get_text_config(), "hidden_size", 4096)
    return RATES.get(method, 2e-4 * 4096 / width * (10 if method == "VERA" else 1))


def _data_sets(options: Base, encoder: Encoder, records: Sequence[Record], out: Any) -> tuple[Any, Any]:
    """(examples to train on, examples held out or None)"""
    from datasets import Dataset

    encoded = encoder(records)
    _say_cut(encoded, encoder.length, out)
    examples, names = encoded.examples, encoder.labels
    if len(names) == 1:
        raise ValueError(f"all {len(examples)} records have the label {names[0]!r}: there is nothing to tell apart")
    if encoder.task in ("chat", "causal-lm"):
        out.print(f"An example; what is learnt is green:\n{shown(examples[0], encoder.tokenizer)}", markup=True)
    if options.eval_data:
        _, others = understand(read_records(options.eval_data), options.columns, options.task or encoder.task)
        return Dataset.from_list(examples), Dataset.from_list(encoder(others).examples)
    held_out = min(math.ceil(options.eval_split * len(examples)), len(examples) - 1)
    if not held_out:
        return Dataset.from_list(examples), None
    parts = Dataset.from_list(examples).train_test_split(held_out, seed=options.seed)
    return parts["train"], parts["test"]


def _say_cut(encoded: Any, length: int, out: Any) -> None:
    total = len(encoded.examples) + encoded.dropped
    if encoded.cut:
        out.print(f"{encoded.cut:,} of {total:,} examples are cut: --max-length is {length} tokens")
    if encoded.dropped:
        out.print(f"{encoded.dropped:,} of {total:,} examples are left out: nothing to learn is left of them")


def steps_of(arguments: Any, examples: int) -> int:
    """Optimizer steps of a run."""
    batches = math.ceil(examples / (arguments.per_device_train_batch_size * arguments.world_size))
    per_epoch = max(1, math.ceil(batches / arguments.gradient_accumulation_steps))
    return arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * per_epoch)


def _trainer_classes(options: Base, task: str, method: str, fields: Mapping[str, Any]) -> tuple[str, str, str]:
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


def _arguments(
    options: Any, given: Mapping[str, Any], classes: Sequence[str], evaluates: bool, examples: int, lr: float
) -> Any:
    """The arguments of the trainer; what the user gave under its own names comes last.

    Raises:
        OptionError: they do not fit each other.
    """
    made = getattr(import_module(classes[0]), classes[2])
    # called activation_checkpointing in later versions of transformers
    checkpointing = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if hasattr(made, n))
    values: dict[str, Any] = {theirs: getattr(options, own) for own, theirs in PASSED.items() if hasattr(options, own)}
    values |= {
        "learning_rate": lr,
        "max_steps": options.max_steps or -1,
        "per_device_eval_batch_size": options.batch_size,
        "optim": "adamw_torch" if options.optim in OPTIMIZERS else options.optim,
        "bf16": options.dtype == "bfloat16",
        "fp16": options.dtype == "float16" and options.device != "cpu",
        "use_cpu": models.device_of(options.device).type == "cpu",
        checkpointing: options.gradient_checkpointing,
        f"{checkpointing}_kwargs": {"use_reentrant": False} if options.gradient_checkpointing else None,
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    if classes[0] == "transformers":
        values |= {"remove_unused_columns": False, "label_names": ["labels"]}
    else:
        values["max_length"] = options.max_length
    if options.packing:
        values["packing"] = True
    try:
        total = steps_of(made(**values | dict(given)), examples)
        every = getattr(options, "eval_steps", None) or max(1, math.ceil(total / 10))
        values |= {"logging_steps": max(1, total // 200), "save_steps": every, "save_total_limit": 2}
        if evaluates:
            values |= {"eval_strategy": "steps", "eval_steps": every, "eval_on_start": True}
            values["load_best_model_at_end"] = True
        return made(**values | dict(given))
    except (ValueError, TypeError) as error:
        raise OptionError(str(error)) from error
