"""Values computed from a parameter, kept while it stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")

_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def remember(parameter: Tensor, key: Hashable, compute: Callable[[], T]) -> T:
    """What `compute` makes of `parameter`; of a frozen one, once, until it is written to or moved.

    Parameters that are trained are left out: optimisers may write to them in ways that leave no trace.

    Args:
        parameter: what the value is computed from.
        key: tells values of the same parameter apart.
        compute: makes the value, of nothing else that changes.
    """
    if torch.compiler.is_compiling() or parameter.requires_grad or parameter.is_inference() or parameter.is_meta:
        return compute()
    stamp = (parameter._version, parameter.data_ptr(), parameter.dtype)
    values = _kept.setdefault(parameter, {})
    if key not in values or values[key][0] != stamp:
        with torch.inference_mode(False):  # it may be needed where gradients are wanted next
            values[key] = (stamp, compute())
    return values[key][1]
