"""The low-rank products of `ops/lora.py` by Triton kernels: when they are used, what they compute, their gradients.

They are off until they are switched on: by PEFT_TRITON=1 in the environment, or by `peft.ops.fused.enabled = True`.
They agree with plain torch in Triton's interpreter (3.7) and compile for a GPU; they were neither run nor timed on one.
`benchmarks/gpu.py` measures a step with and without them.

With dropout they save what plain torch needs a full-size tensor for: the mask is made in registers, in the forward pass
and again in the backward pass from the same seed. Nothing is kept for it but that seed, 8 bytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_VARIABLE = "PEFT_TRITON"


def _asked_for() -> bool:
    value = os.environ.get(_VARIABLE, "0")
    if value not in ("", "0", "1"):
        raise ValueError(f"{_VARIABLE}={value!r} is not understood: 1 switches the Triton kernels on, 0 off.")
    return value == "1"


#: whether the kernels run where they can
enabled = _asked_for()

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: a tile is as wide as the rank, and a multiprocessor has room for rows of so many bytes
MAX_RANK_BYTES = 256
#: fewer rows are no work for kernels that go over matrices in tiles of rows: decoding stays with the library's products
MIN_ROWS = 64


def wanted(x: Tensor, r: int, *others: Tensor | None, few: bool = False) -> bool:
    """Whether the kernels are to compute a product of rank r with x [..., size]: they are on, and can.

    The caller has seen to it that nobody traces or transforms (`ops.lora.needs_plain`).

    Args:
        others: what else takes part; it has to be of the dtype of x, on its device.
        few: also where x has fewer rows than `MIN_ROWS`.

    Raises:
        ImportError: the kernels are on, and triton is not installed.
    """
    if not enabled or not (x.is_cuda or _interpreted()):
        return False
    if not _installed():
        raise ImportError(
            "The Triton kernels are switched on (PEFT_TRITON=1 or peft.ops.fused.enabled), but the package triton is"
            " not installed. Install it, or switch them off."
        )
    return (
        0 < r * x.element_size() <= MAX_RANK_BYTES
        and x.dtype in _DTYPES
        and x.numel() >= (1 if few else MIN_ROWS) * x.shape[-1] > 0
        and all(t is None or (t.dtype == x.dtype and t.device == x.device) for t in others)
        # who watches operations (to count, record or replay them) does not see a kernel
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _interpreted() -> bool:
    """Whether Triton was asked to run kernels in Python, on tensors of the CPU: so they are tested without a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache(maxsize=1)
def _installed() -> bool:
    return find_spec("triton") is not None


def _kernels() -> ModuleType:
    from peft.ops import triton_lora

    return triton_lora


# ---- the products in plain torch


def keep_mask(seed: Tensor, rows: int, size: int, p: float) -> Tensor:
    """[rows, size], bool: what dropout keeps; the mask that the kernels make for `seed` (int64, [1]) in registers.

    Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): the counter is the column / 4
    and the row, the key the seed; its four numbers are for four neighbours in a row.
    """
    word = 0xFFFFFFFF
    quad, row = torch.arange(-(-size // 4), device=seed.device), torch.arange(rows, device=seed.device)
    c0, c1 = torch.broadcast_tensors(quad[None, :], row[:, None])
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & word, seed >> 32 & word
    for _ in range(10):
        # int64 wraps around as uint64 does, so both halves of a product are right
        left, right = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (right >> 32 & word) ^ c1 ^ k0, right & word, (left >> 32 & word) ^ c3 ^ k1, left & word
        k0, k1 = k0 + 0x9E3779B9 & word, k1 + 0xBB67AE85 & word
    numbers = torch.stack((c0, c1, c2, c3), -1).view(rows, -1)[:, :size]
    return numbers >> 8 >= round(p * 2**24)


def _dropped(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    return x if seed is None else x * keep_mask(seed, x.shape[0], x.shape[1], p) / (1 - p)


def down_plain(x: Tensor, a: Tensor, scale: float, p: float, seed: Tensor | None) -> Tensor:
    """scale drop(x) A^T: what `triton_lora.down` computes."""
    return F.linear(_dropped(x, p, seed), a) * scale


def add_up_plain(base: Tensor | None, low: Tensor, b: Tensor, scale: float, p: float, seed: Tensor | None) -> Tensor:
    """base + drop(scale low B^T): what `triton_lora.add_up` computes."""
    product = _dropped(F.linear(low, b) * scale, p, seed)
    return product if base is None else base + product


def summed_plain(low: Tensor, x: Tensor, scale: float, p: float, seed: Tensor | None) -> Tensor:
    """scale low^T drop(x): what `triton_lora.summed` computes."""
    return low.T @ _dropped(x, p, seed) * scale


def add_routed_plain(
    x: Tensor, result: Tensor, a: Tensor, b: Tensor, rows: Sequence[Sequence[int]], scale: float = 1.0
) -> Tensor:
    """result with scale x A^T B^T of owner i added to `rows[i]`: what `add_routed` computes."""
    result = result.clone()
    for i, index in enumerate(rows):
        result[list(index)] += F.linear(F.linear(x[list(index)], a[i]), b[i]) * scale
    return result


# ---- by kernels


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    result: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    p: float,
    overwrite: bool,
    kept: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """What `ops.lora.lora_linear` computes, for tensors that are `wanted`.

    Args:
        kept: two tensors of which x is the product, if they are to be kept for the backward pass in its place.
    """
    if not torch.is_grad_enabled():
        base = F.linear(x, weight, bias) if result is None else result  # type: ignore[arg-type]
        return _product(x, base, a, b, scaling, p, overwrite or result is None)[0]
    return _FusedLoraLinear.apply(x, weight, bias, result, a, b, scaling, p, overwrite, *(kept or (x, None)))


def _product(
    x: Tensor, base: Tensor, a: Tensor, b: Tensor, scaling: float, p: float, overwrite: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """base with the adapter's product added, what B is multiplied with, and the seed of the mask, if there is one."""
    # Drawn on the device from its own generator: nothing waits for it, and checkpointing draws it again.
    seed = torch.empty(1, dtype=torch.int64, device=x.device).random_() if p else None
    out = base if overwrite else torch.empty_like(base, memory_format=torch.contiguous_format)
    low = _kernels().down(_matrix(x), a, 1.0, p, seed)
    _kernels().add_up(_matrix(base), low, b, scaling, 0.0, None, out.view(-1, out.shape[-1]))
    return out, low, seed


class _FusedLoraLinear(torch.autograd.Function):
    """The product and its gradients; W and b are frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        result: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        p: float,
        overwrite: bool,
        u: Tensor,
        v: Tensor | None,
    ) -> Tensor:
        base = F.linear(x, weight, bias) if result is None else result  # type: ignore[arg-type]
        out, low, seed = _product(x, base, a, b, scaling, p, overwrite or result is None)
        if overwrite and result is not None:
            ctx.mark_dirty(result)
        ctx.scaling, ctx.p, ctx.shape = scaling, p, x.shape
        ctx.save_for_backward(u, v, weight if result is None else None, low, a, b, seed)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, v, weight, low, a, b, seed = ctx.saved_tensors
        x, grad_out = _matrix(u if v is None else u * v), _matrix(grad)
        s, p = ctx.scaling, ctx.p
        if torch.is_grad_enabled():  # a second derivative is wanted, so everything comes from tensors with a history
            down, add_up, summed = down_plain, add_up_plain, summed_plain
            low = down(x, a, 1.0, p, seed)
        else:
            down, add_up, summed = _kernels().down, _kernels().add_up_, _kernels().summed
        grad_low = down(grad_out, b.T, s, 0.0, None)
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            through = None if weight is None else grad_out @ weight
            grad_x = add_up(through, grad_low, a.T, 1.0, p, seed).view(ctx.shape)
        if ctx.needs_input_grad[4]:
            grad_a = summed(grad_low, x, 1.0, p, seed)
        if ctx.needs_input_grad[5]:
            grad_b = summed(low, grad_out, s, 0.0, None).T.contiguous()
        return grad_x, None, None, grad if ctx.needs_input_grad[3] else None, grad_a, grad_b, *[None] * 5


def _matrix(x: Tensor) -> Tensor:
    """[..., size] as rows that lie one behind the other."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def row_blocks(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows by owner, cut into blocks that have one owner each.

    Returns:
        row numbers, int32, [blocks * rows of a block], -1 where a block is not full; owners, int32, [blocks].
    """
    step = _kernels().ROWS
    index: list[int] = []
    owner: list[int] = []
    for i, numbers in enumerate(rows):
        index += numbers
        index += [-1] * (-len(numbers) % step)
        owner += [i] * -(-len(numbers) // step)
    return (
        torch.tensor(index, dtype=torch.int32, device=device),
        torch.tensor(owner, dtype=torch.int32, device=device),
    )


def add_routed(
    x: Tensor, result: Tensor, a: Tensor, b: Tensor, blocks: tuple[Tensor, Tensor], scale: float = 1.0
) -> Tensor:
    """Adds scale x A^T B^T to each row of `result`, with A and B of the row's owner; in place, without gradients.

    Args:
        x: [..., size].
        result: [..., out], contiguous; rows that are in no block stay as they are.
        a: [owners, r, size]; lower ranks are padded with zeros.
        b: [owners, out, r].
        blocks: from `row_blocks`, of rows of x seen as a matrix.
    """
    kernels, flat = _kernels(), result.view(-1, result.shape[-1])
    low = kernels.down(_matrix(x), a, 1.0, 0.0, None, blocks)
    kernels.add_up(flat, low, b, scale, 0.0, None, flat, blocks)
    return result
