"""`peft train`: an adapter from a model and data, with a log, a loss curve, and checkpoints to go on from."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import time
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peft import PeftModel, get_peft_model
from peft.cli import tiny
from peft.cli.arguments import SETTINGS, add_arguments, option_names, write_settings
from peft.cli.data import Batches, Example, make_examples, read_documents, split
from peft.cli.fields import build, user_fields
from peft.cli.loop import evaluate, optimize, progress
from peft.cli.models import AUTO_CLASSES, device_of, load_base, load_tokenizer, task_of, transformers
from peft.cli.plots import loss_curve
from peft.registry import method_of

LOG, CURVE, STATE = "log.jsonl", "loss.png", "state.pt"


@dataclass
class Outcome:
    """A trained adapter.

    Attributes:
        model: the base model with the adapter.
        tokenizer: of the base model.
        base: path or hub id of the base model.
        before: loss on the held-out examples without the adapter; None where nothing was held out.
        after: the same with it.
        seconds: what the fine-tuning took.
    """

    model: PeftModel
    tokenizer: Any
    base: str
    before: float | None
    after: float | None
    seconds: float


def run(args: Namespace, fields: dict[str, Any]) -> int:
    from rich.console import Console

    train(args, fields, Console())
    return 0


def train(args: Namespace, fields: dict[str, Any], console: Any) -> Outcome:
    """Trains as `args` and `fields` say (see `peft.cli.arguments.read_train`), reporting to a rich console.

    Raises:
        ValueError: an option that does not fit the model or the data; nothing is trained then.
        RuntimeError: the loss is no longer a number.
    """
    config_class = method_of(args.method.upper()).config_class
    options = option_names(add_arguments("train", ArgumentParser()))
    build(config_class, fields, options=options)  # a wrong option is said before anything else is done
    output = _prepare(args)

    base = args.model or tiny.base_model(output, console, args.base_steps)
    task, tokenizer, device = task_of(base), load_tokenizer(base), device_of(args.device)
    model = load_base(base, AUTO_CLASSES[task], dtype=torch.bfloat16 if args.bf16 else None, device=device)
    block = min(args.block_size, getattr(model.config, "max_position_embeddings", None) or args.block_size)
    training, held_out = _examples(args, tokenizer, block, task, console)
    batches = Batches(training, args.batch_size, args.grad_accum, tokenizer.pad_token_id, device, args.seed)
    total = args.max_steps or max(1, math.ceil(args.epochs * batches.steps_per_epoch))

    defaults = {"task_type": task, "tokenizer_name_or_path": base, "total_step": total}
    known = user_fields(config_class)
    config = build(config_class, {name: value for name, value in defaults.items() if name in known} | fields)
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    model = get_peft_model(model, config)
    if args.gradient_checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    trainable, everything = model.get_nb_trainable_parameters()
    console.print(
        f"{args.method} on {type(model.get_base_model()).__name__}: {trainable:,} of {everything:,} parameters train"
        f" ({100 * trainable / everything:.2f} %)\n{len(training):,} examples of up to {block} tokens,"
        f" {len(held_out):,} held out; {total:,} steps on {device}"
    )

    run = _Run(args, model, output, total, console)
    done = run.restore() if args.resume else 0
    if not done:
        output.mkdir(parents=True, exist_ok=True)
        for folder in _checkpoints(output):
            shutil.rmtree(folder)
        write_settings(output / SETTINGS, args, fields)
    start = time.perf_counter()
    run.fit(batches, held_out, done)
    seconds = time.perf_counter() - start
    model.eval().save_pretrained(output)
    loss_curve(run.entries, f"{args.method} on {os.path.basename(base)}", output / CURVE)
    size = sum(path.stat().st_size for path in output.glob("adapter_*"))
    console.print(
        f"Adapter ({size / 1000:,.0f} kB), {CURVE} and {LOG} are in {output}, after {seconds:.0f} s", soft_wrap=True
    )
    losses = [entry["eval_loss"] for entry in run.entries if "eval_loss" in entry] or [None]
    return Outcome(model, tokenizer, base, losses[0], losses[-1], seconds)


def _prepare(args: Namespace) -> Path:
    """The output folder, with paths made absolute, so that a resumed run finds them wherever it is started.

    Raises:
        ValueError: it holds a run, which would be lost.
    """
    for name in ("data", "eval_data"):
        if getattr(args, name):
            setattr(args, name, [os.path.abspath(path) for path in getattr(args, name)])
    if args.model and os.path.isdir(args.model):
        args.model = os.path.abspath(args.model)
    output = Path(args.output)
    if output.is_file():
        raise ValueError(f"--output {output} is a file")
    there = any((output / name).exists() for name in (SETTINGS, "adapter_config.json"))
    if there and not (args.resume or args.overwrite):
        raise ValueError(f"--output {output} holds a run: --resume goes on with it, --overwrite replaces it")
    return output


def _examples(
    args: Namespace, tokenizer: Any, block: int, task: str, console: Any
) -> tuple[list[Example], list[Example]]:
    """(examples to train on, examples held out)"""
    names = dict(text=args.text_field, prompt=args.prompt_field, completion=args.completion_field)

    def load(files: list[str] | None) -> list[Example]:
        documents = read_documents(files, **names) if files else tiny.library_sources()
        examples, cut = make_examples(documents, tokenizer, block, seq2seq=task == "SEQ_2_SEQ_LM")
        if cut:
            console.print(f"{cut:,} of {len(examples):,} answers lose their end: --block-size is {block} tokens")
        return examples

    examples = load(args.data)
    if args.eval_data:
        return examples, load(args.eval_data)
    if not 0 <= args.eval_split < 1:
        raise ValueError(f"--eval-split takes a share from 0 up to 1, got {args.eval_split}")
    return split(examples, args.eval_split, args.seed)


def _checkpoints(output: Path) -> list[Path]:
    found = [path for path in output.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


class _Run:
    """The steps of a run, and what they leave on disk, so that a killed one goes on as if nothing had happened."""

    def __init__(self, args: Namespace, model: PeftModel, output: Path, total: int, console: Any):
        self.args, self.model, self.output, self.total, self.console = args, model, output, total, console
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay)
        self.scheduler = transformers().get_scheduler(args.schedule, self.optimizer, args.warmup_steps, total)
        self.entries: list[dict[str, Any]] = []

    def fit(self, batches: Batches, held_out: list[Example], done: int) -> None:
        """Takes the steps from `done` on, with evaluations and checkpoints on the way."""
        args, total = self.args, self.total
        every = args.eval_steps or max(1, math.ceil(total / 10))
        save_every = args.save_steps or every

        def log(entry: dict[str, Any], evaluates: bool) -> None:
            if evaluates and held_out:
                loss = evaluate(self.model, held_out, args.batch_size, batches.pad, bf16=args.bf16)
                entry["eval_loss"] = loss
            self._log(entry, say=evaluates)

        self._open_log(done)
        if not done:
            log({"step": 0}, evaluates=True)
        steps = optimize(
            self.model,
            batches,
            self.optimizer,
            self.scheduler,
            range(done, total),
            max_grad_norm=args.max_grad_norm,
            bf16=args.bf16,
        )
        with progress(self.console, "training", total, done) as advance:
            for step, loss in steps:
                last = step == total
                log({"step": step, "loss": loss, "lr": self.scheduler.get_last_lr()[0]}, last or step % every == 0)
                if last or step % save_every == 0:
                    self.save(step)
                advance(f"loss {loss:.3f}")

    def _open_log(self, done: int) -> None:
        """Starts the log, with the lines up to step `done`: a killed run may have got further than its checkpoint."""
        path = self.output / LOG
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[: done + 1] if done else []
        self.entries = [json.loads(line) for line in lines]
        path.write_text("".join(lines), encoding="utf-8")

    def _log(self, entry: dict[str, Any], say: bool) -> None:
        self.entries.append(entry)
        with open(self.output / LOG, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if say:
            words = [f"step {entry['step']:>{len(str(self.total))}}/{self.total}"]
            named = (("loss", "loss"), ("eval_loss", "held out"))
            words += [f"{word} {entry[key]:.4f}" for key, word in named if key in entry]
            self.console.print("  ".join(words), highlight=False)

    def save(self, step: int) -> None:
        """Writes a checkpoint beside the last one and removes that when it is whole."""
        old = _checkpoints(self.output)
        folder = self.output / "checkpoint.unfinished"
        shutil.rmtree(folder, ignore_errors=True)
        self.model.save_pretrained(folder)
        state = {
            "step": step,
            # not the adapter's files: those of some methods hold what their training parameters come to
            "trainable": {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": {"python": random.getstate(), "torch": torch.get_rng_state()},
        }
        if torch.cuda.is_available():
            state["random"]["cuda"] = torch.cuda.get_rng_state_all()
        torch.save(state, folder / STATE)
        folder.rename(self.output / f"checkpoint-{step}")
        for path in old:
            shutil.rmtree(path)

    def restore(self) -> int:
        """Reads the last checkpoint; returns its step, 0 where there is none yet."""
        found = _checkpoints(self.output)
        if not found:
            return 0
        state = torch.load(found[-1] / STATE, map_location="cpu", weights_only=True)
        mine = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if {name: p.shape for name, p in mine.items()} != {name: p.shape for name, p in state["trainable"].items()}:
            raise ValueError(f"--resume: {found[-1]} is of another model, or of a method with other fields")
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(state["trainable"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        random.setstate(state["random"]["python"])
        torch.set_rng_state(state["random"]["torch"])
        if "cuda" in state["random"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["random"]["cuda"])
        self.console.print(f"Going on after step {state['step']:,}")
        return int(state["step"])
