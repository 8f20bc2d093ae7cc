"""Rows of embeddings that are trained on their own: the layer that has them, which they are, how a model gets them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.core.adapted import Ledger
from peft.core.auxiliary import ModulesToSaveWrapper
from peft.core.base_op import BaseOp, EmbeddingOp, base_op
from peft.core.change import Change, Weight
from peft.core.layer import AdapterLayer
from peft.core.part import Part
from peft.core.slots import Buffers, Setting, Slot
from peft.core.storage.shared import shape_of
from peft.core.targets import base_of, check_target_module_exists, ends_with, model_modules, saved_as
from peft.core.tying import input_embedding_name, tied_embedding_modules
from peft.core.walk import live_key, parts_of
from peft.core.wrappers import TrainableTokensWrapper, get_submodules, held


@dataclass(slots=True, eq=False)
class Rows(Change):
    """Some vectors of an embedding's weight (columns of the matrix), or rows of a linear layer's, replaced.

    Attributes:
        index: which, [n].
        values: what they are replaced by, [n, dim].
    """

    index: Tensor
    values: Tensor
    with_bias = False

    def acts(self, op: BaseOp) -> bool:
        return op.kind in ("Embedding", "Linear") and self.index.numel() > 0

    def leave(self, op: BaseOp, module: Any, x: Tensor, y: Tensor, bias: Tensor | None, fresh: bool = False) -> Tensor:
        # They go to their places in the output: that is less than putting them into the weight.
        values, index = self.values.to(y.dtype), self.index
        if op.kind != "Embedding":
            bias = None if bias is None else bias[index].to(y.dtype)
            return y.index_copy(-1, index, F.linear(x.to(y.dtype), values, bias))
        places = torch.full((op.in_features,), -1, device=x.device)
        places[index] = torch.arange(len(index), device=x.device)
        place, padding = places[x], module.padding_idx
        padding = None if padding is None or places[padding] < 0 else int(places[padding])
        trained = F.embedding(place.clamp(min=0), values, padding_idx=padding)
        return torch.where((place >= 0).unsqueeze(-1), EmbeddingOp.scaled(module, trained), y)

    def weight(self, op: BaseOp, module: Any, matrix: Tensor) -> Tensor:
        values = self.values.to(matrix)
        dim = 1 if op.kind == "Embedding" else 0
        return matrix.index_copy(dim, self.index, values.T if dim else values)


class TrainableTokensLayer(AdapterLayer):
    """Rows of an embedding that are trained on their own: `trainable_tokens_delta[adapter]`, [tokens, dim].

    That is all of an adapter of this method; one of another may train rows beside its changes of other modules
    (`trainable_token_indices`), and has no configuration here then.

    Args:
        base_layer: an `nn.Embedding`, or the linear layer tied to one.
        tied: the layer whose rows these are too (an output layer shares those of the embedding).
        apart: whether the modules get weights of their own when rows are merged, since others change one of them too.
        group: names of the modules that have the rows in common, the one that holds them first; none for one alone.
    """

    trainable_tokens_delta = Slot()
    kinds = frozenset(("Embedding", "Linear"))
    label = "{name}"

    token_indices = Setting[list[int]]()

    def __init__(
        self,
        base_layer: nn.Module,
        tied: TrainableTokensLayer | None = None,
        apart: bool = False,
        group: tuple[str, ...] = (),
    ):
        super().__init__(base_layer)
        self.group = group
        #: whether the rows are held by another layer
        self.is_tied = False
        #: whether rows and weight are those of another layer too, and stay so when they are merged
        self.has_twin = False
        if tied is not None:
            self.tie_to(tied, apart)

    def tie_to(self, tied: TrainableTokensLayer, apart: bool = False) -> None:
        """Takes the rows of another layer for this one's too."""
        # The same containers: what is trained, moved or deleted there is so here.
        self.trainable_tokens_delta = tied.trainable_tokens_delta
        self.configs, self.settings = tied.configs, tied.settings
        self.is_tied = True
        if not apart and self.get_base_layer().weight is tied.get_base_layer().weight:
            self.ledger = tied.ledger
            self.has_twin = tied.has_twin = True
        self.refresh()

    @property
    def trainable_tokens_original(self) -> Buffers:
        """Adapter -> the rows as they are without it, [tokens, dim]."""
        rows, weight = Buffers(persistent=False), self.original_weight().detach()
        for name, indices in self.token_indices.items():
            rows[name] = weight[indices]
        return rows

    def part_from(self, others: Iterable[Part]) -> None:
        """Lets twins among these have weights of their own when merged: another adapter is about to change this one's.

        Raises:
            ValueError: they are merged.
        """
        if self.has_twin and self.ledger.entries:
            raise ValueError("Rows of tied embeddings are merged; call unmerge_adapter() before adapting one of them.")
        twins = [part for part in others if isinstance(part, TrainableTokensLayer) and part.ledger is self.ledger]
        for twin in twins if self.has_twin else ():
            twin.ledger, twin.has_twin = Ledger(), False
            twin.refresh()

    def new_record(self, name: str, config: Any, own: Any = None) -> None:
        if not self.is_tied:
            super().new_record(name, config, own)

    def create(self, name: str, config: Any, token_indices: Sequence[int] = ()) -> None:
        if self.is_tied:
            return
        weight = self.original_weight()
        outside = [index for index in token_indices if not -weight.shape[0] <= index < weight.shape[0]]
        if outside:
            raise IndexError(f"Token index {outside[0]} is out of range for an embedding of {weight.shape[0]} tokens.")
        self.token_indices[name] = list(token_indices)
        rows = weight.detach()[torch.tensor(token_indices, dtype=torch.long, device=weight.device)]
        start = rows.clone() if getattr(config, "init_weights", True) else torch.randn_like(rows)
        self.trainable_tokens_delta[name] = nn.Parameter(start)

    def is_beside(self, name: str) -> bool:
        return self.has(name) and self.configs[name] is None

    def key_map(self, name: str) -> dict[str, str]:
        keys = super().key_map(name)
        if not self.is_beside(name):
            return keys
        return {} if self.is_tied else {f"token_adapter.{key}": live for key, live in keys.items()}

    def change(self, name: str) -> Change:
        tokens = self.in_features if self.op.kind == "Embedding" else self.out_features
        rows = self.trainable_tokens_delta[name]
        index = torch.tensor([i % tokens for i in self.token_indices[name]], dtype=torch.long, device=rows.device)
        # An embedding that shortens the vectors it looks up (max_norm) has to do so itself.
        by_weight = getattr(self.get_base_layer(), "max_norm", None) is not None
        change = Rows(index, rows)
        return Weight(lambda matrix: change.weight(self.op, None, matrix)) if by_weight else change

    def names_to_merge(self, adapter_names: Sequence[str] | None) -> list[str]:
        names = super().names_to_merge(adapter_names)
        seen = {index for name in self.merged_adapters for index in self.token_indices[name]}
        for name in names:
            shared = seen.intersection(self.token_indices[name])
            if shared:
                raise ValueError(
                    f"The token indices {sorted(shared)} are trained by several of"
                    f" {', '.join([*self.merged_adapters, *names])}; they cannot all be merged."
                )
            seen.update(self.token_indices[name])
        return names


def token_rows(config: Any, model: nn.Module) -> dict[str, list[int]]:
    """Name of an embedding -> rows to train, as `trainable_token_indices` says; a list means the input embedding.

    Raises:
        ValueError: the model has no such module, the adapter trains it in full, or a row is named twice.
        TypeError: the module is a target of the adapter too, or no embedding.
        IndexError: it has no such row.
    """
    wanted = getattr(config, "trainable_token_indices", None) or {}
    rows = wanted if isinstance(wanted, Mapping) else {input_embedding_name(model): list(wanted)}
    modules = list(model_modules(model)) if rows else []
    targets = {id(base_of(module)): key for key, module in modules if check_target_module_exists(config, key)}
    for name, indices in rows.items():
        found = [(key, module) for key, module in modules if ends_with(key, {name})]
        if not found:
            raise ValueError(f"trainable_token_indices names {name!r}, which {type(model).__name__} does not have.")
        for key, module in found:
            target = targets.get(id(base_of(module)))
            if target is not None:
                other = "" if target == key else f" (as {key!r})"
                raise TypeError(
                    f"{target!r} is in target_modules and in trainable_token_indices{other}; choose one of them."
                )
            if saved_as(key, config.modules_to_save or ()):
                raise ValueError(
                    f"{key!r} is trained in full (modules_to_save), so trainable_token_indices has nothing to add;"
                    " leave out one of them."
                )
            check_rows(key, module, indices)
    wanted = _by_module(model, rows)
    if getattr(config, "ensure_weight_tying", False):
        _check_tied(model, wanted)
    return wanted


def _check_tied(model: nn.Module, wanted: Mapping[str, Sequence[int]]) -> None:
    """Raises ValueError where tied modules are to train different rows."""
    tied = tied_embedding_modules(model)
    named = {key: list(wanted[key]) for key in tied if key in wanted}
    if any(indices != next(iter(named.values())) for indices in named.values()):
        raise ValueError(
            "ensure_weight_tying=True, but trainable_token_indices names different rows of tied modules: "
            + ", ".join(f"{key}: {indices}" for key, indices in named.items())
            + ". Name the same rows, or leave out ensure_weight_tying."
        )


def check_rows(key: str, module: nn.Module, indices: Sequence[int]) -> None:
    """Raises TypeError, IndexError or ValueError where these are no rows of an embedding to train."""
    module = base_of(module)
    weight, op = getattr(module, "weight", None), base_op(module)
    if not isinstance(weight, Tensor) or op is None or op.kind not in TrainableTokensLayer.kinds:
        raise TypeError(f"trainable_token_indices needs an embedding; {key!r} is a {type(module).__name__}.")
    tokens = shape_of(weight)[0]
    if not all(isinstance(index, int) for index in indices):
        raise TypeError(f"trainable_token_indices must be integers, got {list(indices)}.")
    outside = [index for index in indices if not -tokens <= index < tokens]
    if outside:
        raise IndexError(f"trainable_token_indices has index {outside[0]}, but {key!r} has {tokens} rows.")
    if len({index % tokens for index in indices}) < len(indices):
        raise ValueError(f"trainable_token_indices={list(indices)} names a row of {key!r} twice.")


def train_tokens(model: nn.Module, adapter_name: str, rows: Mapping[str, list[int]]) -> None:
    """Lets an adapter train rows of embeddings, see `token_rows`; modules tied to the input embedding share its rows.

    Not so those that are trained in full, or for which other rows are named. What is said of an output layer alone
    holds for it alone.
    """
    wanted, tied = dict(rows), tied_embedding_modules(model) if rows else []
    if tied and tied[0] in wanted:
        indices = wanted.pop(tied[0])
        modules: dict[str, Any] = {key: model.get_submodule(live_key(model, key)) for key in tied}
        tied = [key for key in tied if not any(modules[key] is modules[other] for other in tied[: tied.index(key)])]
        in_full = {key for key, it in modules.items() if isinstance(it, ModulesToSaveWrapper) and it.has(adapter_name)}
        alike = [key for key in tied[1:] if list(wanted.get(key, indices)) == list(indices) and key not in in_full]
        group = (tied[0], *alike) if alike else ()
        around = [layer for key in group for layer in _layers_around(modules[key])]
        apart = any(not isinstance(layer, TrainableTokensLayer) or layer.group != group for layer in around)
        layer = _train_tokens_of(model, tied[0], adapter_name, indices, group)
        for key in alike:
            wanted.pop(key, None)
            _train_tokens_of(model, key, adapter_name, indices, group, layer, apart)
    for key, indices in wanted.items():
        _train_tokens_of(model, key, adapter_name, indices)


def _layers_around(module: Any) -> Iterator[AdapterLayer]:
    """The adapter layers around the module of the base model that is in this place, from the outermost on."""
    layer = held(module)
    while isinstance(layer, AdapterLayer):
        yield layer
        layer = layer.base_layer


def _by_module(model: nn.Module, rows: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """The rows to train by the whole names of the modules; of a module with several places, the first.

    Raises:
        ValueError: different rows of one module are named.
    """
    first: dict[int, str] = {}
    wanted: dict[str, list[int]] = {}
    for key, module in model_modules(model) if rows else ():
        place = first.setdefault(id(module), key)
        for indices in (indices for name, indices in rows.items() if ends_with(key, {name})):
            if list(wanted.setdefault(place, indices)) != list(indices):
                raise ValueError(
                    f"trainable_token_indices names {list(wanted[place])} of {place!r} and {list(indices)} of"
                    f" {key!r}, which are one module; name its rows once."
                )
    return wanted


def _train_tokens_of(
    model: nn.Module,
    key: str,
    adapter_name: str,
    indices: Sequence[int],
    group: tuple[str, ...] = (),
    tied: TrainableTokensLayer | None = None,
    apart: bool = False,
) -> TrainableTokensLayer:
    owner, module, name = get_submodules(model, live_key(model, key))
    if isinstance(module, ModulesToSaveWrapper):  # another adapter's
        owner, name, module = module, "original_module", module.original_module
    around: Any = None
    for layer in _layers_around(module):
        if isinstance(layer, TrainableTokensLayer) and layer.group == group:
            break
        around = layer
    else:
        # Next to the embedding, below LoRA on an output layer tied to it, say: the rows come first.
        base = module if around is None else around.base_layer
        if isinstance(around, TrainableTokensLayer):
            around.part_from(part for _, part in parts_of(model))
        layer = TrainableTokensLayer(base, tied, apart, group).train(base.training)
        layer.is_read = True  # models with tied embeddings ask for the weight
        if around is None:
            setattr(owner, name, TrainableTokensWrapper(layer).train(base.training))
        else:
            layer.ledger, around.base_layer = around.ledger, layer
    layer.add_adapter(adapter_name, None, token_indices=indices)
    return layer
