"""Generation: one token at a time with an adapter that is not merged, and batches of several adapters."""

from __future__ import annotations

from typing import Any

import torch
from case import DTYPES, LINEAR, Case, Clock, Part, Prepared, Row, Scale, fill, llama, sample, twin
from torch import Tensor

import peft

TITLE = "Decoding and mixed batches"
TEXT = """\
The model is that of the training step. Decoding: {s.tokens} tokens, one by one, after a prompt of 64, with a key-value
cache. Mixed batches: one forward pass without gradients of {s.adapters} samples of 16 tokens, each with the adapter
that `adapter_names` says, against the same batch with the one active adapter; and the same for one new token of each
sample."""

_TASK = dict(r=16, target_modules=LINEAR, task_type="CAUSAL_LM")


def cases(scale: Scale) -> list[Case]:
    return [case(scale, dtype) for case in (_decoding, _mixed) for dtype in DTYPES]


def _decoding(scale: Scale, dtype: str) -> Case:
    rows = [Row(f"one token, {dtype}, adapter not merged / base", "adapter", "base", 1.10)]
    return Case(f"decode {dtype}", lambda: _prepare_decoding(scale, dtype), rows, 9 if dtype == "fp32" else 5)


def _prepare_decoding(scale: Scale, dtype: str) -> Prepared:
    base = llama(scale, DTYPES[dtype])
    adapted = peft.get_peft_model(twin(base), peft.LoraConfig(**_TASK)).eval()
    fill(adapted)
    tokens = _tokens(scale, 1, 64)
    with torch.no_grad():
        outcome = {"logits": sample(adapted(tokens).logits)}
    parts = {"base": decoder(base, tokens, scale.tokens), "adapter": decoder(adapted, tokens, scale.tokens)}
    return Prepared(parts, outcome, tolerance=1e-3 if dtype == "fp32" else 5e-2)


def decoder(model: Any, prompt: Tensor, count: int, **arguments: Any) -> Part:
    """A part that decodes `count` tokens after `prompt`, always the same."""
    with torch.no_grad():
        cache = model(prompt, use_cache=True, **arguments).past_key_values
    token = prompt[:, -1:]

    @torch.no_grad()
    def part(clock: Clock) -> None:
        with clock:
            for _ in range(count):
                model(token, past_key_values=cache, use_cache=True, **arguments)
        cache.crop(-count)

    return part


def _mixed(scale: Scale, dtype: str) -> Case:
    rows = []
    for what in ("batch", "token"):
        rows += [
            Row(f"{what}, {dtype}, one adapter / base", f"{what} one", f"{what} base"),
            Row(f"{what}, {dtype}, `adapter_names` all the same / one adapter", f"{what} same", f"{what} one", 1.05),
            Row(f"{what}, {dtype}, 4 different adapters / one", f"{what} 4", f"{what} one"),
            Row(f"{what}, {dtype}, {scale.adapters} different / one", f"{what} all", f"{what} one", 1.15),
        ]
    return Case(f"mixed batch {dtype}", lambda: _prepare_mixed(scale, dtype), rows, 7 if dtype == "fp32" else 3)


def _prepare_mixed(scale: Scale, dtype: str) -> Prepared:
    base, count = llama(scale, DTYPES[dtype]), scale.adapters
    adapted = peft.get_peft_model(twin(base), peft.LoraConfig(**_TASK), adapter_name="a0")
    fill(adapted)
    for index in range(1, count):
        adapted.add_adapter(f"a{index}", peft.LoraConfig(**_TASK))
        adapted.set_adapter(f"a{index}")
        fill(adapted)
    adapted.set_adapter("a0")
    adapted.eval()
    tokens = _tokens(scale, count, 16)
    wanted: dict[str, tuple[Any, dict[str, list[str]]]] = {
        "base": (base, {}),
        "one": (adapted, {}),
        "same": (adapted, {"adapter_names": ["a1"] * count}),
        "4": (adapted, {"adapter_names": [f"a{index % 4}" for index in range(count)]}),
        "all": (adapted, {"adapter_names": [f"a{index}" for index in range(count)]}),
    }
    parts: dict[str, Part] = {}
    for name, (model, arguments) in wanted.items():
        parts[f"batch {name}"] = _forward(model, tokens, arguments)
        parts[f"token {name}"] = decoder(model, tokens, 2, **arguments)
    with torch.no_grad():
        outcome = {name: sample(model(tokens, **arguments).logits) for name, (model, arguments) in wanted.items()}
    return Prepared(parts, outcome, tolerance=1e-3 if dtype == "fp32" else 5e-2)


def _forward(model: Any, tokens: Tensor, arguments: dict[str, list[str]]) -> Part:
    @torch.no_grad()
    def part(clock: Clock) -> None:
        with clock:
            model(tokens, use_cache=False, **arguments)

    return part


def _tokens(scale: Scale, count: int, length: int) -> Tensor:
    return torch.randint(scale.vocabulary, (count, length), generator=torch.Generator().manual_seed(1))
