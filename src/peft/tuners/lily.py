"""Low-rank interconnected adaptation across layers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Any

import torch.nn.functional as F
from torch import Tensor, nn

from peft.config import LayerConfig
from peft.core.change import Beside
from peft.core.method import Method
from peft.core.plan import Plan
from peft.core.scale import ScaledLayer
from peft.core.slots import ModuleSlot, Setting
from peft.core.storage.flat import weight_of
from peft.core.targets import matching_entry
from peft.core.tuner import BaseTuner
from peft.ops.starts import linears
from peft.registry import PeftType
from peft.values import PositiveInt, Range


@dataclass
class LilyConfig(LayerConfig, peft_type=PeftType.LILY):
    """Lily (arXiv:2407.09946): y = W x + scaling * (p_1 B_1 + ... + p_n B_n) A x, with the p of a router.

    The factors B_e [out, r] are shared by all layers that the same entry of `target_modules` means and whose weights
    have the same shape; each A [r, in] by `stride_A` neighbours of those. Every layer has a router [n, r] of its own: p
    is the softmax of the router of A x, averaged over all positions of all samples. What is in a batch, its padding
    too, has a part in what an adapter does.

    Args:
        r: rank of each factor.
        stride_A: number of neighbouring layers that share one A.
        num_B: number n of factors B; at least 2.
        scaling: factor of what is added.
        init_weights: start the B at zero, without effect; False starts them at random.
    """

    r: PositiveInt = 32
    stride_A: PositiveInt = 1
    num_B: Annotated[int, Range("must be at least 2, for the router to choose from", lambda count: count >= 2)] = 2
    scaling: float = 1.0
    init_weights: bool = True


class LilyLayer(ScaledLayer):
    """A linear layer with a router, and factors that it shares with other layers.

    `lily_A` and `lily_B` hold modules, the very same in the layers that share them, for files have them once a layer.
    """

    lily_A = ModuleSlot[nn.Linear](several=True)
    lily_B = ModuleSlot[nn.Linear](several=True)
    lily_router = ModuleSlot[nn.Linear]()
    # What is added depends on the whole batch, so only what acts on the activations can be adapted.
    kinds = frozenset(("Linear", "Conv1D"))
    cannot_merge = "A Lily adapter changes the weight differently for each batch, so it cannot be merged into it."

    #: the factors of the adapter that have been made, by slot and group; the same for all its layers
    lily_made = Setting[dict[tuple[str, str], nn.Linear]]()

    def create(self, name: str, config: LilyConfig) -> None:
        # A B_e is held as [r, out], one on top of the other.
        sizes = (self.in_features, config.r), (self.out_features, config.num_B * config.r), (config.r, config.num_B)
        a, b, self.lily_router[name] = linears(*sizes, zero=config.init_weights)
        self.lily_A[name], self.lily_B[name] = self.first("lily_A", name, a), self.first("lily_B", name, b)

    def first(self, slot: str, name: str, factor: nn.Linear) -> nn.Linear:
        """The factor of the layer's group: that of the first of its layers."""
        made, key = self.lily_made[name], (slot, self.groups[name][slot])
        if key not in made or (made[key].weight.is_meta and not factor.weight.is_meta):
            made[key] = factor
        return made[key]

    def change(self, name: str) -> Beside:
        return Beside(lambda x: self.mixture(name, x), self.cannot_merge)

    def mixture(self, name: str, x: Tensor) -> Tensor:
        """What adapter `name` adds to the output, for inputs [..., in]: [..., out]."""
        a, b, router = (weight_of(held[name]) for held in (self.lily_A, self.lily_B, self.lily_router))
        low = F.linear(x.to(a.dtype), a)
        shares = F.linear(low, router).softmax(-1).flatten(0, -2)
        shares = shares.sum(0) * (self.scaling[name] / max(len(shares), 1))
        mixed = (shares.to(b.dtype) @ b.view(len(shares), -1)).view(len(a), -1)
        return low @ mixed.to(low.dtype)


class LilyMethod(Method):
    """Which layers share what."""

    def plan_settings(self, plan: Plan, config: LilyConfig) -> dict[str, dict[str, Any]]:
        made: dict[tuple[str, str], nn.Linear] = {}
        before: Counter[str] = Counter()
        settings = {}
        for layer in plan.layers:
            entry = matching_entry(config.target_modules, layer.name) or layer.name
            alike = f"{entry} {layer.op.out_features}x{layer.op.in_features}"
            groups = {"lily_A": f"{alike} {before[alike] // config.stride_A}", "lily_B": alike}
            before[alike] += 1
            settings[layer.name] = {"groups": groups, "lily_made": made}
        return settings


class LilyModel(BaseTuner, layer=LilyLayer, method=LilyMethod, prefix="lily_"):
    """A model with Lily adapters."""
