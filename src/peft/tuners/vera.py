"""Vector-based random matrix adaptation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from peft.config import LayerConfig
from peft.core.base_op import BaseOp, base_op
from peft.core.change import LowRank
from peft.core.layer import AdapterLayer
from peft.core.plan import Plan
from peft.core.shared import SharedTensors
from peft.core.storage import place_of
from peft.core.tuner import BaseTuner
from peft.registry import PeftType


@dataclass
class VeraConfig(LayerConfig):
    """Vector-based random matrix adaptation (arXiv:2310.11454): W' = W + diag(b) B diag(d) A.

    A [r, in] and B [out, r] are random, frozen and shared by all layers, cut to the size that each needs; the vectors
    d [r] and b [out] are trained.

    Args:
        r: rank of the shared projections.
        projection_prng_key: seed of the projections.
        save_projection: store them in the checkpoint; without, they are made again from the seed.
        vera_dropout: probability of dropout on the adapter's input.
        d_initial: start value of d.
        fan_in_fan_out: whether the layers hold their weight as [in, out]; found out from the layer itself.
        init_weights: start b at zero, without effect; False starts it at random.
    """

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    init_weights: bool = True

    positive_fields = ("r",)
    fraction_fields = ("vera_dropout",)
    beyond_reference: ClassVar[frozenset[str]] = frozenset(("target_parameters", "exclude_modules"))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.VERA


class VeraLayer(AdapterLayer):
    """A module with vectors that scale the shared projections."""

    adapter_layer_names = ("vera_lambda_b", "vera_lambda_d")
    other_param_names = ("vera_dropout",)
    label = "vera"

    vera_lambda_b: nn.ParameterDict
    vera_lambda_d: nn.ParameterDict

    def __init__(self, base_layer: nn.Module, parameter_name: str | None, vera_A: SharedTensors, vera_B: SharedTensors):
        super().__init__(base_layer, parameter_name)
        self.vera_A, self.vera_B = vera_A, vera_B
        self.vera_dropout = nn.ModuleDict()

    def create(self, name: str, config: VeraConfig) -> None:
        self.vera_dropout[name] = nn.Dropout(config.vera_dropout) if config.vera_dropout > 0 else nn.Identity()
        self.vera_lambda_d[name] = nn.Parameter(torch.full((config.r,), float(config.d_initial)))
        b = torch.zeros(self.out_features) if config.init_weights else torch.randn(self.out_features)
        self.vera_lambda_b[name] = nn.Parameter(b)

    def change(self, name: str) -> LowRank:
        b, d, dropout = self.vera_lambda_b[name], self.vera_lambda_d[name], self.vera_dropout[name]
        down, up = self.vera_A[name][:, : self.in_features], self.vera_B[name][: self.out_features]
        p = dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0
        return LowRank(down.to(b), up.to(b), dropout=p, middle=d, factors=b)

    @classmethod
    def check(cls, config: VeraConfig, key: str, module: nn.Module, op: BaseOp) -> None:
        if config.vera_dropout and not op.linear:
            raise ValueError(f"vera_dropout needs linear layers; {key!r} is a {op.kind}.")


class VeraModel(BaseTuner):
    """A model with VeRA adapters; `vera_A` and `vera_B` hold the projections that an adapter's layers share."""

    prefix = "vera_lambda_"
    layer_class = VeraLayer
    shared_names = ("vera_A", "vera_B")
    injectable = False

    def prepare_shared(self) -> None:
        self.vera_A, self.vera_B = SharedTensors(), SharedTensors()

    def check_config(self, adapter_name: str, config: VeraConfig) -> None:
        others = [other for name, other in self.peft_config.items() if name != adapter_name]
        if any(other.projection_prng_key != config.projection_prng_key for other in others):
            raise ValueError(
                "All VeRA adapters of a model need the same projection key, got projection_prng_key="
                f"{sorted({c.projection_prng_key for c in (*others, config)})}."
            )
        if any(other.save_projection != config.save_projection for other in others):
            raise ValueError("Either all or none of a model's VeRA adapters save their projection (save_projection).")

    def prepare(self, plan: Plan, config: VeraConfig, adapter_name: str) -> None:
        ops = [_op_of(target.module, target.parameter_name) for target in plan.targets]
        generator = torch.Generator(device="cpu").manual_seed(config.projection_prng_key)
        device = place_of(plan.targets[0].module)[0]
        device = None if device is None or device.type == "meta" else device
        sizes = (config.r, max(op.in_features for op in ops)), (max(op.out_features for op in ops), config.r)
        with torch.device("cpu"):  # also where the adapter itself is made without memory: it may not be in the file
            for shared, size in zip((self.vera_A, self.vera_B), sizes, strict=True):
                start = torch.empty(size)
                nn.init.kaiming_uniform_(start, generator=generator)
                shared[adapter_name] = start.to(device)

    def make_layer(self, config: VeraConfig, target: nn.Module, parameter_name: str | None, key: str) -> VeraLayer:
        return VeraLayer(target, parameter_name, self.vera_A, self.vera_B)

    def key_map(self, adapter_name: str) -> dict[str, str]:
        return super().key_map(adapter_name) if self.peft_config[adapter_name].save_projection else {}


def _op_of(module: nn.Module, parameter_name: str | None) -> Any:
    if isinstance(module, AdapterLayer):
        module = module.get_base_layer()
    return base_op(module, parameter_name)
