"""Linear layers whose weight is shared out among processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.core.parallel_state import get_tensor_model_parallel_group


class _Exchange(torch.autograd.Function):
    """What goes from process to process on the way there, and on the way back."""

    @staticmethod
    def forward(ctx, x, there, back):
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.back(grad), None, None


class _Parallel(nn.Module):
    def __init__(self, in_features, out_features, config, dim, bias_size, skip_bias_add, is_expert=False):
        super().__init__()
        self.tp_group = get_tensor_model_parallel_group()
        self.config, self.skip_bias_add, self.is_expert = config, skip_bias_add, is_expert
        self.input_size, self.output_size = in_features, out_features
        self.sequence_parallel = config.sequence_parallel
        size = [out_features, in_features]
        size[dim] //= self.tp_group.size()
        assert config.use_cpu_initialization
        self.weight = nn.Parameter(torch.empty(size, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.zeros(bias_size, dtype=config.params_dtype)) if bias_size else None

    def _start(self, init_method, dim):
        whole = torch.empty(self.output_size, self.input_size)
        init_method(whole)
        with torch.no_grad():
            self.weight.copy_(self.part(whole, dim))
        self.weight.tensor_model_parallel, self.weight.partition_dim = True, dim

    # Each of these takes a tensor of this process and gives one.

    def same(self, x: Tensor) -> Tensor:
        return x

    def sum(self, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=self.tp_group)
        return x

    def part(self, x: Tensor, dim: int = -1) -> Tensor:
        return x.chunk(self.tp_group.size(), dim)[self.tp_group.rank()].contiguous()

    def joined(self, x: Tensor, dim: int = -1) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(self.tp_group.size())]
        dist.all_gather(parts, x.contiguous(), group=self.tp_group)
        return torch.cat(parts, dim)

    def tokens_joined(self, x: Tensor) -> Tensor:
        return self.joined(x, 0)

    def part_of_sum(self, x: Tensor) -> Tensor:
        return self.part(self.sum(x), 0)

    def finish(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.skip_bias_add:
            return y, self.bias
        return (y if self.bias is None else y + self.bias), None

    def get_extra_state(self):
        return None

    def set_extra_state(self, state):
        pass


class ColumnParallelLinear(_Parallel):
    """Each process has rows of the weight [out, in], and so a part of the output."""

    def __init__(
        self, input_size, output_size, *, config, init_method, bias=True, gather_output=False, skip_bias_add=False,
        is_expert=False, tp_group=None,
    ):  # fmt: skip
        own = output_size // get_tensor_model_parallel_group().size()
        super().__init__(input_size, output_size, config, 0, own if bias else 0, skip_bias_add, is_expert)
        self.output_size_per_partition, self.gather_output = own, gather_output
        self._start(init_method, 0)

    def forward(self, x, weight=None, runtime_gather_output=None):
        if self.sequence_parallel:
            x = _Exchange.apply(x, self.tokens_joined, self.part_of_sum)
        else:
            x = _Exchange.apply(x, self.same, self.sum)
        y = nn.functional.linear(x, self.weight if weight is None else weight)
        y, bias = self.finish(y)
        if self.gather_output if runtime_gather_output is None else runtime_gather_output:
            y = _Exchange.apply(y, self.joined, self.part)
        return y, bias


class RowParallelLinear(_Parallel):
    """Each process has columns of the weight [out, in], and so a part of each sum that makes the output."""

    def __init__(
        self, input_size, output_size, *, config, init_method, bias, input_is_parallel, skip_bias_add,
        is_expert=False, tp_group=None,
    ):  # fmt: skip
        super().__init__(input_size, output_size, config, 1, output_size if bias else 0, skip_bias_add, is_expert)
        self.input_size_per_partition = input_size // self.tp_group.size()
        self.input_is_parallel = input_is_parallel
        self._start(init_method, 1)

    def forward(self, x):
        if not self.input_is_parallel:
            x = _Exchange.apply(x, self.part, self.joined)
        y = nn.functional.linear(x, self.weight)
        if self.sequence_parallel:
            y = _Exchange.apply(y, self.part_of_sum, self.tokens_joined)
        else:
            y = _Exchange.apply(y, self.sum, self.same)
        return self.finish(y)
