"""Arrow: each token goes to those of several adapters whose directions it lies along."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from peft.core.change import Beside
from peft.tuners.lora.base import FactorLayer
from peft.tuners.lora.variants.base import Variant

#: names of the adapters that `create_arrow_model` loads, a number behind them, and of the one that chooses
TASK_PREFIX, GENERAL_PREFIX, ROUTER = "task_", "gks_", "arrow_router"


class Arrow(Variant):
    """y = x W^T + sum over the k nearest experts e of c_e x (s_e B_e A_e)^T (arXiv:2405.11157).

    The adapter that chooses has factors, which are not used: it works with the other adapters of the layer. An expert's
    direction is the first right singular vector of its change; c is a softmax of a token's lengths along the directions
    of the nearest k. With `use_gks`, the mean of the general adapters' factors is taken out of the experts' first
    (arXiv:2505.10939); the adapters themselves stay as they are.
    """

    label = "Arrow (arrow_config)"
    cannot_merge = (
        "Arrow adapter {name!r} cannot be merged: it chooses experts for each token; a weight is the same for all."
    )

    def change(self, layer: FactorLayer, name: str) -> Beside:
        return Beside(lambda x: self._mixed(layer, name, x), "each token has experts of its own")

    def _mixed(self, layer: FactorLayer, name: str, x: Tensor) -> Tensor:
        """What the experts add for each token of x."""
        directions, a, b = self._experts(layer, x.dtype)
        tokens = x.reshape(-1, x.shape[-1])
        nearness = (tokens @ directions.T).abs()
        nearest = nearness.topk(min(self.setting.top_k, nearness.shape[1]), dim=1)
        shares = torch.softmax(nearest.values / self.setting.router_temperature, dim=1)
        weights = torch.zeros_like(nearness).scatter(1, nearest.indices, shares)
        low = (tokens @ a.flatten(0, 1).T).view(-1, *a.shape[:2]) * weights[..., None]
        change = low.flatten(1) @ b.transpose(1, 2).flatten(0, 1)
        return F.dropout(change, layer.dropout_of(name)).view(*x.shape[:-1], -1)

    def _experts(self, layer: FactorLayer, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The experts: the input direction that each changes most [experts, in], their A [experts, r, in], and their B,
        with the scales [experts, out, r]."""
        names, general = self._names(layer)
        tensors = [factor for other in (*names, *general) for factor in layer.factors(other)]
        make = partial(self._stacked, layer, names, general, dtype)
        tracked = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        if tracked or any(tensor.is_inference() for tensor in tensors):  # which do not say whether they have changed
            return make()
        key = (names, dtype, [layer.scaling[other] for other in names], [(id(t), t._version) for t in tensors])
        return self.keep(key, make)

    def _names(self, layer: FactorLayer) -> tuple[list[str], list[str]]:
        """The experts, those that came later counted in, and the general adapters."""
        general = list(self.setting.gks_adapter_names or ())
        routers = [name for name, variant in layer.lora_variant.items() if isinstance(variant, Arrow)]
        others = [name for name in layer.adapter_names() if name not in (*general, *routers)]
        return others, general if self.setting.use_gks else []

    def _stacked(
        self, layer: FactorLayer, names: list[str], general: list[str], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not names:
            raise ValueError("Arrow has no experts to choose from: load other adapters beside it, or deactivate it.")
        a, b = map(torch.stack, zip(*map(layer.factors, names), strict=True))
        if general:
            general_a, general_b = map(torch.stack, zip(*map(layer.factors, general), strict=True))
            a, b = a - general_a.mean(0), b - general_b.mean(0)
        with torch.no_grad():
            directions = torch.stack([self._direction(a_e.float(), b_e.float()) for a_e, b_e in zip(a, b, strict=True)])
        scales = torch.tensor([layer.scaling[name] for name in names], device=b.device, dtype=b.dtype)
        return directions.to(dtype), a.to(dtype), (b * scales[:, None, None]).to(dtype)

    def _direction(self, a: Tensor, b: Tensor, steps: int = 15) -> Tensor:
        """The first right singular vector of B A: [in]; up to its sign. With a seed, nearly, by power iteration."""
        if self.setting.rng_seed is None:
            base, triangle = torch.linalg.qr(a.T)
            return base @ torch.linalg.svd(torch.linalg.qr(b).R @ triangle.T).Vh[0]
        generator = torch.Generator(a.device).manual_seed(self.setting.rng_seed)
        vector = torch.randn(a.shape[1], device=a.device, generator=generator)
        gram = b.T @ b
        for _ in range(steps):
            vector = F.normalize(a.T @ (gram @ (a @ vector)), dim=0, eps=1e-8)
        return vector
