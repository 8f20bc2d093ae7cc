"""Multitask prompt tuning: one soft prompt for several tasks, and a low-rank factor for each of them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft.core.routing import check_task_ids
from peft.pickles import read_pickle
from peft.registry import PeftType
from peft.tuners.prompts.prompt_tuning import PromptEmbedding, PromptTuningConfig
from peft.untrusted import check_allowed
from peft.values import NonNegativeInt, PositiveInt


class MultitaskPromptTuningInit(str, Enum):
    """How the prompt starts.

    TEXT: from the embeddings of a text. RANDOM: at random. From a prompt trained on source tasks:
    AVERAGE_SOURCE_TASKS, the shared prompt and the mean of the factors; EXACT_SOURCE_TASK, the shared prompt and the
    factors of one task; ONLY_SOURCE_SHARED, the shared prompt alone.
    """

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig, peft_type=PeftType.MULTITASK_PROMPT_TUNING):
    """Multitask prompt tuning (arXiv:2303.02861). Forward passes and generation need `task_ids` [batch].

    Args:
        prompt_tuning_init: how the prompt starts, one of [`MultitaskPromptTuningInit`].
        prompt_tuning_init_state_dict_path: file of the prompt trained on source tasks (safetensors or a pickle).
        prompt_tuning_init_task: the source task that EXACT_SOURCE_TASK takes.
        num_ranks: rank of each task's factor.
        num_tasks: number of tasks.

    Raises:
        ValueError: a start from source tasks without their file, or counts that are not positive.
    """

    prompt_tuning_init: MultitaskPromptTuningInit | str = MultitaskPromptTuningInit.RANDOM
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: NonNegativeInt | None = 0
    num_ranks: PositiveInt = 1
    num_tasks: PositiveInt = 1

    def check(self) -> None:
        super().check()
        start: Any = self.prompt_tuning_init
        if "SOURCE" in start and not self.prompt_tuning_init_state_dict_path:
            raise ValueError(f"prompt_tuning_init={start.value!r} needs prompt_tuning_init_state_dict_path, a file.")


class MultitaskPromptEmbedding(PromptEmbedding):
    """The prompt of task t is embedding * (cols_t rows_t), elementwise (arXiv:2303.02861): `embedding` [tokens,
    token_dim] is shared, `prefix_task_cols` [tasks, tokens, ranks] and `prefix_task_rows` [tasks, ranks, token_dim]
    hold a factor of low rank for each task.

    Raises:
        ValueError: the file of source tasks does not fit.
    """

    prompts_decoder: ClassVar[bool] = True
    reads_weights = True
    stored_beside: ClassVar[tuple[str, ...]] = ("prefix_task_cols", "prefix_task_rows")

    def __init__(self, config: Any, word_embeddings: nn.Module):
        super().__init__(config, word_embeddings)
        tokens, width = self.embedding.weight.shape
        self.num_tasks: int = config.num_tasks
        self.prefix_task_cols = nn.Parameter(torch.empty(config.num_tasks, tokens, config.num_ranks).normal_(std=0.02))
        self.prefix_task_rows = nn.Parameter(torch.empty(config.num_tasks, config.num_ranks, width).normal_(std=0.02))
        if not config.inference_mode and "SOURCE" in config.prompt_tuning_init:
            self._start_from_source(config)

    @torch.no_grad()
    def _start_from_source(self, config: Any) -> None:
        check_allowed(config, "prompt_tuning_init_state_dict_path")
        path, start = config.prompt_tuning_init_state_dict_path, config.prompt_tuning_init
        source = _read(path)
        factors_too = start != MultitaskPromptTuningInit.ONLY_SOURCE_SHARED
        wanted = ["prompt_embeddings", *(self.stored_beside if factors_too else ())]
        lacking = [name for name in wanted if name not in source]
        if lacking:
            raise ValueError(f"{path} is no prompt of source tasks: it lacks {', '.join(lacking)}.")
        stored, task = self.stored_tensors(), config.prompt_tuning_init_task
        for name in wanted:
            value = source[name]
            if name in self.stored_beside:
                if start != MultitaskPromptTuningInit.EXACT_SOURCE_TASK:
                    value = value.mean(0)
                elif task is None or not 0 <= task < len(value):
                    raise ValueError(f"prompt_tuning_init_task={task}, but {path} has {len(value)} tasks.")
                else:
                    value = value[task]
                value = value.expand(self.num_tasks, *value.shape)
            if value.shape != stored[name].shape:
                raise ValueError(
                    f"{name} in {path} gives {tuple(value.shape)}, but this prompt has {tuple(stored[name].shape)}:"
                    " num_virtual_tokens, num_ranks and the width of the base model must be those of the source."
                )
            stored[name].copy_(value)

    def prompt(self, batch_size: int, task_ids: Tensor | None = None, **options: Any) -> Tensor:
        """Vectors [batch, tokens, token_dim].

        Args:
            batch_size: number of samples.
            task_ids: [batch], the task of each.

        Raises:
            ValueError: no `task_ids`, not one for each sample, or one out of range.
        """
        tasks = check_task_ids(task_ids, self.num_tasks, batch_size).to(self.prefix_task_cols.device)
        return self(self.indices) * (self.prefix_task_cols[tasks] @ self.prefix_task_rows[tasks])


def _read(path: str) -> dict[str, Tensor]:
    """The tensors of a file, by the names that a saved adapter has them under."""
    if not os.path.isfile(path):
        raise ValueError(f"prompt_tuning_init_state_dict_path={path!r} is no file.")
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    return read_pickle(path)
