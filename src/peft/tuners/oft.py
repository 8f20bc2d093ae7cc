"""Orthogonal finetuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from packaging.version import InvalidVersion, Version
from torch import Tensor, nn

from peft.config import LayoutConfig
from peft.core.change import OnInput, OnOutput
from peft.core.layer import AdapterLayer
from peft.core.method import Method
from peft.core.slots import ModuleSlot, Setting
from peft.core.storage.shared import scale_in_forward
from peft.core.tuner import BaseTuner
from peft.errors import warn
from peft.ops.memo import remember
from peft.ops.orthogonal import add_rotated, cayley, cayley_neumann, drop_blocks, skew_symmetric
from peft.registry import PeftType
from peft.values import Fraction, NonNegativeInt, PositiveFloat, PositiveInt


def _is_older(version: Any, than: str) -> bool:
    """Whether a file's version comes before another; so does what is none."""
    try:
        return Version(str(version or "0").partition("@")[0]) < Version(than)
    except InvalidVersion:
        return True


@dataclass
class OFTConfig(LayoutConfig, peft_type=PeftType.OFT):
    """Orthogonal finetuning (arXiv:2306.07280; in this form arXiv:2506.19847).

    W' = W R^T with a block-diagonal rotation R: the module's input is rotated, block by block. Each block is made of a
    skew-symmetric matrix Q, of which the upper triangle is trained: (I - Q) (I + Q)^-1, or a series in place of the
    inverse. Of an embedding, the output is rotated.

    Args:
        r: number of blocks; give this or `oft_block_size`, and 0 for the other.
        oft_block_size: size of a block. Where it (or r) does not divide the width of a module, the nearest number that
            does is taken, with a warning.
        module_dropout: share of the blocks that are left out at random in training.
        coft: keep all Q of a module together within the distance `eps` of zero.
        eps: that distance.
        block_share: the same rotation for all blocks.
        use_cayley_neumann: a Neumann series instead of the inverse, which turns the other way round.
        num_cayley_neumann_terms: terms of that series.
        init_weights: start with Q at zero, without effect; False starts it at random.
    """

    r: NonNegativeInt = 0
    oft_block_size: NonNegativeInt = 32
    module_dropout: Fraction = 0.0
    init_weights: bool = True
    coft: bool = False
    eps: PositiveFloat = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: PositiveInt = 5

    def check(self) -> None:
        if bool(self.r) == bool(self.oft_block_size):
            sizes = f"r={self.r} and oft_block_size={self.oft_block_size}"
            raise ValueError(f"Give a positive r or a positive oft_block_size, and 0 for the other; got {sizes}.")

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        if "oft_block_size" not in kwargs:
            raise ValueError("OFT files of peft before 0.14 (no oft_block_size) cannot be read; use peft 0.13.")
        if kwargs.get("use_cayley_neumann") and _is_older(kwargs.get("peft_version"), "0.18.0"):
            warn(
                f"This OFT adapter was written by peft {kwargs.get('peft_version') or 'before 0.18'}; the Neumann"
                " series was changed in 0.18, so its effect is not the same here. Train it again, or use it with peft"
                " 0.17."
            )
        return super().check_kwargs(**kwargs)


class OFTRotation(nn.Module):
    """A block-diagonal rotation: `weight` [blocks, b (b - 1) / 2] holds the upper triangles of its Q."""

    def __init__(self, width: int, size: int, config: OFTConfig):
        super().__init__()
        self.size, self.dropout = size, config.module_dropout
        self.radius = config.eps if config.coft else None
        self.terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else None
        self.weight = nn.Parameter(torch.zeros(1 if config.block_share else width // size, size * (size - 1) // 2))
        if not config.init_weights:
            nn.init.normal_(self.weight, std=0.1)

    def change(self, dtype: torch.dtype, training: bool) -> Tensor:
        """Its blocks minus the identity, [blocks, b, b]."""
        if self.radius is not None and self.weight.requires_grad:
            with torch.no_grad():
                scale_in_forward(self.weight, self.shrinkage(self.weight))
        change = remember(self.weight, dtype, lambda: self.compute().to(dtype))
        return drop_blocks(change, self.dropout) if training and self.dropout else change

    def compute(self) -> Tensor:
        """The change, in float32 at least."""
        skew = skew_symmetric(self.weight, self.size)
        if self.radius is not None:
            skew = skew * self.shrinkage(self.weight.detach().to(skew.dtype))[..., None]
        return cayley(skew) if self.terms is None else cayley_neumann(skew, self.terms)

    def shrinkage(self, weight: Tensor) -> Tensor:
        """What brings each Q to where it may be: radius / sqrt(blocks) from zero at most (Frobenius)."""
        share = (self.radius or 0.0) / weight.shape[0] ** 0.5 / (weight.norm(dim=1, keepdim=True) * 2**0.5)
        # With a little room, so that what has been shortened is not shortened again for its rounding.
        return torch.where(share < 1 - 1e-6, share, 1.0)


class OFTLayer(AdapterLayer):
    """A module whose input is rotated in blocks; of an embedding, its output."""

    oft_R = ModuleSlot[OFTRotation]()
    oft_embedding_R = ModuleSlot[OFTRotation]()

    oft_block_size = Setting[int]()

    @property
    def rotations(self) -> dict[str, OFTRotation]:
        """Those of the adapters: of inputs, or of the outputs of an embedding."""
        return self.oft_embedding_R if self.op.kind == "Embedding" else self.oft_R

    def create(self, name: str, config: OFTConfig) -> None:
        width = self.out_features if self.op.kind == "Embedding" else self.in_features
        if config.r:
            size = width // _fitting("r", config.r, width)
        else:
            size = _fitting("oft_block_size", config.oft_block_size, width)
        self.r[name], self.oft_block_size[name] = width // size, size
        self.rotations[name] = OFTRotation(width, size, config)

    def change(self, name: str) -> OnInput | OnOutput:
        rotation = self.rotations[name]

        def rotate(x: Tensor) -> Tensor:
            return add_rotated(x, rotation.change(x.dtype, self.training))

        if self.op.kind == "Embedding":
            return OnOutput(rotate)
        return OnInput(rotate, lambda weight: add_rotated(weight, rotation.change(weight.dtype, self.training).mT))


def _fitting(setting: str, wanted: int, width: int) -> int:
    """The divisor of `width` that is nearest to `wanted`."""
    if width % wanted == 0:
        return wanted
    nearest = min((n for n in range(1, width + 1) if width % n == 0), key=lambda n: abs(n - wanted))
    warn(f"{setting}={wanted} does not divide {width}; {nearest} is taken there.")
    return nearest


class OFTMethod(Method):
    """What files of older versions are read as."""

    @classmethod
    def read_tensors(cls, model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if any(".oft_r." in key for key in tensors):
            raise ValueError("OFT files of peft before 0.16 (with oft_r) cannot be read; use peft 0.15.2.")
        return tensors


class OFTModel(BaseTuner, layer=OFTLayer, method=OFTMethod, prefix="oft_"):
    """A model with orthogonal finetuning adapters."""
