"""Variants of LoRA: each a small object that plugs into the LoRA layer. They know the layer by its methods alone."""

from __future__ import annotations

from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.variants.alora import Alora
from peft.tuners.lora.variants.arrow import Arrow
from peft.tuners.lora.variants.base import Variant
from peft.tuners.lora.variants.bdlora import BdLora
from peft.tuners.lora.variants.dora import Dora
from peft.tuners.lora.variants.kasa import Kasa
from peft.tuners.lora.variants.monteclora import Monteclora
from peft.tuners.lora.variants.qalora import Qalora
from peft.tuners.lora.variants.velora import Velora

#: the field of the configuration that asks for a variant -> the variant
VARIANTS: dict[str, type[Variant]] = {
    "use_dora": Dora,
    "use_qalora": Qalora,
    "use_bdlora": BdLora,
    "alora_invocation_tokens": Alora,
    "arrow_config": Arrow,
    "velora_config": Velora,
    "monteclora_config": Monteclora,
    "kasa_config": Kasa,
}


def variant_of(config: LoraConfig, key: str = "") -> Variant | None:
    """The variant that a configuration asks for on the module `key`.

    Raises:
        ValueError: it asks for several.
    """
    asked = [field for field in VARIANTS if getattr(config, field)]
    if len(asked) > 1:
        raise ValueError(f"{' and '.join(asked)} cannot be combined: an adapter has one variant of LoRA at most.")
    return VARIANTS[asked[0]](getattr(config, asked[0]), key) if asked else None
