"""Orthogonal subspace fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from peft.config import LayerConfig
from peft.core.base_op import BaseOp
from peft.core.change import Add
from peft.core.layer import AdapterLayer
from peft.core.method import Method
from peft.core.slots import FixedSlot, ModuleSlot, Setting
from peft.core.targets import ALL_LINEAR, has_default_targets
from peft.core.tuner import BaseTuner
from peft.ops.matrix import Dense
from peft.ops.singular import keeping_off
from peft.registry import PeftType
from peft.values import PositiveFloat


@dataclass
class OSFConfig(LayerConfig, peft_type=PeftType.OSF):
    """Orthogonal subspace fine-tuning (arXiv:2504.07097): W' = U_high S_high V_high + U_low S_low V_low.

    That is W by its singular values. The largest of them stay with their directions as they are; the others are
    trained: U_low [out, m], S_low [m] and V_low [m, in]. What their gradients have in the directions of U_high and
    V_high is taken out, so that what is learned disturbs little of what the model knew.

    Args:
        effective_rank: how many directions stay: a number, a fraction (up to 1.0) of the smaller side of the weight, or
            None for half of it.
        rank_pattern: the same for single modules: name or regular expression for its end -> how many.
        init_weights: start from the weight, without effect; False starts at random.
        target_svd_config: accepted for the sake of files, and without effect.

    Raises:
        ValueError: no directions would stay.
    """

    effective_rank: int | PositiveFloat | None = None
    rank_pattern: dict[str, int | float] | None = None
    init_weights: bool | None = True
    target_svd_config: dict[str, int] | None = None

    pattern_fields: ClassVar[dict[str, str]] = {"rank_pattern": "effective_rank"}


def kept_directions(wanted: float | None, op: BaseOp) -> int:
    """How many singular directions of a weight stay as they are; all of them at most."""
    side = min(op.out_features, op.in_features)
    if wanted is None:
        return side // 2
    return min(int(wanted * side) if isinstance(wanted, float) and wanted <= 1 else int(wanted), side)


class OSFLayer(AdapterLayer):
    """A module whose weight is trained where its singular values are small."""

    osf_svd_params = ModuleSlot[nn.ParameterDict]()
    osf_U_high = FixedSlot(stored=False)
    osf_V_high = FixedSlot(stored=False)
    #: U_low S_low V_low as they are without the adapter
    osf_start = FixedSlot(stored=False)

    osf_kept = Setting[int]()

    def create(self, name: str, config: OSFConfig) -> None:
        self.osf_kept[name] = kept_directions(config.effective_rank, self.op)
        trained = dict(zip(("U_low", "S_low", "V_low"), self.decompose(name), strict=True))
        if config.init_weights is False:
            trained = {part: torch.randn_like(value) for part, value in trained.items()}
        self.osf_svd_params[name] = nn.ParameterDict({part: nn.Parameter(value) for part, value in trained.items()})

    def draw(self, name: str, config: OSFConfig) -> None:
        if self.osf_start[name].is_meta:
            self.decompose(name)

    def decompose(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Makes the fixed tensors from the base weight.

        Returns:
            U_low, S_low and V_low as they start.
        """
        kept = self.osf_kept[name]
        left, values, right = torch.linalg.svd(self.start_matrix(), full_matrices=False)
        low = left[:, kept:].contiguous(), values[kept:].contiguous(), right[kept:].contiguous()
        self.osf_U_high[name], self.osf_V_high[name] = left[:, :kept].contiguous(), right[:kept].contiguous()
        self.osf_start[name] = (low[0] * low[1]) @ low[2]
        return low

    def change(self, name: str) -> Add:
        parts = self.osf_svd_params[name]
        left = keeping_off(parts["U_low"], self.osf_U_high[name])
        right = keeping_off(parts["V_low"].T, self.osf_V_high[name].T).T
        return Add(Dense(torch.addmm(self.osf_start[name].to(left.dtype), left * parts["S_low"], right, beta=-1)))

    @classmethod
    def check(cls, config: OSFConfig, key: str, module: nn.Module, op: BaseOp) -> None:
        wanted, side = config.effective_rank, min(op.out_features, op.in_features)
        if wanted is not None and kept_directions(wanted, op) < 1:
            raise ValueError(f"effective_rank={wanted} leaves {key!r}, {side} wide, no direction that stays.")


class OSFMethod(Method):
    """Which modules are adapted by default."""

    def choose_targets(self, config: OSFConfig, model_config: dict[str, Any]) -> None:
        # Where nothing is known of the type of the model, as where everything is trained: all linear layers.
        if has_default_targets(config.peft_type, model_config.get("model_type")):
            super().choose_targets(config, model_config)
        else:
            config.target_modules = ALL_LINEAR


class OSFModel(BaseTuner, layer=OSFLayer, method=OSFMethod, prefix="osf_"):
    """A model with OSF adapters."""
