"""Rows of embeddings that are trained beside an adapter: which they are, and how a model gets them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from peft.core.auxiliary import TrainableTokensLayer, TrainableTokensWrapper
from peft.core.plan import check_target_module_exists, ends_with, model_modules
from peft.core.tying import input_embedding_name, tied_embedding_modules


def token_rows(config: Any, model: nn.Module) -> dict[str, list[int]]:
    """Embedding -> rows to train, as `trainable_token_indices` says; a plain list means the input embedding.

    Raises:
        ValueError: the model has no such module.
        TypeError: the module is a target of the adapter too.
        IndexError: it has no such row.
    """
    wanted = getattr(config, "trainable_token_indices", None) or {}
    rows = wanted if isinstance(wanted, Mapping) else {input_embedding_name(model): list(wanted)}
    for name, indices in rows.items():
        found = [(key, module) for key, module in model_modules(model) if ends_with(key, {name})]
        if not found:
            raise ValueError(f"trainable_token_indices names {name!r}, which {type(model).__name__} does not have.")
        for key, module in found:
            if check_target_module_exists(config, key):
                raise TypeError(f"{key!r} is in target_modules and in trainable_token_indices; choose one of them.")
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and indices and max(indices) >= weight.shape[0]:
                raise IndexError(
                    f"trainable_token_indices has index {max(indices)}, but {key!r} has {weight.shape[0]} rows."
                )
    return dict(rows)


def train_tokens(model: nn.Module, adapter_name: str, rows: Mapping[str, Sequence[int]]) -> None:
    """Lets an adapter train rows of embeddings; output layers tied to one of them share its rows."""
    tied = tied_embedding_modules(model) if rows else []
    for name, indices in rows.items():
        for key in [key for key, _ in model_modules(model) if ends_with(key, {name})]:
            layer = _train_tokens_of(model, key, adapter_name, indices, None)
            for other in tied if key in tied else ():
                if other != key and not any(ends_with(other, {named}) for named in rows):
                    _train_tokens_of(model, other, adapter_name, indices, layer)


def _train_tokens_of(
    model: nn.Module, key: str, adapter_name: str, indices: Sequence[int], tied: TrainableTokensLayer | None
) -> TrainableTokensLayer:
    parent, _, name = key.rpartition(".")
    owner = model.get_submodule(parent)
    module = getattr(owner, name)
    if isinstance(module, TrainableTokensWrapper):
        module.update(adapter_name, token_indices=indices)
    else:
        module = TrainableTokensWrapper(module, adapter_name, indices, tied)
        setattr(owner, name, module)
    return module.token_adapter
