"""Arrow: each token goes to those of several adapters whose directions it lies along."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft.core.change import Beside
from peft.tuners.lora.base import FactorLayer
from peft.tuners.lora.variants.base import Variant

#: names of the adapters that `create_arrow_model` loads, a number behind them, and of the one that chooses
TASK_PREFIX, GENERAL_PREFIX, ROUTER = "task_", "gks_", "arrow_router"


class Experts:
    """The experts of one layer, stacked.

    Attributes:
        directions: the input direction that each changes most: [experts, in].
        a: [experts, r, in].
        b: [experts, out, r], with the scales.
    """

    def __init__(self, directions: Tensor, a: Tensor, b: Tensor):
        self.directions, self.a, self.b = directions, a, b


class Arrow(Variant):
    """y = x W^T + sum over the k nearest experts e of c_e x (s_e B_e A_e)^T (arXiv:2405.11157).

    The adapter that chooses has factors, which are not used: it works with the other adapters of the layer. An expert's
    direction is the first right singular vector of its change; c is a softmax of a token's lengths along the directions
    of the nearest k. With `use_gks`, the mean of the general adapters' factors is taken out of the experts' first
    (arXiv:2505.10939); the adapters themselves stay as they are.
    """

    label = "Arrow (arrow_config)"
    def __init__(self, setting: Any, key: str = ""):
        super().__init__(setting, key)
        self._known: tuple[Any, Experts] | None = None

    def forget(self) -> None:
        self._known = None

    def check_merge(self, layer: FactorLayer, name: str) -> None:
        raise NotImplementedError(
            f"Arrow adapter {name!r} cannot be merged: it chooses experts for each token; a weight is the same for all."
        )

    def change(self, layer: FactorLayer, name: str) -> Beside:
        return Beside(lambda x: self._mixed(layer, name, x), "each token has experts of its own")

    def _mixed(self, layer: FactorLayer, name: str, x: Tensor) -> Tensor:
        """What the experts add for each token of x."""
        experts = self._experts(layer, x.dtype)
        tokens = x.reshape(-1, x.shape[-1])
        nearness = (tokens @ experts.directions.T).abs()
        nearest = nearness.topk(min(self.setting.top_k, nearness.shape[1]), dim=1)
        shares = torch.softmax(nearest.values / self.setting.router_temperature, dim=1)
        weights = torch.zeros_like(nearness).scatter(1, nearest.indices, shares)
        count, r, _ = experts.a.shape
        low = (tokens @ experts.a.flatten(0, 1).T).view(-1, count, r) * weights[..., None]
        change = low.flatten(1) @ experts.b.transpose(1, 2).flatten(0, 1)
        return F.dropout(change, layer.dropout_of(name)).view(*x.shape[:-1], -1)

    def _experts(self, layer: FactorLayer, dtype: torch.dtype) -> Experts:
        names, general = self._names(layer)
        tensors = [factor for other in (*names, *general) for factor in layer.factors(other)]
        key = (names, dtype, [layer.scaling[other] for other in names], [(id(t), t._version) for t in tensors])
        tracked = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        if tracked or self._known is None or self._known[0] != key:
            experts = self._stacked(layer, names, general, dtype)
            if tracked:
                return experts
            self._known = key, experts
        return self._known[1]

    def _names(self, layer: FactorLayer) -> tuple[list[str], list[str]]:
        """The experts, those that came later counted in, and the general adapters."""
        general = list(self.setting.gks_adapter_names or ())
        others = [
            other
            for other in layer.adapter_names()
            if other not in general and not isinstance(layer.lora_variant.get(other), Arrow)
        ]
        return others, general if self.setting.use_gks else []

    def _stacked(self, layer: FactorLayer, names: list[str], general: list[str], dtype: torch.dtype) -> Experts:
        if not names:
            raise ValueError("Arrow has no experts to choose from: load other adapters beside it, or deactivate it.")
        a, b = (torch.stack(factors) for factors in zip(*(layer.factors(name) for name in names), strict=True))
        if general:
            mean_a, mean_b = (
                torch.stack(factors).mean(0) for factors in zip(*(layer.factors(g) for g in general), strict=True)
            )
            a, b = a - mean_a, b - mean_b
        with torch.no_grad():
            directions = torch.stack([self._direction(a_e.float(), b_e.float()) for a_e, b_e in zip(a, b, strict=True)])
        scales = torch.tensor([layer.scaling[name] for name in names], device=b.device, dtype=b.dtype)
        return Experts(directions.to(dtype), a.to(dtype), (b * scales[:, None, None]).to(dtype))

    def _direction(self, a: Tensor, b: Tensor, steps: int = 15) -> Tensor:
        """The first right singular vector of B A, by power iteration: [in]; up to its sign."""
        generator = None
        if self.setting.rng_seed is not None:
            generator = torch.Generator(a.device).manual_seed(self.setting.rng_seed)
        vector = torch.randn(a.shape[1], device=a.device, generator=generator)
        gram = b.T @ b
        for _ in range(steps):
            vector = F.normalize(a.T @ (gram @ (a @ vector)), dim=0, eps=1e-8)
        return vector
