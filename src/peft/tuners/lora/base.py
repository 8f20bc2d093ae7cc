"""The two factors that an adapter has on a LoRA layer: what variants and starts work with."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.core.change import LowRank
from peft.core.run import is_watched
from peft.core.scale import ScaledLayer
from peft.core.slots import ModuleSlot, Setting
from peft.core.storage.base import widened
from peft.core.storage.flat import weight_of
from peft.core.wrappers import unwrapped
from peft.tuners.lora.config import LoraConfig

#: what is left of a base weight [out, in] when an adapter has started
Residual = Callable[[Tensor], Tensor]


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


def _is_plain(module: Any) -> bool:
    """Whether a factor is the linear layer that it seems, with nobody watching."""
    module = module if type(module) is nn.Linear else unwrapped(module)
    return type(module) is nn.Linear and not is_watched(module) and "forward" not in module.__dict__


def _call(factor: Any, cast: bool, x: Tensor) -> Tensor:
    """A factor's own forward pass, in the dtype of its weight if `cast`."""
    return factor(x.to(factor.weight.dtype) if cast else x)


class DropoutLayer(ScaledLayer):
    """A module with adapters whose dropout is a module of torch's, where other packages look for it."""

    lora_dropout = ModuleSlot[nn.Module](trained=False, stored=False)
    lora_alpha = Setting[float]()

    def make_dropout(self, name: str, config: LoraConfig) -> None:
        """Makes the dropout of an adapter."""
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        # Past `ModuleDict.__setitem__`, here and below: the name was checked before.
        self._modules["lora_dropout"]._modules[name] = dropout  # type: ignore[union-attr]

    def dropout_of(self, name: str) -> float:
        """Probability of dropout on the adapter's input at present."""
        dropout: Any = self._modules["lora_dropout"]._modules[name]  # type: ignore[union-attr]
        return dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0


class FactorLayer(DropoutLayer):
    """A module with two factors by adapter, A [r, in] and B [out, r], whose scaled product is added to its weight."""

    lora_A: Any = ModuleSlot[Any]()  # nn.ModuleDict of nn.Linear (or of what stands for one)
    lora_B: Any = ModuleSlot[Any]()
    unit_slots = frozenset(("lora_A", "lora_B", "lora_magnitude_vector"))

    use_rslora = Setting[bool]()
    use_dora = Setting[bool]()
    lora_bias = Setting[bool]()
    lora_residual = Setting[Residual]()  # until the adapter is complete

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # the slots of variants

    def initial_scaling(self, name: str) -> float:
        r = self.r[name]
        return self.lora_alpha[name] / (math.sqrt(r) if self.use_rslora[name] else r)

    def start_weight(self, name: str) -> Tensor:
        """The base weight [out, in] as it will be when adapter `name` is there."""
        weight = self.op.matrix(self.get_base_weight())
        return self.lora_residual[name](weight) if name in self.lora_residual else weight

    def make_factors(self, name: str, r: int, config: LoraConfig) -> None:
        """Makes A and B as layers of torch start: so an adapter starts without `init_lora_weights`."""
        modules: Any = self._modules
        modules["lora_A"]._modules[name] = nn.Linear(self.in_features, r, bias=False)
        modules["lora_B"]._modules[name] = nn.Linear(r, self.out_features, bias=config.lora_bias)

    @torch.no_grad()
    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str = True) -> None:
        """Gives an adapter its start values: A at random, B zero; with False it keeps those it was made with."""
        a, b = self.factors(adapter_name)
        if a.is_meta or init_lora_weights is False:
            return
        draw_(a, self.r[adapter_name], init_lora_weights)
        b.zero_()
        if self.lora_bias[adapter_name]:
            self.lora_B[adapter_name].bias.zero_()

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A and B as they are stored."""
        modules: Any = self._modules  # past `__getattr__`, which takes longer than the rest
        return _weight(modules["lora_A"]._modules[name]), _weight(modules["lora_B"]._modules[name])

    def low_rank(self, name: str) -> LowRank:
        """scaling B A, and the bias that belongs to it."""
        modules: Any = self._modules
        a, b = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
        scaling = self.settings["scaling"][name]
        bias = b._parameters.get("bias")
        offset = None if bias is None else bias * scaling
        down, up = widened(_weight(a)), widened(_weight(b))
        if down.dim() > 2:  # those of a convolution
            down, up = down.flatten(1), up.flatten(1)
        change = LowRank(down, up, scaling, self.dropout_of(name), offset)
        # Somebody wants to see them called; FSDP has done so to bring their weights together.
        if self.op.linear and not (_is_plain(a) and _is_plain(b)):
            cast = self.cast_input_dtype_enabled
            change.low, change.high = partial(_call, a, cast), partial(_call, b, cast)
        return change


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
