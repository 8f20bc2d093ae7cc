"""aLoRA: the adapter acts from the tokens on that call for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft.core.call import Call, begin, cached_tokens, current, end, fact, remember_for_backward
from peft.core.change import LowRank
from peft.core.method import Method
from peft.core.model_config import cache_in
from peft.errors import warn
from peft.tuners.lora.base import FactorLayer
from peft.tuners.lora.variants.base import Variant

#: a position behind all tokens
_NEVER = 2**62
#: what a call knows: tokens of an invocation -> where they are; and the same for the prompt of a generation
_FOUND, _PROMPT = "alora_invocations", "alora_prompt"


@dataclass(frozen=True)
class Invocation:
    """Where an adapter's tokens of invocation begin in the samples of a call.

    Attributes:
        starts: position of the first of them in each sample, those in the cache counted in: [samples].
        past: tokens of each sample that are in the cache.
        rows: samples of the call, beams counted in.
    """

    starts: Tensor
    past: int
    rows: int

    def mask(self, shape: torch.Size, samples: Sequence[int] | None) -> Tensor:
        """Which vectors of an input of this shape, which is of these samples of the call, come after: [vectors]."""
        starts = self.starts if samples is None else self.starts[list(samples)]
        starts = starts.repeat_interleave(max(1, self.rows // len(self.starts)))  # beams of a sample lie side by side
        tokens = shape[:-1].numel() // len(starts)
        positions = torch.arange(self.past, self.past + tokens, device=starts.device)
        return (positions >= starts[:, None]).flatten()


def find(tokens: Sequence[int], ids: Tensor) -> Tensor:
    """Where the last occurrence of the tokens begins in each row of ids [samples, tokens]: [samples]."""
    wanted = torch.tensor(tokens, device=ids.device)
    starts = torch.full((len(ids),), _NEVER, device=ids.device)
    if ids.shape[1] < len(wanted):
        return starts
    # A copy, for ids may be expanded, and a window over those is not taken.
    matches = (ids.contiguous().unfold(1, len(wanted), 1) == wanted).all(-1)
    last = matches.shape[1] - 1 - matches.int().flip(1).argmax(1)
    return torch.where(matches.any(1), last, starts)


class Invocations:
    """Stands around the forward passes of a base model, whoever makes them, and finds the invocations in each.

    Args:
        method: knows the configurations of the adapters.
    """

    def __init__(self, method: Method):
        self.method = method
        #: starts found in the last prompt, for calls that go on from its cache
        self._last: dict[tuple[int, ...], Tensor] = {}

    def tokens(self) -> list[tuple[int, ...]]:
        """The tokens that call for some adapter."""
        asked = (getattr(config, "alora_invocation_tokens", None) for config in self.method.configs.values())
        return list(dict.fromkeys(tuple(tokens) for tokens in asked if tokens))

    def before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Notes where the invocations are in what the model is called with."""
        given = kwargs.get("input_ids", args[0] if args else None)
        inputs = kwargs.get("inputs_embeds") if given is None else given
        ids = given if isinstance(given, Tensor) and given.dim() == 2 and not given.is_floating_point() else None
        past, rows = cached_tokens(cache_in(kwargs)), len(inputs) if isinstance(inputs, Tensor) else 0
        prompt = fact(_PROMPT)
        found = {}
        for tokens in self.tokens():
            if prompt is not None:  # generation goes on from a prompt that was looked at
                starts = prompt.get(tokens)
            elif ids is None:
                _warn()
                starts = None
            else:
                starts = self._last.get(tokens)
                if past == 0 or starts is None or rows % len(starts):
                    starts = self._last[tokens] = find(tokens, ids) + past
            if starts is not None:
                found[tokens] = Invocation(starts, past, rows)
        call = current() or Call()
        call.facts[_FOUND] = found
        begin(call)

    def after(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Ends the call, whose backward pass finds the same invocations."""
        call = current()
        end()
        if call is not None and output is not None and torch.is_grad_enabled():
            remember_for_backward(output, call)

    def prompt(self, ids: Tensor | None) -> dict[str, Any]:
        """The fact of a generation that goes on from a prompt [samples, tokens]."""
        if ids is None:
            _warn()
            return {_PROMPT: {}}
        return {_PROMPT: {tokens: find(tokens, ids if ids.dim() > 1 else ids[None]) for tokens in self.tokens()}}


def _warn() -> None:
    warn("aLoRA looks for its invocation tokens in input_ids; without these, the adapter is not active.")


class Alora(Variant):
    """LoRA that acts on the last occurrence of some tokens and all that follows (arXiv:2504.12397).

    Samples in which they do not occur are the base model's. What comes before is the base model's too, so that its
    cache of keys and values can be used again.
    """

    label = "aLoRA (alora_invocation_tokens)"
    is_product = True
    cannot_merge = (
        "aLoRA adapter {name!r} cannot be merged: it acts on some tokens and not on others; a weight acts on all."
    )

    def change(self, layer: FactorLayer, name: str) -> LowRank:
        change = layer.low_rank(name)
        change.where = self._where
        return change

    def _where(self, shape: torch.Size, samples: Sequence[int] | None) -> Tensor | None:
        found = fact(_FOUND, {}).get(tuple(self.setting))
        return None if found is None else found.mask(shape, fact("samples") if samples is None else samples)
