"""The training loop, once: for the adapter of the user and for the small base model of the demo."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from peft.cli.data import IGNORED, Example, collate

Batch = dict[str, torch.Tensor]


def _autocast(model: Any, bf16: bool) -> torch.autocast:
    return torch.autocast(model.device.type, torch.bfloat16, enabled=bf16)


def _targets(model: Any, batch: Batch) -> int:
    """How many tokens of a batch are predicted: a decoder alone predicts no first one."""
    labels = batch["labels"] if model.config.is_encoder_decoder else batch["labels"][:, 1:]
    return int((labels != IGNORED).sum())


def optimize(
    model: Any,
    batches: Callable[[int], list[Batch]],
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    steps: range,
    *,
    max_grad_norm: float,
    bf16: bool = False,
) -> Iterator[tuple[int, float]]:
    """Takes the optimizer steps `steps`; yields (steps taken so far, loss per token) after each.

    The batches of one step count by their tokens, so that accumulating gradients equals one large batch.

    Raises:
        RuntimeError: the loss is no longer a number; the model is left as the step before made it.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    for step in steps:
        model.train()
        work = [(batch, _targets(model, batch)) for batch in batches(step)]
        tokens = sum(count for _, count in work)
        total = 0.0
        for batch, count in work:
            with _autocast(model, bf16):
                loss = model(**batch).loss * (count / tokens)
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise RuntimeError(f"the loss is {total} at step {step + 1}: a lower --lr or --max-grad-norm may help")
        torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        optimizer.step()
        scheduler.step()
        # AdaLoRA and its kind move ranks between layers by the gradients of the step
        if hasattr(getattr(model, "base_model", None), "update_and_allocate"):
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad(set_to_none=True)
        yield step + 1, total


@torch.no_grad()
def evaluate(model: Any, examples: Sequence[Example], size: int, pad: int, *, bf16: bool = False) -> float:
    """Loss per token over `examples`, in evaluation mode."""
    model.eval()
    total = tokens = 0.0
    for start in range(0, len(examples), size):
        batch = collate(examples[start : start + size], pad, model.device)
        count = _targets(model, batch)
        with _autocast(model, bf16):
            total += model(**batch).loss.item() * count
        tokens += count
    return total / tokens


@contextmanager
def progress(console: Any, title: str, total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
    """A progress bar on a terminal, nothing elsewhere; call what it yields after each step, with a word about it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(title, total=total, completed=done, note="")
        yield lambda note: bar.update(task, advance=1, note=note)
