"""LoRA of a mixture's experts in its two layouts: a pair of factors per expert, as files and engines have it, and one
pair for the parameter that transformers 5 fuses the experts into.

    mlp.experts.0.gate_proj.lora_A.weight [r, in], ...up_proj..., and so for each expert      per expert
    mlp.experts.base_layer.lora_A.weight [experts * 2r, in], .lora_B.weight [2 out, 2r * experts]      fused
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft.core.targets import ROOT
from peft.integrations.transformers import (
    ExpertStack,
    _expert_stacks,
    _targeted,
    _wrapper,
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)

Adapter = tuple[Any, dict[str, Tensor]]


def fuse_experts(config: Any, tensors: Mapping[str, Tensor], model: nn.Module) -> Adapter:
    """(configuration, tensors) of a LoRA per expert as one of the fused parameters of `model`, which may be on meta.

    Raises:
        ValueError: `model` has no fused experts, or the LoRA is not on all layers that share a parameter.
    """
    _stacks_of(model)
    config = copy.deepcopy(config)
    convert_peft_config_for_transformers(config, model, state_dict=tensors)
    return config, convert_peft_adapter_state_dict_for_transformers(model, config, tensors)


def split_experts(config: Any, tensors: Mapping[str, Tensor], model: nn.Module) -> Adapter:
    """(configuration, tensors) of a LoRA of fused parameters as one per expert, by the names of the model's own files.

    Where each projection has a part of the rank of its own, as after `fuse_experts`, it gets that part; else the whole.

    Args:
        config: of the adapter.
        tensors: as files have them.
        model: the base model; it may be on meta.

    Raises:
        ValueError: `model` has no fused experts, the adapter does not adapt them, or has shapes that do not fit them.
    """
    stacks = _stacks_of(model)
    config, tensors = copy.deepcopy(config), dict(tensors)
    names = _targeted(config, stacks)
    targets: set[str] = set()
    for stack in stacks:
        key = ROOT + _wrapper(stack.key, stack.rule.parameter, names)
        a, b = (tensors.pop(f"{key}.{side}.weight", None) for side in ("lora_A", "lora_B"))
        if a is None or b is None or stack.rule.parameter not in names:
            continue
        own = config.at(f"{stack.key}.{stack.rule.parameter}")
        rank = own.r
        if a.shape[0] != stack.count * rank or b.shape[1] != stack.count * rank:
            raise ValueError(f"{key}: {[*a.shape]} and {[*b.shape]} do not fit {stack.count} experts of rank {rank}.")
        part, found = _split(_names(model, stack), rank, a, b)
        share = part / rank
        alpha = own.lora_alpha * (share**0.5 if config.use_rslora else share)
        for layer, (own_a, own_b) in found.items():
            tensors[f"{ROOT}{layer}.lora_A.weight"], tensors[f"{ROOT}{layer}.lora_B.weight"] = own_a, own_b
            name = ".".join(layer.split(".")[-3:])
            targets.add(name)
            if part != config.r:
                config.rank_pattern[name] = part
            if alpha != config.lora_alpha:
                config.alpha_pattern[name] = alpha
    if not targets:
        raise ValueError("The adapter holds no LoRA of fused experts.")
    for pattern in (config.rank_pattern, config.alpha_pattern):
        for name in [name for name in pattern if name.rpartition(".")[2] in names]:
            del pattern[name]
    config.target_parameters = [n for n in config.target_parameters if n.rpartition(".")[2] not in names] or None
    config.target_modules = sorted({*(config.target_modules or ()), *targets})
    return config, tensors


def _stacks_of(model: nn.Module) -> list[ExpertStack]:
    stacks = _expert_stacks(model)
    if not stacks:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise ValueError(f"A {kind} model has no experts that transformers fuses into one parameter.")
    return stacks


def _names(model: Any, stack: ExpertStack) -> list[list[str]]:
    """The layers of a fused parameter, [projections][experts], by the names that the model's files have for them."""
    from transformers.core_model_loading import revert_weight_conversion

    parameter = getattr(model.get_submodule(stack.key), stack.rule.parameter)
    files = revert_weight_conversion(model, {f"{stack.key}.{stack.rule.parameter}": torch.empty_like(parameter)})
    layers = {tuple(name.split(".")[-3:-1]): name.removesuffix(".weight") for name in files}
    return [[layers[str(expert), name] for expert in range(stack.count)] for name in stack.rule.projections]


def _split(names: list[list[str]], rank: int, a: Tensor, b: Tensor) -> tuple[int, dict[str, tuple[Tensor, Tensor]]]:
    """(rank of a layer, layer -> A [r, in] and B [out, r]) of a fused parameter; names are [projections][experts]."""
    n, count = len(names), len(names[0])
    a = a.view(count, rank, -1)
    b = b.view(b.shape[0], rank, count).permute(2, 0, 1)  # [experts, n * out, rank]
    apart = rank % n == 0
    if apart:
        blocks = b.reshape(count, n, -1, n, rank // n)
        apart = not blocks.transpose(2, 3)[:, ~torch.eye(n, dtype=torch.bool)].any()
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for i, layers in enumerate(names):
        own_a = a.view(count, n, rank // n, -1)[:, i] if apart else a
        own_b = blocks[:, i, :, i] if apart else b.chunk(n, 1)[i]
        found |= {name: (own_a[j].contiguous(), own_b[j].contiguous()) for j, name in enumerate(layers)}
    return rank // n if apart else rank, found
