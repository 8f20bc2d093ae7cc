"""Adapters of other methods turned into LoRA."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft.checkpoint.files import write_adapter
from peft.checkpoint.state import config_of, get_peft_model_state_dict
from peft.core.base_op import ParameterOp
from peft.core.combine import exact_targets
from peft.core.layer import AdapterLayer
from peft.core.merge import bias_difference, difference
from peft.core.targets import ROOT, target_name
from peft.core.tuner import BaseTuner
from peft.core.walk import in_files, parts_of, with_progress
from peft.errors import listed, warn
from peft.ops.merging import svd_of_product
from peft.ops.principal import unrounded
from peft.registry import method_of, value_of
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.factors import adapter_rank, block_count, block_rank, change_factors, of_svd

#: relative error of a layer above which it is worth a warning
NOTABLE_ERROR = 0.1
#: what the LoRA takes over from the configuration of the adapter
_KEPT_FIELDS = (
    "task_type", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "modules_to_save",
    "trainable_token_indices", "ensure_weight_tying", "layer_replication", "fan_in_fan_out",
)  # fmt: skip


class ConvertedLora(tuple[LoraConfig, dict[str, Tensor]]):
    """What [`convert_to_lora`] returns: the pair (configuration, tensors by the names that files have for them).

    Attributes:
        errors: by module, how much of its change is lost: the norm of the difference over the norm of the change
            (Frobenius), 0 where nothing is lost.
    """

    errors: dict[str, float]

    def __new__(cls, config: LoraConfig, state_dict: dict[str, Tensor], errors: dict[str, float]) -> ConvertedLora:
        pair = super().__new__(cls, (config, state_dict))
        pair.errors = errors
        return pair


@dataclass
class LayerChange:
    """A layer's change, decomposed into u [blocks, out, k], s [blocks, k], vh [blocks, k, in]; that of its bias."""

    layer: AdapterLayer
    u: Tensor
    s: Tensor
    vh: Tensor
    bias: Tensor | None

    def rank_for(self, energy: float) -> int:
        """The smallest rank of a block with which that share of the squared singular values is kept.

        Those that are zero but for rounding do not count.
        """
        rounding = self.s.amax() * max(self.u.shape[1], self.vh.shape[2]) * torch.finfo(self.s.dtype).eps
        kept = torch.where(self.s > rounding, self.s, 0).double().square().sum(0).cumsum(0)
        return min(int((kept < energy * kept[-1]).sum()) + 1, self.s.shape[1])

    def block(self, rank: int | float) -> int:
        """The rank of a block for that of the LoRA, or for a share of energy that is to be kept."""
        return self.rank_for(rank) if isinstance(rank, float) else block_rank(self.layer, rank)

    def tensors(self, rank: int) -> dict[str, Tensor]:
        """The LoRA of that rank per block."""
        # LoRA counts the change of a projection that attention reads twice, see `peft.tuners.lora.layer.Linear.delta`.
        return of_svd(self.layer, self.u, self.s / (2 if self.layer.with_attention else 1), self.vh, rank)

    def error(self, rank: int) -> float:
        """How much of the change is lost, relative to it."""
        energy = self.s.double().square()
        whole = energy.sum()
        return float((energy[:, rank:].sum() / whole).sqrt()) if whole > 0 else 0.0


def convert_to_lora(
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> ConvertedLora:
    """Turns an adapter that changes weights, of whatever method, into the nearest LoRA.

    Each layer's change of the weight is cut down to the rank by a truncated singular value decomposition, which no LoRA
    of that rank comes nearer to. What the adapter does to biases becomes `lora_bias`; modules trained in full, trained
    tokens and trained biases are taken along. The LoRA's scale is one.

    Args:
        model: a model with adapters; it is not changed.
        rank: the LoRA's rank. A float is a threshold, above 0 and up to 1: each layer gets the smallest rank
            that keeps that share of the squared singular values (`rank_pattern` in the result).
        adapter_name: the adapter to convert.
        progressbar: show one.
        compile_kwargs: compile the decomposition with these arguments of `torch.compile`.

    Returns:
        The pair (LoraConfig, state dict), with an attribute `errors`: the relative error of each module. A warning
        names the worst where it is notable.

    Raises:
        TypeError: the model has no adapter layers, or the adapter does something else than change weights.
        ValueError: the rank is too low or too high; adapters are merged; or biases change where a LoRA cannot have one.
        KeyError: there is no such adapter.
    """
    check_rank(rank)
    modules = _layers_of(model, adapter_name)
    if isinstance(rank, int):
        _check_fit(modules, rank)
    split = decompose if compile_kwargs is None else torch.compile(decompose, **compile_kwargs)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    errors: dict[str, float] = {}
    biases: dict[str, tuple[AdapterLayer, Tensor | None]] = {}
    for key, layers in with_progress(list(modules.items()), progressbar, "Converting"):
        # Layers of one module, as attention has them, share a rank.
        changes = {path: _changed(layer, adapter_name, split) for path, layer in layers.items()}
        block = max(change.block(rank) for change in changes.values())
        ranks[key] = max(adapter_rank(change.layer, block) for change in changes.values())
        for path, change in changes.items():
            place = in_files(model, adapter_name, path)
            tensors.update({f"{place}.{name}": tensor for name, tensor in change.tensors(block).items()})
            biases[place] = (change.layer, change.bias)
            errors[path.removeprefix(ROOT)] = change.error(block)
    config = _lora_config(model, config_of(model, adapter_name), modules, ranks, rank)
    if any(bias is not None for _, bias in biases.values()):
        config.lora_bias = True
        tensors.update(_bias_tensors(biases))
    tensors.update(_other_tensors(model, adapter_name, modules))
    report(errors)
    return ConvertedLora(config, tensors, errors)


def save_as_lora(
    path: str | os.PathLike,
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Turns an adapter into a LoRA (see [`convert_to_lora`], which also says what is lost) and saves that.

    Args:
        path: the folder, made if need be.
        model, rank, adapter_name, progressbar, compile_kwargs: as for [`convert_to_lora`].

    Raises:
        TypeError, ValueError, KeyError: see [`convert_to_lora`]; nothing is written then.
    """
    config, tensors = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    write_adapter(path, config.to_json_dict(), tensors)


def check_rank(rank: Any) -> None:
    """Raises TypeError or ValueError where `rank` is neither a rank nor a share of energy."""
    if isinstance(rank, bool) or not isinstance(rank, (int, float)):
        raise TypeError(f"rank must be an int (the rank) or a float (the share of energy to keep), got {rank!r}.")
    if isinstance(rank, int) and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}.")
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ValueError(f"A float rank is the share of energy to keep, above 0 and up to 1; got {rank}.")


def _layers_of(model: nn.Module, adapter_name: str) -> dict[str, dict[str, AdapterLayer]]:
    """Module -> its layers with the adapter, by their names in the model: one, or two for attention.

    Raises TypeError where there is nothing that could become a LoRA.
    """
    parts = parts_of(model)
    layers = {path: part for path, part in parts if isinstance(part, AdapterLayer) and not part.is_beside(adapter_name)}
    if not layers:
        raise TypeError(f"{type(model).__name__} has no adapter layers for a conversion to LoRA.")
    config = config_of(model, adapter_name)
    layers = {path: layer for path, layer in layers.items() if layer.has(adapter_name)}
    other = sorted({layer.op.kind for layer in layers.values() if not layer.supports_lora_conversion(adapter_name)})
    if other or not layers:
        where = f" to {', '.join(other)} layers" if other else ""
        raise TypeError(
            f"Adapter {adapter_name!r} ({value_of(config.peft_type)}) does not support"
            f" conversion to LoRA: what it does{where} is no change of a whole weight matrix."
        )
    if any(layer.merged for layer in layers.values()):
        raise ValueError("Adapters are merged, so the base weights are not known; call unmerge_adapter() first.")
    modules: dict[str, dict[str, AdapterLayer]] = {}
    for path, layer in layers.items():
        modules.setdefault(target_name(path.removeprefix(ROOT), layer), {})[path] = layer
    return modules


def _check_fit(modules: Mapping[str, Mapping[str, AdapterLayer]], rank: int) -> None:
    """Raises ValueError where a module cannot have a LoRA of this rank."""
    for key, layers in modules.items():
        for layer in layers.values():
            blocks = block_count(layer)
            largest = min(layer.op.out_features // blocks, layer.op.in_features)
            if adapter_rank(layer, block_rank(layer, rank)) != rank:
                raise ValueError(f"rank={rank} must be a multiple of the groups of {key!r} ({blocks}).")
            if block_rank(layer, rank) > largest:
                raise ValueError(
                    f"rank={rank} is larger than the weight of {key!r} allows ({adapter_rank(layer, largest)}); choose"
                    " a lower one, or a float threshold, which finds a rank for each layer."
                )


def decompose(change: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u [blocks, out, k], s [blocks, k] and vh [blocks, k, in] of a change [blocks, out, in]."""
    return torch.linalg.svd(unrounded(change), full_matrices=False)


@torch.no_grad()
def _changed(layer: AdapterLayer, name: str, split: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> LayerChange:
    factors = change_factors(layer, name)
    if factors is None:
        # In the adapter's dtype, so that nothing is lost in a base weight of lower precision.
        change = difference(layer, name).unflatten(0, (block_count(layer), -1))
        parts = split(change)
    else:
        change, parts = factors[1], svd_of_product(*factors)
    u, s, vh = (part.to(change.dtype) for part in parts)
    return LayerChange(layer, u, s, vh, bias_difference(layer, name))


def _lora_config(
    model: nn.Module, config: Any, modules: Mapping[str, Mapping[str, AdapterLayer]], ranks: dict[str, int], rank: Any
) -> LoraConfig:
    bare = {key for key, layers in modules.items() for layer in layers.values() if isinstance(layer.op, ParameterOp)}
    base = next((module.model for module in model.modules() if isinstance(module, BaseTuner)), model)
    wanted = set(modules) - bare
    targets: Any = exact_targets(base, wanted, [getattr(config, "target_modules", None)]) if wanted else []
    kept = {name: getattr(config, name) for name in _KEPT_FIELDS if getattr(config, name, None)}
    bias = getattr(config, "bias", "none")
    bias = bias if bias in ("none", "all") else "lora_only"
    made = LoraConfig(target_modules=targets, target_parameters=sorted(bare) or None, bias=bias, **kept)
    set_ranks(made, ranks, rank)
    return made


def set_ranks(config: LoraConfig, ranks: Mapping[str, int], rank: int | float) -> None:
    """Gives a LoRA the rank that was asked for, or the ranks by module that a share of energy has led to; scale 1."""
    config.r = config.lora_alpha = 1 if isinstance(rank, float) else rank
    if isinstance(rank, float):
        config.rank_pattern, config.alpha_pattern = dict(ranks), dict(ranks)


def _bias_tensors(biases: Mapping[str, tuple[AdapterLayer, Tensor | None]]) -> dict[str, Tensor]:
    """The biases of B. All modules have one then, so it is zero where nothing changes.

    Raises ValueError where a kind of module cannot have one.
    """
    tensors = {}
    for place, (layer, bias) in biases.items():
        if layer.op.kind in ("Embedding", "Parameter"):
            raise ValueError(
                "The adapter changes biases, which takes a LoRA with lora_bias=True; but it is on"
                f" {place.removeprefix(ROOT)!r} ({layer.op.kind}) too, where a LoRA cannot have a bias."
            )
        weight = layer.get_base_weight()
        tensors[f"{place}.lora_B.bias"] = weight.new_zeros(layer.out_features) if bias is None else bias.contiguous()
    return tensors


def _other_tensors(
    model: nn.Module, adapter_name: str, modules: Mapping[str, Mapping[str, AdapterLayer]]
) -> Iterator[tuple[str, Tensor]]:
    """What the adapter saves beside its layers: modules trained in full, biases, embeddings."""
    owners: list[tuple[str, Any]] = [(path, layer) for layers in modules.values() for path, layer in layers.items()]
    owners += [(path, module) for path, module in model.named_modules() if isinstance(module, BaseTuner)]
    own = {in_files(model, adapter_name, f"{path}.{k}") for path, owner in owners for k in owner.key_map(adapter_name)}
    tuner: Any = method_of(config_of(model, adapter_name).peft_type).model_class
    stored = get_peft_model_state_dict(model, adapter_name=adapter_name)
    for key, tensor in tuner.method_class.read_tensors(model, adapter_name, stored).items():
        if key not in own:
            yield key, tensor


def report(errors: Mapping[str, float]) -> None:
    """Warns where the LoRA is notably different from what it stands for."""
    notable = {key: error for key, error in errors.items() if error > NOTABLE_ERROR}
    if notable:
        worst = [f"{key} {notable[key]:.0%}" for key in sorted(notable, key=notable.__getitem__, reverse=True)]
        warn(
            f"The LoRA is not the adapter: on {len(notable)} of {len(errors)} modules it misses more than"
            f" {NOTABLE_ERROR:.0%} of the change ({listed(worst, 3)}). A higher rank comes nearer."
        )
