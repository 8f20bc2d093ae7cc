"""Soft prompts that are keys and values: a cache that attention reads before those of the tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft.config import PromptLearningConfig
from peft.core.model_config import cache_name, read_model_config, take_cache
from peft.core.storage import place_of
from peft.core.undo import replaced
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

#: what says of a layer of transformers that it may have a cache while it is checkpointed
_KEEPS_CACHE = "_can_checkpoint_with_cache"


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
    """

    adds_tokens: ClassVar[bool] = False
    #: kind of the base model
    model_type: str | None = None
    #: what the base model calls its cache
    cache_name: str
    #: (heads, width) of the keys of each layer, None where it takes those of another layer; empty: all as in `shape`
    layer_shapes: Sequence[tuple[int, int] | None] = ()
    #: the base model's configuration, where the cache has to know that layers differ
    layers_from: Any = None

    def __init__(self, config: Any, word_embeddings: nn.Module | None = None):
        super(VirtualTokens, self).__init__()  # without the table of one vector per token
        self.num_virtual_tokens = config.num_virtual_tokens
        self.in_decoder: bool = config.num_transformer_submodules == 2
        self.shape = (config.num_layers, 2, config.num_attention_heads, config.token_dim // config.num_attention_heads)

    @classmethod
    def build(cls, config: PromptLearningConfig, model: nn.Module, word_embeddings: nn.Module) -> CachedTokens:
        encoder = cls(config, word_embeddings)
        encoder.model_type, encoder.cache_name = read_model_config(model, "model_type"), cache_name(model) or ""
        shapes = [] if encoder.in_decoder else key_shapes(model)
        if len(set(shapes)) > 1:
            encoder.layer_shapes, encoder.layers_from = shapes, model.config
        return encoder

    @classmethod
    def shapes(cls, config: Any, model: Any, word_embeddings: nn.Module) -> dict[str, Any]:
        method, kind = config.peft_type.value, type(model).__name__
        if cache_name(model) is None:
            raise ValueError(f"{method} puts keys and values into a cache, but {kind} takes no past_key_values.")
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

    def prompt(self, batch_size: int, task_ids: Tensor | None = None, **options: Any) -> Any:
        """A `DynamicCache` of transformers; for encoder-decoders, an `EncoderDecoderCache`."""
        rows = self(self.indices)
        by_layer = rows.view(len(rows), *self.shape).permute(1, 2, 3, 0, 4)[:, :, None]
        if self.in_decoder:  # the order that files of encoder-decoders have: room is left for cross-attention
            by_layer = by_layer[[2 * layer % len(by_layer) for layer in range(len(by_layer))]]
        layers: Any = tuple(by_layer.expand(-1, -1, batch_size, -1, -1, -1))
        if self.layer_shapes:
            layers = [_cut(layer, shape) for layer, shape in zip(layers, self.layer_shapes, strict=False)]
        own = TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING.get(self.model_type or "")
        return _pour(layers if own is None else own(layers), self._empty_cache(), rows.dtype)

    def _empty_cache(self) -> Any:
        from transformers import DynamicCache, EncoderDecoderCache

        if self.in_decoder:
            return EncoderDecoderCache(DynamicCache(), DynamicCache())
        return DynamicCache(config=self.layers_from)

    def insert(self, inputs: dict[str, Any], prompt: Any, embed: nn.Module, side: str = "") -> None:
        """Puts the keys and values into the cache that is given, which is empty, or into a new one."""
        given = take_cache(inputs)
        cache = given if hasattr(given, "update") else self._empty_cache()
        inputs[self.cache_name] = _pour(layers_of(prompt), cache, place_of(embed)[1])

    def make_room(self, inputs: dict[str, Any], batch_size: int, seen: int, side: str = "") -> None:
        super().make_room(inputs, batch_size, seen, "decoder_" if self.in_decoder else side)

    @contextmanager
    def around(self, model: nn.Module, inputs: dict[str, Any]) -> Iterator[None]:
        """Lets layers that are checkpointed read the cache, which they then do not write: they run twice on it."""
        checkpointed = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) and m.training]
        if not checkpointed:
            yield
            return
        blocks = [module for module in checkpointed if _is_block(module)]
        settings = [getattr(getattr(m, "_gradient_checkpointing_func", None), "keywords", {}) for m in checkpointed]
        if any(one.get("use_reentrant") for one in settings) or not all(hasattr(m, _KEEPS_CACHE) for m in blocks):
            raise ValueError(
                "A prompt of keys and values works with gradient checkpointing that is not re-entrant"
                " (gradient_checkpointing_kwargs={'use_reentrant': False}), in versions of transformers that leave the"
                " cache to checkpointed layers. Or call model.gradient_checkpointing_disable()."
            )
        _make_read_only(inputs[self.cache_name])
        with ExitStack() as stack:
            for block in blocks:
                stack.enter_context(replaced(block, _KEEPS_CACHE, True))
            for module in checkpointed:  # GPT-2 drops the cache around its blocks
                if not _is_block(module) and any(map(_is_block, module.modules())):
                    stack.enter_context(replaced(module, "gradient_checkpointing", False))
            yield

    @torch.no_grad()
    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """Gives the prompt these keys and values: [num_virtual_tokens, layers * 2 * token_dim].

        Raises:
            ValueError: they have another shape, or are made of something else.
        """
        wanted = tuple(self(self.indices).shape)
        if tuple(prompt_embeddings.shape) != wanted:
            raise ValueError(f"The prompt has the shape {wanted}, got {tuple(prompt_embeddings.shape)}.")
        self.load_stored({"prompt_embeddings": prompt_embeddings})


def _cut(layer: Tensor, shape: tuple[int, int] | None) -> Tensor | tuple[None, None]:
    """Keys and values [2, batch, heads, tokens, width] of one layer, as many as it takes; none if it takes others."""
    if shape is None or shape[0] > layer.shape[2] or shape[1] > layer.shape[4]:
        return None, None
    return layer[:, :, : shape[0], :, : shape[1]]


def _pour(layers: Iterable[Any], cache: Any, dtype: torch.dtype | None) -> Any:
    """Puts keys and values [batch, heads, tokens, head_dim] of each layer (or None) into a cache, and gives it back."""
    own = getattr(cache, "self_attention_cache", cache)
    for index, (keys, values) in enumerate(layers):
        if keys is not None:
            own.update(keys.to(dtype), values.to(dtype), index)
    return cache


def _is_block(layer: nn.Module) -> bool:
    """Whether transformers checkpoints this module itself, rather than the blocks in it."""
    return any(kind.__name__ == "GradientCheckpointingLayer" for kind in type(layer).__mro__)


def _make_read_only(cache: Any) -> None:
    """From now on the cache joins what it holds to what it is given, and keeps what it holds."""
    own = getattr(cache, "self_attention_cache", cache)
    held = layers_of(own)

    def join(keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if layer >= len(held) or held[layer][0] is None:
            return keys, values
        return torch.cat((held[layer][0], keys), dim=-2), torch.cat((held[layer][1], values), dim=-2)

    own.update = join
    if own is not cache:
        cache.cross_attention_cache.update = lambda keys, values, *_, **__: (keys, values)
        cache.is_updated = _Empty()


class _Empty(dict[Any, Any]):
    """Keeps nothing."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def layers_of(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [batch, heads, tokens, head_dim] of each layer of a cache: of transformers, or as pairs."""
    if isinstance(cache, (tuple, list)):
        return [(layer[0], layer[1]) for layer in cache]
    return [(layer.keys, layer.values) for layer in getattr(cache, "self_attention_cache", cache).layers]


def _cache_shape(config: PromptLearningConfig, model: nn.Module) -> dict[str, Any]:
    """What the base model's configuration says of its cache; wins over a configuration that counts query heads."""
    found = {}
    if config.task_type == TaskType.SEQ_2_SEQ_LM:
        found = {field: read_model_config(model, *names) for field, names in _DECODER_NAMES.items()}
    shapes = [shape for shape in key_shapes(model, found.get("num_attention_heads")) if shape]
    if shapes and (len(set(shapes)) == 1 or not config.token_dim):  # room for those of the widest layer
        heads, width = (max(sizes) for sizes in zip(*shapes, strict=True))
        found |= {"num_attention_heads": heads, "token_dim": heads * width}
    return {field: value for field, value in found.items() if value is not None}


def key_shapes(model: nn.Module, heads: int | None = None) -> list[tuple[int, int] | None]:
    """(heads, width) of the keys of each layer, where the base model's configuration says it.

    None for layers at the end that use the keys and values of layers before them. Gemma 4 has a configuration for each
    layer; of others, all layers have the same. `heads` are those of the queries, where they are known.
    """
    read = partial(read_model_config, model)
    layers, shared = read("num_layers") or 1, read("num_kv_shared_layers") or 0
    by_layer = read("per_layer_config")
    if by_layer is None:
        return [_key_shape(model, heads)] * (layers - shared) + [None] * shared
    own = [_key_shape(SimpleNamespace(config=by_layer[index]), heads) for index in range(layers - shared)]
    return own + [None] * shared


def _key_shape(model: Any, heads: int | None) -> tuple[int, int] | None:
    read = partial(read_model_config, model)
    heads, hidden = heads or read("num_attention_heads"), read("token_dim")
    if not heads or not hidden:
        return None
    key_heads = read(*_KEY_HEADS) or heads
    if read("multi_query") and not read("new_decoder_architecture"):  # Falcon, GPT BigCode
        key_heads = 1
    return key_heads, read(*_HEAD_WIDTH) or hidden // heads
