"""LoRA: its configuration, its layer for each kind of module, and its model."""

from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.eva import get_eva_state_dict, initialize_lora_eva_weights
from peft.tuners.lora.kinds import (
    Conv1d,
    Conv2d,
    Conv3d,
    Embedding,
    Linear,
    MultiheadAttention,
    ParamWrapper,
)
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.model import LoraModel
from peft.tuners.lora.preprocess import preprocess_corda, preprocess_loraga
from peft.tuners.lora.quantised import Linear4bit, Linear8bitLt
from peft.tuners.lora.settings import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
)

__all__ = [
    "ArrowConfig", "BdLoraConfig", "Conv1d", "Conv2d", "Conv3d", "CordaConfig", "Embedding", "EvaConfig", "KasaConfig",
    "Linear", "Linear4bit", "Linear8bitLt", "LoftQConfig", "LoraConfig", "LoraGAConfig", "LoraLayer", "LoraModel",
    "LoraRuntimeConfig", "MontecloraConfig", "MultiheadAttention", "ParamWrapper", "VeloraConfig", "get_eva_state_dict",
    "initialize_lora_eva_weights", "preprocess_corda", "preprocess_loraga",
]  # fmt: skip
