"""`peft train`: an adapter from a model and data. All that is cheap is checked before a weight is loaded."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

from peft import PeftModel, get_peft_model
from peft.cli import models, tiny
from peft.cli.options import Base, Train
from peft.cli.parse import SETTINGS, OptionError, init_types, method_named, settings_of
from peft.cli.plots import loss_curve
from peft.cli.records import Record, read_records, understand
from peft.cli.starts import data_driven
from peft.cli.tasks import TASKS, Encoder, collator_for, metrics_for, shown
from peft.cli.watch import Watch
from peft.registry import METHODS

CURVE = "loss.png"
#: what may change when a run is gone on with; everything else is in the checkpoint, or decided what is in it
FREE = {
    "max_steps", "epochs", "eval_steps", "patience", "report_to", "push_to_hub", "device", "logging_steps", "save_steps",
    "save_total_limit", "dataloader_num_workers",
}  # fmt: skip
#: learning rates from the papers of the methods, see `Base.lr`; None is the rule for weights, times the number
RATES: dict[str, float] = {
    "IA3": 3e-3, "PROMPT_TUNING": 0.3, "MULTITASK_PROMPT_TUNING": 0.3, "CPT": 1e-2, "P_TUNING": 1e-2,
    "PREFIX_TUNING": 1e-2, "ADAPTION_PROMPT": 1e-2,
}  # fmt: skip
OPTIMIZERS = ("loraplus", "lorafa", "riemannian")


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


@dataclass
class Outcome:
    """A trained adapter: the model with it, its tokenizer, the trainer's log, and the seconds that training took."""

    model: PeftModel
    tokenizer: Any
    log: list[dict[str, Any]]
    seconds: float


def run(options: Train, fields: Mapping[str, Any], trainer: Mapping[str, Any]) -> int:
    train(options, fields, trainer, console())
    return 0


def console() -> Any:
    """A rich console, which speaks in the first of several processes alone."""
    from rich.console import Console

    return Console(quiet=int(os.environ.get("RANK", 0)) > 0, soft_wrap=True, highlight=False)


def train(options: Train, fields: Mapping[str, Any], trainer: Mapping[str, Any], out: Any) -> Outcome:
    """Trains as the options say, and saves the adapter with a curve, a card and the settings.

    Raises:
        ValueError: an option that does not fit the model or the data; nothing is written then.
        RuntimeError: an adapter tensor gets no gradient, or the loss is no longer a number.
    """
    output = Path(options.output)
    state = _processes(options)
    _check_output(options, output)
    plan = prepare(options, fields, trainer, out)
    settings = settings_of(plan.options, fields, trainer)
    checkpoint = _checkpoint(output, settings, out) if options.resume else None
    state.wait_for_everyone()
    if state.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        for folder in () if options.resume else output.glob("checkpoint-[0-9]*"):
            shutil.rmtree(folder)
        (output / SETTINGS).write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    outcome = fit(plan, out, checkpoint)
    if state.is_main_process:
        _finish(plan, outcome, settings, output, out)
    return outcome


def _processes(options: Base) -> Any:
    from accelerate import PartialState

    models.device_of(options.device)
    if options.device and ":" in options.device:
        os.environ["CUDA_VISIBLE_DEVICES"] = options.device.partition(":")[2]
    elif "RANK" not in os.environ:  # several GPUs in one process are slower than one, and Trainer would take them
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    return PartialState(**({"cpu": True} if options.device == "cpu" else {}))


def _check_output(options: Train, output: Path) -> None:
    if output.is_file():
        raise ValueError(f"--output {output} is a file")
    there = any((output / name).exists() for name in (SETTINGS, "adapter_config.json"))
    if there and not (options.resume or options.overwrite):
        raise ValueError(f"--output {output} holds a run: --resume goes on with it, --overwrite replaces it")


def _checkpoint(output: Path, settings: Mapping[str, Any], out: Any) -> str | None:
    """The last checkpoint of a broken-off run, if it has one.

    Raises:
        OptionError: settings have changed that it was made with.
    """
    from transformers.trainer_utils import get_last_checkpoint

    before = yaml.safe_load((output / SETTINGS).read_text(encoding="utf-8")) or {}
    changed = {name for name in {*before, *settings} if before.get(name) != settings.get(name)}
    words = [f"{name} {before.get(name, 'default')} -> {settings.get(name, 'default')}" for name in sorted(changed)]
    if changed - FREE:
        raise OptionError(f"--resume: a run goes on only as it was: {', '.join(words)}. It may have another {', '.join(sorted(FREE))}")
    found = get_last_checkpoint(str(output))
    step = found.rpartition("-")[2] if found else "0, for it has no checkpoint"
    out.print(f"Going on after step {step}" + (f", with {', '.join(words)}" if words else ""))
    return found


def prepare(options: Base, fields: Mapping[str, Any], trainer: Mapping[str, Any], out: Any) -> Plan:
    """Reads the data and the model's configuration, and checks everything that can be without its weights.

    Raises:
        ValueError: something does not fit; says what.
    """
    _check_numbers(options)
    method = method_named(options.method)
    configure(method, fields, "CAUSAL_LM", 100)  # a wrong field is said before anything is read
    options = replace(options, **{
        name: [os.path.abspath(path) if os.path.isfile(path) else path for path in getattr(options, name)]
        for name in ("data", "eval_data")
    })  # fmt: skip
    records = read_records(options.data) if options.data else tiny.library_sources()
    data_task, records = understand(records, options.columns, options.task)
    base = models.locate(options.model, out.print) if options.model else tiny.base_model(models.cache(), out)
    if options.model:
        options = replace(options, model=base)
    config = models.config_of(base)
    answers = "prompt" in records[0][1] and data_task == "causal-lm"
    task = options.task or ("seq2seq" if answers and config.is_encoder_decoder else data_task)
    if task == "seq2seq" and not answers:
        raise ValueError(f"{records[0][0]}: an encoder-decoder learns answers to prompts: records with prompt and completion")
    models.check_task(config, task)
    tokenizer = models.load_tokenizer(base, template=options.chat_template)
    if not tokenizer.chat_template and (task == "chat" or isinstance(records[0][1].get("prompt"), list)):
        raise ValueError(f"the tokenizer of {base} has no chat template: --chat-template chatml, or a file with one")

    limits = [options.max_length, getattr(config.get_text_config(), "max_position_embeddings", None)]
    virtual = getattr(configure(method, fields, TASKS[task].peft, 100), "num_virtual_tokens", None) or 0
    length = min(limit for limit in limits if limit) - (virtual if limits[1] and limits[1] < options.max_length + virtual else 0)
    numbered = not {"num_tasks", "n_tasks"}.isdisjoint(init_types(METHODS[method].config_class))
    encoder = Encoder(task, tokenizer, length, numbered)
    training, held_out = _data_sets(options, encoder, records, out)
    lr = options.lr if options.lr is not None else learning_rate(method, config)
    arguments = _arguments(options, trainer, task, method, fields, held_out is not None, len(training), lr)
    total = steps_of(arguments, len(training))
    if arguments.warmup_steps >= total:
        raise OptionError(f"--warmup-steps {arguments.warmup_steps} is not less than the {total} steps of the run")
    tasks = 1 + max((row.get("task_ids", 0) for _, row in records), default=0)
    layers = config.get_text_config()
    config = configure(
        method, fields, TASKS[task].peft, total, layers, tokenizer_name_or_path=base, num_tasks=tasks, n_tasks=tasks
    )
    out.print(
        f"{task} with {options.method} on {base}: {len(training):,} examples of up to {length} tokens,"
        f" {len(held_out or ()):,} held out; {total:,} steps; learning rate {lr:.2g}"
        + (" (by the rule in --help)" if options.lr is None else "")
    )
    return Plan(options, fields, base, task, tokenizer, training, held_out, config, arguments, encoder.labels)


def _check_numbers(options: Base) -> None:
    for name in ("epochs", "max_steps", "batch_size", "grad_accum", "lr", "max_length", "eval_steps", "patience"):
        value = getattr(options, name, None)
        if value is not None and not value > 0:
            raise OptionError(f"--{name.replace('_', '-')} has to be more than 0, got {value}")
    if not 0 <= options.eval_split < 1:
        raise OptionError(f"--eval-split takes a share from 0 up to 1, got {options.eval_split}")
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
    text = config.get_text_config()
    width = next((getattr(text, name) for name in ("hidden_size", "n_embd", "d_model", "dim") if hasattr(text, name)), 4096)
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


def _trainer_classes(options: Base, task: str, method: str, fields: Mapping[str, Any]) -> tuple[str, str]:
    """(class of the trainer, of its arguments), in trl or transformers.

    trl's computes the loss from the weight of the output layer itself, which soft prompts and an adapted head rule out.
    """
    by_hand = METHODS[method].prompt or bool(fields.get("modules_to_save")) or "lm_head" in str(fields.get("target_modules"))
    if task != "preference" and not options.packing and (task != "chat" or by_hand):
        return "Trainer", "TrainingArguments"
    if by_hand:
        raise OptionError(f"{'--packing' if options.packing else task} is done by trl, which takes no soft prompt and no adapted output layer")
    if options.packing and TASKS[task].peft != "CAUSAL_LM":
        raise OptionError(f"--packing is for language models, not for {task}")
    if find_spec("trl") is None:
        raise ImportError(f"{'--packing' if options.packing else 'the task ' + task} needs trl: pip install trl")
    return ("DPOTrainer", "DPOConfig") if task == "preference" else ("SFTTrainer", "SFTConfig")


def _arguments(
    options: Any, given: Mapping[str, Any], task: str, method: str, fields: Mapping[str, Any],
    evaluates: bool, examples: int, lr: float,
) -> Any:  # fmt: skip
    """The arguments of the trainer; what the user gave under its own names comes last.

    Raises:
        OptionError: they do not fit each other.
    """
    trainer_class, class_name = _trainer_classes(options, task, method, fields)
    library = __import__("transformers" if trainer_class == "Trainer" else "trl")
    if options.optim in OPTIMIZERS and "LORA" not in method:
        raise OptionError(f"--optim {options.optim} is made for the two factors of LoRA, not for {options.method}")
    values: dict[str, Any] = {
        "output_dir": options.output,
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.grad_accum,
        "learning_rate": lr,
        "num_train_epochs": options.epochs,
        "max_steps": options.max_steps or -1,
        "lr_scheduler_type": options.schedule,
        "warmup_steps": int(options.warmup_steps) if options.warmup_steps >= 1 else options.warmup_steps,
        "optim": "adamw_torch" if options.optim in OPTIMIZERS else options.optim,
        "bf16": options.dtype == "bfloat16",
        "fp16": options.dtype == "float16" and options.device != "cpu",
        "use_cpu": models.device_of(options.device).type == "cpu",
        "neftune_noise_alpha": options.neftune_noise_alpha,
        "report_to": getattr(options, "report_to", "none"),
        "push_to_hub": getattr(options, "push_to_hub", False),
        "seed": options.seed,
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        "remove_unused_columns": task == "preference",
        "label_names": ["labels"],
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    if trainer_class != "Trainer":
        values |= {"max_length": options.max_length, "packing": options.packing}
        values.pop("remove_unused_columns")
        if task == "preference":
            values.pop("packing")
    known = getattr(library, class_name).__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    values[name] = options.gradient_checkpointing
    if options.gradient_checkpointing:
        values[f"{name}_kwargs"] = {"use_reentrant": False}
    try:
        probe = getattr(library, class_name)(**values | dict(given))
        total = steps_of(probe, examples)
        every = getattr(options, "eval_steps", None) or max(1, math.ceil(total / 10))
        values |= {"logging_steps": max(1, total // 200), "save_strategy": "steps", "save_steps": every, "save_total_limit": 2}
        if evaluates:
            values |= {"eval_strategy": "steps", "eval_steps": every, "eval_on_start": True, "load_best_model_at_end": True}
        return getattr(library, class_name)(**values | dict(given))
    except (ValueError, TypeError) as error:
        raise OptionError(str(error)) from error


def fit(plan: Plan, out: Any, checkpoint: str | None = None) -> Outcome:
    """Loads the model, puts the adapter on it and trains it."""
    library = models.transformers()
    options, arguments, preference = plan.options, plan.arguments, plan.task == "preference"
    library.set_seed(options.seed)
    arguments.eval_on_start = arguments.eval_on_start and checkpoint is None
    fields = {"num_labels": 1, "problem_type": "regression"} if plan.task == "regression" else {}
    if plan.labels:
        fields = {"id2label": dict(enumerate(plan.labels)), "label2id": {name: i for i, name in enumerate(plan.labels)}}
    base = models.load_for_training(plan.base, TASKS[plan.task], options, fields)
    if base.config.pad_token_id is None:
        base.config.pad_token_id = plan.tokenizer.pad_token_id
    base.config.use_cache = False  # of no use in training, and X-LoRA and checkpointing want it so
    collator = None if preference else collator_for(plan.task, plan.tokenizer)
    model = base if preference else data_driven(base, plan, collator, out)
    if options.gradient_checkpointing and not preference:
        model.enable_input_require_grads()
    watch = Watch(out, checkpoint, steps_of(arguments, len(plan.training)))
    more: dict[str, Any] = {"peft_config": plan.config} if preference else {"compute_metrics": metrics_for(plan.task)}
    if collator is not None and type(arguments).__name__ != "SFTConfig":
        more["data_collator"] = collator
    if options.optim in OPTIMIZERS:
        more["optimizers"] = (_optimizer(model, plan), None)
    name, _ = _trainer_classes(options, plan.task, method_named(options.method), plan.fields)
    trainer = getattr(library if name == "Trainer" else __import__("trl"), name)(
        model=model, args=arguments, train_dataset=plan.training, eval_dataset=plan.held_out,
        processing_class=plan.tokenizer, callbacks=[watch], **more,
    )  # fmt: skip
    trainer.remove_callback(library.PrinterCallback)
    patience = getattr(options, "patience", None)
    if patience:
        trainer.add_callback(library.EarlyStoppingCallback(patience))
    trainable, everything = trainer.model.get_nb_trainable_parameters()
    out.print(f"{trainable:,} of {everything:,} parameters train ({100 * trainable / everything:.2f} %), on {arguments.device}")
    start = time.perf_counter()
    with watch:
        trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - start
    base.config.use_cache = True
    trainer.save_model(options.output)
    if arguments.push_to_hub:
        trainer.push_to_hub()
    return Outcome(trainer.accelerator.unwrap_model(trainer.model).eval(), plan.tokenizer, trainer.state.log_history, seconds)


def _optimizer(model: Any, plan: Plan) -> torch.optim.Optimizer:
    from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer

    rate, decay = plan.arguments.learning_rate, plan.arguments.weight_decay
    if plan.options.optim == "lorafa":
        return create_lorafa_optimizer(model, plan.config.r, plan.config.lora_alpha, rate, decay)
    if plan.options.optim == "riemannian":
        return create_riemannian_optimizer(model, torch.optim.AdamW, lr=rate, weight_decay=decay)
    return create_loraplus_optimizer(model, torch.optim.AdamW, lr=rate, loraplus_lr_ratio=16, weight_decay=decay)


def _finish(plan: Plan, outcome: Outcome, settings: Mapping[str, Any], output: Path, out: Any) -> None:
    """The curve and the card beside the adapter, and a word on where they are."""
    curve = loss_curve(outcome.log, f"{plan.options.method} on {os.path.basename(plan.base)}", output / CURVE)
    if not curve:
        out.print("No picture: matplotlib is not installed here (pip install matplotlib)")
    held_out = [entry for entry in outcome.log if "eval_loss" in entry]
    best = min(held_out, key=lambda entry: entry["eval_loss"], default={})
    measured = {name.removeprefix("eval_"): f"{value:.4g}" for name, value in best.items() if name.startswith("eval_")}
    rows = "".join(f"| {name} | {value} |\n" for name, value in {**settings, **measured}.items())
    card = output / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    text += f"\n## Training\n\n`peft train --config {SETTINGS}`\n\n| | |\n| --- | --- |\n{rows}"
    card.write_text(text + (f"\n![Loss]({CURVE})\n" if curve else ""), encoding="utf-8")
    size = sum(path.stat().st_size for path in output.glob("adapter_*"))
    out.print(f"Adapter ({size / 1000:,.0f} kB){', ' + CURVE if curve else ''} and the checkpoints are in {output}, after {outcome.seconds:.0f} s")
