"""Kinds of base module: how each holds its matrix, and how it is applied with another one.

A method sees a weight as a matrix [out, in] whatever the module is. `BaseOp` gives that view of the module's own
weight, turns a changed matrix back into the module's shape, and runs the module with it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.core.routing import rows_of, select_rows
from peft.core.storage.shared import run_with, shaped
from peft.ops.matrix import Matrix


class BaseOp:
    """A module seen as a matrix [out_features, in_features] and a way to apply it.

    Attributes:
        kind: what the module is, in a word; part of what status reports and errors say.
        weight_name, bias_name: its parameters (`bias_name` may name None).
        linear: whether the module maps the last dimension of its input by the matrix.
        multiplies: whether the product of an input with another matrix can be had by itself (`low_rank`, `product`).
        scales_input, scales_output: whether the features of its input and output lie along one dimension.
        batch_dim: the dimension of the input that counts samples.
        projections: how many of the same size lie one above the other in it.
        kernel: the sizes of a convolution's kernel.
        rounds: how often it counts all of them, one after the other; None where samples are mingled.
    """

    kind = "Module"
    weight_name = "weight"
    bias_name: str | None = "bias"
    linear = False
    multiplies = False
    scales_input = False
    scales_output = False
    batch_dim = 0
    projections = 1
    kernel: tuple[int, ...] = ()
    rounds: int | None = 1
    own_forward = False  # whether its forward is more than its kind, so that only its weight can be changed

    def __init__(self, module: nn.Module):
        self.out_features, self.in_features = self.features(module)

    def features(self, module: Any) -> tuple[int, int]:
        """(out_features, in_features)."""
        out_features, in_features = self.matrix(shaped(getattr(module, self.weight_name))).shape
        return out_features, in_features

    @property
    def part_features(self) -> int:
        """Rows of one of the matrices that lie one above the other: of a projection of attention, or of an expert."""
        return getattr(self, "expert_out_features", self.out_features // self.projections)

    def matrix(self, weight: Tensor) -> Tensor:
        """The module's weight as a matrix [out, in]; a view where that is possible."""
        return weight

    def unmatrix(self, matrix: Tensor, like: Tensor) -> Tensor:
        """A matrix [out, in] in the shape of the weight `like`."""
        return matrix.reshape(like.shape)

    def run(self, module: nn.Module, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        """The module's output with another weight (in the module's shape) and bias."""
        tensors = {self.weight_name: weight}
        if bias is not None and self.bias_name is not None:
            tensors[self.bias_name] = bias
        return run_with(module, tensors, args, kwargs)

    def low_rank(self, module: Any, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """What the module, with the matrix up down in place of its own and no bias, makes of x.

        Args:
            module: the module.
            x: its input.
            down: [r, in].
            up: [out, r].
        """
        raise NotImplementedError

    def product(self, module: Any, x: Tensor, matrix: Matrix) -> Tensor:
        """What the module, with this matrix in place of its own and no bias, makes of x."""
        raise NotImplementedError

    def along_output(self, module: Any, values: Tensor) -> Tensor:
        """One value per row of the matrix [out], in the shape in which it multiplies outputs."""
        return values

    def along_input(self, module: Any, values: Tensor) -> Tensor:
        """One value per input feature, in the shape in which it multiplies inputs."""
        return values

    def scale_columns(self, module: Any, matrix: Tensor, values: Tensor) -> Tensor:
        """The matrix of the module with its input features multiplied by `values` first."""
        return matrix * values

    def input_size(self, module: Any) -> int:
        """How many features the input has; the matrix may have several columns for each."""
        return self.in_features

    def select(self, index: Tensor, rows: int, args: tuple, kwargs: dict[str, Any]) -> tuple[list, dict[str, Any]]:
        """The arguments of a call for some samples of the batch: what has a row per sample, cut down to `index`."""
        return select_rows(index, rows, args, kwargs)


class _LastDimension(BaseOp):
    """Modules that map the last dimension of their input by the matrix."""

    linear = multiplies = scales_input = scales_output = True

    def low_rank(self, module: Any, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return F.linear(F.linear(x, down), up)

    def product(self, module: Any, x: Tensor, matrix: Matrix) -> Tensor:
        return matrix.apply(x)


class LinearOp(_LastDimension):
    """`nn.Linear` and whatever behaves like it, quantised or not: weight [out, in]."""

    kind = "Linear"

    def features(self, module: Any) -> tuple[int, int]:
        # The packed weight of a quantised layer has another shape or another name, so the module is asked.
        try:
            return module.out_features, module.in_features
        except AttributeError:
            return super().features(module)

    def run(self, module: nn.Module, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        if self.own_forward:
            return super().run(module, weight, bias, *args, **kwargs)
        return F.linear(args[0], weight, bias)


class EetqOp(LinearOp):
    """EETQ's int8 layers: weight [in, out]; those of transformers say it in no other way."""

    def features(self, module: Any) -> tuple[int, int]:
        in_features, out_features = module.weight.shape
        return out_features, in_features


class _Transposed(BaseOp):
    """Modules that hold their weight as [in, out]."""

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def unmatrix(self, matrix: Tensor, like: Tensor) -> Tensor:
        return matrix.T


class TransposedOp(_LastDimension, _Transposed):
    """transformers' `Conv1D` (GPT-2): a linear layer that holds its weight as [in, out]."""

    kind = "Conv1D"

    def run(self, module: nn.Module, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        return F.linear(args[0], weight.T, bias)


class ConvOp(BaseOp):
    """Convolutions in 1 to 3 dimensions: weight [out, in / groups, *kernel], the matrix its flattening."""

    multiplies = scales_input = scales_output = True

    def __init__(self, module: Any):
        super().__init__(module)
        self.kernel = tuple(module.kernel_size)
        self.kind = f"Conv{len(self.kernel)}d"  # subclasses too

    def low_rank(self, module: Any, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        # LoRA's A sees the channels of all groups, and B has those of the ranks that belong to the output's group. As a
        # change of the matrix, all ranks are seen by each group, in its own channels.
        groups = module.groups if down.shape[1] == self.in_features else 1
        window = (module.in_channels // groups, *self.kernel)
        low = _convolve(module, x, down.reshape(-1, *window).repeat(groups, *[1] * len(window)), groups)
        conv = _CONVOLUTIONS[len(self.kernel) - 1]
        return conv(low, up.reshape(*up.shape, *[1] * len(self.kernel)), groups=module.groups)

    def run(self, module: Any, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        if self.weight_name in module._parameters:  # else it is made of other tensors
            return super().run(module, weight, bias, *args, **kwargs)
        y = _convolve(module, args[0], weight, module.groups)
        return y if bias is None else y + self.along_output(module, bias)

    def product(self, module: Any, x: Tensor, matrix: Matrix) -> Tensor:
        weight = matrix.dense().to(x.dtype).reshape(-1, module.in_channels // module.groups, *self.kernel)
        return _convolve(module, x, weight, module.groups)

    def along_output(self, module: Any, values: Tensor) -> Tensor:
        return values.view(-1, *[1] * len(self.kernel))

    along_input = along_output

    def scale_columns(self, module: Any, matrix: Tensor, values: Tensor) -> Tensor:
        per_row = values.reshape(module.groups, -1).repeat_interleave(len(matrix) // module.groups, dim=0)
        return matrix * per_row.repeat_interleave(matrix.shape[1] // per_row.shape[1], dim=1)

    def input_size(self, module: Any) -> int:
        return module.in_channels

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)


_CONVOLUTIONS: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)


def _convolve(module: Any, x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """A convolution like the module's, with another weight and no bias."""
    padding = module.padding
    if module.padding_mode != "zeros":
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        padding = 0
    conv = _CONVOLUTIONS[len(module.kernel_size) - 1]
    return conv(x, weight, None, module.stride, padding, module.dilation, groups)


class EmbeddingOp(_Transposed):
    """`nn.Embedding`: weight [tokens, dim]; as a matrix it maps one-hot tokens to dim, so it is [dim, tokens]."""

    kind = "Embedding"
    bias_name = None
    multiplies = scales_output = True

    def low_rank(self, module: Any, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        low = F.embedding(x, down.T, padding_idx=module.padding_idx, scale_grad_by_freq=module.scale_grad_by_freq)
        return self.scaled(module, F.linear(low, up))

    def product(self, module: Any, x: Tensor, matrix: Matrix) -> Tensor:
        return self.scaled(module, matrix.columns(x))

    @staticmethod
    def scaled(module: Any, rows: Tensor) -> Tensor:
        """Some models (Gemma) multiply the embedding in its own forward."""
        scale = getattr(module, "embed_scale", None)
        return rows if scale is None else rows * torch.as_tensor(scale).to(rows)

    def features(self, module: Any) -> tuple[int, int]:
        if not module.weight.is_floating_point():  # packed
            return module.embedding_dim, module.num_embeddings
        return super().features(module)

    def run(self, module: Any, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        if not module.weight.is_floating_point() or self.weight_name not in module._parameters:  # made by its forward
            return F.embedding(args[0], weight, module.padding_idx)
        return super().run(module, weight, bias, *args, **kwargs)


class AttentionOp(BaseOp):
    """The fused input projection of `nn.MultiheadAttention`: in_proj_weight [3 dim, dim].

    The output projection is a module of its own there and gets an adapter of its own.
    """

    kind = "MultiheadAttention"
    weight_name = "in_proj_weight"
    bias_name = "in_proj_bias"
    projections = 3

    def __init__(self, module: nn.MultiheadAttention):
        super().__init__(module)
        self.batch_dim = 0 if module.batch_first else 1
        self.heads = module.num_heads

    #: arguments of its forward, in order, that have a row per sample
    ARGUMENTS = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask")

    def select(self, index: Tensor, rows: int, args: tuple, kwargs: dict[str, Any]) -> tuple[list, dict[str, Any]]:
        named = {**dict(zip(self.ARGUMENTS, args, strict=False)), **kwargs}
        for name in ("query", "key", "value"):
            named[name] = named[name].index_select(self.batch_dim, index)
        named["key_padding_mask"] = rows_of(named.get("key_padding_mask"), index, rows)
        mask = named.get("attn_mask")
        if mask is not None and mask.dim() == 3:
            named["attn_mask"] = mask.unflatten(0, (rows, self.heads)).index_select(0, index).flatten(0, 1)
        return [named.pop("query")], named


class ParallelLinearOp(BaseOp):
    """Megatron's `ColumnParallelLinear` and `RowParallelLinear`: each process holds a part of the weight.

    The part [out / processes, in] or [out, in / processes] is what is seen as matrix; `in_features` and `out_features`
    are those of the whole. Inputs are [sequence, batch, in], and what comes out is a pair: the output, and the bias
    where adding it is left to the caller.

    Attributes:
        shares_input: whether the processes share the columns (`RowParallelLinear`) rather than the rows.
        processes: how many of them share the weight.
    """

    kind = "ParallelLinear"
    batch_dim = 1
    multiplies = True

    def __init__(self, module: Any):
        super().__init__(module)
        self.shares_input = hasattr(module, "input_size_per_partition")
        if self.shares_input:
            self.processes = module.input_size // module.input_size_per_partition
        else:
            self.processes = module.output_size // module.output_size_per_partition
        if getattr(module, "is_expert", False):  # it sees tokens sorted by expert
            self.rounds = None

    def features(self, module: Any) -> tuple[int, int]:
        return module.output_size, module.input_size


class NormOp(BaseOp):
    """Norms of torch (by layer, group, batch) and of other packages (T5's, RMS): weight [dim], the matrix [dim, 1]."""

    kind = "LayerNorm"

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.reshape(-1, 1)


class ParameterOp(BaseOp):
    """One `nn.Parameter` of a module: [out, in], or a stack [experts, out, in] as fused mixtures of experts hold it.

    A stack is seen as one matrix [experts * out, in]. Modules that say `is_transposed` hold [experts, in, out].
    """

    kind = "Parameter"
    bias_name = None

    def __init__(self, module: nn.Module, parameter_name: str):
        self.weight_name = parameter_name
        weight = shaped(getattr(module, parameter_name))
        if weight.dim() not in (2, 3):
            raise ValueError(
                f"Parameter {parameter_name!r} has {weight.dim()} dimensions; a matrix or a stack of matrices"
                " is needed."
            )
        self.num_experts = weight.shape[0] if weight.dim() == 3 else 1
        self.transposed = weight.dim() == 3 and bool(getattr(module, "is_transposed", False))
        self.rounds = _rounds_of_experts(module, self.num_experts)
        super().__init__(module)
        #: of one expert
        self.expert_out_features = self.out_features // self.num_experts

    def matrix(self, weight: Tensor) -> Tensor:
        weight = weight.mT if self.transposed else weight
        return weight.reshape(-1, weight.shape[-1])

    def unmatrix(self, matrix: Tensor, like: Tensor) -> Tensor:
        return matrix.reshape(like.mT.shape).mT if self.transposed else super().unmatrix(matrix, like)


class BlockOp(BaseOp):
    """A whole block of a model, which has no matrix: for methods that stand around it."""

    kind = "Block"
    weight_name = ""
    bias_name = None

    def features(self, module: Any) -> tuple[int, int]:
        return 0, 0


def _rounds_of_experts(module: nn.Module, num_experts: int) -> int | None:
    """`BaseOp.rounds` of modules of experts; a module does not say it, so those of other packages go by their name."""
    name = type(module).__name__
    if name == "Llama4TextExperts":  # all tokens for the first expert, then all for the second
        return num_experts
    # JetMoe and its like: the tokens of the first expert, then those of the second.
    return None if name.endswith("ParallelExperts") else 1


def _is_conv1d(module: nn.Module) -> bool:
    # By name and only if it is loaded: asking must not import transformers.
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    return pytorch_utils is not None and isinstance(module, pytorch_utils.Conv1D)


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and (
        isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase))
        or (type(module).__name__.endswith("Norm") and weight.dim() == 1)
    )


def _is_parallel_linear(module: nn.Module) -> bool:
    # By name: asking must not import Megatron, which has been in more than one place of its package.
    return "megatron" in sys.modules and any(
        kind.__name__ in ("ColumnParallelLinear", "RowParallelLinear") and kind.__module__.startswith("megatron.")
        for kind in type(module).__mro__
    )


def _is_linear_like(module: nn.Module) -> bool:
    """Quantised and sharded linear layers of other packages are no `nn.Linear`, but say what they map."""
    known = all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))
    # Megatron's layers made of Transformer Engine's are shared out among processes, and return pairs.
    return known and not any(kind.__module__.startswith("megatron.") for kind in type(module).__mro__)


#: first match wins
_KINDS: list[tuple[Callable[[nn.Module], bool], type[BaseOp]]] = [
    (lambda module: isinstance(module, nn.Linear), LinearOp),  # by far the most frequent
    (_is_conv1d, TransposedOp),
    (lambda module: isinstance(module, nn.Embedding), EmbeddingOp),
    (lambda module: isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)), ConvOp),
    (lambda module: isinstance(module, nn.MultiheadAttention), AttentionOp),
    (_is_norm, NormOp),
    (_is_parallel_linear, ParallelLinearOp),
    (lambda module: type(module).__name__ == "EetqLinear", EetqOp),
    (_is_linear_like, LinearOp),
]


def base_op(module: nn.Module, parameter_name: str | None = None) -> BaseOp | None:
    """What kind of module this is, or None where it is none that a matrix can be seen in.

    Raises:
        ValueError: a module of a known kind that is set up in a way that has no one matrix.
    """
    if parameter_name is not None:
        return ParameterOp(module, parameter_name)
    for matches, kind in _KINDS:
        if matches(module):
            if kind is AttentionOp and module.in_proj_weight is None:
                raise ValueError(
                    "nn.MultiheadAttention with keys or values of another width (kdim, vdim) has no fused input"
                    " projection and is not supported."
                )
            return kind(module)
    return None
