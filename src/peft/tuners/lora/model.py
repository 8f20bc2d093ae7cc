"""A model with LoRA adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from peft.core.base_op import base_op
from peft.core.layer import AdapterLayer
from peft.core.tuner import BaseTuner
from peft.ops.merging import SignMethod
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import LAYERS, Embedding, Linear, LoraLayer, TiedFactor, alpha_of, check_config, rank_of
from peft.tuners.lora.merging import Combination, add_weighted_adapter
from peft.tuners.lora.starts import start_of
from peft.tuners.lora.variants import variant_of


class LoraModel(BaseTuner):
    """A model with LoRA adapters on its layers (arXiv:2106.09685)."""

    prefix = "lora_"
    layer_class = LoraLayer

    @classmethod
    def start_is_replaceable(cls, config: LoraConfig) -> bool:
        start, variant = start_of(config.init_lora_weights), variant_of(config)
        return not (start is not None and start.changes_base) and not (variant is not None and variant.changes_base)

    def check_config(self, adapter_name: str, config: LoraConfig) -> None:
        check_config(config)

    def layer_settings(self, config: LoraConfig, key: str) -> dict[str, Any]:
        return {"r": rank_of(config, key), "lora_alpha": alpha_of(config, key)}

    def make_layer(self, config: LoraConfig, target: nn.Module, parameter_name: str | None, key: str) -> AdapterLayer:
        base = target.get_base_layer() if isinstance(target, AdapterLayer) else target
        op = base_op(base, parameter_name)
        if op is None:
            raise ValueError(f"{key!r} is a {type(base).__name__}, which LoRA does not know.")
        return LAYERS[op.kind](target, parameter_name=parameter_name, op=op)

    def tie(self, layer: AdapterLayer, to: AdapterLayer, adapter_name: str) -> None:
        if not isinstance(layer, Linear) or not isinstance(to, Embedding):
            return super().tie(layer, to, adapter_name)
        layer.lora_A[adapter_name] = TiedFactor(to.lora_embedding_B, adapter_name)
        layer.lora_B[adapter_name] = TiedFactor(to.lora_embedding_A, adapter_name)
        for setting in ("r", "lora_alpha", "scaling"):
            getattr(layer, setting)[adapter_name] = getattr(to, setting)[adapter_name]

    def _prepare_model(self, peft_config: LoraConfig, model: nn.Module) -> Callable[[], None] | None:
        return replicate_layers(model, peft_config.layer_replication) if peft_config.layer_replication else None

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: SignMethod = "total",
    ) -> None:
        """Adds an adapter that combines others; it is not active yet. A call that raises changes nothing.

        Args:
            adapters: names of the adapters to combine. One of them at most may have `modules_to_save` or
                `trainable_token_indices`, which the new adapter takes over as they are.
            weights: a factor for each; negative ones take an adapter's effect away.
            adapter_name: the new adapter's name.
            combination_type: `"cat"` and `"svd"` make the weighted sum of the changes that the adapters make to a
                weight: exact, with the sum of all ranks, or the nearest of rank `svd_rank`. `"linear"` sums the
                factors A and B instead, which is cheap and rough. `"ties"` (arXiv:2306.01708), `"dare_linear"`,
                `"dare_ties"` (arXiv:2311.03099) and `"magnitude_prune"` prune first; with `_svd` at the end they
                work on the changes, else on A and B. Those on A and B need adapters of the same rank.
            svd_rank: rank of the new adapter, for the svd types; the largest of the adapters' ranks if None.
            svd_clamp: quantile that no entry of the factors may pass, for the svd types.
            svd_full_matrices: has no influence on the outcome; taken for compatibility.
            svd_driver: method of `torch.linalg.svd` on CUDA.
            density: share of the entries that pruning keeps, 0 to 1.
            majority_sign_method: how `ties` and `dare_ties` elect the sign of an entry: by the sum (`"total"`) or by
                counting (`"frequency"`).

        Raises:
            ValueError: an adapter does not exist, the name is taken, ranks differ where they may not, a setting is
                out of range or missing, or an adapter is on a bare parameter.
            RuntimeError: an unknown `majority_sign_method`.
        """
        how = Combination(combination_type, svd_rank, svd_clamp, svd_driver, density, majority_sign_method)
        add_weighted_adapter(self, adapters, weights, adapter_name, how)


def replicate_layers(model: nn.Module, ranges: list[tuple[int, int]]) -> Callable[[], None]:
    """Builds a model's stack of layers anew from ranges [start, end) of it; repeated layers share their weights.

    Returns what undoes it.

    Raises:
        ValueError: the model has no such stack, or it is shorter than a range.
    """
    config: Any = getattr(model, "config", None)
    count = getattr(config, "num_hidden_layers", None)
    stacks = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and count is not None and len(child) == count
    ]
    if not stacks:
        raise ValueError(f"layer_replication found no stack of layers in {type(model).__name__}.")
    parent, name, layers = stacks[0]
    order = [index for start, end in ranges for index in range(start, end)]
    if not order or max(order) >= len(layers):
        raise ValueError(
            f"layer_replication={ranges} asks for layers that {type(model).__name__} does not have"
            f" ({len(layers)} layers)."
        )
    replicated = nn.ModuleList()
    for index in order:
        replicated.append(_sharing_copy(layers[index]) if layers[index] in list(replicated) else layers[index])
    _number_layers(replicated)
    setattr(parent, name, replicated)
    config.num_hidden_layers = len(replicated)

    def undo() -> None:
        setattr(parent, name, layers)
        _number_layers(layers)
        config.num_hidden_layers = count

    return undo


def _sharing_copy(module: nn.Module) -> nn.Module:
    """A copy of a module that holds the very same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)


def _number_layers(layers: nn.ModuleList) -> None:
    # Attention modules find their part of the cache by this number.
    for index, layer in enumerate(layers):
        for module in layer.modules():
            attention: Any = module
            if hasattr(attention, "layer_idx"):
                attention.layer_idx = index
