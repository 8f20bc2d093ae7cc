"""What a LoRA on any kind of module is made of, as plain matrices, and the tensors that it is stored as.

The change of a weight is a stack of blocks [blocks, out, in]: one block for most modules, one per group of a
convolution, one per expert of a stacked parameter. A block of rank r is a product b a, so a LoRA is a pair of stacks,
a [blocks, r, in] and b [blocks, out, r].
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from peft.core.base_op import ConvOp, EmbeddingOp, ParallelLinearOp, ParameterOp
from peft.core.change import LowRank
from peft.core.layer import AdapterLayer
from peft.core.merge import without_dropout
from peft.core.storage import onloaded
from peft.ops.principal import unrounded

#: the factors' names in files
FACTOR_KEYS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")


def block_count(layer: AdapterLayer) -> int:
    """How many blocks the weight of a layer's module has."""
    if isinstance(layer.op, ConvOp):
        return layer.get_base_layer().groups
    return layer.op.num_experts if isinstance(layer.op, ParameterOp) else 1


def block_rank(layer: AdapterLayer, r: int) -> int:
    """The rank of one block where the adapter's rank is `r`: the groups of a convolution share it, experts do not."""
    return r // block_count(layer) if isinstance(layer.op, ConvOp) else r


def adapter_rank(layer: AdapterLayer, rank: int) -> int:
    """The adapter's rank where that of one block is `rank`."""
    return rank * block_count(layer) if isinstance(layer.op, ConvOp) else rank


@torch.no_grad()
def change_factors(layer: AdapterLayer, name: str) -> tuple[Tensor, Tensor] | None:
    """b [blocks, out, r] and a [blocks, r, in] whose product is the change of an adapter that is one of low rank."""
    with without_dropout(layer):
        changes = layer.changes([name])
    change = changes[0] if len(changes) == 1 else None
    if not isinstance(change, LowRank) or change.where is not None:
        return None
    (a, b), blocks = change.folded(), block_count(layer)
    if a.dim() == 2:
        a, b = a.expand(blocks, *a.shape), b.unflatten(0, (blocks, -1))
    if a.shape[2] != layer.op.in_features or a.shape[1] > min(b.shape[1], a.shape[2]):
        return None
    return b * change.scale, a


def store(layer: AdapterLayer, a: Tensor, b: Tensor, rank: int = 0) -> dict[str, Tensor]:
    """The tensors of a LoRA on a layer's module, by the names that files have for them; with zeros up to a rank."""
    missing = max(rank - a.shape[1], 0)
    a, b = pad(a, (0, 0, 0, missing)), pad(b, (0, missing))
    if isinstance(layer.op, EmbeddingOp):
        return {"lora_embedding_A": a[0].contiguous(), "lora_embedding_B": b[0].contiguous()}
    if isinstance(layer.op, ConvOp):
        conv = layer.get_base_layer()
        window = tuple(conv.kernel_size)
        a, b = _over_all_channels(layer, a).flatten(0, 1), b.flatten(0, 1)
        a, b = a.view(-1, conv.in_channels, *window), b.view(*b.shape, *(1 for _ in window))
    else:
        # A has all ranks of the first expert before those of the next; B has the first rank of all experts before the
        # next rank.
        a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
    return {"lora_A.weight": a.contiguous(), "lora_B.weight": b.contiguous()}


def in_two(u: Tensor, s: Tensor, vh: Tensor, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """A and B that share the singular values evenly, with scaling B A = u diag(s) vh; or stacks of these."""
    if not scaling > 0:
        raise ValueError(f"A start from singular values needs a scale above zero, and lora_alpha makes it {scaling}.")
    root = (s / scaling).sqrt()
    return root[..., None] * vh, u * root[..., None, :]


def of_svd(layer: AdapterLayer, u: Tensor, s: Tensor, vh: Tensor, rank: int) -> dict[str, Tensor]:
    """The tensors of the LoRA of that rank per block nearest to u s vh; A and B share the singular values evenly.

    Args:
        layer: where the LoRA goes.
        u, s, vh: decomposition of the blocks, [blocks, out, k], [blocks, k] and [blocks, k, in].
        rank: where it is more than k, the rest is zero.
    """
    return store(layer, *in_two(u[..., :rank], s[:, :rank], vh[:, :rank]), rank)


def check_plain(layer: Any, name: str) -> None:
    """Raises ValueError where an adapter has tensors beside the factors and their bias, so that they say not all."""
    variant = layer.lora_variant.get(name)
    more = set(layer.key_map(name)) - {*FACTOR_KEYS, "lora_B.bias"}
    more = more or (set() if variant is None or variant.is_product else {variant.label})
    if more:
        raise ValueError(
            f"Adapter {name!r} has {', '.join(sorted(more))} beside its factors, so its change is not their product."
            " convert_to_lora makes a plain LoRA of it, which works here."
        )


def check_own(layer: AdapterLayer) -> None:
    """Raises ValueError where a layer's weight is shared out among processes: none can tell what is large in it."""
    if isinstance(layer.op, ParallelLinearOp):
        raise ValueError(
            f"{type(layer.get_base_layer()).__name__} of Megatron holds a part of a weight, and this needs the whole."
            " Of LoRAs on it, add_weighted_adapter makes 'linear' and 'cat' combinations."
        )


def base_blocks(layer: AdapterLayer) -> Tensor:
    """The base weight as blocks [blocks, out, in], over the same inputs as the product of a LoRA's factors."""
    with onloaded(layer.get_base_layer()):
        blocks = layer.op.matrix(layer.get_base_weight()).unflatten(0, (block_count(layer), -1))
    return _over_all_channels(layer, blocks) if isinstance(layer.op, ConvOp) else blocks


def product(layer: Any, name: str) -> Tensor:
    """The scaled product of an adapter's factors: [blocks, out, in], in single precision at least.

    Raises:
        ValueError: the adapter's change is more than that product, or this process has a part of it only.
    """
    check_plain(layer, name)
    check_own(layer)
    a, b = map(unrounded, load(layer, name))
    return torch.bmm(b, a) * layer.scaling[name]


def _over_all_channels(layer: AdapterLayer, a: Tensor) -> Tensor:
    """`a` [groups, r, in] over the channels of all groups, which a LoRA's A sees: zero for those of the others."""
    groups, conv = len(a), layer.get_base_layer()
    if a.shape[-1] == conv.in_channels * math.prod(conv.kernel_size):
        return a
    wide = a.new_zeros(groups, a.shape[1], groups, a.shape[2])
    index = torch.arange(groups, device=a.device)
    wide[index, :, index] = a
    return wide.flatten(2)


def load(layer: Any, name: str) -> tuple[Tensor, Tensor]:
    """The stacks a [blocks, r, in] and b [blocks, out, r] of an adapter, without its scale."""
    return as_stacks(layer, *layer.factors(name))


def as_stacks(layer: AdapterLayer, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Stored factors as the stacks a [blocks, r, in] and b [blocks, out, r]."""
    blocks, a, b = block_count(layer), a.flatten(1), b.flatten(1)
    by_rank = not isinstance(layer.op, ConvOp)  # as `store` has it
    b = b.unflatten(1, (-1, blocks)).permute(2, 0, 1) if by_rank else b.unflatten(0, (blocks, -1))
    return a.unflatten(0, (blocks, -1)), b
