"""The LoRA layer, for each kind of base module."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.core.base_op import BaseOp, ConvOp, ParallelLinearOp, ParameterOp
from peft.core.blank import blank
from peft.core.layer import AdapterLayer
from peft.core.part import without
from peft.core.plan import get_pattern_key
from peft.core.products import frozen_linear, hooks_of, is_watched
from peft.core.routing import Route
from peft.core.storage import onloaded, storage_of
from peft.ops.factored import FactoredWeight
from peft.ops.lora import add_low_rank, compute_dtype, lora_linear, lora_linear_few, needs_plain
from peft.tuners.lora import mixed
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.megatron import check_megatron, check_parallel
from peft.tuners.lora.mixed import is_plain
from peft.tuners.lora.starts import CORDA, GRADIENT, Remainder, Start, check_start, start_of
from peft.tuners.lora.variants import variant_of
from peft.tuners.lora.variants.base import Variant


def empty_linear(in_features: int, out_features: int, bias: bool = False) -> nn.Linear:
    """A linear layer whose values are still open: `nn.Linear` would draw some, which takes most of its time."""
    linear = blank(nn.Linear)
    # Past `__setattr__`, for the same reason.
    linear.__dict__.update(in_features=in_features, out_features=out_features)
    linear._parameters["weight"] = nn.Parameter(torch.empty(out_features, in_features))
    linear._parameters["bias"] = nn.Parameter(torch.empty(out_features)) if bias else None
    return linear


#: what other packages ask every layer for, though only some kinds have it
_CONTAINERS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
#: for adapters without dropout; it has no state
_NO_DROPOUT = nn.Identity()


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

    adapter_layer_names: tuple[str, ...] = ("lora_A", "lora_B")
    other_param_names = (
        "r", "lora_alpha", "scaling", "lora_dropout", "use_rslora", "use_dora", "lora_bias", "lora_variant",
        "lora_start",
    )  # fmt: skip
    label = "lora"
    kinds = AdapterLayer.kinds | {ParallelLinearOp.kind}
    #: whether there is a forward that does not compute the changed weight
    is_cheap: ClassVar[bool] = False

    lora_A: Any  # nn.ModuleDict of nn.Linear (or of what stands for one)
    lora_B: Any
    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    use_rslora: dict[str, bool]
    lora_bias: dict[str, bool]
    lora_variant: dict[str, Variant]
    lora_start: dict[str, Start]

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
        del self.__dict__["lora_dropout"]  # it would hide the modules, which train() and eval() switch
        self._modules["lora_dropout"] = blank(nn.ModuleDict)
        absent: dict[str, Any] = {name: {} for name in _CONTAINERS if name not in self.adapter_layer_names}
        self.__dict__.update(absent, fan_in_fan_out=self.op.kind == "Conv1D")
        if adapter_name is not None:
            if config is None:
                raise TypeError(f"{type(self).__name__} needs a config to make adapter {adapter_name!r}.")
            self.update_layer(adapter_name, r, lora_alpha, config)
            self.set_adapter(adapter_name, inference_mode=config.inference_mode)

    def container(self, slot: str) -> nn.Module:
        return blank(nn.ModuleDict)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any) -> None:
        """Makes an adapter, or makes it anew."""
        self.add_adapter(adapter_name, config, r=r, lora_alpha=lora_alpha, key=kwargs.get("target_name", ""))
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
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else _NO_DROPOUT
        modules: Any = self._modules
        modules["lora_dropout"]._modules[name] = dropout
        variant = variant_of(config, key)
        if variant is None or not variant.applies(self):
            self.make_factors(name, r, config)
            self._start(name, config)
            return
        self.lora_variant[name] = variant
        for slot, container in variant.slots.items():
            if slot not in self.adapter_layer_names:
                self.adapter_layer_names = (*self.adapter_layer_names, slot)
                self.__dict__.pop(slot, None)
                setattr(self, slot, container())
        variant.make_factors(self, name, r, config)
        self._start(name, config)
        self._leave(name, variant.create(self, name, config))

    def _start(self, name: str, config: LoraConfig) -> None:
        """Gives A and B their start values, those of the method that the configuration names."""
        start = start_of(config.init_lora_weights)
        # Starts fill both; they find the generator as it is after both were drawn, so that a seed means one adapter.
        self.reset_lora_parameters(name, config.init_lora_weights if start is None else False)
        if start is None:
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
        """Makes A and B, their values still open."""
        modules: Any = self._modules
        modules["lora_A"]._modules[name] = empty_linear(self.in_features, r)
        modules["lora_B"]._modules[name] = empty_linear(r, self.out_features, bias=config.lora_bias)

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str = True) -> None:
        """Gives an adapter its start values."""
        a, b = self.factors(adapter_name)
        if a.is_meta:
            return
        draw_factors_(a.data, b.data, self.r[adapter_name], init_lora_weights)
        if self.lora_bias[adapter_name]:
            bias = self.lora_B[adapter_name].bias
            nn.init.zeros_(bias) if init_lora_weights is not False else nn.init.normal_(bias, std=0.02)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A and B as they are stored."""
        modules: Any = self._modules  # past `__getattr__`, which takes longer than the rest
        return _weight(modules["lora_A"]._modules[name]), _weight(modules["lora_B"]._modules[name])

    def live_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A and B as they are multiplied."""
        variant = self.lora_variant.get(name)
        return self.factors(name) if variant is None else variant.factors(self, name)

    def flat_factors(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """A and B as matrices [r, in] and [out, r]."""
        return a, b

    def product(self, name: str) -> Tensor:
        """scaling B A, as a change of the matrix: [out, in]."""
        a, b = self.live_factors(name)
        return self.scaling[name] * (b @ a)

    def add_product(self, name: str, x: Tensor, result: Tensor, p: float | None = None) -> Tensor:
        """`result` plus the product of the factors with x; `p` is the probability of dropout, if not the adapter's."""
        raise NotImplementedError

    def adapt_product(self, name: str, below: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The output of `below` plus that product."""
        return self.add_product(name, x, below(x, *args, **kwargs))

    def delta(self, name: str) -> Tensor:
        variant = self.lora_variant.get(name)
        return self.product(name) if variant is None else variant.delta(self, name)

    def transform(self, name: str, weight: Tensor) -> Tensor:
        variant = self.lora_variant.get(name)
        return super().transform(name, weight) if variant is None else variant.transform(self, name, weight)

    def cheap(self, name: str) -> bool:
        variant = self.lora_variant.get(name)
        return self.is_cheap if variant is None else variant.cheap(self, name)

    def add(self, name: str, x: Tensor, result: Tensor) -> Tensor:
        variant = self.lora_variant.get(name)
        return self.add_product(name, x, result) if variant is None else variant.add(self, name, x, result)

    def adapt(self, name: str, below: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        variant = self.lora_variant.get(name)
        if variant is None:
            return self.adapt_product(name, below, x, *args, **kwargs)
        return variant.adapt(self, name, below, x, *args, **kwargs)

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
        self.__dict__.pop("_stack", None)
        for variant in self.lora_variant.values():
            variant.forget()
        return super().train(mode)

    def dropout_of(self, name: str) -> float:
        """Probability of dropout on the adapter's input at present."""
        dropout = self.lora_dropout[name]
        return dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0

    def key_map(self, name: str) -> dict[str, str]:
        if not self.has(name):
            return {}
        slots = [slot for slot in self.adapter_layer_names if name in getattr(self, slot)]
        tied = [slot for slot in slots if isinstance(getattr(self, slot)[name], TiedFactor)]
        keys = {**super().key_map(name), **{f"{slot}.weight": f"{slot}.{name}.weight" for slot in tied}}
        return keys if name not in self.lora_variant else self.lora_variant[name].key_map(name, keys)

    def transform_bias(self, name: str, bias: Tensor | None) -> Tensor | None:
        if not self.lora_bias[name]:
            return bias
        change = self.scaling[name] * self.lora_B[name].bias
        return change if bias is None else bias + change

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
        for name in self._live:
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the scale of the active adapters; without `scale`, sets it to what the configuration says."""
        for name in self._live:
            self._set_scaling(name, self._initial_scaling(name) if scale is None else self.scaling[name] / scale)

    def _set_scaling(self, name: str, value: float) -> None:
        scaling: dict[str, Any] = self.scaling
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
    for setting in ("lora_dropout", "fan_in_fan_out", "lora_bias"):
        if getattr(config, setting):
            raise ValueError(f"{setting}={getattr(config, setting)} is not supported for target_parameters ({name!r}).")


def rank_of(config: LoraConfig, key: str) -> int:
    """The rank of the adapter on one module."""
    return config.rank_pattern.get(get_pattern_key(config.rank_pattern, key), config.r)


def alpha_of(config: LoraConfig, key: str) -> float:
    """Its lora_alpha."""
    return config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, key), config.lora_alpha)


class _Shortest:
    """A layer's output for a few tokens without gradients, by the shortest way there is.

    One token leaves little time: to look a module up as an attribute takes as long as a small product. So what does not
    change unless the layer's state does is looked up in the first call after that changed.
    """

    def __init__(self, name: str):
        self.name = name
        self.modules: Any = None

    def look_up(self, layer: Linear) -> None:
        name = self.name
        self.numel = layer.r[name] * layer.in_features  # from here on, x is more than A
        self.modules = layer.base_layer, layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        self.hooks = [hooks for module in self.modules for hooks in hooks_of(module)]
        self.serves = all(type(module) is nn.Linear for module in self.modules[:3])

    def __call__(self, layer: Linear, x: Tensor) -> Tensor | None:
        """The output, or None where this way does not serve."""
        if self.modules is None:
            if torch.compiler.is_compiling():  # what is noted in the first call would make the second compile anew
                return None
            self.look_up(layer)
        base, a, b, dropout = self.modules
        modules: Any = layer._modules
        if (
            not self.serves or any(self.hooks) or x.numel() >= self.numel
            or modules["base_layer"] is not base or "forward" in base.__dict__
            or modules["lora_A"]._modules[self.name] is not a or "forward" in a.__dict__
            or modules["lora_B"]._modules[self.name] is not b or "forward" in b.__dict__
            or modules["lora_dropout"]._modules[self.name] is not dropout
            or (dropout is not _NO_DROPOUT and dropout.training)
            or torch.is_autocast_enabled(x.device.type)
        ):  # fmt: skip
            return None
        base, a, b = base._parameters, a._parameters, b._parameters
        if b["bias"] is not None:
            return None
        return lora_linear_few(x, base["weight"], base["bias"], a["weight"], b["weight"], layer.scaling[self.name])


class Linear(LoraLayer):
    """LoRA on linear layers, with their weight as [out, in] or transposed."""

    is_cheap = True
    #: how to run for a few tokens, where a single adapter that is no variant is in effect
    _shortest: _Shortest | None = None

    def _refresh(self) -> None:
        super()._refresh()
        live = self._live
        plain = type(self) is Linear and len(live) == 1 and live[0] not in self.lora_variant
        self.__dict__["_shortest"] = _Shortest(live[0]) if plain and not self._disable_adapters else None
        self.__dict__.pop("_stack", None)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        shortest = self._shortest
        if shortest is None or self._route is not None or args or kwargs or torch.is_grad_enabled():
            return super().forward(x, *args, **kwargs)
        result = shortest(self, x)
        return super().forward(x) if result is None else result

    def product(self, name: str) -> Tensor:
        change = super().product(name)
        # huggingface/peft applies the change of attention's output projection twice, once of them out of sight of the
        # gradient; adapters trained with it rely on that.
        return change + change.detach() if self.is_read else change

    def merged_tensors(self, names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        plain = len(names) == 1 and names[0] not in self.lora_variant and not self.is_read
        if not plain or isinstance(self.scaling[names[0]], Tensor):
            return super().merged_tensors(names)
        native, (a, b) = self.get_base_weight(), self.factors(names[0])
        weight = add_low_rank(self.op.matrix(native), a, b, self.scaling[names[0]])
        bias = self.transform_bias(names[0], self.get_base_bias())
        return self.op.unmatrix(weight, native), bias if bias is None else bias.to(native.dtype)

    def add_product(self, name: str, x: Tensor, result: Tensor, p: float | None = None) -> Tensor:
        a, b = self.lora_A[name], self.lora_B[name]
        p = self.dropout_of(name) if p is None else p
        # A and B, which are small, come to the dtype of the activations rather than these to theirs.
        dtype = compute_dtype(x)
        x, result = x.to(dtype), result.to(dtype)
        if name in self.lora_variant or (is_plain(a) and is_plain(b) and b.bias is None):
            low, high = self.live_factors(name)
            result = lora_linear(
                x, None, None, result, low, high, self.scaling[name], p,
                overwrite=result.is_contiguous() and not is_watched(self.base_layer),
            )  # fmt: skip
            return result if b.bias is None else result + (b.bias * self.scaling[name]).to(dtype)
        return result + b(a(F.dropout(x.to(a.weight.dtype), p))).to(dtype) * self.scaling[name]

    def adapt_product(self, name: str, below: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        a, b = self.lora_A[name], self.lora_B[name]
        frozen = frozen_linear(self, below, x)
        if frozen is None or not is_plain(a) or not is_plain(b) or b.bias is not None:
            return self.add_product(name, x, below(x, *args, **kwargs))
        low, high = self.live_factors(name)
        dtype, p = compute_dtype(x), self.dropout_of(name)
        return lora_linear(x.to(dtype), *frozen, None, low, high, self.scaling[name], p)

    def add_routed(self, route: Route, groups: Sequence[tuple[str, Tensor]], x: Tensor, result: Tensor) -> Tensor:
        added = mixed.add_routed(self, route, [name for name, _ in groups], x, result)
        return super().add_routed(route, groups, x, result) if added is None else added


def draw_factors_(a: Tensor, b: Tensor, r: int, init_lora_weights: bool | str) -> None:
    """Gives A and B of rank `r` random start values."""
    if init_lora_weights == "gaussian":
        a.normal_(std=1 / r)
    else:
        _kaiming_uniform_(a)
    if init_lora_weights is False:
        _kaiming_uniform_(b)
    else:
        b.zero_()


def _weight(factor: Any) -> Tensor:
    weight = factor._parameters.get("weight")
    return factor.weight if weight is None else weight


def _kaiming_uniform_(factor: Tensor) -> None:
    """What `nn.init.kaiming_uniform_` with a slope of sqrt(5) comes to: the start of every linear layer in torch."""
    bound = 1 / math.sqrt(factor.shape[1:].numel())
    factor.uniform_(-bound, bound)


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


class Embedding(LoraLayer):
    """LoRA on embeddings: the change of the row of token t is scaling B A[:, t]."""

    adapter_layer_names: tuple[str, ...] = ("lora_embedding_A", "lora_embedding_B")
    is_cheap = True
    lora_embedding_A: nn.ParameterDict
    lora_embedding_B: nn.ParameterDict

    def container(self, slot: str) -> nn.Module:
        return nn.ParameterDict()

    def make_factors(self, name: str, r: int, config: LoraConfig) -> None:
        self.lora_embedding_A[name] = nn.Parameter(torch.empty(r, self.in_features))
        self.lora_embedding_B[name] = nn.Parameter(torch.empty(self.out_features, r))

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str = True) -> None:
        a, b = self.factors(adapter_name)
        nn.init.normal_(b)
        nn.init.normal_(a) if init_lora_weights is False else nn.init.zeros_(a)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        return self.lora_embedding_A[name], self.lora_embedding_B[name]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(x, *args, **kwargs)

    def add_product(self, name: str, x: Tensor, result: Tensor, p: float | None = None) -> Tensor:
        a, b = (factor.to(result.dtype) for factor in self.factors(name))
        base = self.get_base_layer()
        low = F.embedding(x, a.T, padding_idx=base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)
        change = F.linear(low, b) * self.scaling[name]
        # Some models (Gemma) multiply the embedding in its own forward.
        scale = getattr(base, "embed_scale", None)
        return result + (change if scale is None else change * torch.as_tensor(scale).to(change))


class _ConvNd(LoraLayer):
    """LoRA on convolutions: A is the same convolution with r outputs, B a 1x1 convolution in as many groups."""

    conv: ClassVar[type[nn.Module]]
    is_cheap = True

    def make_factors(self, name: str, r: int, config: LoraConfig) -> None:
        base = self.get_base_layer()
        # skip_init passes no string for padding_mode on to some versions' meta device, so it is set after.
        shape = dict(kernel_size=base.kernel_size, stride=base.stride, padding=base.padding, dilation=base.dilation)
        self.lora_A[name] = self.conv(base.in_channels, r, **shape, padding_mode=base.padding_mode, bias=False)
        self.lora_B[name] = self.conv(r, base.out_channels, 1, groups=base.groups, bias=config.lora_bias)

    def live_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A and B as they are multiplied."""
        variant = self.lora_variant.get(name)
        return self.factors(name) if variant is None else variant.factors(self, name)

    def flat_factors(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a.flatten(1), b.flatten(1)

    def product(self, name: str) -> Tensor:
        a, b = self.flat_factors(*self.factors(name))
        return self.scaling[name] * (b @ a)

    def check_merge(self, name: str) -> None:
        super().check_merge(name)
        if self.get_base_layer().groups > 1:
            raise NotImplementedError(
                "LoRA on a convolution with groups cannot be merged: its A sees the channels of all groups,"
                " and the base"
                " weight has no room for such a change."
            )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(x, *args, **kwargs)

    def add_product(self, name: str, x: Tensor, result: Tensor, p: float | None = None) -> Tensor:
        a, b = self.lora_A[name], self.lora_B[name]
        bias = b.bias if b.bias is None else b.bias.to(x.dtype)
        low = a._conv_forward(F.dropout(x, self.dropout_of(name) if p is None else p), a.weight.to(x.dtype), None)
        return result + b._conv_forward(low, b.weight.to(x.dtype), bias) * self.scaling[name]


class Conv1d(_ConvNd):
    """LoRA on `nn.Conv1d`."""

    conv = nn.Conv1d


class Conv2d(_ConvNd):
    """LoRA on `nn.Conv2d`."""

    conv = nn.Conv2d


class Conv3d(_ConvNd):
    """LoRA on `nn.Conv3d`."""

    conv = nn.Conv3d


class MultiheadAttention(LoraLayer):
    """LoRA on the fused input projection of `nn.MultiheadAttention`; its output projection has a layer of its own."""


class ParamWrapper(LoraLayer):
    """LoRA on one parameter of a module, a matrix or a stack of matrices (fused mixtures of experts).

    For a stack of E matrices [out, in], A is [r E, in], expert by expert, and B [out, r E], rank by rank.
    """

    op: ParameterOp

    def make_factors(self, name: str, r: int, config: LoraConfig) -> None:
        experts = self.op.num_experts
        self.lora_A[name] = empty_linear(self.in_features, r * experts)
        self.lora_B[name] = empty_linear(r * experts, self.op.expert_out_features)

    def stacks(self, name: str) -> tuple[Tensor, Tensor]:
        """A and B by expert: [experts, r, in] and [experts, out, r]."""
        a, b = self.factors(name)
        experts, r = self.op.num_experts, self.r[name]
        return a.view(experts, r, -1), b.view(b.shape[0], r, experts).permute(2, 0, 1)

    def product(self, name: str) -> Tensor:
        a, b = self.stacks(name)
        return (self.scaling[name] * torch.bmm(b, a)).flatten(0, 1)

    def weight_to_run(self, names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        base, stacks = self.get_base_weight(), [self.stacks(name) for name in names]
        if needs_plain(base, *(factor for pair in stacks for factor in pair)):
            return super().weight_to_run(names)
        lefts = [(b * self.scaling[name]).contiguous() for name, (_, b) in zip(names, stacks, strict=True)]
        rights = [a for a, _ in stacks]
        # Several adapters act together as one of all their ranks.
        left, right = (lefts[0], rights[0]) if len(names) == 1 else (torch.cat(lefts, dim=2), torch.cat(rights, dim=1))
        if self.op.transposed:
            left, right = right.mT, left.mT
        if base.dim() == 2:
            left, right = left[0], right[0]
        return FactoredWeight.of(base, left, right), None

    @property
    def num_experts(self) -> int:
        """How many matrices the parameter stacks."""
        return self.op.num_experts

    @property
    def out_features(self) -> int:
        return self.op.expert_out_features

    def get_param(self) -> nn.Parameter:
        """The parameter."""
        return getattr(self.get_base_layer(), self.op.weight_name)

    def __getattr__(self, name: str) -> Any:
        # Models read other attributes of the module (an expert count, say) through the wrapper.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "base_layer" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.base_layer, name)

    @property
    def type_name(self) -> str:
        return "lora.ParamWrapper"


LAYERS: dict[str, type[LoraLayer]] = {
    "Linear": Linear, "Conv1D": Linear, "Embedding": Embedding, "Conv1d": Conv1d, "Conv2d": Conv2d, "Conv3d": Conv3d,
    "MultiheadAttention": MultiheadAttention, "Parameter": ParamWrapper,
}  # fmt: skip
