"""Soft prompts that are keys and values: a cache that attention reads before those of the tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft.config import PromptLearningConfig
from peft.core.model_config import read_model_config
from peft.core.storage import place_of
from peft.registry import TaskType
from peft.tuners.prompts.base import VirtualTokens

#: where configurations of base models say it, beside or before the names that `read_model_config` knows
_DECODER_NAMES = {
    "num_layers": ("decoder_layers", "num_decoder_layers", "num_layers"),
    "num_attention_heads": ("decoder_attention_heads", "num_attention_heads"),
}
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads")
_HEAD_WIDTH = ("head_dim", "d_kv", "kv_channels")
#: kinds of layers that keep keys and values of every token (or of the last ones)
_ATTENTION = frozenset(("full_attention", "sliding_attention", "chunked_attention"))


def bloom_model_postprocess_past_key_value(past_key_values: tuple[Tensor, ...]) -> tuple[tuple[Tensor, Tensor], ...]:
    """Keys [batch * heads, head_dim, tokens] and values [batch * heads, tokens, head_dim] as Bloom once had them.

    Args:
        past_key_values: tensors [some, batch, heads, tokens, head_dim], all keys first and then all values.
    """
    keys, values = torch.cat(past_key_values).flatten(1, 2).chunk(2)
    return tuple(zip(keys.mT, values, strict=True))


#: model type -> what to make of the cache, one tensor [2, batch, heads, tokens, head_dim] for each layer, before the
#: model gets it; models of the versions of transformers that are supported need nothing
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict[str, Callable[[tuple[Tensor, ...]], Iterable[Any]]] = {}


class CachedTokens(VirtualTokens):
    """Base of the prompts that are keys and values, of all layers: a method says where its table comes from.

    The table [num_virtual_tokens, layers * 2 * token_dim] holds, for each virtual token, keys and values of the first
    layer, of the second, and so on. An encoder-decoder has them in its decoder's self-attention.

    Args:
        config: the configuration, with all its shapes filled in.
        word_embeddings: not used.
    """

    adds_tokens: ClassVar[bool] = False
    #: kind of the base model
    model_type: str | None = None

    def __init__(self, config: Any, word_embeddings: nn.Module | None = None):
        super(VirtualTokens, self).__init__()  # without the table of one vector per token
        self.num_virtual_tokens = config.num_virtual_tokens
        self.in_decoder: bool = config.num_transformer_submodules == 2
        self.shape = (config.num_layers, 2, config.num_attention_heads, config.token_dim // config.num_attention_heads)

    @classmethod
    def build(cls, config: PromptLearningConfig, model: nn.Module, word_embeddings: nn.Module) -> CachedTokens:
        encoder = cls(config, word_embeddings)
        encoder.model_type = read_model_config(model, "model_type")
        return encoder

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

    def rows(self) -> Tensor:
        """The table, ready for use."""
        return self(self.indices)

    def prompt(self, batch_size: int, task_ids: Tensor | None = None, **options: Any) -> Any:
        """A `DynamicCache` of transformers; for encoder-decoders, an `EncoderDecoderCache`."""
        rows = self.rows()
        by_layer = rows.view(len(rows), *self.shape).permute(1, 2, 3, 0, 4)[:, :, None]
        if self.in_decoder:  # the order that files of encoder-decoders have: room is left for cross-attention
            by_layer = by_layer[[2 * layer % len(by_layer) for layer in range(len(by_layer))]]
        layers: Any = tuple(by_layer.expand(-1, -1, batch_size, -1, -1, -1))
        own = TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING.get(self.model_type or "")
        return _pour(layers if own is None else own(layers), self._empty_cache(), rows.dtype)

    def _empty_cache(self) -> Any:
        from transformers import DynamicCache, EncoderDecoderCache

        return EncoderDecoderCache(DynamicCache(), DynamicCache()) if self.in_decoder else DynamicCache()

    def insert(self, inputs: dict[str, Any], prompt: Any, embed: nn.Module, side: str = "") -> None:
        """Puts the keys and values into the cache that is given, which is empty, or into a new one."""
        given = inputs.get("past_key_values")
        cache = given if hasattr(given, "update") else self._empty_cache()
        inputs["past_key_values"] = _pour(layers_of(prompt), cache, place_of(embed)[1])

    def make_room(self, inputs: dict[str, Any], batch_size: int, seen: int, side: str = "") -> None:
        super().make_room(inputs, batch_size, seen, "decoder_" if self.in_decoder else side)

    @torch.no_grad()
    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """Gives the prompt these keys and values: [num_virtual_tokens, layers * 2 * token_dim].

        Raises:
            ValueError: they have another shape, or are made of something else.
        """
        wanted = tuple(self.rows().shape)
        if tuple(prompt_embeddings.shape) != wanted:
            raise ValueError(f"The prompt has the shape {wanted}, got {tuple(prompt_embeddings.shape)}.")
        self.load_stored({"prompt_embeddings": prompt_embeddings})


def _pour(layers: Iterable[Any], cache: Any, dtype: torch.dtype | None) -> Any:
    """Puts keys and values [batch, heads, tokens, head_dim] of each layer into a cache, and gives it back."""
    own = getattr(cache, "self_attention_cache", cache)
    for index, (keys, values) in enumerate(layers):
        own.update(keys.to(dtype), values.to(dtype), index)
    return cache


def layers_of(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [batch, heads, tokens, head_dim] of each layer of a cache: of transformers, or as pairs."""
    if isinstance(cache, (tuple, list)):
        return [(layer[0], layer[1]) for layer in cache]
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
