"""Rows of embeddings that are trained beside an adapter: which they are, and how a model gets them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from peft.core.auxiliary import ModulesToSaveWrapper, TrainableTokensLayer, TrainableTokensWrapper
from peft.core.plan import check_target_module_exists, ends_with, model_modules
from peft.core.tying import input_embedding_name, tied_embedding_modules


def token_rows(config: Any, model: nn.Module) -> dict[str, list[int]]:
    """Embedding -> rows to train, as `trainable_token_indices` says; a plain list means the input embedding.

    Raises:
        ValueError: the model has no such module, the adapter trains it in full, or a row is named twice.
        TypeError: the module is a target of the adapter too, or no embedding.
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
            if isinstance(module, ModulesToSaveWrapper) or ends_with(key, config.modules_to_save or ()):
                raise ValueError(
                    f"{key!r} is trained in full (modules_to_save), so trainable_token_indices has nothing to add;"
                    " leave out one of them."
                )
            check_rows(key, module, indices)
    return dict(rows)


def check_rows(key: str, module: nn.Module, indices: Sequence[int]) -> None:
    """Raises TypeError, IndexError or ValueError where these are no rows of an embedding to train."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise TypeError(f"trainable_token_indices needs an embedding; {key!r} is a {type(module).__name__}.")
    tokens = weight.shape[0]
    if not all(isinstance(index, int) for index in indices):
        raise TypeError(f"trainable_token_indices must be integers, got {list(indices)}.")
    outside = [index for index in indices if not -tokens <= index < tokens]
    if outside:
        raise IndexError(f"trainable_token_indices has index {outside[0]}, but {key!r} has {tokens} rows.")
    if len({index % tokens for index in indices}) < len(indices):
        raise ValueError(f"trainable_token_indices={list(indices)} names a row of {key!r} twice.")


def train_tokens(model: nn.Module, adapter_name: str, rows: Mapping[str, Sequence[int]]) -> None:
    """Lets an adapter train rows of embeddings; output layers tied to the input embedding share its rows."""
    tied = tied_embedding_modules(model) if rows else []
    for name, indices in rows.items():
        for key in [key for key, _ in model_modules(model) if ends_with(key, {name})]:
            layer = _train_tokens_of(model, key, adapter_name, indices, None)
            # What is said of the output layer alone holds for it alone.
            for other in tied if key in tied[:1] else ():
                in_full = isinstance(model.get_submodule(other), ModulesToSaveWrapper)
                if other != key and not in_full and not any(ends_with(other, {named}) for named in rows):
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
        module = TrainableTokensWrapper(module, adapter_name, indices, tied).train(module.training)
        setattr(owner, name, module)
    return module.token_adapter
