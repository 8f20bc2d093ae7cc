"""Mixed batches: which adapter each sample of a batch gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: the name that stands for the base model without any adapter
BASE = "__base__"


class Route:
    """The adapters of a batch's samples, and the index of each adapter's rows, worked out once per batch size.

    Args:
        names: the adapter of each sample; `"__base__"` for none.
    """

    def __init__(self, names: Sequence[str]):
        self.names = list(names)
        #: what layers have worked out for these names, by layer; as short-lived as the route
        self.prepared: dict[object, Any] = {}
        self._groups: dict[tuple[int, torch.device], list[tuple[str, Tensor]]] = {}

    def groups(self, rows: int, device: torch.device) -> list[tuple[str, Tensor]]:
        """(adapter, indices of its rows) for a tensor of `rows` rows.

        A layer may see several rows per sample, next to each other: beams, or tokens where a model flattens batch and
        sequence (OPT does).

        Raises:
            ValueError: the rows cannot be shared out among the samples.
        """
        key = (rows, device)
        if key not in self._groups:
            self._groups[key] = [(name, torch.tensor(i, device=device)) for name, i in self.indices(rows).items()]
        return self._groups[key]

    def indices(self, rows: int) -> dict[str, list[int]]:
        """What `groups` says, as numbers.

        Raises:
            ValueError: the rows cannot be shared out among the samples.
        """
        if not self.names or rows % len(self.names):
            raise ValueError(
                f"The length of adapter_names ({len(self.names)}) does not fit a layer that sees {rows} rows: one"
                " name per sample is needed."
            )
        repeats = rows // len(self.names)
        indices: dict[str, list[int]] = {}
        for i, name in enumerate(self.names):
            indices.setdefault(name, []).extend(range(i * repeats, (i + 1) * repeats))
        return indices


def check_task_ids(task_ids: Tensor | None, num_tasks: int, rows: int) -> Tensor:
    """`task_ids` [rows], the task of each sample, where they are fit for use.

    Raises:
        ValueError: there are none, they are not one for each sample, or one is no task.
    """
    if task_ids is None:
        raise ValueError(f"task_ids cannot be None: the task of each sample is needed, 0 to {num_tasks - 1}.")
    task_ids = torch.as_tensor(task_ids)
    if task_ids.shape != (rows,):
        raise ValueError(f"task_ids must be [{rows}], one task for each sample; got {tuple(task_ids.shape)}.")
    if rows and not 0 <= int(task_ids.min()) <= int(task_ids.max()) < num_tasks:
        raise ValueError(f"task_ids must be 0 to {num_tasks - 1}, got {sorted(set(task_ids.tolist()))}.")
    return task_ids.long()
