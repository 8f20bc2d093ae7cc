"""Modules with experts, of which each token takes its share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft.core.base_op import EmbeddingOp
from peft.core.call import fact
from peft.core.change import Beside, Change
from peft.core.routing import Route
from peft.ops.lora import compute_dtype
from peft.tuners.lora.kinds import Embedding, Linear
from peft.tuners.lora.layer import LoraLayer
from peft.xlora.gate import WEIGHTS, weights_at

NO_ROUTES = "adapter_names (a mixed batch) cannot be used with X-LoRA, which weighs all experts itself."


class XLoraLayer(LoraLayer):
    """A module with LoRA experts, of which each token takes what the mixture says."""

    # Other kinds see no tokens, or have one weight for all of them.
    kinds = frozenset(("Linear", "Conv1D", "Embedding"))
    cannot_merge = "X-LoRA weighs its experts anew for each token, so they cannot be merged."

    layer_number: int  # set by the model

    def low(self, name: str, x: Tensor) -> Tensor:
        """A x of one expert: [..., r]."""
        a, _ = self.factors(name)
        if self.op.kind == "Embedding":
            return F.embedding(x, a.T)
        return F.linear(self.lora_dropout[name](x), a.to(compute_dtype(x)))

    def changes(self, names: Sequence[str]) -> list[Change]:
        if fact(WEIGHTS) is None:
            return super().changes(names)
        return [Beside(lambda x: self.mixed(names, x), self.cannot_merge)]

    def mixed(self, names: Sequence[str], x: Tensor) -> Tensor:
        """What the experts add for each token, in its shares: [..., out]."""
        weights = weights_at(self.layer_number, x.shape if self.op.kind == "Embedding" else x.shape[:-1])
        if weights == 0:
            return torch.zeros((), device=x.device)
        dtype = compute_dtype(x) if x.is_floating_point() else self.place()[1] or torch.float32
        low, up = [], []
        for name in names:
            share = weights if isinstance(weights, float) else weights[name]
            low.append((self.low(name, x) * (share * self.scaling[name])).to(dtype))
            up.append(self.factors(name)[1].to(dtype))
        change = F.linear(torch.cat(low, -1), torch.cat(up, 1))
        return EmbeddingOp.scaled(self.get_base_layer(), change)

    def _forward_routed(self, route: Route, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(NO_ROUTES)


class XLoraLinearLayer(XLoraLayer, Linear):
    """A linear layer with experts."""


class XLoraEmbeddingLayer(XLoraLayer, Embedding):
    """An embedding with experts."""
