"""What belongs to adapters in a run of transformers' Trainer, and what is said about it."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from peft.core.tuner import BaseTuner
from peft.errors import listed

#: beside a checkpoint: the adapter's files of some methods hold what their training parameters come to
STATE = "trainable.pt"
#: seconds between two lines where there is no terminal
PAUSE = 15.0
#: of what an evaluation gives, by the words for it
SHOWN = {
    "loss": "held out", "accuracy": "accuracy", "f1": "F1", "rmse": "RMSE", "r2": "R²",
    "mean_token_accuracy": "token accuracy", "rewards/accuracies": "preferred", "rewards/margins": "margin",
}  # fmt: skip


def last_checkpoint(output: Path) -> str | None:
    """The last checkpoint that is whole: a killed process may have left one that is not."""
    found = sorted(output.glob("checkpoint-[0-9]*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for name in (STATE, "trainer_state.json"):  # sharded training keeps what trains in files of its own
        whole = [path for path in found if (path / name).is_file()]
        if whole:
            return str(whole[-1])
    return None


class Watch(TrainerCallback):
    """Speaks of the progress; checks gradients and losses; calls methods that change between steps; keeps parameters.

    Args:
        console: a rich console.
        checkpoint: what the run goes on from, or None.
        total: steps of the run.
    """

    def __init__(self, console: Any, checkpoint: str | None, total: int):
        self.console, self.checkpoint, self.total = console, checkpoint, total
        self.said, self.loss = time.monotonic(), ""
        quiet = not console.is_terminal or console.quiet
        self.bar = tqdm(total=total, desc="training", leave=False, dynamic_ncols=True, disable=quiet)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.first, self.begun = state.global_step, time.monotonic()
        path = Path(self.checkpoint or "") / STATE
        if self.checkpoint and path.is_file():
            kept = torch.load(path, map_location="cpu", weights_only=True)
            mine = {name: p for name, p in model.named_parameters() if p.requires_grad}
            if {name: p.shape for name, p in mine.items()} != {name: p.shape for name, p in kept.items()}:
                raise ValueError(f"--resume: {self.checkpoint} is of another model, or of a method with other fields")
            with torch.no_grad():
                for name, parameter in mine.items():
                    parameter.copy_(kept[name])

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

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.set_postfix_str(self.loss, refresh=False)
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Raises RuntimeError where the loss is no longer a number."""
        loss = logs.get("loss")
        if loss is not None:
            if not math.isfinite(loss):
                raise RuntimeError(f"the loss is {loss} at step {state.global_step}: a lower --lr may help")
            self.loss = f"loss {loss:.4f}"
        evaluated = "eval_loss" in logs
        if evaluated or (loss is not None and not control.should_evaluate and time.monotonic() - self.said > PAUSE):
            words = [f"step {state.global_step:>{len(str(self.total))}}/{self.total}", *[self.loss] * bool(self.loss)]
            words += [f"{SHOWN[k]} {logs[f'eval_{k}']:.4f}" for k in SHOWN if f"eval_{k}" in logs]
            done = state.global_step - self.first
            if 0 < done < self.total - self.first:
                left = (time.monotonic() - self.begun) / done * (self.total - state.global_step)
                words.append(f"{left / 60:.0f} min left" if left > 90 else f"{left:.0f} s left")
            self.bar.clear()
            self.console.print("  ".join(words))
            self.said = time.monotonic()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir() and not (args.fsdp or args.deepspeed):
            trains = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
            torch.save(trains, folder / f"{STATE}.tmp")
            (folder / f"{STATE}.tmp").rename(folder / STATE)  # the last of a checkpoint: with it, it is whole
