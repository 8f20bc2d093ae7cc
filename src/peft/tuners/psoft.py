"""Orthogonal fine-tuning in the principal subspace of the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from peft.config import LayoutConfig
from peft.core.change import LowRank
from peft.core.layer import AdapterLayer
from peft.core.slots import Dropout, FixedSlot, ModuleSlot, Setting
from peft.core.tuner import BaseTuner
from peft.errors import warn
from peft.ops.memo import remember
from peft.ops.orthogonal import cayley, cayley_neumann, skew_symmetric
from peft.ops.principal import principal_factors, unrounded
from peft.registry import PeftType
from peft.values import Fits, Fraction, NonNegativeInt, PositiveInt, Range

Rank = Annotated[
    PositiveInt, Fits("it has to be at most the shorter side", lambda r, op: r <= min(op.out_features, op.in_features))
]


@dataclass
class PsoftConfig(LayoutConfig, peft_type=PeftType.PSOFT):
    """Orthogonal fine-tuning in the principal subspace (arXiv:2505.11235): W' = W + s B (diag(b) R diag(a) - I) A.

    s B A is the part of W with the r largest singular values, and s = psoft_alpha / r. A [r, in] and B [out, r] are
    fixed; they are made of the base weight again when an adapter is loaded, on the device where that is. R [r, r] is
    the rotation (I + Q) (I - Q)^-1 of a skew-symmetric Q, whose upper triangle is trained.

    Args:
        r: width of the subspace; at most the shorter side of the weight.
        psoft_alpha: numerator of the scale.
        psoft_dropout: probability of dropout on the adapter's input.
        ab_svd_init: `"psoft_init"` gives the singular values to B, so that A has orthonormal rows; `"pissa_init"`
            shares them evenly.
        psoft_svd: `"full"`, or `"lowrank"` for an approximation that is faster for large weights.
        psoft_svd_lowrank_niter: power iterations of the approximation.
        random_seed: what the approximation starts from.
        psoft_orth: keep R a rotation; False trains its entries.
        psoft_mag_b: train b, which scales the rows of R.
        psoft_mag_a: train a, which scales its columns.
        use_cayley_neumann: make R by a series in place of the inverse, which is nearly a rotation.
        num_cayley_neumann_terms: terms of the series.
        cayley_neumann_eps: largest norm (Frobenius) of the Q that the series gets, between 0 and 1; None for any.
        init_weights: start without effect; False starts R at random.
    """

    r: Rank = 32
    psoft_alpha: PositiveInt = 32
    psoft_dropout: Fraction = 0.0
    ab_svd_init: Literal["psoft_init", "pissa_init"] = "psoft_init"
    psoft_svd: Literal["full", "lowrank"] = "full"
    psoft_svd_lowrank_niter: NonNegativeInt = 10
    random_seed: int = 0
    psoft_orth: bool = True
    psoft_mag_b: bool = True
    psoft_mag_a: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: PositiveInt = 5
    cayley_neumann_eps: Annotated[float, Range("must be between 0 and 1", lambda norm: 0 < norm < 1)] | None = None
    init_weights: bool = True

    def check(self) -> None:
        for field, needed, there in (
            ("cayley_neumann_eps", "use_cayley_neumann", self.use_cayley_neumann),
            ("num_cayley_neumann_terms", "use_cayley_neumann", self.use_cayley_neumann),
            ("psoft_svd_lowrank_niter", "psoft_svd='lowrank'", self.psoft_svd == "lowrank"),
        ):
            if not there and getattr(self, field) != getattr(PsoftConfig, field):
                warn(f"{field} has no effect without {needed}.")


class PsoftRotation(nn.Module):
    """R with its scales: `weight` [r (r - 1) / 2], or [r, r] where R is free; `vector_b` and `vector_a` [r]."""

    def __init__(self, config: PsoftConfig):
        super().__init__()
        r = self.r = config.r
        self.orthogonal = config.psoft_orth
        self.terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else None
        self.radius = config.cayley_neumann_eps
        start = torch.zeros(r * (r - 1) // 2) if config.psoft_orth else torch.eye(r)
        self.weight = nn.Parameter(start if config.init_weights else start + 0.1 * torch.randn(start.shape))
        self.vector_b = nn.Parameter(torch.ones(r)) if config.psoft_mag_b else None
        self.vector_a = nn.Parameter(torch.ones(r)) if config.psoft_mag_a else None

    def change(self) -> Tensor:
        """diag(b) R diag(a) - I, [r, r]; computed in single precision at least."""
        change = self._plain_change()
        ones = change.new_ones(self.r)
        b, a = (ones if vector is None else vector.to(change) for vector in (self.vector_b, self.vector_a))
        # R - I and what the scales change: not the difference of numbers that are nearly the same.
        return b[:, None] * change * a + torch.diag((b - 1) * a + (a - 1))

    def _plain_change(self) -> Tensor:
        """R - I."""
        if not self.orthogonal:
            weight = unrounded(self.weight)
            return weight - torch.eye(self.r, dtype=weight.dtype, device=weight.device)
        skew = skew_symmetric(self.weight[None], self.r)
        if self.terms is None:
            return cayley(-skew)[0]
        if self.radius is not None:
            norm = torch.linalg.matrix_norm(skew, keepdim=True)
            skew = torch.where(norm > self.radius, skew * (self.radius / norm.clamp(min=self.radius)), skew)
        return cayley_neumann(skew, self.terms)[0]


class PsoftLayer(AdapterLayer):
    """A module with the principal part of its weight rotated."""

    psoft_R = ModuleSlot[PsoftRotation]()
    psoft_A = FixedSlot(stored=False)
    psoft_B = FixedSlot(stored=False)

    scaling = Setting[float]()
    psoft_dropout = Dropout()

    def create(self, name: str, config: PsoftConfig) -> None:
        self.scaling[name] = config.psoft_alpha / config.r
        self.psoft_R[name] = PsoftRotation(config)

    def draw(self, name: str, config: PsoftConfig) -> None:
        weight, even = self.original_matrix(), config.ab_svd_init == "pissa_init"
        approximate = config.psoft_svd == "lowrank" and not weight.is_meta
        iterations = config.psoft_svd_lowrank_niter if approximate else None
        self.psoft_A[name], self.psoft_B[name] = principal_factors(
            weight, config.r, self.scaling[name], even, iterations, config.random_seed
        )

    def change(self, name: str) -> LowRank:
        rotation, b = self.psoft_R[name], self.psoft_B[name]
        vectors = list(rotation.parameters())[1:]

        def rotated() -> Tensor:
            change = rotation.change()
            return b.to(change) @ change

        # On the side of the outputs: a training step then keeps x A^T, and x is not needed.
        up = remember(rotation.weight, "up", rotated, b, *vectors)
        return LowRank(self.psoft_A[name].to(up.dtype), up, self.scaling[name], self.dropout_of(name))


class PsoftModel(BaseTuner, layer=PsoftLayer, prefix="psoft_"):
    """A model with the principal parts of its weights rotated."""
