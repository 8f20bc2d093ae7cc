"""Low-rank adaptation of all layers by one vector."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peft.config import LayoutConfig
from peft.core.change import LowRank
from peft.core.layer import AdapterLayer
from peft.core.method import Method
from peft.core.plan import Plan
from peft.core.slots import Dropout, FixedSlot, Setting, Slot
from peft.core.tuner import BaseTuner
from peft.registry import PeftType
from peft.values import Fraction, NonNegativeInt, PositiveFloat, PositiveInt


@dataclass
class UniLoraConfig(LayoutConfig, peft_type=PeftType.UNILORA):
    """Uni-LoRA (arXiv:2506.00799): W' = W + B A, with all entries of A [r, in] and B [out, r] taken from one vector.

    The vector theta [theta_d_length] is trained, and shared by all layers. Which of its entries an entry of A or B is,
    is random and fixed; it is divided by the root of how many are the same one, so that theta is mapped to all A and B
    by a projection that keeps norms.

    Args:
        r: rank of the change.
        proj_seed: seed of the choice of entries.
        theta_d_length: length of the vector.
        unilora_dropout: probability of dropout on the adapter's input.
        init_theta_d_bound: the vector starts uniformly in [-bound, bound].
        init_weights: start like that; False starts it with standard deviation 1.
        save_indices: store the choice of entries and their scales in the checkpoint; without, they are made again from
            the seed.
    """

    r: PositiveInt = 4
    proj_seed: NonNegativeInt = 42
    theta_d_length: PositiveInt = 256
    unilora_dropout: Fraction = 0.0
    init_theta_d_bound: PositiveFloat = 0.02
    init_weights: bool = True
    save_indices: bool = False


class UniLoraLayer(AdapterLayer):
    """A module with factors whose entries are those of the shared vector."""

    unilora_theta_d = Slot(shared=True)
    unilora_indices_A = FixedSlot(stored="save_indices")
    unilora_indices_B = FixedSlot(stored="save_indices")
    unilora_scales_A = FixedSlot(stored="save_indices")
    unilora_scales_B = FixedSlot(stored="save_indices")

    #: where the entries of this layer begin among those of all, and how many all are
    unilora_place = Setting[tuple[int, int]]()
    unilora_dropout = Dropout()

    def draw(self, name: str, config: UniLoraConfig) -> None:
        start, count = self.unilora_place[name]
        index, scale = assign_entries(count, config.theta_d_length, config.proj_seed)
        for factor, shape in (("A", (config.r, self.in_features)), ("B", (self.out_features, config.r))):
            end = start + shape[0] * shape[1]
            for slot, values in ((f"unilora_indices_{factor}", index), (f"unilora_scales_{factor}", scale)):
                getattr(self, slot)[name] = values[start:end].view(shape).clone()
            start = end

    def change(self, name: str) -> LowRank:
        theta = self.unilora_theta_d[name]
        factors: list[Tensor] = []
        for indices, scales in (
            (self.unilora_indices_A, self.unilora_scales_A),
            (self.unilora_indices_B, self.unilora_scales_B),
        ):
            index, scale = indices[name], scales[name].to(theta.dtype)
            # The gradient of `gather` takes a fraction of the time of that of indexing.
            factors.append(theta.gather(0, index.flatten()).view(index.shape) * scale)
        down, up = factors
        return LowRank(down, up, dropout=self.dropout_of(name))


@lru_cache(maxsize=1)  # the layers of an adapter ask for the same one after the other
@torch.inference_mode(False)  # what is kept may be needed where gradients are wanted
def assign_entries(count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Which entry of a vector each of many values takes, each entry as often as any other, in random order.

    Args:
        count: number of values.
        length: of the vector. Where it is longer than there are values, some entries are not taken.
        seed: of the order.

    Returns:
        Indices [count], and their scales [count]: 1 over the root of how often the index is taken, so that the values
        are a projection of the vector that keeps its norm.
    """
    rng = np.random.default_rng(seed)
    index = np.arange(length).repeat(count // length)
    index = np.concatenate((index, rng.choice(length, count % length, replace=False)))
    rng.shuffle(index)
    times = np.bincount(index, minlength=length)
    return torch.from_numpy(index), torch.from_numpy((1 / np.sqrt(times[index])).astype(np.float32))


class UniLoraMethod(Method):
    """What Uni-LoRA shares: the vector, and the places in it, dealt out over all layers."""

    def plan_settings(self, plan: Plan, config: UniLoraConfig) -> dict[str, dict[str, Any]]:
        sizes = [config.r * (layer.op.in_features + layer.op.out_features) for layer in plan.layers]
        starts = accumulate(sizes, initial=0)
        return {
            layer.name: {"unilora_place": (start, sum(sizes))}
            for layer, start in zip(plan.layers, starts, strict=False)
        }

    def share(self, plan: Plan, config: UniLoraConfig, adapter_name: str) -> dict[str, Tensor]:
        theta, bound = torch.empty(config.theta_d_length), config.init_theta_d_bound
        return {"unilora_theta_d": theta.uniform_(-bound, bound) if config.init_weights else theta.normal_()}

    def added(self, adapter_name: str) -> None:
        assign_entries.cache_clear()


class UniLoraModel(BaseTuner, layer=UniLoraLayer, method=UniLoraMethod, prefix="unilora_"):
    """A model with Uni-LoRA adapters; `unilora_theta_d` holds the vectors, one for all layers of an adapter."""
