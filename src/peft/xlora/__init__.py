"""X-LoRA: a mixture of saved LoRA adapters, weighed anew for each token (arXiv:2402.07148)."""

from peft.xlora.config import XLoraConfig
from peft.xlora.gate import XLoraClassifier
from peft.xlora.layer import XLoraEmbeddingLayer, XLoraLayer, XLoraLinearLayer
from peft.xlora.model import XLoraModel

__all__ = [
    "XLoraClassifier", "XLoraConfig", "XLoraEmbeddingLayer", "XLoraLayer", "XLoraLinearLayer", "XLoraModel",
]  # fmt: skip
