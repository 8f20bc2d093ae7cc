"""LoRA on quantised linear layers: classes by which other packages tell the kinds apart.

What they do is `Linear`; how a weight is read and written is the business of `peft.core.storage`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from peft.core.base_op import LinearOp, base_op
from peft.core.storage import storage_of
from peft.core.targets import base_of
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.kinds import Linear


class QuantisedLinear(Linear):
    """LoRA on a linear layer whose weight is packed."""

    label = "lora.{name}"


class Linear8bitLt(QuantisedLinear):
    """LoRA on bitsandbytes' `Linear8bitLt`."""


class Linear4bit(QuantisedLinear):
    """LoRA on bitsandbytes' `Linear4bit` (QLoRA, arXiv:2305.14314)."""


class TorchaoLoraLinear(QuantisedLinear):
    """LoRA on linear layers with torchao's tensors."""


class HqqLoraLinear(QuantisedLinear):
    """LoRA on `HQQLinear`."""


class GPTQLoraLinear(QuantisedLinear):
    """LoRA on GPTQModel's layers."""


class AwqLoraLinear(QuantisedLinear):
    """LoRA on those of them that hold weights as AWQ does."""


class EetqLoraLinear(QuantisedLinear):
    """LoRA on EETQ's layers."""


class AqlmLoraLinear(QuantisedLinear):
    """LoRA on AQLM's `QuantizedLinear`."""


class IncLoraLinear(QuantisedLinear):
    """LoRA on Intel Neural Compressor's layers."""


class TeLinear(QuantisedLinear):
    """LoRA on Transformer Engine's `Linear` with 8-bit weights."""


BY_BACKEND: dict[str | None, type[Linear]] = {
    None: Linear, "bnb 8bit": Linear8bitLt, "bnb 4bit": Linear4bit, "torchao": TorchaoLoraLinear, "hqq": HqqLoraLinear,
    "gptq": GPTQLoraLinear, "awq": AwqLoraLinear, "eetq": EetqLoraLinear, "aqlm": AqlmLoraLinear, "inc": IncLoraLinear,
    "te": TeLinear,
}  # fmt: skip


def linear_class(module: Any) -> type[Linear]:
    """The class of LoRA layer for a linear module, or for an adapter layer on one."""
    return BY_BACKEND[storage_of(base_of(module), "weight").backend]


def dispatch(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> Linear | None:
    """A LoRA layer with an adapter on a quantised linear layer; None for modules that are something else."""
    base = base_of(target)
    made = linear_class(base) if isinstance(base_op(base), LinearOp) else Linear
    if not issubclass(made, QuantisedLinear):
        return None
    own = config.at(kwargs.pop("target_name", ""))
    return made(target, adapter_name, config, **{"r": own.r, "lora_alpha": own.lora_alpha, **kwargs})
