"""What an adapter does to a module, as a small set of changes.

A module is y = W x + b with a matrix W [out, in], see `kinds`. A method says what an adapter does to it by one change,
or several in a row; each has its algebra beside it: what it does to what goes in (`enter`), to what comes out
(`leave`), to the matrix and to the bias. How a module is run with its changes is decided in `run`, how they become part
of its weight in `merge`.

| change | forward | matrix |
|---|---|---|
| `LowRank` | y + s B A x | W + s B A |
| `Add` | y + M x | W + M |
| `Bias` | y + c | W |
| `ScaleInput`, `ScaleOutput` | W (s * x), s * y | columns, rows of W times s |
| `OnInput`, `OnOutput` | W f(x), f(y), for a linear map f | f of the rows, of the columns of W |
| `Rows` (in `tokens`) | y with some entries replaced | W with some rows replaced |
| `Weight` | y of f(W) | f(W) |
| `Statistics` | y with other buffers in the module | W |
| `Beside` | y + f(x) for any f | has none |
| `Dropped` | y + (what changes make of dropout(x)) - W dropout(x) | what they make of W |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from peft.core.base_op import BaseOp
from peft.ops.lora import add_low_rank, compute_dtype, lora_linear
from peft.ops.matrix import Matrix


class Change:
    """One step of what an adapter does. `module` is the base module that `op` describes."""

    #: whether it adds something to the output that depends on the input alone
    additive: ClassVar[bool] = False
    #: whether it does to the module's own bias what it does to the rest of the output
    with_bias = True

    @property
    def needs_bias(self) -> bool:
        """Whether `leave` has to know the bias that is part of `y`."""
        return not self.with_bias

    def acts(self, op: BaseOp) -> bool:
        """Whether it can be had by what goes in and comes out; else the module has to run with a changed weight."""
        return False

    def enter(self, op: BaseOp, module: Any, x: Tensor) -> Tensor:
        """The input that what comes before this change gets."""
        return x

    def leave(self, op: BaseOp, module: Any, x: Tensor, y: Tensor, bias: Tensor | None, fresh: bool = False) -> Tensor:
        """The output, where `y` is what came before it makes of `enter(x)`.

        Args:
            op, module, x, y: these.
            bias: the bias that is part of y, where `needs_bias`.
            fresh: whether y may be written to.
        """
        return y

    def weight(self, op: BaseOp, module: Any, matrix: Tensor) -> Tensor:
        """The matrix [out, in]; in its dtype, or in that of the adapter."""
        return matrix

    def bias(self, bias: Tensor | None) -> Tensor | None:
        """The bias [out]."""
        return bias

    def of_samples(self, samples: Sequence[int]) -> Change:
        """The change for some samples of a batch, where it is not the same for all."""
        return self


@dataclass(slots=True, eq=False)
class LowRank(Change):
    """y + s rows * (B (middle * (A dropout(x))) + c), and W + s diag(rows) B diag(middle) A.

    Attributes:
        down: A [r, in]; for a stack of matrices that is one tall matrix, [stack, r, in].
        up: B [out, r], or [stack, out, r].
        scale: s; a number, or a tensor of none dimensions.
        dropout: probability of dropout on x, at present.
        offset: s c, [out].
        middle: [r].
        factors: rows, [out].
        low, high: how A x, and B h + c, are computed where they are not products with these matrices.
        where: the vectors of an input that the change is for: of its shape, features included, and of the samples of
            the batch that it holds (None for all) it makes a mask [vectors]; None where the change is for none.
    """

    down: Tensor
    up: Tensor
    scale: Any = 1.0
    dropout: float = 0.0
    offset: Tensor | None = None
    middle: Tensor | None = None
    factors: Tensor | None = None
    low: Callable[[Tensor], Tensor] | None = None
    high: Callable[[Tensor], Tensor] | None = None
    where: Callable[[torch.Size, Sequence[int] | None], Tensor | None] | None = None
    additive: ClassVar[bool] = True

    @property
    def is_foldable(self) -> bool:
        """Whether it is a product for all vectors alike, with what stands between and behind the factors."""
        return self.low is None and self.high is None and self.where is None and self.down.dim() == 2

    @property
    def is_product(self) -> bool:
        """Whether there is no more to it than s B A dropout(x)."""
        return self.is_foldable and self.offset is None and self.middle is None and self.factors is None

    def acts(self, op: BaseOp) -> bool:
        if self.low is not None:
            return True
        if not op.multiplies or self.down.dim() != 2:
            return False
        if op.linear:
            return True
        # A change of full rank costs a convolution more than the convolution itself.
        thin = len(self.down) < min(op.in_features, op.out_features) or self.down.shape[1] != op.in_features
        return op.kind == "Embedding" or self.dropout > 0 or thin

    def folded(self) -> tuple[Tensor, Tensor]:
        """A and B with what stands between and behind them, the scale aside."""
        up = self.up if self.middle is None else self.up * self.middle
        return self.down, up if self.factors is None else up * self.factors[..., None]

    def leave(self, op: BaseOp, module: Any, x: Tensor, y: Tensor, bias: Tensor | None, fresh: bool = False) -> Tensor:
        if self.where is not None:
            return self._leave_some(op, module, x, y)
        if self.is_foldable and op.linear:
            (down, up), dtype = self.folded(), compute_dtype(x)
            # A and B, which are small, come to the dtype of the activations rather than these to theirs.
            y = lora_linear(x.to(dtype), None, None, y.to(dtype), down, up, self.scale, self.dropout, overwrite=fresh)
            return y if self.offset is None else y + op.along_output(module, self.offset.to(dtype))
        return y + self.product(op, module, x, y.dtype)

    def product(self, op: BaseOp, module: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        """What is added to the output, in the dtype of that."""
        if x.is_floating_point():
            dtype = compute_dtype(x)
            x = F.dropout(x.to(dtype), self.dropout) if self.dropout else x.to(dtype)
        down, up = self.folded()
        if self.high is None and not (isinstance(self.scale, float) and self.scale == 1.0):
            up = up * self.scale
        if self.low is None and self.high is None:
            change = op.low_rank(module, x, down.to(dtype), up.to(dtype))
        else:
            low = F.linear(x, down.to(dtype)) if self.low is None else self.low(x)
            change = F.linear(low, up.to(low.dtype)) if self.high is None else self.high(low) * self.scale
        if self.offset is not None and self.high is None:  # else it is part of what that makes
            change = change + op.along_output(module, self.offset.to(change.dtype))
        return change.to(dtype)

    def _leave_some(self, op: BaseOp, module: Any, x: Tensor, y: Tensor) -> Tensor:
        mask = self.where and self.where(x.shape, None)
        if mask is None:
            return y
        index = mask.to(x.device).nonzero().squeeze(1)
        flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        change = replace(self, where=None).product(op, module, flat_x[index], flat_y.dtype)
        return flat_y.index_add(0, index, change.to(flat_y.dtype)).view(y.shape)

    def delta(self) -> Tensor:
        """s diag(rows) B diag(middle) A as a matrix [out, in]."""
        down, up = self.folded()
        return self.scale * (torch.bmm(up, down).flatten(0, 1) if down.dim() == 3 else up @ down)

    def weight(self, op: BaseOp, module: Any, matrix: Tensor) -> Tensor:
        if self.down.dim() == 2 and self.down.shape[1] != matrix.shape[1]:
            raise NotImplementedError("A low-rank change over the channels of all groups is none of a weight.")
        if torch.is_grad_enabled() or isinstance(self.scale, Tensor) or self.down.dim() == 3:
            return matrix + self.delta()
        return add_low_rank(matrix, *self.folded(), self.scale)

    def bias(self, bias: Tensor | None) -> Tensor | None:
        return bias if self.offset is None else self.offset if bias is None else bias + self.offset

    def of_samples(self, samples: Sequence[int]) -> LowRank:
        where = self.where
        return self if where is None else replace(self, where=lambda shape, some: where(shape, samples))


@dataclass(slots=True, eq=False)
class Add(Change):
    """y + rows * (M dropout(x)), and W + diag(rows) M.

    Attributes:
        matrix: M.
        dropout: probability of dropout on x, at present.
        factors: rows, [out].
    """

    matrix: Matrix
    dropout: float = 0.0
    factors: Tensor | None = None
    additive: ClassVar[bool] = True

    def acts(self, op: BaseOp) -> bool:
        return op.linear or op.kind == "Embedding" or (op.multiplies and self.dropout > 0)

    def leave(self, op: BaseOp, module: Any, x: Tensor, y: Tensor, bias: Tensor | None, fresh: bool = False) -> Tensor:
        if x.is_floating_point():
            x = x.to(compute_dtype(x))
        change = op.product(module, F.dropout(x, self.dropout) if self.dropout else x, self.matrix)
        if self.factors is not None:
            change = change * op.along_output(module, self.factors.to(change.dtype))
        return y + change.to(y.dtype)

    def weight(self, op: BaseOp, module: Any, matrix: Tensor) -> Tensor:
        if self.factors is None:
            return self.matrix.added_to(matrix)
        return matrix + (self.matrix.dense() * self.factors[:, None]).to(matrix.dtype)


@dataclass(slots=True, eq=False)
class Bias(Change):
    """y + c, for c [out]."""

    values: Tensor
    additive: ClassVar[bool] = True

    def acts(self, op: BaseOp) -> bool:
        return op.scales_output

    def leave(self, op: BaseOp, module: Any, x: Tensor, y: Tensor, bias: Tensor | None, fresh: bool = False) -> Tensor:
        return y + op.along_output(module, self.values.to(y.dtype))

    def bias(self, bias: Tensor | None) -> Tensor | None:
        return self.values if bias is None else bias + self.values


@dataclass(slots=True, eq=False)
class ScaleInput(Change):
    """W (s * x), for one factor per input feature."""

    values: Tensor

    def acts(self, op: BaseOp) -> bool:
        return op.scales_input

    def enter(self, op: BaseOp, module: Any, x: Tensor) -> Tensor:
        return x * op.along_input(module, self.values.to(x.dtype))

    def weight(self, op: BaseOp, module: Any, matrix: Tensor) -> Tensor:
        return op.scale_columns(module, matrix, self.values)


@dataclass(slots=True, eq=False)
class ScaleOutput(Change):
    """s * y, for one factor per row of W [out]; the module's own bias aside, unless `with_bias`."""

    values: Tensor
    with_bias: bool = True

    def acts(self, op: BaseOp) -> bool:
        return op.scales_output

    def leave(self, op: BaseOp, module: Any, x: Tensor, y: Tensor, bias: Tensor | None, fresh: bool = False) -> Tensor:
        scale = op.along_output(module, self.values.to(y.dtype))
        if self.with_bias or bias is None:
            return y * scale
        return torch.addcmul(op.along_output(module, bias.to(y.dtype)) * (1 - scale), y, scale)

    def weight(self, op: BaseOp, module: Any, matrix: Tensor) -> Tensor:
        return matrix * self.values.to(matrix.dtype)[:, None]

    def bias(self, bias: Tensor | None) -> Tensor | None:
        return bias * self.values if bias is not None and self.with_bias else bias


@dataclass(slots=True, eq=False)
class OnInput(Change):
    """W f(x), for a linear map f(x) = R x.

    Attributes:
        map: f, of vectors [..., in].
        on_weight: W R, of a matrix [out, in].
        thin: L and K with R = I + L K^T, both [in, r], where there are such: W R is W + (W L) K^T then.
    """

    map: Callable[[Tensor], Tensor]
    on_weight: Callable[[Tensor], Tensor]
    thin: tuple[Tensor, Tensor] | None = None

    def acts(self, op: BaseOp) -> bool:
        return op.linear

    def enter(self, op: BaseOp, module: Any, x: Tensor) -> Tensor:
        return self.map(x)

    def weight(self, op: BaseOp, module: Any, matrix: Tensor) -> Tensor:
        return self.on_weight(matrix)


@dataclass(slots=True, eq=False)
class OnOutput(Change):
    """f(y), for a linear map f of vectors [..., out]; the module's own bias aside, unless `with_bias`.

    Attributes:
        map: f. On the columns of W it does what it does to outputs.
        with_bias: whether the bias goes through f as well.
    """

    map: Callable[[Tensor], Tensor]
    with_bias: bool = True

    def acts(self, op: BaseOp) -> bool:
        return op.linear or op.kind == "Embedding"

    def leave(self, op: BaseOp, module: Any, x: Tensor, y: Tensor, bias: Tensor | None, fresh: bool = False) -> Tensor:
        if self.with_bias or bias is None:
            return self.map(y)
        bias = bias.to(y.dtype)
        return self.map(y - bias) + bias

    def weight(self, op: BaseOp, module: Any, matrix: Tensor) -> Tensor:
        return self.map(matrix.T).T

    def bias(self, bias: Tensor | None) -> Tensor | None:
        return self.map(bias) if bias is not None and self.with_bias else bias


@dataclass(slots=True, eq=False)
class Weight(Change):
    """y of f(W), for a `map` f of matrices [out, in]: whatever else changes one."""

    map: Callable[[Tensor], Tensor]

    def weight(self, op: BaseOp, module: Any, matrix: Tensor) -> Tensor:
        return self.map(matrix)


@dataclass(slots=True, eq=False)
class Statistics(Change):
    """The module with other buffers: the statistics of batch normalisation, which it brings up to date in training.

    Attributes:
        buffers: them, by their names in the module.
    """

    buffers: dict[str, Tensor]

    @staticmethod
    def of(changes: Sequence[Change]) -> dict[str, Tensor]:
        """The buffers that these changes put in, the last of them where several do."""
        found = (change.buffers for change in changes if type(change) is Statistics)
        return {name: tensor for buffers in found for name, tensor in buffers.items()}


@dataclass(slots=True, eq=False)
class Beside(Change):
    """y + f(x), for an f that is no matrix: a mixture by token, a network.

    Attributes:
        function: f, of the module's input.
        reason: why it cannot become part of the weight, for the error that says so.
    """

    function: Callable[[Tensor], Tensor]
    reason: str
    additive: ClassVar[bool] = True

    def acts(self, op: BaseOp) -> bool:
        return True

    def leave(self, op: BaseOp, module: Any, x: Tensor, y: Tensor, bias: Tensor | None, fresh: bool = False) -> Tensor:
        return y + self.function(x).to(y.dtype)

    def weight(self, op: BaseOp, module: Any, matrix: Tensor) -> Tensor:
        raise NotImplementedError(self.reason)


@dataclass(slots=True, eq=False)
class Dropped(Change):
    """The difference that changes make, seen for a dropped input: y + changed(dropout(x)) - W dropout(x) - b.

    Attributes:
        changes: the changes, without dropout of their own.
        dropout: probability of dropout on x, at present.
    """

    changes: tuple[Change, ...]
    dropout: float
    additive: ClassVar[bool] = True

    @property
    def needs_bias(self) -> bool:
        return any(change.needs_bias for change in self.changes)

    def acts(self, op: BaseOp) -> bool:
        return all(change.acts(op) for change in self.changes)

    def leave(self, op: BaseOp, module: Any, x: Tensor, y: Tensor, bias: Tensor | None, fresh: bool = False) -> Tensor:
        x = F.dropout(x, self.dropout)
        plain = module(x)
        changed = output_with(self.changes, op, module, x, bias, lambda seen: plain if seen is x else module(seen))
        return y + (changed - plain).to(y.dtype)

    def weight(self, op: BaseOp, module: Any, matrix: Tensor) -> Tensor:
        return weight_with(self.changes, op, module, matrix)

    def bias(self, bias: Tensor | None) -> Tensor | None:
        return bias_with(self.changes, bias)


# ---- several, one after the other


def output_with(
    changes: Sequence[Change], op: BaseOp, module: Any, x: Tensor, bias: Tensor | None, call: Callable[[Tensor], Tensor]
) -> Tensor:
    """What changes make of `call`, which is the module with this bias, for the input x."""
    inputs = [x]
    for change in reversed(changes):
        inputs.append(change.enter(op, module, inputs[-1]))
    y = call(inputs.pop())
    for change in changes:
        y, bias = change.leave(op, module, inputs.pop(), y, bias), change.bias(bias)
    return y


def weight_with(changes: Sequence[Change], op: BaseOp, module: Any, matrix: Tensor) -> Tensor:
    """The matrix as changes make it; the very tensor where none does anything to it."""
    for change in changes:
        matrix = change.weight(op, module, matrix)
    return matrix


def bias_with(changes: Sequence[Change], bias: Tensor | None) -> Tensor | None:
    """The bias as changes make it, likewise."""
    for change in changes:
        bias = change.bias(bias)
    return bias
