"""What belongs to adapters in a run of transformers' Trainer, and what is said about it."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback

from peft.cli.options import TABLES
from peft.core.tuner import BaseTuner
from peft.errors import listed

#: beside a checkpoint: the adapter's files of some methods hold what their training parameters come to
STATE = "trainable.pt"
#: seconds between two lines
PAUSE = 5.0


def console(quiet: bool = False) -> Console:
    """A rich console, which speaks in the first of several processes alone, or not at all."""
    silent = quiet or int(os.environ.get("RANK", 0)) > 0
    return Console(quiet=silent, soft_wrap=True, highlight=False, markup=False)


def last_checkpoint(output: Path) -> str | None:
    """The last checkpoint that is whole: a killed process may have left one that is not."""
    folders = "checkpoint-[0-9]*"  # sharded training keeps what trains in files of its own
    found = [*output.glob(f"{folders}/{STATE}")] or [*output.glob(f"{folders}/trainer_state.json")]
    whole = {int(path.parent.name.rpartition("-")[2]): str(path.parent) for path in found}
    return whole[max(whole)] if whole else None


class NoNumber(RuntimeError):
    """The loss of a run is infinite, or not a number."""


class Watch(TrainerCallback):
    """Speaks of the progress; checks gradients and losses; calls methods that change between steps; keeps parameters.

    Args:
        console: a rich console.
        checkpoint: what the run goes on from, or None.
    """

    def __init__(self, console: Any, checkpoint: str | None = None):
        self.console, self.checkpoint = console, checkpoint
        self.said, self.loss = time.monotonic(), ""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.first, self.begun = state.global_step, time.monotonic()
        path = Path(self.checkpoint or "") / STATE
        if self.checkpoint and path.is_file():
            kept = torch.load(path, map_location="cpu", weights_only=True)
            if kept.keys() != {name for name, p in model.named_parameters() if p.requires_grad}:
                raise ValueError(f"--resume: {self.checkpoint} is of another model, or of a method with other fields")
            model.load_state_dict(kept, strict=False)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Raises RuntimeError where a tensor that should train has no gradient in the first step."""
        if state.global_step or args.deepspeed:  # DeepSpeed keeps gradients in places of its own
            return
        trains = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        tuner = getattr(model, "base_model", None)
        methods = tuner.methods() if isinstance(tuner, BaseTuner) else []
        idle = tuple(f".{slot}." for method in methods for slot in method.idle_slots)
        dead = [name for name, grad in trains.items() if grad is None and not any(slot in name for slot in idle)]
        if any(value for name, value in vars(model.config).items() if name.endswith("layerdrop")):
            dead = []  # layers are left out at random, one step without a gradient says nothing
        nothing = not any(grad.any() for grad in trains.values() if grad is not None)
        if nothing and getattr(model.get_base_model(), "is_quantized", False):
            # some of their kernels have no backward on some devices
            dead = list(trains)
        if dead:
            raise RuntimeError(
                f"{len(dead)} of {len(trains)} adapter tensors got no gradient in the first step, so they would stay as"
                f" they are: {listed(dead, 3)}. Leave their modules out of the"
                " targets, or train without quantisation on this device"
            )
        if nothing:
            self.console.print("Note: all gradients are zero in the first step; trained tokens may not be in its data")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        # AdaLoRA and its kind move ranks between layers by the gradients of the step
        if hasattr(getattr(model, "base_model", None), "update_and_allocate"):
            model.base_model.update_and_allocate(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Raises NoNumber where the loss is no longer one."""
        loss = logs.get("loss")
        if loss is not None:
            if not math.isfinite(loss):
                raise NoNumber(f"the loss is {loss} at step {state.global_step}: a lower --lr may help")
            self.loss = f"loss {loss:.4f}"
        evaluated, total = "eval_loss" in logs, state.max_steps
        if evaluated or (loss is not None and not control.should_evaluate and time.monotonic() - self.said > PAUSE):
            words = [f"step {state.global_step:>{len(str(total))}}/{total}", *[self.loss] * bool(self.loss)]
            words += [f"{word} {logs[f'eval_{k}']:.4f}" for k, word in TABLES.shown.items() if f"eval_{k}" in logs]
            done = state.global_step - self.first
            if 0 < done < total - self.first:
                left = (time.monotonic() - self.begun) / done * (total - state.global_step)
                words.append(f"{left / 60:.0f} min left" if left > 90 else f"{left:.0f} s left")
            self.console.print("  ".join(words))
            self.said = time.monotonic()

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir() and not (args.fsdp or args.deepspeed):
            trains = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
            torch.save(trains, folder / f"{STATE}.tmp")
            (folder / f"{STATE}.tmp").rename(folder / STATE)  # the last of a checkpoint: with it, it is whole
