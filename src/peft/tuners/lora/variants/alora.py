"""aLoRA: the adapter acts from the tokens on that call for it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft.core.routing import before_backward
from peft.errors import PeftWarning
from peft.tuners.lora.starts import Remainder
from peft.tuners.lora.variants.base import Variant

if TYPE_CHECKING:
    from peft.tuners.lora.config import LoraConfig
    from peft.tuners.lora.layer import LoraLayer

#: a position behind all tokens
_NEVER = 2**62


class Invocations:
    """Where in the samples of the present call an adapter's tokens of invocation begin.

    `watch` is called before each forward pass of the base model, so that it does not matter who makes the pass.

    Args:
        tokens: the tokens that call for the adapter.
    """

    def __init__(self, tokens: list[int]):
        self.tokens = tokens
        #: position of the first token of the invocation in each sample, those in the cache counted in
        self.starts: Tensor | None = None
        #: tokens of each sample that are in the cache, and samples of the present call (beams count)
        self.past, self.rows = 0, 0
        self._of_prompt = False

    def find(self, ids: Tensor) -> Tensor:
        """Where the last occurrence of the tokens begins in each row of ids [samples, tokens]: [samples]."""
        wanted = torch.tensor(self.tokens, device=ids.device)
        starts = torch.full((len(ids),), _NEVER, device=ids.device)
        if ids.shape[1] < len(wanted):
            return starts
        matches = (ids.unfold(1, len(wanted), 1) == wanted).all(-1)
        last = matches.shape[1] - 1 - matches.int().flip(1).argmax(1)
        return torch.where(matches.any(1), last, starts)

    def watch(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Finds the invocations in what the model is called with."""
        given = kwargs.get("input_ids", args[0] if args else None)
        inputs = kwargs.get("inputs_embeds") if given is None else given
        ids = given if isinstance(given, Tensor) and given.dim() == 2 and not given.is_floating_point() else None
        self.past = cached_tokens(kwargs.get("past_key_values"))
        self.rows = len(inputs) if isinstance(inputs, Tensor) else 0
        if self._of_prompt:
            return  # generation goes on from a prompt that was looked at
        if ids is None:
            self._warn()
            self.starts = None
        elif self.past == 0 or self.starts is None or self.rows % len(self.starts):
            self.starts = self.find(ids) + self.past

    def positions(self) -> tuple[Tensor | None, int, int]:
        """What is known of the present call."""
        return self.starts, self.past, self.rows

    def recall(self, positions: tuple[Tensor | None, int, int]) -> None:
        """Goes back to an earlier call."""
        self.starts, self.past, self.rows = positions

    @contextmanager
    def generating(self, prompt: Tensor | None) -> Iterator[None]:
        """While it lasts, calls go on from a prompt [samples, tokens]."""
        if prompt is None:
            self._warn()
        self.starts = None if prompt is None else self.find(prompt if prompt.dim() > 1 else prompt[None])
        self._of_prompt = True
        try:
            yield
        finally:
            self._of_prompt = False

    @staticmethod
    def _warn() -> None:
        warnings.warn(
            "aLoRA looks for its invocation tokens in input_ids; without these, the adapter is not active.", PeftWarning
        )

    def mask(self, samples: list[int] | None, shape: torch.Size) -> Tensor | None:
        """Which tokens of the call an adapter acts on.

        Args:
            samples: those of the call that the layer's input is of; None for all.
            shape: of that input, [samples, tokens, features] or [samples * tokens, features].

        Returns:
            [samples, tokens]; None if nothing is known of the call.
        """
        if self.starts is None:
            return None
        starts = self.starts if samples is None else self.starts[samples]
        starts = starts.repeat_interleave(max(1, self.rows // len(self.starts)))  # beams of a sample lie side by side
        tokens = shape[:-1].numel() // len(starts)
        return torch.arange(self.past, self.past + tokens, device=starts.device) >= starts[:, None]


class Watch:
    """Stands around the forward passes of a base model; tells the adapters' invocations what it is called with.

    Args:
        configs: configurations by adapter name, as the model holds them.
    """

    def __init__(self, configs: dict[str, Any]):
        self.configs = configs

    def invocations(self) -> list[Invocations]:
        """Those of all adapters that have some."""
        return [invocations_of(c) for c in self.configs.values() if getattr(c, "alora_invocation_tokens", None)]

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        for invocations in self.invocations():
            invocations.watch(args, kwargs)

    def after(self, model: nn.Module, args: tuple, output: Any) -> None:
        """Sees to it that the backward pass finds the invocations of this call."""
        for invocations in self.invocations():
            before_backward(output, partial(invocations.recall, invocations.positions()))


def cached_tokens(cache: Any) -> int:
    """Tokens of each sample that a cache of keys and values holds."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    return cache[0][0].shape[-2]


class Alora(Variant):
    """LoRA that acts on the last occurrence of some tokens and all that follows (arXiv:2504.12397).

    Samples in which they do not occur are the base model's. What comes before is the base model's too, so that its
    cache of keys and values can be used again.
    """

    label = "aLoRA (alora_invocation_tokens)"
    is_product = False
    calls: Invocations

    def create(self, layer: LoraLayer, name: str, config: LoraConfig) -> Remainder | None:
        self.calls = invocations_of(config)
        return None

    def check_merge(self, layer: LoraLayer, name: str) -> None:
        raise NotImplementedError(
            f"aLoRA adapter {name!r} cannot be merged: it acts on some tokens and not on others; a weight acts on all."
        )

    def add(self, layer: LoraLayer, name: str, x: Tensor, result: Tensor) -> Tensor:
        route = layer._route
        samples = None if route is None else [i for i, other in enumerate(route.names) if other == name]
        mask = self.calls.mask(samples, x.shape)
        index = x.new_zeros(0, dtype=torch.long) if mask is None else mask.to(x.device).flatten().nonzero().squeeze(1)
        flat_x, flat = x.reshape(-1, x.shape[-1]), result.reshape(-1, result.shape[-1])
        change = layer.add_product(name, flat_x[index], torch.zeros_like(flat[index]))
        return flat.index_add(0, index, change.to(flat.dtype)).view(result.shape)


def invocations_of(config: LoraConfig) -> Invocations:
    """What all layers of an adapter share; made with the first of them."""
    return config.__dict__.setdefault("_invocations", Invocations(list(config.alora_invocation_tokens or ())))
