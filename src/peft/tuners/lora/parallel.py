"""LoRA on Megatron's parallel linear layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from peft.core.base_op import BaseOp, ParallelLinearOp
from peft.core.change import LowRank
from peft.ops.lora import compute_dtype
from peft.tuners.lora.base import draw_
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.megatron import mark_whole, own_part, parallel_factor


class LoraParallelLinear(LoraLayer):
    """LoRA on Megatron's `ColumnParallelLinear` or `RowParallelLinear` (arXiv:1909.08053).

    What goes in and out is that of the base: x [sequence, batch, in] to a pair of the output and the bias, each as it
    is shared out there. With p processes, `lora_A[name].weight` is [r, in] and `lora_B[name].weight` [out / p, r] on a
    `ColumnParallelLinear`, [r, in / p] and [out, r] on a `RowParallelLinear`.

    The processes must draw the same random numbers when an adapter is added, as they must for Megatron's own layers;
    then it starts as it would on the whole weight. With sequence parallelism the factor that is whole on each process
    carries Megatron's mark for that, and Megatron's training sums up its gradients.
    """

    op: ParallelLinearOp
    label = "lora.{name}"

    def make_factors(self, name: str, r: int, config: LoraConfig) -> None:
        base = self.get_base_layer()
        a, b = nn.Linear(self.in_features, r, bias=False), nn.Linear(r, self.out_features, bias=False)
        if self.op.shares_input:
            self.lora_A[name] = parallel_factor(config, base, self.in_features, r)
            self.lora_B[name] = mark_whole(b, base)
        else:
            self.lora_A[name] = mark_whole(a, base)
            self.lora_B[name] = parallel_factor(config, base, r, self.out_features)
        self._take(name, a.weight, b.weight)

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str = True) -> None:
        if init_lora_weights is False or self.factors(adapter_name)[0].is_meta:
            return
        r = self.r[adapter_name]
        a, b = torch.empty(r, self.in_features), torch.zeros(self.out_features, r)
        draw_(a, r, init_lora_weights)
        self._take(adapter_name, a, b)

    @torch.no_grad()
    def _take(self, name: str, whole_a: Tensor, whole_b: Tensor) -> None:
        """Copies from whole factors what this process holds of them."""
        (a, b), base = self.factors(name), self.get_base_layer()
        a.copy_(own_part(whole_a, base, self.op) if self.op.shares_input else whole_a)
        b.copy_(whole_b if self.op.shares_input else own_part(whole_b, base, self.op))

    def low_rank(self, name: str) -> LowRank:
        a, b = self.lora_A[name], self.lora_B[name]
        return _ParallelLowRank(a.weight, b.weight, self.scaling[name], self.dropout_of(name), modules=(a, b))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # decomposing a part of a matrix says nothing of the whole


def _call(factor: Any, x: Tensor, **kwargs: Any) -> Tensor:
    """The output of a parallel layer, with its weight in the dtype of `x`."""
    if factor.weight.dtype == x.dtype:
        return factor(x, **kwargs)[0]
    return functional_call(factor, {"weight": factor.weight.to(x.dtype)}, (x,), kwargs)[0]


@dataclass(eq=False)
class _ParallelLowRank(LowRank):
    """A low-rank product whose factors are Megatron's layers, where they are shared out."""

    modules: tuple[Any, Any] = (None, None)

    def leave(self, op: BaseOp, module: Any, x: Tensor, y: Tensor, bias: Tensor | None, fresh: bool = False) -> Tensor:
        (a, b), dtype, parallel = self.modules, compute_dtype(x), op
        assert isinstance(parallel, ParallelLinearOp)
        x = F.dropout(x.to(dtype), self.dropout) if self.dropout else x.to(dtype)
        if parallel.shares_input:
            low = self.scale * _call(a, x)
            return y + F.linear(low, b.weight.to(dtype)).to(y.dtype)
        low = self.scale * F.linear(x, a.weight.to(dtype))
        gathered = y.shape[-1] > b.weight.shape[0]  # a call may ask for it, whatever the layer was made for
        asked = {"runtime_gather_output": gathered} if parallel.processes > 1 and gathered != b.gather_output else {}
        return y + _call(b, low, **asked).to(y.dtype)
