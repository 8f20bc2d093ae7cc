"""Modules that do more, or other things, than their kind."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peft.core.base_op import BaseOp


def has_own_forward(module: Any, op: BaseOp) -> bool:
    """Whether the class of a module has a forward of its own that is not the product, or look-up, of its kind.

    What an adapter does there is what the changed weight does in that forward (OPT's positions add 2 to the ids).
    """
    plain, weight = getattr(nn, op.kind, None), module._parameters.get(op.weight_name)
    if op.kind not in ("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d") or not isinstance(module, plain or ()):
        return False
    packed = type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.itemsize == 1
    if packed or type(module).forward is plain.forward:  # type: ignore[union-attr]
        return False
    if op.kind != "Linear":
        return not hasattr(module, "embed_scale")
    if weight.is_meta:
        return False
    x = torch.linspace(-1, 1, op.in_features, device=weight.device, dtype=weight.dtype)[None]
    try:
        with torch.no_grad():
            y = type(module).forward(module, x)
            return not torch.allclose(y.float(), F.linear(x, weight, module.bias).float(), rtol=0.02, atol=0.02)
    except Exception:  # whatever it does, it is not the product
        return True
