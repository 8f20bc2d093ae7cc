"""Probabilistic vector-based random matrix adaptation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.config import LayoutConfig
from peft.core.call import calling, fact
from peft.core.change import LowRank
from peft.core.layer import AdapterLayer
from peft.core.method import Method
from peft.core.plan import Plan
from peft.core.slots import Dropout, FixedSlot, Setting, Slot
from peft.core.tuner import BaseTuner
from peft.ops.internals import backward_pass
from peft.ops.lora import compute_dtype, needs_plain
from peft.ops.random_bases import draw_projections
from peft.registry import PeftType
from peft.values import Fraction, PositiveInt


@dataclass
class PveraConfig(LayoutConfig, peft_type=PeftType.PVERA):
    """Probabilistic VeRA (arXiv:2512.07703): y = W x + b * (B z), for z drawn from a normal distribution.

    Its means and the logarithms of its variances are the two halves of d * (A x). A [2 r, in] and B [out, r] are
    random, frozen and shared by all layers, cut to the size that each needs; the vectors d [2 r] and b [out] are
    trained. In evaluation z is the mean, and so it is in a merged weight.

    Args:
        r: rank of the shared projections.
        projection_prng_key: seed of the projections.
        save_projection: store them in the checkpoint; without, they are made again from the seed.
        pvera_dropout: probability of dropout on the adapter's input.
        d_initial: start value of d.
        init_weights: start b at zero, without effect; False starts it at one, and d at random.
        sample_at_inference: draw z in evaluation too.
        generator_seed: seed of what each layer draws; None draws from torch's own generator.
    """

    r: PositiveInt = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    pvera_dropout: Fraction = 0.0
    d_initial: float = 0.1
    init_weights: bool = True
    sample_at_inference: bool = False
    generator_seed: int | None = None


class PveraLayer(AdapterLayer):
    """A linear module with vectors that scale the shared projections. Each vector of its input has a z of its own."""

    pvera_lambda_b = Slot()
    pvera_lambda_d = Slot()
    pvera_A = FixedSlot(shared=True, stored="save_projection")
    pvera_B = FixedSlot(shared=True, stored="save_projection")
    kinds = frozenset(("Linear", "Conv1D"))

    pvera_dropout = Dropout()
    sample_at_inference = Setting[bool]()
    generator_seed = Setting[int | None]()
    pvera_generator = Setting[torch.Generator]()

    def create(self, name: str, config: PveraConfig) -> None:
        if config.init_weights:
            d, b = torch.full((2 * config.r,), float(config.d_initial)), torch.zeros(self.out_features)
        else:
            d, b = torch.randn(2 * config.r), torch.ones(self.out_features)
        self.pvera_lambda_d[name], self.pvera_lambda_b[name] = nn.Parameter(d), nn.Parameter(b)

    def change(self, name: str) -> LowRank:
        b, d, r = self.pvera_lambda_b[name], self.pvera_lambda_d[name], self.r[name]
        a = self.pvera_A[name][:, : self.in_features].to(d)
        up = self.pvera_B[name][: self.out_features].to(b)
        mean = LowRank(a[:r], up, dropout=self.dropout_of(name), middle=d[:r], factors=b)
        if not (self.training or self.sample_at_inference[name]):
            return mean
        return replace(mean, down=a[:r] * d[:r, None], middle=None, low=lambda x: self.sample(name, x, a, d))

    def sample(self, name: str, x: Tensor, a: Tensor, d: Tensor) -> Tensor:
        """z for each vector of x [..., in]: [..., r]."""
        mean, log_variance = (self.product(name, x, a) * d.to(x.dtype)).chunk(2, dim=-1)
        noise = torch.randn(mean.shape, generator=self.noise(name, x), dtype=mean.dtype, device=mean.device)
        return mean + noise * torch.exp(0.5 * log_variance)

    def product(self, name: str, x: Tensor, a: Tensor) -> Tensor:
        """A x: once for layers that get the same input one after the other, as the projections of attention do."""
        last = None if needs_plain(x) or x.is_inference() else fact("pvera_last")
        if last is None:
            return F.linear(x, a.to(x.dtype))
        # Checkpointing runs a block once more in the backward pass, and wants it to compute all that it did before.
        key = name, x._version, compute_dtype(x), torch.is_grad_enabled(), backward_pass()
        if last.get("input") is not x or last["key"] != key:
            last.update(input=x, key=key, product=F.linear(x, a.to(x.dtype)))
        return last["product"]

    def noise(self, name: str, x: Tensor) -> torch.Generator | None:
        """The generator that adapter `name` draws from here; None for torch's own."""
        seed, generator = self.generator_seed[name], self.pvera_generator.get(name)
        if seed is not None and (generator is None or generator.device != x.device):
            generator = self.pvera_generator[name] = torch.Generator(x.device).manual_seed(seed)
        return generator


class PveraMethod(Method):
    """What PVeRA shares: the projections, as large as the largest of its layers."""

    common_fields = ("projection_prng_key", "save_projection")

    def around_forward(self, args: Sequence[Any], kwargs: dict[str, Any]) -> AbstractContextManager[Any]:
        return calling(pvera_last={})

    def share(self, plan: Plan, config: PveraConfig, adapter_name: str) -> dict[str, Tensor]:
        rows, columns = plan.largest
        a, b = draw_projections((2 * config.r, columns), (rows, config.r), seed=config.projection_prng_key)
        return {"pvera_A": a, "pvera_B": b}


class PveraModel(BaseTuner, layer=PveraLayer, method=PveraMethod, prefix="pvera_lambda_"):
    """A model with PVeRA adapters; `pvera_A` and `pvera_B` hold the projections that an adapter's layers share."""
