"""How the factors A and B of an adapter start, beyond drawing them at random.

A start fills A and B of one adapter. Some take the part of the base weight that A and B begin with out of it, so that
the model as a whole is unchanged: they return what is left of a weight, which is written when the adapter is complete.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft.core.base_op import BaseOp
from peft.core.storage import onloaded, storage_of

if TYPE_CHECKING:
    from peft.tuners.lora.config import LoraConfig
    from peft.tuners.lora.layer import LoraLayer

#: what is left of a base weight [out, in] when an adapter has started
Remainder = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Start:
    """One way to start.

    Attributes:
        fill: gives A and B their values; returns the remainder if the base weight changes.
        kinds: kinds of base module it works on.
        changes_base: whether it changes the base weight.
        trains_b: whether B is trained.
        check: raises ValueError for a rank that does not suit.
    """

    fill: Callable[[LoraLayer, str, LoraConfig], Remainder | None]
    kinds: frozenset[str] = frozenset(("Linear", "Conv1D", "Embedding"))
    changes_base: bool = False
    trains_b: bool = True
    check: Callable[[int, str], None] = lambda r, name: None


def heavy(tensor: Tensor, config: Any) -> Tensor:
    """`tensor` in float32 where a decomposition of it is made: on the accelerator, if it may go there for that."""
    device = tensor.device
    if config.runtime_config.ephemeral_gpu_offload and device.type == "cpu":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = accelerator or device
    return tensor.to(device=device, dtype=torch.promote_types(tensor.dtype, torch.float32))


def base_matrix(layer: LoraLayer, config: LoraConfig) -> Tensor:
    """The base weight [out, in], ready for a decomposition."""
    with onloaded(layer.get_base_layer()):
        return heavy(layer.op.matrix(layer.get_base_weight()).detach(), config)


def fill_factors(layer: LoraLayer, name: str, a: Tensor, b: Tensor) -> None:
    """Copies A [r, in] and B [out, r] into an adapter."""
    for factor, values in zip(layer.factors(name), (a, b), strict=True):
        with torch.no_grad():
            factor.copy_(values.reshape(factor.shape))


def without_product(layer: LoraLayer, name: str) -> Remainder:
    """W - s B A, for the values that the factors have when it is asked for."""

    def remainder(weight: Tensor) -> Tensor:
        change = layer.product(name).to(weight.device)
        return (weight.to(change.dtype) - change).to(weight.dtype)

    return remainder


def _in_two(u: Tensor, s: Tensor, vh: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """A and B that share the singular values evenly, with s B A = u diag(s) vh."""
    root = (s / scaling).sqrt()
    return root[:, None] * vh, u * root


def _pissa(layer: LoraLayer, name: str, config: LoraConfig) -> Remainder:
    """The r largest singular values of W and their vectors (arXiv:2404.02948)."""
    weight, r = base_matrix(layer, config), layer.r[name]
    steps = re.search(r"\d+$", str(config.init_lora_weights))
    if steps is None:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, q=r, niter=int(steps[0]))
        vh = v.T
    fill_factors(layer, name, *_in_two(u[:, :r], s[:r], vh[:r], layer.scaling[name]))
    return without_product(layer, name)


def _olora(layer: LoraLayer, name: str, config: LoraConfig) -> Remainder:
    """The first r columns of Q and rows of R of W = Q R (arXiv:2406.01775)."""
    q, r = torch.linalg.qr(base_matrix(layer, config))
    fill_factors(layer, name, r[: layer.r[name]], q[:, : layer.r[name]])
    return without_product(layer, name)


def _orthogonal(layer: LoraLayer, name: str, config: LoraConfig) -> None:
    """A and B of random directions in two halves of an orthonormal basis, so that B A is zero though neither is."""
    r = layer.r[name]
    basis, _ = torch.linalg.qr(torch.randn(r, r))
    one, other = basis[::2], basis[1::2]
    a = torch.randn(layer.in_features, r // 2) @ one / 10
    b = torch.randn(layer.out_features, r // 2) @ other / 10
    fill_factors(layer, name, a.T, b)


def _mica(layer: LoraLayer, name: str, config: LoraConfig) -> None:
    """B the left singular vectors of the r smallest singular values of W, A zero (arXiv:2604.01694)."""
    u, _, _ = torch.linalg.svd(base_matrix(layer, config), full_matrices=False)
    fill_factors(layer, name, torch.zeros_like(layer.factors(name)[0]), u[:, -layer.r[name] :])


def _check_even(r: int, name: str) -> None:
    if r % 2:
        raise ValueError(f"init_lora_weights='orthogonal' needs an even rank, got r={r} for {name!r}.")


STARTS: dict[str, Start] = {
    "pissa": Start(_pissa, changes_base=True),
    "olora": Start(_olora, changes_base=True),
    "orthogonal": Start(_orthogonal, check=_check_even),
    "mica": Start(_mica, trains_b=False),
}
#: what `LoraLayer.reset_lora_parameters` does on its own
_PLAIN = (True, False, "gaussian")


def start_of(init_lora_weights: bool | str) -> Start | None:
    """The start that a configuration asks for; None for the plain random ones.

    Raises:
        ValueError: there is none of that name.
    """
    if init_lora_weights in _PLAIN:
        return None
    name = re.sub(r"^pissa_niter_\d+$", "pissa", str(init_lora_weights))
    if name not in STARTS:
        known = ", ".join(map(repr, (*_PLAIN, *STARTS, "pissa_niter_4")))
        raise ValueError(f"Unknown init_lora_weights={init_lora_weights!r}; there are {known}.")
    return STARTS[name]


def check_start(config: LoraConfig, name: str, module: nn.Module, op: BaseOp, r: int) -> None:
    """Raises ValueError where the start cannot be made on a module."""
    start = start_of(config.init_lora_weights)
    if start is None:
        return
    if op.kind not in start.kinds:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} does not work on {name!r}, a {op.kind}; it works on"
            f" {', '.join(sorted(start.kinds))}."
        )
    if r > min(op.out_features, op.in_features):
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} needs a rank of at most"
            f" {min(op.out_features, op.in_features)} on {name!r} [{op.out_features}, {op.in_features}], got r={r}."
        )
    start.check(r, name)
    storage = storage_of(module, op.weight_name)
    if start.changes_base:
        storage.check_write(module, op.weight_name)
