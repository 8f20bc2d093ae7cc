"""What transformers asks of this library, and what its models need that other models do not.

Transformers 5 fuses the experts of mixture models into one parameter per projection, such as `experts.gate_up_proj`
[experts, 2 * width, hidden] and `experts.down_proj` [experts, hidden, width], where files, and earlier versions, have a
linear layer per expert. Adapters for such layers become adapters for the parameters here. Which layers went into which
parameter is read from transformers' own rules for weights.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from peft import patterns
from peft.config import LayerConfig, PeftConfig
from peft.core.base_op import base_op
from peft.core.layer import AdapterLayer
from peft.core.targets import ALL_LINEAR, base_of, check_target_module_exists, ends_with, model_modules
from peft.patterns import get_pattern_key
from peft.registry import METHODS, PeftType, method_of


def shift_tokens_right(input_ids: Tensor, pad_token_id: int | None, decoder_start_token_id: int) -> Tensor:
    """Labels [batch, length] as inputs of a decoder: one place to the right, ignored ones (-100) as padding.

    Raises:
        ValueError: `pad_token_id` is None.
    """
    if pad_token_id is None:
        raise ValueError("pad_token_id must be set in the model's configuration to make decoder inputs of labels.")
    shifted = input_ids.roll(1, dims=-1)
    shifted[..., 0] = decoder_start_token_id
    return shifted.masked_fill(shifted == -100, pad_token_id)


# ---- experts that became one parameter


@dataclass(frozen=True)
class ExpertRule:
    """One of transformers' rules that fuse the layers of experts: for `gate_up_proj`, say.

    Attributes:
        parameter: the parameter that they become.
        projections: names of the layers of one expert that go into it, in order.
        rule: transformers' `WeightConverter`.
    """

    parameter: str
    projections: tuple[str, ...]
    rule: Any


@dataclass(frozen=True)
class ExpertStack:
    """One fused parameter of a model; `key` is the module that has it, `count` the number of experts."""

    key: str
    count: int
    rule: ExpertRule

    def layers(self, projection: str) -> list[str]:
        """Names that the layers of one projection would have; first the one that all experts share."""
        return [f"{self.key}.{projection}", *(f"{self.key}.{expert}.{projection}" for expert in range(self.count))]


def fuse_lora_a(projections: Sequence[Sequence[Tensor]]) -> Tensor:
    """LoRA's A of a fused parameter, [experts * projections * r, in], of [projections][experts] of [r, in]."""
    return torch.cat([a for expert in zip(*projections, strict=True) for a in expert])


def fuse_lora_b(projections: Sequence[Sequence[Tensor]]) -> Tensor:
    """LoRA's B of a fused parameter, of [projections][experts] of [out, r].

    The outcome is [projections * out, projections * r * experts]. Each projection has its own part of the rank, so
    that an expert's B is block diagonal. Columns go rank by rank, the experts of one rank side by side.
    """
    experts = [torch.block_diag(*expert) for expert in zip(*projections, strict=True)]
    return torch.stack(experts, dim=-1).flatten(1)


_FUSE = {"lora_A": fuse_lora_a, "lora_B": fuse_lora_b}


def _conversions_of(model: Any) -> list[Any]:
    """Transformers' rules from weights in files to those of `model`; none for other models, or before version 5."""
    if "transformers" not in sys.modules or not hasattr(model, "base_model_prefix") or _model_type(model) is None:
        return []
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return []
    return list(get_model_conversion_mapping(model))


def _model_type(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


def _expert_rules(conversions: Iterable[Any]) -> list[ExpertRule]:
    rules = []
    for conversion in conversions:
        stacks = any(type(op).__name__ == "MergeModulelist" for op in getattr(conversion, "operations", ()))
        if stacks and len(conversion.target_patterns) == 1:
            layers = [re.search(r"\*\.(\w+)\.weight$", pattern) for pattern in conversion.source_patterns]
            if all(layers):
                parameter = conversion.target_patterns[0].rpartition(".")[2]
                rules.append(ExpertRule(parameter, tuple(layer[1] for layer in layers if layer), conversion))
    return rules


def _expert_stacks(model: nn.Module, conversions: Iterable[Any] | None = None) -> list[ExpertStack]:
    """The fused parameters of a model, in its order; by transformers' rules for it if `conversions` is None."""
    # The parameters first: few models have any such, and looking up the rules takes longer than all the rest.
    stacked = [
        (key, name, parameter.shape[0])
        for key, module in model_modules(model)
        for name, parameter in base_of(module)._parameters.items()
        if parameter is not None and parameter.dim() == 3
    ]
    if not stacked:
        return []
    found = _expert_rules(_conversions_of(model) if conversions is None else conversions)
    rules = {rule.parameter: rule for rule in found}
    return [ExpertStack(key, count, rules[name]) for key, name, count in stacked if name in rules]


def convert_peft_config_for_transformers(
    peft_config: PeftConfig,
    model: nn.Module,
    conversions: Sequence[Any] | None = None,
    state_dict: Iterable[str] | None = None,
) -> None:
    """Lets a LoRA configuration that names the layers of experts mean the parameters they are fused into, in place.

    A parameter that holds n layers of an expert gets n times the rank and `lora_alpha`, so that each layer has its own
    part of the rank, at the same scale. Configurations that name no such layers are left as they are.

    Args:
        peft_config: the configuration.
        model: the base model, with or without adapters.
        conversions: transformers' rules for its weights; looked up if None.
        state_dict: names of the adapter's tensors, where it is loaded: they tell whether a name that other layers of
            the model have as well means the experts.

    Raises:
        ValueError: only some of the layers that share a parameter are named, or their ranks differ.
    """
    config: Any = peft_config
    if config.peft_type != PeftType.LORA or not isinstance(peft_config, LayerConfig):
        return
    if config.target_modules is None and config.target_parameters and _always_means_experts(model):
        config.target_modules = set()  # with other models, the defaults join the parameters
    stacks = _expert_stacks(model, conversions) if config.target_modules else []
    if not stacks or not _means_experts(config, model, stacks, state_dict):
        return
    parameters: list[str] = []
    for parameter in dict.fromkeys(stack.rule.parameter for stack in stacks):
        same = [stack for stack in stacks if stack.rule.parameter == parameter]
        chosen = [stack for stack in same if _named_projections(config, stack)]
        for stack in chosen:
            named = _named_projections(config, stack)
            missing = [projection for projection in stack.rule.projections if projection not in named]
            if missing:
                raise ValueError(
                    f"target_modules names {', '.join(named)} of the experts but not {', '.join(missing)}. They are one"
                    f" parameter, {stack.key}.{stack.rule.parameter}, and can only get an adapter together."
                )
        if chosen:
            _set_rank(config, chosen)
        # The plain name stands for all layers of the model; where some are left out, each is named.
        parameters += [parameter] if chosen == same else [f"{stack.key}.{parameter}" for stack in chosen]
    routers = _routers(config, model, stacks)
    if not parameters and not routers:
        return
    config.target_parameters = sorted({*(config.target_parameters or ()), *parameters, *routers})
    _drop_converted_targets(config, model, routers)
    if parameters and config.lora_dropout and config.inference_mode:
        config.lora_dropout = 0.0  # of no effect in inference, and parameters cannot have it


def _named_projections(config: Any, stack: ExpertStack) -> list[str]:
    """Those layers of an expert that a configuration means."""
    if config.target_modules == ALL_LINEAR:
        return list(stack.rule.projections)
    # The number of an expert is not that of a layer, which `layers_to_transform` counts.
    count = 1 if config.layers_to_transform is not None else None

    def means(projection: str) -> bool:
        return any(check_target_module_exists(config, layer) for layer in stack.layers(projection)[:count])

    return list(filter(means, stack.rule.projections))


def _means_experts(config: Any, model: nn.Module, stacks: list[ExpertStack], state_dict: Iterable[str] | None) -> bool:
    """Whether names in `config` that fit layers of experts mean them."""
    if state_dict is not None:
        names = "|".join({re.escape(name) for stack in stacks for name in stack.rule.projections})
        return any(re.search(rf"\.\d+\.({names})\.lora_", key) for key in state_dict)
    if _always_means_experts(model):
        return True
    # Adapters that huggingface/peft made for other models have other layers of the same name, and not the experts.
    return config.target_modules != ALL_LINEAR and not any(
        base_op(module) is not None and check_target_module_exists(config, key)
        for key, module in model_modules(model)
        if key.rpartition(".")[2] in {name for stack in stacks for name in stack.rule.projections}
    )


def _always_means_experts(model: nn.Module) -> bool:
    """Whether it is a model for which huggingface/peft converts configurations."""
    conversion_mapping = sys.modules.get("transformers.conversion_mapping")
    families = {"mixtral": "mixtral", **getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})}
    return families.get(_model_type(model) or "") in ("mixtral", "qwen2_moe")


def _set_rank(config: Any, stacks: list[ExpertStack]) -> None:
    """Gives the fused parameter the rank and alpha of all its layers together."""
    rule = stacks[0].rule
    n = len(rule.projections)
    scaled = n**0.5 if config.use_rslora else n  # the scale stays alpha / r, or alpha / sqrt(r)
    for pattern, default, factor in (("rank_pattern", config.r, n), ("alpha_pattern", config.lora_alpha, scaled)):
        values = getattr(config, pattern)
        layers = [layer for stack in stacks for name in rule.projections for layer in stack.layers(name)[1:]]
        found = {values.get(get_pattern_key(values, layer), default) for layer in layers} if values else {default}
        if len(found) > 1:
            raise ValueError(
                f"{pattern} gives layers of experts that are one parameter, {rule.parameter}, {sorted(found)}."
            )
        total = found.pop() * factor
        if total != default:
            values[rf".*\.{rule.parameter}"] = total


def _routers(config: Any, model: nn.Module, stacks: list[ExpertStack]) -> list[str]:
    """The routers beside the experts that `config` means; linear layers before, they hold a bare weight now."""
    beside = {stack.key.rpartition(".")[0] for stack in stacks}
    found = set()
    for key, module in model_modules(model):
        parent, _, name = key.rpartition(".")
        weight = getattr(module, "weight", None) if parent in beside and base_op(module) is None else None
        wanted = config.target_modules == ALL_LINEAR or check_target_module_exists(config, key)
        if isinstance(weight, Tensor) and weight.dim() == 2 and wanted:
            found.add(f"{name}.weight")
    return sorted(found)


def _drop_converted_targets(config: Any, model: nn.Module, routers: list[str]) -> None:
    """Takes out of `target_modules` what matches no layer any more."""
    if config.target_modules == ALL_LINEAR:
        return
    modules = list(model_modules(model))
    if isinstance(config.target_modules, str):
        layers = [key for key, module in modules if isinstance(module, AdapterLayer) or base_op(module) is not None]
        if not any(patterns.fullmatch(config.target_modules, key) for key in layers):
            config.target_modules = set()
    else:  # other modules are left in, for an error that says why they cannot be adapted
        others = [key for key, _ in modules if f"{key.rpartition('.')[2]}.weight" not in routers]
        targets = config.target_modules
        config.target_modules = {name for name in targets if any(ends_with(key, {name}) for key in others)}


def convert_peft_adapter_state_dict_for_transformers(
    model: nn.Module, peft_config: PeftConfig, adapter_state_dict: Mapping[str, Tensor], adapter_name: str = "default"
) -> dict[str, Tensor]:
    """LoRA tensors, as a file has them, under the names and in the shapes that this version of transformers needs.

    Layers of experts become their fused parameter, and layers that transformers has renamed get their new name.

    Args:
        model: the base model, with or without adapters.
        peft_config: the adapter's configuration, converted (see `convert_peft_config_for_transformers`).
        adapter_state_dict: its tensors by name (`base_model.model.<layer>.lora_A.weight`).
        adapter_name: not needed.
    """
    layers = {key for key, _ in model_modules(model)}
    places = {key: re.match(r"base_model\.model\.(.*)\.(lora_\w+.*)", key) for key in adapter_state_dict}
    known = all(found is None or found[1].replace(".base_layer", "") in layers for found in places.values())
    conversions = _conversions_of(model) if peft_config.peft_type == PeftType.LORA and not known else []
    if not conversions:
        return dict(adapter_state_dict)
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    renamings = [rule for rule in conversions if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in conversions if isinstance(rule, WeightConverter)]
    stacks = {f"{stack.key}.{stack.rule.parameter}": stack for stack in _expert_stacks(model, conversions)}
    result: dict[str, Tensor] = {}
    experts: dict[tuple[str, str], dict[tuple[str, int], Tensor]] = {}
    for key, tensor in adapter_state_dict.items():
        found = places[key]
        if found is None or found[1].replace(".base_layer", "") in layers:
            result[key] = tensor
            continue
        layer, rest = found.groups()
        weight, pattern = rename_source_key(f"{layer}.weight", renamings, converters)
        parts = layer.split(".")
        if pattern is not None and weight in stacks:
            experts.setdefault((weight, rest.partition(".")[0]), {})[parts[-1], int(parts[-2])] = tensor
        elif weight.removesuffix(".weight") in layers:
            result[f"base_model.model.{weight.removesuffix('.weight')}.{rest}"] = tensor
        else:
            result[key] = tensor
    targeted = _targeted(peft_config, stacks.values())
    for (weight, side), tensors in experts.items():
        stack = stacks[weight]
        # Experts that the adapter leaves alone get a change of zero.
        nothing, every = torch.zeros_like(next(iter(tensors.values()))), range(stack.count)
        factors = [[tensors.get((name, expert), nothing) for expert in every] for name in stack.rule.projections]
        wrapper = _wrapper(stack.key, stack.rule.parameter, targeted)
        result[f"base_model.model.{wrapper}.{side}.weight"] = _FUSE[side](factors)
    return result


def _targeted(config: Any, stacks: Iterable[ExpertStack]) -> list[str]:
    """The fused parameters that a configuration means, in the order in which they get their layers."""
    wanted = {entry.rpartition(".")[2] for entry in config.target_parameters or ()}
    return list(dict.fromkeys(stack.rule.parameter for stack in stacks if stack.rule.parameter in wanted))


def _wrapper(key: str, parameter: str, targeted: Sequence[str]) -> str:
    """The name of the layer that adapts `parameter` of module `key`: the first of those targeted is the innermost."""
    inside = len(targeted) - 1 - targeted.index(parameter) if parameter in targeted else 0
    return key + ".base_layer" * inside


def build_peft_weight_mapping(
    weight_conversions: Sequence[Any] | None, adapter_name: str, peft_config: PeftConfig | None = None
) -> list[Any]:
    """The rules by which transformers itself loads an adapter's file into a model with that adapter.

    Args:
        weight_conversions: its rules for the model's own weights.
        adapter_name: the adapter.
        peft_config: its configuration, converted or not.

    Returns:
        Rules that take the prefix off the names in the file, add the adapter's name, and convert what transformers has
        renamed or fused since.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    rules: list[Any] = [WeightRenaming(r"^base_model\.model\.", "")]
    known = peft_config is not None and peft_config.peft_type
    methods = [method_of(peft_config.peft_type)] if known else METHODS.values()  # type: ignore[union-attr,arg-type]
    for prefix in sorted({method.prefix for method in methods if not method.prompt}):
        rules.append(WeightRenaming(rf"\.({prefix}[^.]*)", rf".\1.{adapter_name}"))
    rules += [rule for rule in weight_conversions or () if isinstance(rule, WeightRenaming)]

    experts = _expert_rules(weight_conversions or ())
    targeted = [rule.parameter for rule in experts if peft_config is None or _mentions(peft_config, rule)]
    for rule in experts:
        container = rule.rule.target_patterns[0].rpartition(".")[0]
        for side in _FUSE:
            ending = f".{side}.{adapter_name}.weight"
            sources = [re.sub(r"\.weight$", ending, pattern) for pattern in rule.rule.source_patterns]
            target = _wrapper(container, rule.parameter, targeted) + ending
            converter = WeightConverter(sources, target, operations=[_fuse_operation(side)])
            for attribute in ("scope_prefix", "base_model_prefix"):
                if hasattr(rule.rule, attribute):
                    setattr(converter, attribute, getattr(rule.rule, attribute))
            rules.append(converter)
    return rules


def _mentions(config: Any, rule: ExpertRule) -> bool:
    """Whether a configuration, converted or not, is for the parameter of a rule."""
    if any(entry.rpartition(".")[2] == rule.parameter for entry in getattr(config, "target_parameters", None) or ()):
        return True
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, str):
        return targets == ALL_LINEAR or any(name in targets for name in rule.projections) or "[" in targets
    return any(entry.rpartition(".")[2] in rule.projections for entry in targets or ())


@lru_cache
def _fuse_operation(side: str) -> Any:
    """`fuse_lora_a` or `fuse_lora_b` as transformers' conversion operation."""
    from transformers.core_model_loading import ConversionOps

    class FuseExperts(ConversionOps):
        def convert(
            self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
        ) -> dict[str, Any]:
            with torch.no_grad():
                return {target_patterns[0]: _FUSE[side]([input_dict[pattern] for pattern in source_patterns])}

    return FuseExperts()
