"""Mixed batches: which adapter each sample of a batch gets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

#: the name that stands for the base model without any adapter
BASE = "__base__"


#: one of a list or a dictionary of experts
_EXPERT = re.compile(r"(^|\.)\w*experts?[._]\d+(\.|$)")


#: tables of distances: T5, MPNet, WavLM, BERT and their like
_DISTANCES = re.compile(r"(^|\.)(relative_attention_bias|rel_attn_embed|rel_embeddings|distance_embedding)$")
#: tables of positions
_POSITIONS = re.compile(r"(^|\.)(wpe|\w*pos\w*)$")


def without_samples(key: str) -> str | None:
    """What the module `key` is given in place of a row for each sample, going by its name; None for such rows.

    `"tokens"` where it belongs to one of several experts, `"distances"` of positions, which all samples share, and so
    they may share `"positions"`.
    """
    kinds = (("tokens", _EXPERT), ("distances", _DISTANCES), ("positions", _POSITIONS))
    return next((kind for kind, pattern in kinds if pattern.search(key)), None)


class Route:
    """The adapters of a batch's samples, and the index of each adapter's rows, worked out once per batch size.

    Args:
        names: the adapter of each sample; `"__base__"` for none.
    """

    def __init__(self, names: Sequence[str]):
        self.names = list(names)
        #: adapter -> the places of its samples
        self.samples: dict[str, list[int]] = {}
        for place, name in enumerate(self.names):
            self.samples.setdefault(name, []).append(place)
        self._groups: dict[tuple[int, torch.device, int | None], list[tuple[str, Tensor]]] = {}
        self._blocks: dict[Any, tuple[Tensor, Tensor, Tensor] | None] = {}
        self._orders: dict[Any, tuple[Tensor | None, Tensor | None, list[int]]] = {}

    def groups(self, rows: int, device: torch.device, rounds: int | None = 1) -> list[tuple[str, Tensor]]:
        """(adapter, indices of its rows) for a tensor of `rows` rows.

        A layer may see several rows per sample, next to each other: beams, or tokens where a model flattens batch and
        sequence (OPT does).

        Args:
            rows: how many there are.
            device: where the indices are needed.
            rounds: how often all samples come, one after the other; None where rows have lost their samples.

        Raises:
            ValueError: the rows cannot be shared out among the samples.
        """
        key = (rows, device, rounds)
        if key not in self._groups:
            indices = self.indices(rows, rounds)
            self._groups[key] = [(name, torch.tensor(i, device=device)) for name, i in indices.items()]
        return self._groups[key]

    def order(
        self, rows: int, device: torch.device, rounds: int | None = 1
    ) -> tuple[Tensor | None, Tensor | None, list[int]]:
        """Rows in the order of `groups`, their way back, and how many there are of each; None where they are in order.

        Raises:
            ValueError: the rows cannot be shared out among the samples.
        """
        key = (rows, device, rounds)
        if key not in self._orders:
            groups = self.indices(rows, rounds).values()
            order = [row for some in groups for row in some]
            there = torch.tensor(order, device=device) if order != sorted(order) else None
            self._orders[key] = (there, None if there is None else there.argsort(), [len(some) for some in groups])
        return self._orders[key]

    def blocks(self, names: Sequence[str], rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor] | None:
        """The rows of some adapters as blocks of one length, one for each adapter, those of fewer rows filled up.

        Returns:
            The rows of all blocks, one behind the other; which of these are not there to fill up; the rows that these
            are. None where that is all rows in their order.
        """
        key = (rows, device, *names)
        if key not in self._blocks:
            indices = self.indices(rows)
            groups = [indices[name] for name in names]
            length, there = max(map(len, groups)), [row for some in groups for row in some]
            if length * len(groups) == rows and there == list(range(rows)):
                self._blocks[key] = None
            else:
                filled = [row for some in groups for row in (*some, *some[:1] * (length - len(some)))]
                places = [i * length + j for i, some in enumerate(groups) for j in range(len(some))]
                first, second, third = (torch.tensor(some, device=device) for some in (filled, places, there))
                self._blocks[key] = first, second, third
        return self._blocks[key]

    def indices(self, rows: int, rounds: int | None = 1) -> dict[str, list[int]]:
        """What `groups` says, as numbers.

        Raises:
            ValueError: the rows cannot be shared out among the samples.
        """
        if rounds is None:
            if len(set(self.names)) == 1:
                return {self.names[0]: list(range(rows))}
            raise ValueError(
                "Mixed batches (adapter_names) do not work here: the layer is given what has no row for each sample"
                " (tokens sent to an expert, positions or distances between them, sequences before samples). Run the"
                " samples of each adapter by themselves."
            )
        if not self.names or rows % (rounds * len(self.names)):
            raise ValueError(
                f"The length of adapter_names ({len(self.names)}) does not fit a layer that sees {rows} rows: one"
                " name per sample is needed."
            )
        repeats = rows // (rounds * len(self.names))
        indices: dict[str, list[int]] = {}
        for i, name in enumerate(self.names * rounds):
            indices.setdefault(name, []).extend(range(i * repeats, (i + 1) * repeats))
        return indices


def rows_of(value: Any, index: Tensor, rows: int) -> Any:
    """`value` for some samples of a batch of `rows`: their rows of a tensor that has one per sample."""
    return value.index_select(0, index) if isinstance(value, Tensor) and value.dim() and len(value) == rows else value


def select_rows(
    index: Tensor, rows: int, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a call for some samples; tuples (cosines and sines of positions, say) entry by entry."""

    def select(value: Any) -> Any:
        if type(value) is tuple:
            return tuple(select(entry) for entry in value)
        return rows_of(value, index, rows)

    return [select(value) for value in args], {key: select(value) for key, value in kwargs.items()}


def join_rows(parts: Iterable[tuple[Tensor, Any]], dim: int, rows: int) -> Any:
    """Outputs of groups of samples put together in the order of the samples; tuples entry by entry."""
    parts = list(parts)
    sample = parts[0][1]
    if isinstance(sample, tuple):
        # What a module returns beside its first output may count samples first even if that does not.
        return tuple(
            join_rows([(index, part[i]) for index, part in parts], dim if i == 0 else 0, rows)
            for i in range(len(sample))
        )
    if not isinstance(sample, Tensor):
        return sample
    shape = list(sample.shape)
    shape[dim] = rows
    joined = sample.new_empty(shape)
    for index, part in parts:
        if part.shape[dim] != len(index):  # what a recurrent layer hands on, by layers first
            raise ValueError(
                f"adapter_names (a mixed batch) needs modules whose outputs have a row per sample; one of shape"
                f" {tuple(part.shape)} came for {len(index)} samples."
            )
        joined.index_copy_(dim, index, part.to(joined.dtype))
    return joined


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
