"""Floor, reference and this library side by side on a CUDA device: python benchmarks/gpu.py (options: see run.py)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from case import LINEAR, Case, Clock, Part, Prepared, Row, Scale, gradients, llama, sample, twin
from step import train
from torch import Tensor

import peft

TITLE = "Llama 1B and 8B on a GPU"
TEXT = """\
Random weights, bf16, LoRA of rank 16 on all linear projections. Training: a step on one sequence of 2048 tokens,
gradients flowing to the input embeddings. Peak memory is the allocator's, the floor's without the adapter that lies
beside it. Decoding: {s.tokens} tokens after a prompt of 512 with a static key-value cache; plainly, under torch.compile
(`reduce-overhead`, which uses CUDA graphs), and from a CUDA graph captured by hand. "Kernels" are the Triton kernels
of `peft.ops.fused`, which are off unless switched on; the reference has none, and does in such a row what it always
does."""

_SHAPES = {
    "1B": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16),
    "8B": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32),
}
_COMMON = dict(num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=4096)
_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def cases(scale: Scale) -> list[Case]:
    found = []
    for size in _SHAPES:
        for dropout in (0.0, 0.1):
            for checkpointing in (False, True):
                found.append(_step_case(scale, size, dropout, checkpointing))
        for batch in (1, 32):
            for how in ("plain", "torch.compile", *(["CUDA graph"] if _DEVICE == "cuda" else [])):
                name = f"{size}: decode, batch {batch}, {how}"
                rows = [Row(name, "adapter", "floor", None if how == "plain" else 1.10)]
                found.append(Case(name, lambda s=size, b=batch, h=how: _prepare_decoding(scale, s, b, h), rows))
        name = f"{size}: decode, mixed batch"
        rows = [
            Row(f"{name}, {scale.adapters} different adapters / one", "all", "one", 1.15),
            Row(f"{name}, {scale.adapters} different adapters / one, kernels", "all by kernels", "one"),
            Row(f"{name}, `adapter_names` all the same / one", "same", "one", 1.05),
        ]
        found.append(Case(name, lambda s=size: _prepare_mixed(scale, s), rows))
    return found


def _step_case(scale: Scale, size: str, dropout: float, checkpointing: bool) -> Case:
    settings = [f"dropout {dropout}"] * (dropout > 0) + ["gradient checkpointing"] * checkpointing
    name = ", ".join([f"{size}: step", *settings])
    target = 1.05 if size == "8B" and not dropout else None
    rows = [
        Row(name, "adapter", "floor", target),
        Row(f"{name}, kernels", "kernels", "floor", target),
        Row(f"{name}, peak memory", "adapter peak", "floor peak", unit="B"),
        Row(f"{name}, peak memory, kernels", "kernels peak", "floor peak", unit="B"),
    ]
    return Case(name, lambda: _prepare_step(scale, size, dropout, checkpointing), rows)


def _models(scale: Scale, size: str, dropout: float = 0.0, adapters: int = 1) -> tuple[Any, Any]:
    """The base and, on the same weights, one with adapters a0, a1, ...; all of them in effect."""
    fields = {**_SHAPES[size], **_COMMON} if scale.hidden > 64 else {}
    base = llama(scale, torch.bfloat16, "meta", **fields).to_empty(device=_DEVICE)
    torch.manual_seed(0)
    for parameter in base.parameters():
        parameter.data.normal_(std=0.02) if parameter.dim() > 1 else parameter.data.fill_(1.0)
    rotary = base.model.rotary_emb
    for buffer, start in zip((rotary.inv_freq, rotary.original_inv_freq), [_frequencies(base.config)] * 2, strict=True):
        buffer.data = start.to(buffer.device)
    config = dict(r=16, lora_dropout=dropout, target_modules=LINEAR, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(twin(base), peft.LoraConfig(**config), adapter_name="a0")
    for index in range(1, adapters):
        adapted.add_adapter(f"a{index}", peft.LoraConfig(**config))
    generator = torch.Generator(_DEVICE).manual_seed(0)
    for name, parameter in sorted(adapted.named_parameters()):
        if "lora_" in name:
            parameter.data.normal_(std=0.02, generator=generator)
    return base, adapted


def _frequencies(config: Any) -> Tensor:
    width = config.hidden_size // config.num_attention_heads
    return 1.0 / (10000.0 ** (torch.arange(0, width, 2, dtype=torch.float32) / width))


def _tokens(model: Any, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator).to(_DEVICE)


def _prepare_step(scale: Scale, size: str, dropout: float, checkpointing: bool) -> Prepared:
    floor, adapted = _models(scale, size, dropout)
    tokens = _tokens(floor, 1, 2048 if scale.hidden > 64 else scale.length)
    embeddings = floor.get_input_embeddings()(tokens).detach().requires_grad_(True)
    inputs = {"inputs_embeds": embeddings, "labels": tokens, "use_cache": False}
    adapted.eval()
    outcome = _outcome(adapted, inputs, "")
    with _kernels():
        outcome |= _outcome(adapted, inputs, " by kernels")
    for model in (floor, adapted):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    beside = sum(p.numel() * p.element_size() for name, p in adapted.named_parameters() if "lora_" in name)
    parts = {
        "floor": _timed(lambda: train(floor, inputs)),
        "adapter": _timed(lambda: train(adapted, inputs)),
        "kernels": _by_kernels(_timed(lambda: train(adapted, inputs))),
        # between the parts, what the other's step has left must be gone
        "floor peak": _peak(lambda: train(floor, inputs), adapted, beside),
        "adapter peak": _peak(lambda: train(adapted, inputs), adapted, 0),
        "kernels peak": _by_kernels(_peak(lambda: train(adapted, inputs), adapted, 0)),
    }
    return Prepared(parts, outcome, tolerance=5e-2)


def _outcome(model: Any, inputs: dict[str, Any], how: str) -> dict[str, Tensor]:
    """Logits and gradients of a step without dropout."""
    train(model, inputs)
    with torch.no_grad():
        return {f"logits{how}": sample(model(**inputs).logits), f"gradients{how}": gradients(model)}


@contextmanager
def _kernels() -> Iterator[None]:
    """While it lasts, this library uses its Triton kernels; the reference has none."""
    try:
        from peft.ops import fused
    except ImportError:
        yield
        return
    fused.enabled = True
    try:
        yield
    finally:
        fused.enabled = False


def _by_kernels(part: Part) -> Part:
    def run(clock: Clock) -> float | None:
        with _kernels():
            return part(clock)

    return run


def _timed(action: Callable[[], object]) -> Part:
    def part(clock: Clock) -> None:
        with clock:
            action()

    return part


def _peak(action: Callable[[], object], adapted: Any, beside: int) -> Part:
    def part(clock: Clock) -> float:
        adapted.zero_grad(set_to_none=True)
        if _DEVICE != "cuda":
            return 0.0
        torch.cuda.reset_peak_memory_stats()
        action()
        return float(torch.cuda.max_memory_allocated() - beside)

    return part


def _prepare_decoding(scale: Scale, size: str, batch: int, how: str) -> Prepared:
    base, adapted = _models(scale, size)
    tokens = _tokens(base, batch, 512 if scale.hidden > 64 else 8)
    with torch.no_grad():
        outcome = {"logits": sample(adapted.eval()(tokens[:, :8], use_cache=False).logits)}
    parts = {name: _decoder(m, tokens, scale.tokens, how) for name, m in (("floor", base), ("adapter", adapted))}
    return Prepared(parts, outcome, tolerance=5e-2)


def _prepare_mixed(scale: Scale, size: str) -> Prepared:
    count = scale.adapters
    base, adapted = _models(scale, size, adapters=count)
    adapted.eval()
    tokens = _tokens(base, count, 64 if scale.hidden > 64 else 8)
    wanted: dict[str, dict[str, list[str]]] = {
        "one": {},
        "same": {"adapter_names": ["a1"] * count},
        "all": {"adapter_names": [f"a{index}" for index in range(count)]},
    }
    with torch.no_grad():
        outcome = {name: sample(adapted(tokens[:, :8], **names).logits) for name, names in wanted.items()}
        with _kernels():
            outcome["all by kernels"] = sample(adapted(tokens[:, :8], **wanted["all"]).logits)
    parts = {name: _decoder(adapted, tokens, scale.tokens, "plain", **names) for name, names in wanted.items()}
    with _kernels():
        parts["all by kernels"] = _by_kernels(_decoder(adapted, tokens, scale.tokens, "plain", **wanted["all"]))
    return Prepared(parts, outcome, tolerance=5e-2)


@torch.no_grad()
def _decoder(model: Any, prompt: Tensor, count: int, how: str, **arguments: Any) -> Part:
    """A part that decodes `count` tokens after `prompt`, always the same."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + count + 8)
    model(prompt, past_key_values=cache, use_cache=True, **arguments)
    token = prompt[:, -1:].clone()
    position = torch.full((1, 1), prompt.shape[1], device=_DEVICE)
    # a mask in four dimensions is taken as it is; to make one, the cache would be asked for its length
    mask = torch.ones(1, 1, 1, cache.get_max_length(), dtype=torch.bool, device=_DEVICE)

    def step(token: Tensor) -> Tensor:
        return model(
            token, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True, **arguments
        ).logits

    run = step
    if how == "torch.compile":
        run = torch.compile(step, mode="reduce-overhead") if _DEVICE == "cuda" else torch.compile(step, backend="eager")
    elif how == "CUDA graph":
        run = _captured(step, token)

    def part(clock: Clock) -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(prompt.shape[1])
        with torch.no_grad(), clock:
            for _ in range(count):
                run(token)

    for _ in range(2):  # compiled and warm before anything is measured
        part(Clock())
    return part


def _captured(step: Callable[[Tensor], Tensor], token: Tensor) -> Callable[[Tensor], object]:
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step(token)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(token)
    return lambda token: graph.replay()


if __name__ == "__main__":
    import run

    if _DEVICE != "cuda" and "--smoke" not in sys.argv:
        sys.exit("benchmarks/gpu.py needs a CUDA device, and torch finds none here: nothing was measured.")
    sys.exit(run.main(groups=("gpu",), heading="Benchmarks on a GPU"))
