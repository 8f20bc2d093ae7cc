"""Matrices with structure: all of them multiply, learn and are added to a weight as the matrices they stand for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from peft.ops.circulant import BlockCirculant
from peft.ops.fourier import Spectrum, draw_frequencies
from peft.ops.hadamard import HadamardProduct, Rescaled
from peft.ops.kronecker import Kron
from peft.ops.matrix import Dense, Product, recomputed
from peft.ops.shards import Tiled
from peft.ops.singular import Framed
from peft.ops.sparse import Entries, draw_places
from peft.ops.wavelets import Wavelets

OUT, IN = 6, 8
WEIGHT = torch.randn(OUT, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def _framed(values, diagonal, transposed=False):
    torch.manual_seed(1)
    left, right = torch.randn(OUT, IN, dtype=values.dtype), torch.randn(IN, IN, dtype=values.dtype)
    return Framed(left, Entries.at(draw_places(IN, IN, 5, 0), values, (IN, IN)), diagonal, right, transposed)


#: kind -> shapes of what is trained, and what makes a matrix [OUT, IN] of it
KINDS = {
    "dense": ([(OUT, IN)], Dense),
    "rescaled": ([(OUT, 2), (2, IN)], lambda *factors: Rescaled(lambda: WEIGHT, factors)),
    "rescaled and shifted": ([(OUT, 2), (2, IN)] * 2, lambda *f: Rescaled(lambda: WEIGHT, f[:2], f[2:])),
    "rescaled by rows": ([(OUT, 1), (OUT, 1)], lambda f, g: Rescaled(lambda: WEIGHT, [f], [g])),
    "rescaled by numbers": ([(1,), (1,)], lambda f, g: Rescaled(lambda: WEIGHT, [f], [g])),
    "entries": ([(9,)], lambda values: Entries.at(draw_places(OUT, IN, 9, 0), values, (OUT, IN))),
    "many entries": ([(40,)], lambda values: Entries.at(draw_places(OUT, IN, 40, 0), values, (OUT, IN))),
    "tiled": ([(3, OUT)], lambda block: Tiled(block, IN)),
    "kronecker": ([(2, 4), (3, 2)], Kron),
    "hadamard": ([(OUT, 2), (2, IN), (OUT, 2), (2, IN)], HadamardProduct),
    "product": ([(2, IN), (OUT, 2)], lambda down, up: Product(down, up, 0.5)),
    "product of many ranks": ([(20, IN), (OUT, 20)], Product),
    "spectrum": ([(7,)], lambda values: Spectrum(values, draw_frequencies(OUT, IN, 7, 0), OUT, IN)),
    "wavelets": ([(5,)], lambda values: Wavelets(values, draw_places(OUT, IN, 5, 0), "db2", OUT, IN)),
    "few wavelets": ([(3,)], lambda values: Wavelets(values, draw_places(OUT, IN, 3, 0), "db1", OUT, IN)),
    "circulant": ([(3, 4, 2)], BlockCirculant),
    "framed": ([(5,), (IN,)], _framed),
}
over = pytest.mark.parametrize("kind", KINDS)


def parts_of(kind, dtype=torch.float64, grad=True):
    torch.manual_seed(0)
    shapes, make = KINDS[kind]
    return [torch.randn(shape, dtype=dtype, requires_grad=grad) for shape in shapes], make


@over
def test_products_and_columns_are_those_of_the_matrix(kind):
    parts, make = parts_of(kind)
    matrix, weight, bias = make(*parts), WEIGHT, torch.randn(OUT, dtype=torch.float64)
    x, index = torch.randn(2, 3, IN, dtype=torch.float64), torch.randint(IN, (2, 4))
    for tracked in (True, False):
        with torch.set_grad_enabled(tracked):
            torch.testing.assert_close(matrix.apply(x), x @ matrix.dense().T)
            torch.testing.assert_close(matrix.linear(x, weight, bias), F.linear(x, weight + matrix.dense(), bias))
    torch.testing.assert_close(matrix.columns(index), matrix.dense().T[index])
    torch.testing.assert_close(matrix.added_to(weight), weight + matrix.dense())
    if matrix.thin() is not None:
        down, up = matrix.thin()
        torch.testing.assert_close(up @ down, matrix.dense())


@over
@pytest.mark.parametrize("way", ["apply", "linear"])
def test_derivatives(kind, way):
    parts, make = parts_of(kind)
    x = torch.randn(2, 2, IN, dtype=torch.float64, requires_grad=kind != "circulant")  # not the true one
    product = lambda x, *parts: make(*parts).apply(x) if way == "apply" else make(*parts).linear(x, WEIGHT)
    assert torch.autograd.gradcheck(product, (x, *parts))
    assert torch.autograd.gradgradcheck(product, (x, *parts))


@over
def test_a_frozen_part_gets_no_gradient(kind):
    parts, make = parts_of(kind)
    parts[0].requires_grad_(False)
    x = torch.randn(2, IN, dtype=torch.float64, requires_grad=True)
    make(*parts).linear(x, WEIGHT).sum().backward()
    assert x.grad is not None and parts[0].grad is None
    assert all(part.grad is not None for part in parts[1:])


@over
def test_the_gradient_of_the_input_is_the_same_where_it_is_traced(kind):
    parts, make = parts_of(kind, grad=False)
    x, grad = torch.randn(3, IN, dtype=torch.float64, requires_grad=True), torch.randn(3, OUT, dtype=torch.float64)
    matrix = make(*parts)
    product = lambda x: matrix.linear(x, WEIGHT)
    (mine,) = torch.autograd.grad(product(x), x, grad)
    torch.testing.assert_close(torch.func.vjp(product, x.detach())[1](grad)[0], mine)
    one_by_one = torch.vmap(lambda row: product(row[None])[0])(x.detach())
    torch.testing.assert_close(one_by_one, product(x))


@over
@pytest.mark.parametrize("way", ["apply", "linear"])
def test_nothing_but_inputs_and_parts_is_kept_for_the_backward_pass(kind, way):
    parts, make = parts_of(kind)
    x, weight, kept = torch.randn(50, IN, dtype=torch.float64, requires_grad=True), WEIGHT.clone(), []
    matrix = make(*parts)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        matrix.apply(x) if way == "apply" else matrix.linear(x, weight)
    known = {t.data_ptr() for t in (x, weight, *matrix.tensors)}
    apart = [t for t in kept if t.data_ptr() not in known and t.numel() > 50 * 3]  # the sums of three shards are
    assert (way == "apply" and kind in ("tiled", "framed", "hadamard")) or not apart


@over
def test_in_the_dtype_of_autocast(kind):
    parts, make = parts_of(kind, torch.float32)
    x = torch.randn(5, IN, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = make(*parts).linear(x.bfloat16(), WEIGHT.bfloat16())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and all(part.grad.dtype == torch.float32 for part in parts)
    expected = torch.autograd.grad(make(*parts).linear(x, WEIGHT.float()).sum(), parts)
    for part, wanted in zip(parts, expected, strict=True):
        torch.testing.assert_close(part.grad, wanted, rtol=0.05, atol=0.3)


def test_what_is_recomputed_is_computed_with_its_inputs_alone():
    x, a = (torch.randn(3, 3, dtype=torch.float64, requires_grad=True) for _ in "xa")
    function = lambda x, a: (x @ a).sigmoid() @ a
    assert torch.autograd.gradcheck(lambda x, a: recomputed(function, x, a), (x, a))
    assert torch.autograd.gradgradcheck(lambda x, a: recomputed(function, x, a), (x, a))
