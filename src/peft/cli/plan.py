"""A run, checked in everything that is cheap, before a weight is loaded."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from peft.cli import models, tiny
from peft.cli.options import ALIASES, TABLES, OptionError, explained, refuse
from peft.cli.parse import init_types, method_named
from peft.cli.records import Record, read_records, understand, unused
from peft.cli.tasks import TASKS, Encoder, shown
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from peft.registry import METHODS

#: optimizers of this library
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "loraplus": partial(create_loraplus_optimizer, optimizer_cls=torch.optim.AdamW, loraplus_lr_ratio=16),
    "riemannian": partial(create_riemannian_optimizer, optimizer_cls=torch.optim.AdamW),
    "lorafa": create_lorafa_optimizer,
}
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
        trainer: class of the trainer.
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
    trainer: Any


def prepare(options: Any, fields: Mapping[str, Any], trainer: Mapping[str, Any], out: Any) -> Plan:
    """Reads the data and the model's configuration, and checks everything that can be without its weights.

    Raises:
        ValueError: something does not fit; says what.
    """
    refuse(os.path.isfile(options.output), f"--output {options.output} is a file")
    _choose_device(options.device)
    method = method_named(options.method)
    configured = configure(method, fields, "CAUSAL_LM", 100)  # a wrong field is said before anything is read
    blind = getattr(options, "patience", None) and not (options.eval_split or options.eval_data)
    refuse(blind, "--patience counts evaluations, and nothing is held out: see --eval-split")
    data, others = ([os.path.abspath(file) if os.path.isfile(file) else file for file in files]
                    for files in (options.data, options.eval_data))  # fmt: skip
    read = read_records(data) if data else tiny.library_sources()
    task, records = understand(read, options.columns, options.task)
    aside = ", ".join(unused(read[0][1], options.columns, task))
    if aside:
        out.print(f"Nothing is learnt from these fields of the records: {aside}")
    base = models.locate(options.model)
    options = replace(options, data=data, eval_data=others, model=base)
    config = models.config_of(base)
    heads = models.tasks_of(config)
    if options.task is None and task not in heads and OTHERWISE.get(task) in heads:
        task = OTHERWISE[task]
    models.check_task(config, task)
    where, first = records[0]
    bare = task == "seq2seq" and "prompt" not in first
    refuse(bare, f"{where}: an encoder-decoder learns answers: records need prompt and completion")
    soft = METHODS[method].prompt and TASKS[task].peft is None
    refuse(soft, f"--method {options.method}: soft prompts are for models that read text, not for {task}")
    tokenizer = models.load_processor(base, TASKS[task].processor, options.chat_template)
    mute = (task == "chat" or isinstance(first.get("prompt"), list)) and not tokenizer.chat_template
    refuse(mute, f"the tokenizer of {base} has no chat template: --chat-template chatml, or a file with one")
    virtual = getattr(configured, "num_virtual_tokens", None) or 0
    length = min(options.max_length, models.longest(config, tokenizer) - virtual)
    refuse(length < 1, f"--num-virtual-tokens {virtual} leaves no place for text in {length + virtual} tokens")
    numbered = not {"num_tasks", "n_tasks"}.isdisjoint(init_types(METHODS[method].config_class))
    encoder = Encoder(task, tokenizer, length, numbered)
    training, held_out = _data_sets(options, encoder, records, out)
    batches = math.ceil(len(training) / (options.batch_size * int(os.environ.get("WORLD_SIZE", 1))))
    total = options.max_steps or math.ceil(options.epochs * math.ceil(batches / options.grad_accum))
    words = f"--warmup-steps {options.warmup_steps:g} is not less than the {total} steps of the run"
    refuse(options.warmup_steps >= total, words)
    lr = options.lr or learning_rate(method, config)
    rule = "" if options.lr else " (by the rule in --help)"
    trainer_class, kind = _trainer_classes(options, task, method, fields)
    arguments = _arguments(replace(options, lr=lr, max_steps=total), trainer, kind, task, held_out is not None)
    tasks = 1 + max((row.get("task_ids", 0) for _, row in records), default=0)
    adapter = configure(
        method, fields, TASKS[task].peft, total, config.get_text_config(), num_tasks=tasks, n_tasks=tasks,
        tokenizer_name_or_path=base,
    )  # fmt: skip
    out.print(
        f"{task} with {options.method} on {base}: {len(training):,} examples of up to {length} tokens,"
        f" {len(held_out or ()):,} held out; {total:,} steps; learning rate {lr:.2g}{rule}"
    )
    return Plan(options, base, task, tokenizer, training, held_out, adapter, arguments, encoder.labels, trainer_class)


def _choose_device(name: str | None) -> None:
    """Lets the process see one GPU before torch looks for them, and lets it find the other processes, if any."""
    from accelerate import PartialState

    if name and ":" in name:
        os.environ["CUDA_VISIBLE_DEVICES"] = name.partition(":")[2]
    elif "RANK" not in os.environ:  # several GPUs in one process are slower than one, and Trainer would take them
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if models.device_of(name).type == "cpu":
        # glibc keeps what is freed; what is larger than this it gives back (M_MMAP_THRESHOLD): the row with
        # checkpointing in benchmarks/estimate.py takes 1.15 GB then, in place of 2.04. Not in all C libraries.
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(-3, 1 << 20)
    PartialState(cpu=name == "cpu")


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
    return TABLES.rates.get(method) or min(1.0, 2e-4 * 4096 / width * TABLES.factors.get(method, 1))


def _data_sets(options: Any, encoder: Encoder, records: Sequence[Record], out: Any) -> tuple[Any, Any]:
    """(examples to train on, examples held out or None)"""
    data, names = _data_set(encoder, records, out, "examples"), encoder.labels
    refuse(len(names) == 1, f"all {len(records)} records have the label {names}: there is nothing to tell apart")
    if encoder.task in ("chat", "causal-lm"):
        out.print(f"An example; what is learnt is green:\n{shown(data[0], encoder.tokenizer)}", markup=True)
    if options.eval_data:
        _, others = understand(read_records(options.eval_data), options.columns, options.task or encoder.task)
        return data, _data_set(encoder, others, out, "examples to evaluate on")
    held_out = min(math.ceil(options.eval_split * len(data)), len(data) - 1)
    parts = data.train_test_split(held_out, seed=options.seed) if held_out else {"train": data}
    return parts["train"], parts.get("test")


def _data_set(encoder: Encoder, records: Sequence[Record], out: Any, what: str) -> Any:
    """Records as numbers; says how many of them are not whole."""
    from datasets import Dataset

    found = encoder(records)
    total = len(found.examples) + found.dropped
    if found.cut:
        out.print(f"{found.cut:,} of {total:,} {what} are cut: --max-length is {encoder.length} tokens")
    if found.dropped:
        out.print(f"{found.dropped:,} of {total:,} {what} are left out: nothing to learn is left of them")
    return Dataset.from_list(found.examples)


def _trainer_classes(options: Any, task: str, method: str, fields: Mapping[str, Any]) -> list[Any]:
    """The classes of the trainer and of its arguments.

    trl's computes the loss from the weight of the output layer itself, which soft prompts and an adapted head rule out.

    Raises:
        OptionError: what is asked for is done by trl, and does not fit it.
    """
    head = bool(fields.get("modules_to_save")) or "lm_head" in str(fields.get("target_modules"))
    fits, wanted = not (METHODS[method].prompt or head), options.packing or task == "preference"
    what = "--packing" if options.packing else f"--task {task}"
    words = f"--optim {options.optim} is made for the two factors of LoRA, not for {options.method}"
    refuse(options.optim in OPTIMIZERS and "LORA" not in method, words)
    packs = options.packing and task not in ("chat", "causal-lm")
    refuse(packs, f"--packing is for language models, not for {task}")
    words = f"{what} is done by trl, which takes no soft prompt and no adapted output layer"
    refuse(wanted and not fits, words)
    kind = "Seq2Seq" if task == "speech" else ""
    library, names = "transformers", (f"{kind}Trainer", f"{kind}TrainingArguments")
    if wanted or (task == "chat" and fits and find_spec("trl")):
        library, names = "trl", ("DPOTrainer", "DPOConfig") if task == "preference" else ("SFTTrainer", "SFTConfig")
    return [getattr(import_module(library), name) for name in names]


def _arguments(options: Any, given: Mapping[str, Any], made: Any, task: str, evaluates: bool) -> Any:
    """The arguments of the trainer; what the user gave under its own names comes last.

    Raises:
        OptionError: they do not fit each other.
    """
    own = {name: getattr(options, ALIASES.get(name, name), None) for name in init_types(made)}
    every = getattr(options, "eval_steps", None) or math.ceil(options.max_steps / 10)
    fixed = {name: value for name, value in TABLES.arguments.items() if name in own}
    values: dict[str, Any] = {name: value for name, value in own.items() if value is not None} | fixed
    values |= {
        "per_device_eval_batch_size": options.batch_size,
        "optim": "adamw_torch" if options.optim in OPTIMIZERS else options.optim,
        "bf16": options.dtype == "bfloat16",
        "fp16": options.dtype == "float16" and options.device != "cpu",
        "use_cpu": models.device_of(options.device).type == "cpu",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "logging_steps": max(1, options.max_steps // 200),
        "save_steps": every,
    }
    metric, known = given.get("metric_for_best_model") or "loss", ["loss", *TASKS[task].measures]
    words = f"--metric-for-best-model {metric}: of {task} there is {', '.join(known)}"
    refuse(metric.removeprefix("eval_") not in known, words)
    saves = given.get("save_strategy", "steps")
    when = given.get("eval_strategy") or (saves if saves == "epoch" else "steps")
    if evaluates and when != "no":
        values |= {"eval_strategy": when, "save_strategy": when, "eval_steps": every, "eval_on_start": True}
        values["load_best_model_at_end"] = saves != "no"
    with explained(kind=OptionError):
        arguments = made(**values | dict(given))
        reporters = import_module("transformers.integrations").get_reporting_integration_callbacks
        for reporter in reporters(arguments.report_to):
            reporter()  # raises where its package is missing, which is found out late else
    return arguments
