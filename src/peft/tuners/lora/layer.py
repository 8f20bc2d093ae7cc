"""The LoRA layer: what all kinds of base module have in common; the factors are in `base`, the layers in `kinds`."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from peft.core.base_op import BaseOp, ConvOp, ParallelLinearOp, ParameterOp
from peft.core.change import Change
from peft.core.layer import AdapterLayer
from peft.core.part import without
from peft.core.slots import Setting
from peft.core.storage import onloaded, storage_of
from peft.tuners.lora.base import FactorLayer, TiedFactor
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.megatron import check_parallel
from peft.tuners.lora.starts import CORDA, GRADIENT, Start, check_start, start_of
from peft.tuners.lora.variants import variant_of
from peft.tuners.lora.variants.base import Variant

#: what other packages ask every layer for, though only some kinds have it
_CONTAINERS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


class LoraLayer(FactorLayer):
    """A module with low-rank adapters: W' = W + scaling B A (arXiv:2106.09685).

    Per adapter: `lora_A[name].weight` [r, in] and `lora_B[name].weight` [out, r] (for embeddings the parameters
    `lora_embedding_A[name]` [r, tokens] and `lora_embedding_B[name]` [dim, r]), `scaling[name]`, `r[name]`,
    `lora_alpha[name]`, `lora_dropout[name]`.

    Args:
        base_layer: the module.
        adapter_name: a first adapter to make, if any.
        config: its configuration.
        r, lora_alpha: its rank and the numerator of its scale.
        parameter_name: the parameter to adapt, for modules that hold bare parameters.
    """

    label = "lora.{kind}"
    kinds = AdapterLayer.kinds | {ParallelLinearOp.kind}

    lora_variant = Setting[Variant]()
    lora_start = Setting[Start]()

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str | None = None,
        config: LoraConfig | None = None,
        r: int = 0,
        lora_alpha: float = 1,
        parameter_name: str | None = None,
        op: BaseOp | None = None,
        **kwargs: Any,
    ):
        super().__init__(base_layer, parameter_name, op)
        absent: dict[str, Any] = {name: {} for name in _CONTAINERS if name not in self.own_slots}
        self.__dict__.update(absent, fan_in_fan_out=self.op.kind == "Conv1D")
        if adapter_name is not None:
            if config is None:
                raise TypeError(f"{type(self).__name__} needs a config to make adapter {adapter_name!r}.")
            self.update_layer(adapter_name, r, lora_alpha, config)
            self.set_adapter(adapter_name, inference_mode=config.inference_mode)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any) -> None:
        """Makes an adapter, or makes it anew.

        Args:
            adapter_name, r, lora_alpha, config: its name, rank, numerator of its scale, configuration.
            kwargs: `target_name`, the module's name; `planned`, see `add_adapter`.
        """
        own = copy.copy(config)
        own.r, own.lora_alpha = r or config.r, lora_alpha
        self.add_adapter(adapter_name, config, kwargs.get("planned"), own, key=kwargs.get("target_name", ""))
        if "planned" not in kwargs:  # else the model does so when all its layers have the adapter
            self.change_base(adapter_name)

    def create(self, name: str, config: LoraConfig, key: str = "") -> None:
        if config.r < 1:
            raise ValueError(f"r must be a positive integer, got {config.r}.")
        self.scaling[name] = self.initial_scaling(name)
        self.make_dropout(name, config)
        self.make_factors(name, config.r, config)
        self._start(name, config)
        variant = variant_of(config, key)
        if variant is not None and variant.applies(self):
            self.lora_variant[name] = variant
            for slot, kind in variant.slots.items():
                self.add_slot(slot, kind)
            variant.create(self, name, config)

    def _start(self, name: str, config: LoraConfig) -> None:
        """Gives A and B their start values, those of the method that the configuration names."""
        start = start_of(config.init_lora_weights, self.op.kind)
        if start is None:
            self.reset_lora_parameters(name, config.init_lora_weights)
            return
        self.lora_start[name] = start
        if not self.factors(name)[0].is_meta:
            start.fill(self, name, config)

    def change_base(self, name: str) -> Any:
        if name not in self.lora_residual:
            return None
        base = self.get_base_layer()
        with onloaded(base), torch.no_grad():
            weight = self.op.unmatrix(self.start_weight(name), self.get_base_weight())
            storage, held = storage_of(base, self.op.weight_name), (base, self.op.weight_name)
            before = storage.keep(*held)
            storage.write(*held, weight)
        del self.lora_residual[name]
        for found in (CORDA, GRADIENT):  # what has served its purpose
            base.__dict__.pop(found, None)
        return before

    def change(self, name: str) -> Change | Iterable[Change]:
        variant = self.lora_variant.get(name)
        return self.low_rank(name) if variant is None else variant.change(self, name)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        start, variant = self.lora_start.get(adapter_name), self.lora_variant.get(adapter_name)
        # Those that have changed the base weight belong to that weight, not to the model's own.
        changed = (start is not None and start.changes_base) or (variant is not None and variant.changes_base)
        return not changed and super().supports_lora_conversion(adapter_name)

    def trainable_parameters(self, name: str) -> Iterable[nn.Parameter]:
        start, parameters = self.lora_start.get(name), super().trainable_parameters(name)
        if start is None or start.trains_b or not self.has(name):
            return parameters
        fixed: Any = self.factors(name)[1]
        return without(parameters, [fixed])

    @property
    def frozen_peft_weight_names(self) -> dict[str, tuple[str, ...]]:
        fixed = (name for name, start in self.lora_start.items() if start is not None and not start.trains_b)
        return dict.fromkeys(fixed, ("lora_B",))

    def train(self, mode: bool = True) -> LoraLayer:
        # Training may write to weights in ways that leave no trace, so nothing that was made of them is kept.
        for variant in self.lora_variant.values():
            variant.forget()
        return super().train(mode)

    def key_map(self, name: str) -> dict[str, str]:
        modules: Any = self._modules
        tied = [slot for slot in self.own_slots if isinstance(modules[slot]._modules.get(name), TiedFactor)]
        keys = {**super().key_map(name), **{f"{slot}.weight": f"{slot}.{name}.weight" for slot in tied}}
        return keys if name not in self.lora_variant else self.lora_variant[name].key_map(name, keys)

    def check_merge(self, name: str) -> None:
        super().check_merge(name)
        if self.lora_bias[name] and self.get_base_bias() is None:
            raise ValueError(f"Adapter {name!r} has a bias (lora_bias=True); there is none here to merge it into.")
        variant = self.lora_variant.get(name)
        if variant is not None and variant.cannot_merge:
            raise NotImplementedError(variant.cannot_merge.format(name=name))

    # ---- checks

    @classmethod
    def check(cls, config: LoraConfig, key: str, module: Any, op: BaseOp) -> None:
        name, r = f"{key}.{op.weight_name}" if isinstance(op, ParameterOp) else key, config.r
        if r < 1:
            raise ValueError(f"r must be a positive integer, got {r} for {name!r}.")
        if isinstance(op, ParameterOp):
            _check_parameter(config, name)
        elif config.lora_bias and op.kind == "Embedding":
            raise ValueError(f"lora_bias=True is not supported for embeddings ({key!r}).")
        elif isinstance(op, ConvOp) and r % module.groups:
            raise ValueError(f"r={r} must be a multiple of the groups of {key!r} ({module.groups}).")
        elif isinstance(op, ParallelLinearOp):
            check_parallel(config, key, module, op)
        check_start(config, name, module, op, r)
        variant = variant_of(config, name)
        if variant is not None:
            if op.kind not in variant.kinds:
                known = ", ".join(sorted(variant.kinds))
                raise ValueError(f"{variant.label} is not supported on {name!r}, a {op.kind}; it works on {known}.")
            variant.check(config, name, module, op, r)


def _check_parameter(config: LoraConfig, name: str) -> None:
    for setting in ("fan_in_fan_out", "lora_bias"):
        if getattr(config, setting) and (setting == "lora_bias" or not config.target_modules):  # it may be for these
            raise ValueError(f"{setting}={getattr(config, setting)} is not supported for target_parameters ({name!r}).")
