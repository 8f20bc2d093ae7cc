"""Prompts of keys and values made from texts, from caches, and from each other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from peft.checkpoint import load_peft_weights, write_adapter
from peft.config import PeftConfig
from peft.core.call import cached_tokens
from peft.core.model_config import cache_in
from peft.registry import PeftType
from peft.tuners.prompts.cache import CachedTokens, layers_of

#: what cartridges must agree in to be put one after the other
_SAME = ("task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> Tensor:
    """The first tokens of a cache as the table of a prompt: [num_virtual_tokens, layers * 2 * heads * head_dim].

    Args:
        past_key_values: a cache of transformers, or keys and values [1, heads, tokens, head_dim] of each layer.
        num_virtual_tokens: how many tokens.

    Raises:
        ValueError: it is that of several texts, too short, or not of the same shape in all layers.
        TypeError: it is no cache.
    """
    try:
        layers = layers_of(past_key_values)
    except (AttributeError, TypeError, IndexError):
        raise TypeError(
            "past_key_values must be a cache of transformers, or pairs of keys and values; got"
            f" {type(past_key_values).__name__}."
        ) from None
    tensors = [tensor for layer in layers for tensor in layer]
    if not tensors or any(not isinstance(tensor, Tensor) or tensor.numel() == 0 for tensor in tensors):
        raise ValueError("The cache is empty: past_key_values has to hold keys and values of every layer.")
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if any(len(shape) != 4 or shape[0] != 1 for shape in shapes):
        raise ValueError(
            "Keys and values of one text are needed, [1, heads, tokens, head_dim] (batch of 1); got"
            f" {sorted(shapes)[0]}."
        )
    if len({(shape[1], shape[3]) for shape in shapes}) > 1:
        raise ValueError(f"All layers need as many heads, as wide; got {sorted(shapes)}.")
    held = min(shape[2] for shape in shapes)
    if held < num_virtual_tokens:
        raise ValueError(f"A prompt of {num_virtual_tokens} tokens is asked for, but the cache holds {held}.")
    seen = held if isinstance(past_key_values, (tuple, list)) else cached_tokens(past_key_values)
    if seen > held:
        raise ValueError(
            f"The cache has seen {seen} tokens and holds the last {held} (a sliding window): the first ones are gone."
            " Use a shorter text."
        )
    return torch.stack([tensor[0, :, :num_virtual_tokens].transpose(0, 1) for tensor in tensors], dim=1).flatten(1)


@torch.no_grad()
def initialize_kv_prefix_from_past_key_values(
    model: Any, *, adapter_name: str | None = None, past_key_values: Any, num_virtual_tokens: int | None = None
) -> Tensor:
    """Starts a prompt of keys and values as the first tokens of a cache.

    Args:
        model: a `PeftModel` with a CARTRIDGE or PREFIX_TUNING adapter.
        adapter_name: which; the active one if None.
        past_key_values: see [`prompt_embeddings_from_past_key_values`].
        num_virtual_tokens: how many tokens; as many as the prompt has, if None.

    Returns:
        What the prompt is now, [num_virtual_tokens, layers * 2 * token_dim].

    Raises:
        ValueError: the adapter is of another kind, or the cache does not fit it.
    """
    encoder = _encoder(model, adapter_name)
    table = prompt_embeddings_from_past_key_values(
        past_key_values, num_virtual_tokens=num_virtual_tokens or encoder.num_virtual_tokens
    )
    encoder.load_prompt_embeddings(table)
    return table


@torch.no_grad()
def initialize_kv_prefix_from_text(
    model: Any,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Starts a prompt of keys and values as what the base model makes of the first tokens of a text.

    Args:
        model: a `PeftModel` with a CARTRIDGE or PREFIX_TUNING adapter.
        tokenizer: the base model's.
        text: the text; its first `num_virtual_tokens` tokens count, for which it has to be long enough.
        adapter_name: which adapter; the active one if None.
        num_virtual_tokens: how many tokens; as many as the prompt has, if None.
        use_chat_template: put the text into the tokenizer's chat template, where it has one, as a system message.
        max_length: how many tokens of the text are read at most.

    Returns:
        What the prompt is now, [num_virtual_tokens, layers * 2 * token_dim].

    Raises:
        ValueError: the adapter is of another kind, or the text is too short.
    """
    encoder = _encoder(model, adapter_name)
    count = num_virtual_tokens or encoder.num_virtual_tokens
    tokens = _tokens(tokenizer, text, use_chat_template)[:, :max_length]
    if tokens.shape[1] < count:
        raise ValueError(
            f"A prompt of {count} tokens is asked for, but the text has {tokens.shape[1]}; use a longer one."
        )
    # What follows changes nothing of them, for a model that reads from left to right.
    tokens = tokens[:, :count].to(next(model.parameters()).device)
    with model.disable_adapter():
        output = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=True)
    return initialize_kv_prefix_from_past_key_values(
        model, adapter_name=adapter_name, past_key_values=cache_in(output), num_virtual_tokens=count
    )


def _tokens(tokenizer: Any, text: str, use_chat_template: bool) -> Tensor:
    """The token ids of a text: [1, length]."""
    if use_chat_template and hasattr(tokenizer, "apply_chat_template"):
        with suppress(TypeError, ValueError):  # it has no template, or one without system messages
            message = [{"role": "system", "content": text}]
            return tokenizer.apply_chat_template(message, tokenize=True, return_dict=False, return_tensors="pt")
    return tokenizer(text, return_tensors="pt")["input_ids"]


def _encoder(model: Any, adapter_name: str | None) -> CachedTokens:
    """The prompt of an adapter, if it is one that can be given keys and values."""
    name = model.active_adapter if adapter_name is None else adapter_name
    if name not in model.peft_config:
        raise ValueError(f"Adapter {name!r} not found; there are {', '.join(model.peft_config)}.")
    kind = model.peft_config[name].peft_type
    if kind not in (PeftType.CARTRIDGE, PeftType.PREFIX_TUNING):
        raise ValueError(f"Adapter {name!r} must be a CARTRIDGE or PREFIX_TUNING adapter, got {kind}.")
    encoder: CachedTokens = model.prompt_encoder[name]
    if getattr(model.peft_config[name], "prefix_projection", False):
        raise ValueError(f"Adapter {name!r} makes its prefix by a projection (prefix_projection): it cannot be given.")
    if encoder.in_decoder:
        raise ValueError("Prompts can be made from the cache of a decoder; this model is an encoder-decoder.")
    return encoder


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | os.PathLike], *, output_path: str | os.PathLike, safe_serialization: bool = True
) -> None:
    """Puts cartridges one after the other, as a new adapter that stands for all of their texts.

    Tokens that are not trained are those of the first.

    Args:
        adapter_paths: folders (or repositories) of two or more.
        output_path: the folder of the new one.
        safe_serialization: write safetensors rather than a pickle.

    Raises:
        ValueError: there are fewer than two, some are no cartridges, or they are for different models.
    """
    if isinstance(adapter_paths, (str, os.PathLike)) or len(adapter_paths) < 2:
        raise ValueError(f"At least 2 cartridges are needed to compose a new one, got {adapter_paths!r}.")
    paths = [os.fspath(path) for path in adapter_paths]
    configs = [PeftConfig.from_pretrained(path) for path in paths]
    for path, config in zip(paths, configs, strict=True):
        if config.peft_type != PeftType.CARTRIDGE:
            raise ValueError(f"{path!r} is no CARTRIDGE adapter, but {config.peft_type}.")
        for name in _SAME:
            if getattr(config, name) != getattr(configs[0], name):
                raise ValueError(
                    f"Cartridges for different models cannot be composed: {name} is {getattr(configs[0], name)} in"
                    f" {paths[0]!r} and {getattr(config, name)} in {path!r}."
                )
    composed = torch.cat([load_peft_weights(path, device="cpu")["prompt_embeddings"] for path in paths])
    content = replace(configs[0], num_virtual_tokens=len(composed)).to_json_dict()
    write_adapter(output_path, content, {"prompt_embeddings": composed}, safe_serialization=safe_serialization)
