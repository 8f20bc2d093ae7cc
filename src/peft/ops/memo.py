"""Values computed from a parameter, kept while it stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from peft.ops.internals import fsdp_modules

T = TypeVar("T")

_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def remember(parameter: Tensor, key: Hashable, compute: Callable[[], T], *others: Tensor) -> T:
    """What `compute` makes of `parameter`; of a frozen one, once, until it is written to or moved.

    Parameters that are trained are left out: optimisers may write to them in ways that leave no trace; and so are all
    where `fully_shard` is at work, which fills the same memory anew in each forward pass.

    Args:
        parameter: what the value is computed from, and kept with.
        key: tells values of the same parameter apart.
        compute: makes the value, of nothing else that changes.
        others: what else it is computed from.
    """
    sources = (parameter, *others)
    if torch.compiler.is_compiling() or any(_changes_unseen(t) for t in sources) or fsdp_modules():
        return compute()
    stamp = tuple((t._version, t.data_ptr(), t.dtype) for t in sources)
    values = _kept.setdefault(parameter, {})
    if key not in values or values[key][0] != stamp:
        with torch.inference_mode(False):  # it may be needed where gradients are wanted next
            values[key] = (stamp, compute())
    return values[key][1]


def _changes_unseen(tensor: Tensor) -> bool:
    # DeepSpeed's ZeRO-3 takes values away and brings them back.
    return tensor.requires_grad or tensor.is_inference() or tensor.is_meta or hasattr(tensor, "ds_id")
