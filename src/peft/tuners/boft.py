"""Orthogonal finetuning by butterfly factors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peft.config import LayoutConfig
from peft.core.base_op import BaseOp
from peft.core.change import OnInput, ScaleOutput
from peft.core.layer import AdapterLayer
from peft.core.slots import Setting, Slot
from peft.core.tuner import BaseTuner
from peft.errors import warn
from peft.ops.memo import remember
from peft.ops.orthogonal import add_rotated, butterfly, cayley, drop_blocks
from peft.registry import PeftType
from peft.values import Fraction, NonNegativeInt, PositiveInt


@dataclass
class BOFTConfig(LayoutConfig, peft_type=PeftType.BOFT):
    """Orthogonal finetuning by butterfly factors (arXiv:2311.06243): W' = diag(s) W M^T.

    M is a product of m factors, each block-diagonal up to a permutation, with blocks (I - Q) (I + Q)^-1 of the
    skew-symmetric parts Q of `boft_R` [m, in / b, b, b]; s [out] is `boft_s`. With m factors every input mixes with
    2^(m-1) b others.

    Args:
        boft_block_size: size b of a block; give this or `boft_block_num`, and 0 for the other. It has to divide the
            width of the modules.
        boft_block_num: number of blocks.
        boft_n_butterfly_factor: number m of factors; takes effect with `boft_all_factors`.
        boft_all_factors: use as many factors as `boft_n_butterfly_factor` says. huggingface/peft does so only where it
            could build a CUDA kernel of its own, and takes one factor elsewhere; False is like the latter.
        boft_dropout: share of the blocks of one factor that are left out at random in training.
        init_weights: start without effect; False starts at random.
    """

    boft_block_size: NonNegativeInt = 4
    boft_block_num: NonNegativeInt = 0
    boft_n_butterfly_factor: PositiveInt = 1
    boft_all_factors: bool = False
    boft_dropout: Fraction = 0.0
    init_weights: bool = True

    def check(self) -> None:
        if bool(self.boft_block_size) == bool(self.boft_block_num):
            raise ValueError(
                "Give a positive boft_block_size or a positive boft_block_num, and 0 for the other; got"
                f" {self.boft_block_size} and {self.boft_block_num}."
            )
        if self.factors < self.boft_n_butterfly_factor and not self.inference_mode:
            warn(
                f"A new adapter gets one butterfly factor, not {self.boft_n_butterfly_factor}"
                " (boft_n_butterfly_factor), as in huggingface/peft where it has not built its CUDA kernel."
                " boft_all_factors=True gives it all."
            )

    @property
    def factors(self) -> int:
        """How many butterfly factors a new adapter has."""
        return self.boft_n_butterfly_factor if self.boft_all_factors else 1


class BOFTLayer(AdapterLayer):
    """A module whose input is rotated in blocks, and whose output is scaled."""

    boft_R = Slot()
    boft_s = Slot()

    boft_dropout = Setting[float]()

    def create(self, name: str, config: BOFTConfig) -> None:
        size = config.boft_block_size or self.in_features // config.boft_block_num
        self.boft_R[name] = nn.Parameter(torch.zeros(config.factors, self.in_features // size, size, size))
        shape = (1, self.out_features) if self.op.kernel else (self.out_features, 1)
        self.boft_s[name] = nn.Parameter(torch.ones(shape))
        if not config.init_weights:
            nn.init.normal_(self.boft_R[name], std=0.1)
            nn.init.normal_(self.boft_s[name], mean=1.0, std=0.1)

    def rotation(self, name: str, dtype: torch.dtype) -> Tensor:
        """The blocks of M minus the identity."""
        blocks = self.boft_R[name]
        if not (self.training and self.boft_dropout[name]):
            return remember(blocks, dtype, lambda: butterfly(_rotations(blocks)).to(dtype))
        factors, chosen = list(_rotations(blocks)), int(torch.randint(len(blocks), (1,)))
        factors[chosen] = drop_blocks(factors[chosen], self.boft_dropout[name])
        return butterfly(torch.stack(factors)).to(dtype)

    def change(self, name: str) -> tuple[OnInput, ScaleOutput]:
        rotate = OnInput(
            lambda x: add_rotated(x, self.rotation(name, x.dtype)),
            lambda weight: add_rotated(weight, self.rotation(name, weight.dtype).mT),
        )
        return rotate, ScaleOutput(self.boft_s[name].flatten(), with_bias=False)

    def fit(self, name: str, path: str, find: Callable[[str], Tensor | None]) -> None:
        # How many factors were used, its configuration does not say.
        found, shape = find("boft_R"), self.boft_R[name].shape
        if found is not None and found.shape[1:] == shape[1:] and found.shape != shape:
            self.renew("boft_R", name, found.shape)

    @classmethod
    def check(cls, config: BOFTConfig, key: str, module: nn.Module, op: BaseOp) -> None:
        given = "boft_block_size" if config.boft_block_size else "boft_block_num"
        if op.in_features % getattr(config, given):
            grouped = getattr(module, "groups", 1) > 1
            raise (NotImplementedError if grouped else ValueError)(
                f"{given}={getattr(config, given)} does not fit {key!r}: its width {op.in_features} must be divisible"
                f" by it{' (blocks do not reach across the groups of a convolution)' if grouped else ''}."
            )
        size = config.boft_block_size or op.in_features // config.boft_block_num
        coupled = 2 ** (config.factors - 1)
        if config.factors > 1 and (size % 2 or (op.in_features // size) % coupled):
            raise ValueError(
                f"{config.factors} butterfly factors do not fit {key!r}: its {op.in_features // size} blocks of size"
                f" {size} must be a multiple of {coupled}, and of an even size."
            )


def _rotations(blocks: Tensor) -> Tensor:
    """R - I of blocks [m, n, b, b], in float32 at least."""
    blocks = blocks.to(torch.promote_types(blocks.dtype, torch.float32))
    return cayley(0.5 * (blocks - blocks.mT))


class BOFTModel(BaseTuner, layer=BOFTLayer, prefix="boft_"):
    """A model with butterfly orthogonal finetuning adapters."""
