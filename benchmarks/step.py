"""A training step with LoRA, against the same step of the frozen model."""

from __future__ import annotations

from typing import Any

import torch
from case import DTYPES, LINEAR, Case, Clock, Part, Prepared, Row, Scale, fill, gradients, llama, mixtral, sample, twin
from torch import Tensor

import peft

TITLE = "Training step"
TEXT = """\
Forward and backward of a Llama ({s.layers} layers, hidden size {s.hidden}, intermediate size {s.intermediate}) with
LoRA of rank 16 on all seven linear projections, on a batch of {s.batch} x {s.length} tokens; in bf16, which many CPUs
have no instructions for, of {s.half_batch} x {s.half_length}. The floor is the same model frozen; in both, gradients
flow to the input embeddings. The bytes kept for backward are those of all distinct storages that autograd saves,
parameters and buffers left out. The rows of experts are of a Mixtral with LoRA on both parameters of its experts."""

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def cases(scale: Scale) -> list[Case]:
    linear = [_case(scale, dtype, dropout) for dtype in DTYPES for dropout in (0.0, 0.1)]
    rows = [
        Row("step, experts", "adapter", "floor"),
        Row("bytes kept, experts", "adapter kept", "floor kept", unit="B"),
    ]
    return [*linear, Case("experts", lambda: _prepare(scale, "fp32", 0.0, experts=True), rows, 3)]


def _case(scale: Scale, dtype: str, dropout: float) -> Case:
    name = dtype if dropout == 0 else f"{dtype}, dropout {dropout}"
    fast = {"fp32": 1.08, "bf16": 1.15} if dropout == 0 else {"fp32": 1.15, "bf16": 1.25}
    rows = [
        Row(f"step, {name}", "adapter", "floor", fast[dtype]),
        Row(f"bytes kept, {name}", "adapter kept", "floor kept", 1.25 if dropout == 0 else 1.30, unit="B"),
    ]
    return Case(name, lambda: _prepare(scale, dtype, dropout), rows, 7 if dtype == "fp32" else 5)


def _prepare(scale: Scale, dtype: str, dropout: float, experts: bool = False) -> Prepared:
    scale = scale.for_dtype(dtype)
    floor, adapted = models(scale, dtype, dropout, experts)
    inputs = batch(floor, scale)
    adapted.eval()
    train(adapted, inputs)
    outcome = {"logits": sample(adapted(**inputs).logits), "gradients": gradients(adapted)}
    adapted.train()
    parts = {
        "floor": timed(floor, inputs),
        "adapter": timed(adapted, inputs),
        "floor kept": lambda clock: kept(floor, inputs),
        "adapter kept": lambda clock: kept(adapted, inputs),
    }
    return Prepared(parts, outcome, tolerance=1e-3 if dtype == "fp32" else 5e-2)


def models(scale: Scale, dtype: str, dropout: float, experts: bool = False) -> tuple[Any, Any]:
    """The frozen model and one with LoRA, on the same weights."""
    floor = (mixtral if experts else llama)(scale, DTYPES[dtype], use_cache=False).train()
    targets = {"target_parameters": EXPERTS} if experts else {"target_modules": LINEAR}
    config = peft.LoraConfig(r=16, lora_dropout=dropout, task_type="CAUSAL_LM", **targets)
    adapted = peft.get_peft_model(twin(floor), config).train()
    fill(adapted)
    return floor, adapted


def batch(model: Any, scale: Scale) -> dict[str, Tensor]:
    """Embeddings that want a gradient, and labels."""
    tokens = torch.randint(scale.vocabulary, (scale.batch, scale.length), generator=torch.Generator().manual_seed(1))
    embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_(True)
    return {"inputs_embeds": embeddings, "labels": tokens}


def train(model: Any, inputs: dict[str, Any]) -> None:
    """One step without the optimizer's part."""
    if "inputs_embeds" in inputs:
        inputs["inputs_embeds"].grad = None
    model.zero_grad(set_to_none=True)
    model(**inputs).loss.backward()


def timed(model: Any, inputs: dict[str, Any]) -> Part:
    def part(clock: Clock) -> None:
        with clock:
            train(model, inputs)

    return part


def kept(model: Any, inputs: dict[str, Tensor]) -> float:
    """Bytes of the storages that a forward pass keeps for the backward pass, parameters and buffers left out."""
    parameters = {held.untyped_storage().data_ptr() for held in (*model.parameters(), *model.buffers())}
    storages: dict[int, Any] = {}

    def pack(saved: Tensor) -> Tensor:
        tensor = saved
        if tensor.layout != torch.strided:  # sparse: what it holds is in its values
            tensor = tensor.detach().coalesce().values() if tensor.layout == torch.sparse_coo else tensor.values()
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # held, so that no other takes its address
        return saved.detach()  # itself, it would hold the node that holds it, for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs).loss
    total = sum(storage.nbytes() for address, storage in storages.items() if address not in parameters)
    del loss
    return float(total)
