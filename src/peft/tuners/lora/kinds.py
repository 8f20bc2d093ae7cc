"""The LoRA layer for each kind of base module."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from peft.core.base_op import ParameterOp
from peft.core.change import Bias, Change, LowRank, Weight
from peft.core.slots import Slot
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.factors import load
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.parallel import LoraParallelLinear


class Linear(LoraLayer):
    """LoRA on linear layers, with their weight as [out, in] or transposed."""

    def change(self, name: str) -> Change | Iterable[Change]:
        if not self.with_attention:
            return super().change(name)
        added = self.low_rank(name)

        # huggingface/peft applies the change of attention's output projection twice, once of them out of sight of the
        # gradient; adapters trained with it rely on that.
        def twice(matrix: Tensor) -> Tensor:
            change = added.delta().to(matrix.dtype)
            return matrix + change + change.detach()

        return (Weight(twice),) if added.offset is None else (Weight(twice), Bias(added.offset))


class Embedding(LoraLayer):
    """LoRA on embeddings: the change of the row of token t is scaling B A[:, t]."""

    lora_A = lora_B = None
    lora_embedding_A = Slot()
    lora_embedding_B = Slot()

    def make_factors(self, name: str, r: int, config: LoraConfig) -> None:
        self.lora_embedding_A[name] = nn.Parameter(torch.randn(r, self.in_features))
        self.lora_embedding_B[name] = nn.Parameter(torch.randn(self.out_features, r))

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str = True) -> None:
        if init_lora_weights is not False:
            a, b = self.factors(adapter_name)
            nn.init.zeros_(a)
            nn.init.normal_(b)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        return self.lora_embedding_A[name], self.lora_embedding_B[name]

    def low_rank(self, name: str) -> LowRank:
        return LowRank(*self.factors(name), self.scaling[name])


class _ConvNd(LoraLayer):
    """LoRA on convolutions: A is the same convolution with r outputs, B a 1x1 convolution in as many groups."""

    def make_factors(self, name: str, r: int, config: LoraConfig) -> None:
        base = self.get_base_layer()
        # skip_init passes no string for padding_mode on to some versions' meta device, so it is set after.
        shape = dict(kernel_size=base.kernel_size, stride=base.stride, padding=base.padding, dilation=base.dilation)
        conv = getattr(nn, self.op.kind)
        self.lora_A[name] = conv(base.in_channels, r, **shape, padding_mode=base.padding_mode, bias=False)
        self.lora_B[name] = conv(r, base.out_channels, 1, groups=base.groups, bias=config.lora_bias)

    def check_merge(self, name: str) -> None:
        super().check_merge(name)
        if self.get_base_layer().groups > 1:
            raise NotImplementedError("LoRA on a convolution with groups cannot be merged: its A sees all channels.")


class Conv1d(_ConvNd):
    """LoRA on `nn.Conv1d`."""


class Conv2d(_ConvNd):
    """LoRA on `nn.Conv2d`."""


class Conv3d(_ConvNd):
    """LoRA on `nn.Conv3d`."""


class MultiheadAttention(LoraLayer):
    """LoRA on the fused input projection of `nn.MultiheadAttention`; its output projection has a layer of its own."""


class ParamWrapper(LoraLayer):
    """LoRA on one parameter of a module, a matrix or a stack of matrices (fused mixtures of experts).

    For a stack of E matrices [out, in], A is [r E, in], expert by expert, and B [out, r E], rank by rank.
    """

    op: ParameterOp
    label = "lora.{name}"
    _swapped_in_out = True  # transformers 5.0 would swap the features, which are in the right order here

    def __init__(
        self, base_layer: nn.Module, adapter_name: str | None = None, parameter_name: str | None = None,
        config: LoraConfig | None = None, r: int = 0, lora_alpha: float = 1, **kwargs: Any,
    ):  # fmt: skip
        super().__init__(base_layer, adapter_name, config, r, lora_alpha, parameter_name, **kwargs)

    def make_factors(self, name: str, r: int, config: LoraConfig) -> None:
        experts = self.op.num_experts
        self.lora_A[name] = nn.Linear(self.in_features, r * experts, bias=False)
        self.lora_B[name] = nn.Linear(r * experts, self.op.expert_out_features, bias=False)

    def low_rank(self, name: str) -> LowRank:
        return LowRank(*load(self, name), self.scaling[name], self.dropout_of(name))

    @property
    def num_experts(self) -> int:
        """How many matrices the parameter stacks."""
        return self.op.num_experts

    @property
    def out_features(self) -> int:
        return self.op.expert_out_features

    def get_param(self) -> nn.Parameter:
        """The parameter."""
        return getattr(self.get_base_layer(), self.op.weight_name)


LAYERS: dict[str, type[LoraLayer]] = {
    "Linear": Linear, "Conv1D": Linear, "Embedding": Embedding, "Conv1d": Conv1d, "Conv2d": Conv2d, "Conv3d": Conv3d,
    "MultiheadAttention": MultiheadAttention, "Parameter": ParamWrapper, "ParallelLinear": LoraParallelLinear,
}  # fmt: skip
