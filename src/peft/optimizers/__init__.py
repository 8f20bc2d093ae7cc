"""Optimizers made for LoRA: other learning rates, or gradients multiplied by what the other factor says.

This room knows the adapter layers of `core` and torch's optimizers; it knows no method and no model class.
"""

from peft.optimizers.lorafa import LoraFAOptimizer, create_lorafa_optimizer
from peft.optimizers.loraplus import create_loraplus_optimizer
from peft.optimizers.riemannian import create_riemannian_optimizer

__all__ = [
    "LoraFAOptimizer", "create_lorafa_optimizer", "create_loraplus_optimizer", "create_riemannian_optimizer",
]  # fmt: skip
