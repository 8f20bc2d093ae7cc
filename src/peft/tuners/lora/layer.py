"""The LoRA layer: what all kinds of base module have in common; the layers for each are in `kinds`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.core.base_op import BaseOp, ConvOp, ParallelLinearOp, ParameterOp
from peft.core.change import Change, LowRank
from peft.core.layer import AdapterLayer
from peft.core.part import without
from peft.core.run import is_watched
from peft.core.slots import ModuleSlot, Setting
from peft.core.storage import onloaded, storage_of
from peft.core.storage.flat import weight_of
from peft.core.targets import get_pattern_key
from peft.core.wrappers import unwrapped
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.megatron import check_megatron, check_parallel
from peft.tuners.lora.starts import CORDA, GRADIENT, Remainder, Start, check_start, start_of
from peft.tuners.lora.variants import variant_of
from peft.tuners.lora.variants.base import Variant

#: what other packages ask every layer for, though only some kinds have it
_CONTAINERS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


class TiedFactor(nn.Module):
    """A factor of the output layer's adapter that is one of the tied embedding's, transposed.

    The output layer's weight is that of the embedding, [tokens, dim], and so are their changes: B A of the one is
    (B A)^T = A^T B^T of the other.
    """

    bias = None

    def __init__(self, factors: nn.ParameterDict, name: str):
        super().__init__()
        # Not registered: the parameter belongs to the embedding's adapter.
        self.__dict__["_of"] = (factors, name)

    @property
    def weight(self) -> Tensor:
        factors, name = self.__dict__["_of"]
        return factors[name].T

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def is_plain(module: Any) -> bool:
    """Whether a factor is the linear layer that it seems, with nobody watching."""
    module = module if type(module) is nn.Linear else unwrapped(module)
    return type(module) is nn.Linear and not is_watched(module) and "forward" not in module.__dict__


def _call(factor: Any, x: Tensor) -> Tensor:
    """A factor's own forward pass, in the dtype of its weight."""
    return factor(x.to(factor.weight.dtype))


class LoraLayer(AdapterLayer):
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

    lora_A: Any = ModuleSlot()  # nn.ModuleDict of nn.Linear (or of what stands for one)
    lora_B: Any = ModuleSlot()
    lora_dropout = ModuleSlot(trained=False, stored=False)
    unit_slots = frozenset(("lora_A", "lora_B", "lora_magnitude_vector"))
    label = "lora"
    kinds = AdapterLayer.kinds | {ParallelLinearOp.kind}

    r = Setting[int]()
    lora_alpha = Setting[float]()
    scaling = Setting[float]()
    use_rslora = Setting[bool]()
    use_dora = Setting[bool]()
    lora_bias = Setting[bool]()
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
        absent: dict[str, Any] = {name: {} for name in _CONTAINERS if name not in self.adapter_layer_names}
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
        key = kwargs.get("target_name", "")
        self.add_adapter(adapter_name, config, kwargs.get("planned"), r=r, lora_alpha=lora_alpha, key=key)
        if "planned" not in kwargs:  # else the model does so when all its layers have the adapter
            self.settle(adapter_name)

    def create(self, name: str, config: LoraConfig, r: int = 0, lora_alpha: float | None = None, key: str = "") -> None:
        r = r or config.r
        if r < 1:
            raise ValueError(f"r must be a positive integer, got {r}.")
        self.r[name] = r
        self.lora_alpha[name] = config.lora_alpha if lora_alpha is None else lora_alpha
        self.use_rslora[name], self.lora_bias[name] = config.use_rslora, config.lora_bias
        self.use_dora[name] = config.use_dora
        self.scaling[name] = self.lora_alpha[name] / (math.sqrt(r) if config.use_rslora else r)
        # Past `ModuleDict.__setitem__`, here and below: the name was checked before.
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        modules: Any = self._modules
        modules["lora_dropout"]._modules[name] = dropout
        self.make_factors(name, r, config)
        self._start(name, config)
        variant = variant_of(config, key)
        if variant is not None and variant.applies(self):
            self.lora_variant[name] = variant
            for slot, kind in variant.slots.items():
                self.add_slot(slot, kind)
            self._leave(name, variant.create(self, name, config))

    def _start(self, name: str, config: LoraConfig) -> None:
        """Gives A and B their start values, those of the method that the configuration names."""
        start = start_of(config.init_lora_weights)
        if start is None:
            self.reset_lora_parameters(name, config.init_lora_weights)
            return
        self.lora_start[name] = start
        if not self.factors(name)[0].is_meta:
            self._leave(name, start.fill(self, name, config))

    def _leave(self, name: str, remainder: Remainder | None) -> None:
        """Notes what is to be left of the base weight when adapter `name` is complete."""
        if remainder is not None:
            self.__dict__.setdefault("_remainders", {})[name] = remainder

    def start_weight(self, name: str) -> Tensor:
        """The base weight [out, in] as it will be when adapter `name` is there."""
        weight = self.op.matrix(self.get_base_weight())
        remainder: Remainder | None = self.__dict__.get("_remainders", {}).get(name)
        return weight if remainder is None else remainder(weight)

    def delete_adapter(self, adapter_name: str) -> None:
        self.__dict__.get("_remainders", {}).pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def settle(self, name: str) -> Any:
        if name not in self.__dict__.get("_remainders", ()):
            return None
        base = self.get_base_layer()
        with onloaded(base), torch.no_grad():
            weight = self.op.unmatrix(self.start_weight(name), self.get_base_weight())
            before = storage_of(base, self.op.weight_name).write(base, self.op.weight_name, weight)
        del self.__dict__["_remainders"][name]
        for found in (CORDA, GRADIENT):  # what has served its purpose
            base.__dict__.pop(found, None)
        return before

    def make_factors(self, name: str, r: int, config: LoraConfig) -> None:
        """Makes A and B as layers of torch start: so an adapter starts without `init_lora_weights`."""
        modules: Any = self._modules
        modules["lora_A"]._modules[name] = nn.Linear(self.in_features, r, bias=False)
        modules["lora_B"]._modules[name] = nn.Linear(r, self.out_features, bias=config.lora_bias)

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str = True) -> None:
        """Gives an adapter its start values: A at random, B zero; with False it keeps those it was made with."""
        a, b = self.factors(adapter_name)
        if a.is_meta or init_lora_weights is False:
            return
        draw_(a.data, self.r[adapter_name], init_lora_weights)
        b.data.zero_()
        if self.lora_bias[adapter_name]:
            self.lora_B[adapter_name].bias.data.zero_()

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A and B as they are stored."""
        modules: Any = self._modules  # past `__getattr__`, which takes longer than the rest
        return _weight(modules["lora_A"]._modules[name]), _weight(modules["lora_B"]._modules[name])

    def flat_factors(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """A and B as matrices [r, in] and [out, r]."""
        return a, b

    def low_rank(self, name: str) -> LowRank:
        """scaling B A, and the bias that belongs to it."""
        modules: Any = self._modules
        a, b = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
        scaling = self.records[name].scaling
        bias = b._parameters.get("bias")
        offset = None if bias is None else bias * scaling
        down, up = self.flat_factors(_weight(a), _weight(b))
        change = LowRank(down, up, scaling, self.dropout_of(name), offset)
        # Somebody wants to see them called; FSDP has done so to bring their weights together.
        if self.op.linear and not (is_plain(a) and is_plain(b)):
            change.low, change.high = partial(_call, a), partial(_call, b)
        return change

    def product(self, name: str) -> Tensor:
        """scaling B A as a matrix: [out, in]."""
        return self.low_rank(name).delta()

    def change(self, name: str) -> Change | Iterable[Change]:
        variant = self.records[name].__dict__.get("lora_variant")
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

    def train(self, mode: bool = True) -> LoraLayer:
        # Training may write to weights in ways that leave no trace, so nothing that was made of them is kept.
        for variant in self.lora_variant.values():
            variant.forget()
        return super().train(mode)

    def dropout_of(self, name: str) -> float:
        """Probability of dropout on the adapter's input at present."""
        modules: Any = self._modules
        dropout = modules["lora_dropout"]._modules[name]
        return dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0

    def key_map(self, name: str) -> dict[str, str]:
        if not self.has(name):
            return {}
        slots = [slot for slot in self.adapter_layer_names if name in getattr(self, slot)]
        tied = [slot for slot in slots if isinstance(getattr(self, slot)[name], TiedFactor)]
        keys = {**super().key_map(name), **{f"{slot}.weight": f"{slot}.{name}.weight" for slot in tied}}
        return keys if name not in self.lora_variant else self.lora_variant[name].key_map(name, keys)

    def check_merge(self, name: str) -> None:
        if self.lora_bias[name] and self.get_base_bias() is None:
            raise ValueError(
                f"Adapter {name!r} has a bias (lora_bias=True), but the {self.op.kind} has none that it could"
                " be merged into."
            )
        if name in self.lora_variant:
            self.lora_variant[name].check_merge(self, name)

    # ---- scale

    def set_scale(self, adapter: str, scale: float) -> None:
        """Sets the scale of an adapter to `scale` times what its configuration says."""
        if self.has(adapter):
            self._set_scaling(adapter, scale * self._initial_scaling(adapter))

    def scale_layer(self, scale: float) -> None:
        """Multiplies the scale of the active adapters."""
        for name in self.live():
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the scale of the active adapters; without `scale`, sets it to what the configuration says."""
        for name in self.live():
            self._set_scaling(name, self._initial_scaling(name) if scale is None else self.scaling[name] / scale)

    def _set_scaling(self, name: str, value: float) -> None:
        scaling: Any = self.scaling
        held = scaling[name]
        # A tensor takes the new value in itself: compiled code goes on using it.
        scaling[name] = held.fill_(value) if isinstance(held, Tensor) else value

    def _initial_scaling(self, name: str) -> float:
        r = self.r[name]
        return self.lora_alpha[name] / (math.sqrt(r) if self.use_rslora[name] else r)

    # ---- checks

    @classmethod
    def check(cls, config: LoraConfig, key: str, module: Any, op: BaseOp) -> None:
        name = f"{key}.{op.weight_name}" if isinstance(op, ParameterOp) else key
        r = rank_of(config, name)
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
            kind = "Parameter" if isinstance(op, ParameterOp) else op.kind
            if kind not in variant.kinds:
                raise ValueError(
                    f"{variant.label} is not supported on {name!r}, a {kind}; it works on"
                    f" {', '.join(sorted(variant.kinds))}."
                )
            variant.check(config, name, module, op, r)


def check_config(config: LoraConfig) -> None:
    """Raises ValueError where a configuration asks for what there is no code for."""
    start_of(config.init_lora_weights)
    variant_of(config)
    check_megatron(config)


def _check_parameter(config: LoraConfig, name: str) -> None:
    for setting in ("fan_in_fan_out", "lora_bias"):
        if getattr(config, setting):
            raise ValueError(f"{setting}={getattr(config, setting)} is not supported for target_parameters ({name!r}).")


def rank_of(config: LoraConfig, key: str) -> int:
    """The rank of the adapter on one module."""
    return config.rank_pattern.get(get_pattern_key(config.rank_pattern, key), config.r)


def alpha_of(config: LoraConfig, key: str) -> float:
    """Its lora_alpha."""
    return config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, key), config.lora_alpha)


def draw_(a: Tensor, r: int, init_lora_weights: bool | str) -> None:
    """Gives an A of rank `r` random start values."""
    if init_lora_weights == "gaussian":
        a.normal_(std=1 / r)
    else:
        nn.init.kaiming_uniform_(a, a=5**0.5)


def _weight(factor: Any) -> Tensor:
    try:
        return factor._parameters["weight"]  # faster than the attribute, and ZeRO-3 gathers it as well
    except KeyError:
        return weight_of(factor)

