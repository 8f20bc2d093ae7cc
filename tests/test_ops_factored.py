"""A weight with a low-rank change that stands in for the sum: whatever is done with it must be as with the sum."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peft.ops.factored import FactoredWeight

OUT, IN, RANK, EXPERTS, ROWS = 16, 8, 3, 4, 6


def parts(*stack, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    sizes = ((OUT, IN), (OUT, RANK), (RANK, IN))
    base, left, right = (torch.randn(*stack, *size, generator=generator).to(dtype) for size in sizes)
    return base, left.requires_grad_(), right.requires_grad_()


def inputs(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()


class Product(torch.autograd.Function):
    """A product in which autograd does not see what is done with the weight."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x


grouped = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no product of groups of rows")
ONE, MANY, OFFSETS = (), (EXPERTS,), torch.tensor([2, 2, 5, 6], dtype=torch.int32)
#: (stack, shape of x, what is done)
USES = {
    "linear": (ONE, (2, ROWS, IN), F.linear),
    "linear with bias": (ONE, (ROWS, IN), lambda x, w: F.linear(x, weight=w, bias=torch.arange(float(OUT)))),
    "transposed": (ONE, (ROWS, IN), lambda x, w: x @ w.T),
    "from the left": (ONE, (IN, ROWS), lambda x, w: w @ x),
    "a vector": (ONE, (IN,), lambda x, w: x @ w.t()),
    "one expert": (MANY, (ROWS, IN), lambda x, w: F.linear(x, w[torch.tensor(2)]) + F.linear(x, w[-1])),
    "one transposed expert": (MANY, (ROWS, IN), lambda x, w: x @ w.transpose(1, 2)[1]),
    "an expert for each row": (MANY, (3, IN, 1), lambda x, w: torch.bmm(w[torch.tensor([2, 0, 2])], x)),
    "the same from the right": (MANY, (3, 1, IN), lambda x, w: x.bmm(w.mT[torch.tensor([2, 0, 2])])),
    "each expert": (MANY, (ROWS, IN), lambda x, w: torch.matmul(x, w.transpose(-2, -1))),
    "some experts": (MANY, (2, ROWS, IN), lambda x, w: x @ w[1:3].mT),
    "groups of rows": (MANY, (ROWS, IN), lambda x, w: F.grouped_mm(x, w.transpose(-2, -1), offs=OFFSETS)),
    "another dtype": (ONE, (ROWS, IN), lambda x, w: F.linear(x.double(), w.to(torch.float64))),
    # what is not known of
    "einsum": (MANY, (ROWS, IN), lambda x, w: torch.einsum("ni,eoi->neo", x, w)),
    "entries": (MANY, (ROWS, IN), lambda x, w: x @ w[1, :4].T + w[..., 0].sum() + w[0].abs().sum()),
    "in a list": (ONE, (ROWS, IN), lambda x, w: x @ torch.cat([w, w]).T),
    "other dimensions": (MANY, (ROWS, IN), lambda x, w: w.transpose(0, 1) @ x.T),
    "an autograd function": (ONE, (ROWS, IN), Product.apply),
    "both sides": (ONE, (OUT,), lambda x, w: x @ (w @ w.T)),
}


@pytest.mark.parametrize("use", [pytest.param(use, marks=grouped) if "groups" in use else use for use in USES])
def test_values_and_gradients_are_those_of_the_sum(use):
    stack, shape, function = USES[use]
    base, left, right = parts(*stack)
    outcomes = []
    for weight in (FactoredWeight.of(base, left, right), base + left @ right):
        x = inputs(*shape)
        result = function(x, weight)
        assert type(result) is Tensor
        outcomes.append((result, *torch.autograd.grad(result.square().sum(), (x, left, right))))
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-3)


@grouped
def test_groups_of_rows_with_factors_that_lie_in_memory_in_any_order():
    base, left, right = (part.detach() for part in parts(EXPERTS))
    left, right = left[..., :1].repeat(1, 1, 4), right[:, :1].repeat(1, 4, 1)  # of a rank that needs no padding
    scattered = left.permute(1, 2, 0).contiguous().permute(2, 0, 1), right.mT.contiguous().mT
    x = inputs(ROWS, IN)
    want = F.grouped_mm(x, (base + left @ right).mT, offs=OFFSETS)
    got = F.grouped_mm(x, FactoredWeight.of(base, *scattered).mT, offs=OFFSETS)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_it_looks_like_the_weight():
    base, left, right = parts(EXPERTS, dtype=torch.bfloat16)
    weight = FactoredWeight.of(base, left, right)
    assert isinstance(weight, Tensor)
    assert weight.shape == base.shape
    assert weight.size(0) == EXPERTS
    assert weight.dtype == torch.bfloat16
    assert weight.device == base.device
    assert weight.requires_grad
    with torch.no_grad():
        assert not FactoredWeight.of(base, left, right).requires_grad


def test_code_that_asks_for_its_memory_gets_that_of_the_sum():
    weight = FactoredWeight.of(*parts())
    assert weight.data_ptr() == weight.summed().data_ptr() != 0


@pytest.mark.parametrize("frozen", [True, False])
def test_a_base_and_a_bias_that_are_trained_get_their_gradients(frozen):
    base, left, right = parts()
    base.requires_grad_(not frozen)
    bias = torch.ones(OUT).requires_grad_(not frozen)
    F.linear(inputs(ROWS, IN), FactoredWeight.of(base, left, right), bias).sum().backward()
    assert (base.grad is None) == (bias.grad is None) == frozen
    assert left.grad is not None


@pytest.mark.parametrize("use", ["linear", "one expert", "an expert for each row", "each expert"])
def test_autocast(use):
    stack, shape, function = USES[use]
    base, left, right = parts(*stack)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = function(inputs(*shape), FactoredWeight.of(base, left, right))
        want = function(inputs(*shape), base + left @ right)
    assert got.dtype == want.dtype == torch.bfloat16
    assert (got - want).norm() < 0.02 * want.norm()
    got.float().sum().backward()
    assert left.grad.dtype == torch.float32


@grouped
def test_factors_in_full_precision_beside_a_base_in_half():
    base, left, right = parts(EXPERTS)
    half = base.bfloat16()
    x = inputs(ROWS, IN).bfloat16()
    weight = FactoredWeight.of(half, left, right)
    for got in (x @ weight[1].T, F.grouped_mm(x, weight.mT, offs=OFFSETS)):
        assert got.dtype == torch.bfloat16
        got.float().sum().backward()
    assert left.grad.dtype == torch.float32
    with pytest.raises(RuntimeError, match="dtype"):
        F.linear(x.float(), weight[1])
