"""`peft train`: an adapter from a model and data."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi

from peft.cli import models
from peft.cli.options import TABLES, explained, refuse
from peft.cli.parse import SETTINGS, settings_of
from peft.cli.plan import OPTIMIZERS, Plan, prepare
from peft.cli.plots import loss_curve
from peft.cli.starts import data_driven
from peft.cli.tasks import TASKS, collator_for, measures
from peft.cli.watch import Watch, console, last_checkpoint
from peft.hub import push

CURVE = "loss.png"


def run(options: Any, fields: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Trains as the options say, and saves the adapter with a curve, a card and the settings.

    Raises:
        ValueError: an option that does not fit the model or the data; nothing is written then.
        RuntimeError: an adapter tensor gets no gradient, or the loss is no longer a number.
    """
    output, out = Path(options.output), console()
    given = dict(given)
    if token := given.pop("hub_token", None):  # the files of a run hold all else that was given, on the hub too
        os.environ["HF_TOKEN"] = token
    there = any((output / name).exists() for name in (SETTINGS, "adapter_config.json"))
    lost = there and not (options.resume or options.overwrite)
    refuse(lost, f"--output {output} holds a run: --resume goes on with it, --overwrite replaces it")
    plan = prepare(options, fields, given, out)
    if plan.arguments.push_to_hub:
        with explained("--push-to-hub needs access: `hf auth login`, or --hub-token"):
            HfApi().whoami()
    processes = int(os.environ.get("WORLD_SIZE", 1))  # which share a step's examples, whatever has started them
    settings = settings_of(replace(plan.options, num_processes=processes), fields, given)
    checkpoint = _checkpoint(output, settings, out) if options.resume else None
    trainer = build(plan, out, checkpoint)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        for folder in () if options.resume else output.glob("checkpoint-[0-9]*"):
            shutil.rmtree(folder)
        (output / SETTINGS).write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(_internal_call=True)  # which does not push: the card is not whole yet
    if trainer.is_world_process_zero():
        _finish(plan, trainer.state.log_history, settings, output, out)
        if plan.arguments.push_to_hub:
            _push(trainer.hub_model_id, plan.arguments.hub_revision, output, out)


def _checkpoint(output: Path, settings: Mapping[str, Any], out: Any) -> str | None:
    """The last checkpoint of a broken-off run, if it has one.

    Raises:
        OptionError: settings have changed that it was made with.
    """
    before = yaml.safe_load((output / SETTINGS).read_text(encoding="utf-8")) or {}
    changed = {name for name in {*before, *settings} if before.get(name) != settings.get(name)}
    words = [f"{name} {before.get(name, 'default')} -> {settings.get(name, 'default')}" for name in sorted(changed)]
    said = f"--resume: a run goes on only as it was: {', '.join(words)}. What may change is {', '.join(TABLES.free)}"
    refuse(changed - {*TABLES.free}, said)
    found = last_checkpoint(output)
    step = found.rpartition("-")[2] if found else "0, for it has no checkpoint"
    out.print(f"Going on after step {step}" + (f", with {', '.join(words)}" if words else ""))
    return found


def build(plan: Plan, out: Any, checkpoint: str | None = None) -> Any:
    """The trainer for a plan: loads the model and puts the adapter on it."""
    library = models.transformers()
    options, arguments, preference = plan.options, plan.arguments, plan.task == "preference"
    library.set_seed(options.seed)
    arguments.eval_on_start = arguments.eval_on_start and checkpoint is None
    names = dict(enumerate(plan.labels))
    fields = {"id2label": names, "label2id": {name: number for number, name in names.items()}} if names else {}
    fields |= {"num_labels": 1} if plan.task == "regression" else {}
    base = models.load_for_training(plan.base, TASKS[plan.task], options, fields)
    if getattr(base.config, "pad_token_id", None) is None:  # a start that sees the data needs it now
        base.config.pad_token_id = getattr(plan.tokenizer, "pad_token_id", None)
    base.config.use_cache = False  # of no use in training, and X-LoRA and checkpointing want it so
    if names and TASKS[plan.task].peft is None:  # where no class for the task knows the new head
        heads = [name for name, _ in base.named_children() if name != base.base_model_prefix]
        plan.config.modules_to_save = plan.config.modules_to_save or heads
    collator = collator_for(plan.task, plan.tokenizer, getattr(base.config, "decoder_start_token_id", None))
    more: dict[str, Any] = {"peft_config": plan.config} if preference else measures(plan.task, plan.tokenizer)
    model = base if preference else data_driven(base, plan, collator, out)
    if plan.trainer.__module__.startswith("transformers"):
        more["data_collator"] = collator
    callbacks: list[Any] = [Watch(out, checkpoint)]
    if getattr(options, "patience", None):
        callbacks.append(library.EarlyStoppingCallback(options.patience))
    trainer = plan.trainer(
        model=model, args=arguments, train_dataset=plan.training, eval_dataset=plan.held_out,
        processing_class=plan.tokenizer, callbacks=callbacks, **more,
    )  # fmt: skip
    trainer.remove_callback(library.PrinterCallback)
    if options.optim in OPTIMIZERS:  # of the model that has its adapter now, whoever has put that on
        how = {"lr": arguments.learning_rate, "weight_decay": arguments.weight_decay}
        if options.optim == "lorafa":
            how |= {"r": plan.config.r, "lora_alpha": plan.config.lora_alpha}
        trainer.optimizer = OPTIMIZERS[options.optim](trainer.model, **how)
    trainable, everything = trainer.model.get_nb_trainable_parameters()
    share = f"{100 * trainable / everything:.2f} %"
    out.print(f"{trainable:,} of {everything:,} parameters train ({share}), on {arguments.device}")
    return trainer


def _finish(plan: Plan, log: Sequence[Any], settings: Mapping[str, Any], output: Path, out: Any) -> None:
    """The curve and the card beside the adapter, and a word on where they are."""
    loss_curve(log, f"{plan.options.method} on {os.path.basename(plan.base)}", output / CURVE)
    held_out = [entry for entry in log if "eval_loss" in entry]
    best: dict[str, Any] = min(held_out, key=lambda entry: entry["eval_loss"], default={})
    measured = {name.removeprefix("eval_"): f"{value:.4g}" for name, value in best.items() if name.startswith("eval_")}
    rows = "".join(f"| {name} | {value} |\n" for name, value in {**settings, **measured}.items())
    card, picture = output / "README.md", f"\n![Loss]({CURVE})\n" if (output / CURVE).is_file() else ""
    other = re.sub(r"\n## Training\n.*?(?=\n## |\Z)", "", card.read_text(encoding="utf-8"), flags=re.DOTALL)
    told = f"\n## Training\n\n`peft train --config {SETTINGS}`\n\n| | |\n| --- | --- |\n{rows}{picture}"
    card.write_text(other + told, encoding="utf-8")  # in place of what an earlier run has told
    size = sum(path.stat().st_size for path in output.glob("adapter_*"))
    seconds = log[-1]["train_runtime"]
    out.print(f"Adapter ({size / 1000:,.0f} kB), curve, card and checkpoints are in {output}, after {seconds:.0f} s")


def _push(repo: str, revision: str | None, output: Path, out: Any) -> None:
    """Puts the folder on the hub as one commit, without checkpoints.

    Raises:
        ValueError: the hub does not take it; says how to try again.
    """
    apart = shutil.ignore_patterns("checkpoint-*", "_*")
    again = f"hf upload {repo} {shlex.quote(str(output))} . --exclude 'checkpoint-*'"
    with explained(f"--push-to-hub: the adapter is in {output}, but not on the hub; try again by `{again}`"):
        made = push(lambda folder: shutil.copytree(output, folder, ignore=apart, dirs_exist_ok=True), repo,
                    revision=revision)  # fmt: skip
    out.print(f"On the hub: {made.repo_url}")
