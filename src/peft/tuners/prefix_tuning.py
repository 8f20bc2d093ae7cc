"""Prefix tuning: keys and values of virtual tokens, for every attention layer of the base model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft.config import PromptLearningConfig
from peft.core.prompt import VirtualTokens, read_model_config
from peft.core.storage import place_of
from peft.registry import PeftType, TaskType

#: where configurations of base models say it, beside or before the names that `read_model_config` knows
_DECODER_NAMES = {
    "num_layers": ("decoder_layers", "num_decoder_layers", "num_layers"),
    "num_attention_heads": ("decoder_attention_heads", "num_attention_heads"),
}
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads")
_HEAD_WIDTH = ("head_dim", "d_kv", "kv_channels")
#: kinds of layers that keep keys and values of every token (or of the last ones)
_ATTENTION = frozenset(("full_attention", "sliding_attention", "chunked_attention"))


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Prefix tuning (arXiv:2101.00190).

    `token_dim` and `num_attention_heads` are those of the keys: fewer than the queries' in grouped-query attention.

    Args:
        init_weights: None starts at random; `"zero"` starts with keys and values of zero.
        encoder_hidden_size: hidden width of the projection; `token_dim` if None.
        prefix_projection: make the prefix from narrow vectors by a network of two layers while it is trained.

    Raises:
        ValueError: an unknown start, or a width that is not positive.
    """

    init_weights: str | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False

    positive_fields = ("encoder_hidden_size",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PREFIX_TUNING
        if self.init_weights not in (None, "zero"):
            raise ValueError(f"init_weights={self.init_weights!r} is not known; use None (random) or 'zero'.")


class PrefixEncoder(VirtualTokens):
    """The prompt is a cache of keys and values that attention reads before those of the tokens (arXiv:2101.00190):

        K_l = [P_l; X W_K], V_l = [Q_l; X W_V] in every layer l.

    `embedding` [num_virtual_tokens, layers * 2 * token_dim] holds P_1, Q_1, P_2, Q_2, ... of each virtual token. With
    the projection it is Linear(Tanh(Linear(`embedding`))), with `embedding` [num_virtual_tokens, token_dim]; what is
    stored, and loaded, is always the table. An encoder-decoder has the prefix in its decoder's self-attention.

    Args:
        config: the configuration, with all its shapes filled in.
        word_embeddings: not used.
    """

    adds_tokens: ClassVar[bool] = False

    def __init__(self, config: Any, word_embeddings: nn.Module | None = None):
        super().__init__(config, word_embeddings)
        self.in_decoder: bool = config.num_transformer_submodules == 2
        self.shape = (config.num_layers, 2, config.num_attention_heads, config.token_dim // config.num_attention_heads)
        width, tokens = config.num_layers * 2 * config.token_dim, config.num_virtual_tokens
        self.prefix_projection: bool = config.prefix_projection and not config.inference_mode
        self.embedding = nn.Embedding(tokens, config.token_dim if self.prefix_projection else width)
        if self.prefix_projection:
            hidden = config.encoder_hidden_size
            self.transform = nn.Sequential(nn.Linear(config.token_dim, hidden), nn.Tanh(), nn.Linear(hidden, width))
        if config.init_weights == "zero":
            last: Any = self.transform[-1] if self.prefix_projection else self.embedding
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    @classmethod
    def shapes(cls, config: Any, model: Any, word_embeddings: nn.Module) -> dict[str, Any]:
        method, kind = config.peft_type.value, type(model).__name__
        if getattr(model, "is_gradient_checkpointing", False):
            raise ValueError(
                f"{method} does not work with gradient checkpointing, which runs layers twice on a cache that the first"
                " run has changed. Call model.gradient_checkpointing_disable() first."
            )
        if not any("past_key_values" in inspect.signature(type(m).forward).parameters for m in model.modules()):
            raise ValueError(
                f"{method} puts keys and values into the model's cache, but {kind} takes no past_key_values."
            )
        others = set(read_model_config(model, "layer_types") or ()) - _ATTENTION
        if others:
            raise ValueError(f"{method} needs attention in every layer; {kind} also has {', '.join(sorted(others))}.")
        found = {**super().shapes(config, model, word_embeddings), **_cache_shape(config, model)}
        width, heads = found["token_dim"], found["num_attention_heads"]
        unknown = [name for name in ("token_dim", "num_attention_heads", "num_layers") if not found[name]]
        if unknown or width % heads:
            raise ValueError(
                f"{method} needs the number of layers and the heads of the keys: got token_dim={width},"
                f" num_attention_heads={heads}, num_layers={found['num_layers']}."
            )
        if hasattr(config, "encoder_hidden_size"):
            found["encoder_hidden_size"] = config.encoder_hidden_size or width
        return found

    def forward(self, indices: Tensor) -> Tensor:
        """Keys and values [..., layers * 2 * token_dim] of the virtual tokens with these indices."""
        vectors = super().forward(indices)
        return self.transform(vectors) if self.prefix_projection else vectors

    def prompt(self, batch_size: int, task_ids: Tensor | None = None, **options: Any) -> Any:
        """A `DynamicCache` of transformers; for encoder-decoders, an `EncoderDecoderCache`."""
        rows = self(self.indices)
        by_layer = rows.view(len(rows), *self.shape).permute(1, 2, 3, 0, 4)[:, :, None]
        if self.in_decoder:  # the order that files of encoder-decoders have: room is left for cross-attention
            by_layer = by_layer[[2 * layer % len(by_layer) for layer in range(len(by_layer))]]
        return _pour(by_layer.expand(-1, -1, batch_size, -1, -1, -1), self._empty_cache(), rows.dtype)

    def _empty_cache(self) -> Any:
        from transformers import DynamicCache, EncoderDecoderCache

        return EncoderDecoderCache(DynamicCache(), DynamicCache()) if self.in_decoder else DynamicCache()

    def insert(self, inputs: dict[str, Any], prompt: Any, embed: nn.Module, side: str = "") -> None:
        """Puts the keys and values into the cache that is given, which is empty, or into a new one."""
        given = inputs.get("past_key_values")
        cache = given if hasattr(given, "update") else self._empty_cache()
        inputs["past_key_values"] = _pour(_contents(prompt), cache, place_of(embed)[1])

    def make_room(self, inputs: dict[str, Any], batch_size: int, seen: int, side: str = "") -> None:
        super().make_room(inputs, batch_size, seen, "decoder_" if self.in_decoder else side)


def _pour(layers: Iterable[Any], cache: Any, dtype: torch.dtype | None) -> Any:
    """Puts keys and values [batch, heads, tokens, head_dim] of each layer into a cache, and gives it back."""
    own = getattr(cache, "self_attention_cache", cache)
    for index, (keys, values) in enumerate(layers):
        own.update(keys.to(dtype), values.to(dtype), index)
    return cache


def _contents(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer of a cache."""
    own = getattr(cache, "self_attention_cache", cache)
    if hasattr(own, "layers"):
        return [(layer.keys, layer.values) for layer in own.layers]
    return list(zip(own.key_cache, own.value_cache, strict=True))  # older transformers


def _cache_shape(config: PromptLearningConfig, model: nn.Module) -> dict[str, Any]:
    """What the base model's configuration says of its cache; wins over a configuration that counts query heads."""

    def first(names: Iterable[str]) -> Any:
        return next((value for name in names if (value := read_model_config(model, name)) is not None), None)

    found = {}
    if config.task_type == TaskType.SEQ_2_SEQ_LM:
        found = {field: first(names) for field, names in _DECODER_NAMES.items()}
    heads = found.get("num_attention_heads") or read_model_config(model, "num_attention_heads")
    hidden = read_model_config(model, "token_dim")
    key_heads = first(_KEY_HEADS) or heads
    if first(("multi_query",)) and not first(("new_decoder_architecture",)):  # Falcon, GPT BigCode
        key_heads = 1
    if heads and hidden:
        width = first(_HEAD_WIDTH) or hidden // heads
        found |= {"num_attention_heads": key_heads, "token_dim": key_heads * width}
    return {field: value for field, value in found.items() if value is not None}
