"""KaSA: the least singular parts of the weight given up for ones that are trained."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from peft.core.base_op import BaseOp
from peft.core.change import LowRank
from peft.core.slots import Slot
from peft.tuners.lora.base import FactorLayer
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.starts import base_matrix
from peft.tuners.lora.variants.base import Variant


class Kasa(Variant):
    """W' = W_0 + s B diag(d) A, with W_0 the weight without its r smallest singular values (arXiv:2412.06071).

    The base weight becomes W_0 when the adapter is added. d [r] starts at random, B at zero.
    """

    label = "KaSA (kasa_config)"
    slots: ClassVar[dict[str, Slot]] = {"lora_diag": Slot()}
    changes_base = True

    @classmethod
    def check(cls, config: LoraConfig, name: str, module: nn.Module, op: BaseOp, r: int) -> None:
        if r >= min(op.out_features, op.in_features):
            shape = f"[{op.out_features}, {op.in_features}]"
            raise ValueError(f"KaSA needs r below the sides of {name!r} {shape}, to leave some of it; got r={r}.")

    def create(self, layer: FactorLayer, name: str, config: LoraConfig) -> None:
        a, _ = layer.factors(name)
        layer.lora_diag[name] = nn.Parameter(torch.randn(layer.r[name], device=a.device, dtype=a.dtype))
        if not a.is_meta:
            u, s, vh = torch.linalg.svd(base_matrix(layer, config), full_matrices=False)
            least = slice(-layer.r[name], None)
            u, vh = u[:, least] * s[least], vh[least]
            layer.lora_residual[name] = lambda weight: (weight - (u @ vh).to(weight.device)).to(weight.dtype)

    def change(self, layer: FactorLayer, name: str) -> LowRank:
        change = layer.low_rank(name)
        return replace(change, up=change.up * layer.lora_diag[name], low=None, high=None)

    def penalty(self, layer: FactorLayer, name: str) -> Tensor:
        """beta ||d||^2 + gamma (||B^T B - I|| + ||A A^T - I||), a number, in float32."""
        a, b = (factor.float() for factor in layer.factors(name))
        one = torch.eye(layer.r[name], device=a.device)
        orthogonality = torch.linalg.norm(b.T @ b - one) + torch.linalg.norm(a @ a.T - one)
        return self.setting.beta * layer.lora_diag[name].float().square().sum() + self.setting.gamma * orthogonality
