"""Variants of LoRA: each a small object that plugs into the LoRA layer. They know the layer by its methods alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft.tuners.lora.variants.base import Variant
from peft.tuners.lora.variants.dora import Dora

if TYPE_CHECKING:
    from peft.tuners.lora.config import LoraConfig

#: the field of the configuration that asks for a variant -> the variant
VARIANTS: dict[str, type[Variant]] = {
    "use_dora": Dora,
}


def variant_of(config: LoraConfig) -> Variant | None:
    """The variant that a configuration asks for.

    Raises:
        ValueError: it asks for several.
    """
    asked = [field for field in VARIANTS if getattr(config, field)]
    if len(asked) > 1:
        raise ValueError(f"{' and '.join(asked)} cannot be combined: an adapter has one variant of LoRA at most.")
    return VARIANTS[asked[0]](getattr(config, asked[0])) if asked else None
