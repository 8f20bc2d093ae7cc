"""The fused product of a linear layer with LoRA: equal to the plain formula wherever and however it is used."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import peft
from peft.ops.dropout import draw_mask, drop_probability, mask_factors
from peft.ops.lora import add_low_rank, lora_linear
from peft.ops.matrix import Product

torch.set_num_threads(1)


def lora_linear_plain(x, weight, bias, result, a, b, scaling, p):
    """The formula itself."""
    result = F.linear(x, weight, bias) if result is None else result
    return result + F.linear(F.linear(F.dropout(x, p), a), b) * scaling


def tensors(dtype=torch.float64, rows=(3, 2), size=(5, 4), r=2, x_grad=True):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    x = draw(*rows, size[0]).requires_grad_(x_grad)
    return (
        x,
        draw(size[1], size[0]),
        draw(size[1]),
        draw(r, size[0]).requires_grad_(),
        draw(size[1], r).requires_grad_(),
    )


@pytest.mark.parametrize("x_grad", [True, False])
@pytest.mark.parametrize("rows", [(3, 2), (4,)])
def test_gradients_are_right(rows, x_grad):
    x, weight, bias, a, b = tensors(rows=rows, x_grad=x_grad)
    assert gradcheck(lambda x, a, b: lora_linear(x, weight, bias, None, a, b, 0.7), (x, a, b))
    assert gradgradcheck(lambda x, a, b: lora_linear(x, weight, bias, None, a, b, 0.7), (x, a, b))

    for overwrite in (True, False):

        def with_given_result(x, a, b, overwrite=overwrite):
            return lora_linear(x, None, None, x @ weight.T + bias, a, b, 0.7, overwrite=overwrite)

        assert gradcheck(with_given_result, (x, a, b))
        assert gradgradcheck(with_given_result, (x, a, b))


def test_gradients_are_right_with_dropout():
    x, weight, bias, a, b = tensors()

    def dropped(x, a, b):
        torch.manual_seed(11)
        return lora_linear(x, weight, bias, None, a, b, 0.7, p=0.4)

    assert gradcheck(dropped, (x, a, b))
    assert gradgradcheck(dropped, (x, a, b))


@pytest.mark.parametrize("frozen", ["a", "b"])
def test_a_frozen_factor_gets_no_gradient_and_the_other_the_right_one(frozen):
    x, weight, bias, a, b = tensors()
    (a if frozen == "a" else b).requires_grad_(False)
    lora_linear(x, weight, bias, None, a, b, 0.7).sum().backward()
    got = x.grad, a.grad, b.grad
    expected = tensors()
    lora_linear_plain(expected[0], weight, bias, None, expected[3], expected[4], 0.7, 0.0).sum().backward()
    for value, reference, name in zip(got, (expected[0].grad, expected[3].grad, expected[4].grad), "xab", strict=True):
        assert value is None if name == frozen else torch.allclose(value, reference)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("grad", [True, False])
def test_agrees_with_the_formula_in_every_dtype(dtype, tolerance, grad):
    x, weight, bias, a, b = tensors(dtype, rows=(6, 7), size=(16, 12), r=4)
    exact = lora_linear_plain(*(t.double() for t in (x, weight, bias)), None, a.double(), b.double(), 1.5, 0.0)
    with torch.set_grad_enabled(grad):
        result = lora_linear(x, weight, bias, None, a, b, 1.5)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), exact, rtol=tolerance, atol=10 * tolerance)


#: torch says what autograd keeps, and takes a descriptor into a graph
newer_torch = pytest.mark.skipif(torch.__version__ < "2.6", reason="torch is too old")


@newer_torch
def test_an_input_that_is_a_product_is_not_kept_beside_its_factors():
    n, size, r = 64, 32, 4
    torch.manual_seed(0)
    u, v = torch.randn(n, size, requires_grad=True), torch.randn(n, size, requires_grad=True)
    weight, a, b = (
        torch.randn(size, size),
        torch.randn(r, size, requires_grad=True),
        torch.randn(size, r, requires_grad=True),
    )

    def step(product):
        storages = {}
        with torch.autograd.graph.save_on_cpu() if product is None else nullcontext():
            out = lora_linear(torch.tanh(u) * torch.sigmoid(v), weight, None, None, a, b, 0.5)
        node = out.grad_fn
        for tensor in node.saved_tensors:
            if tensor is not None:
                storages[tensor.untyped_storage().data_ptr()] = tensor.nbytes
        kept = {
            t.untyped_storage().data_ptr()
            for t in (node.next_functions[0][0]._saved_self, node.next_functions[0][0]._saved_other)
        }
        return out, torch.autograd.grad(out.square().sum(), (u, v, a, b)), kept <= storages.keys()

    shared, own = step("shared"), step(None)
    assert shared[2] and not own[2]
    torch.testing.assert_close(shared[0], own[0])
    torch.testing.assert_close(shared[1], own[1])
    small = [t.detach().double()[:2, :3].requires_grad_() for t in (u, v)]
    factor_a, factor_b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3), (4, 2)))
    matrix = torch.randn(4, 3, dtype=torch.float64)

    def product(u, v, a, b):
        return lora_linear(torch.tanh(u) * torch.sigmoid(v), matrix, None, None, a, b, 0.5)

    assert gradcheck(product, (*small, factor_a, factor_b))
    assert gradgradcheck(product, (*small, factor_a, factor_b))


@newer_torch
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["factors", "matrix"])
@pytest.mark.parametrize("frozen_norm", [True, False])
def test_an_input_behind_a_norm_is_not_kept_beside_what_the_norm_keeps(kind, p, frozen_norm):
    if kind == "matrix" and p:
        pytest.skip("matrices have no dropout")
    torch.manual_seed(0)
    h, matrix = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True), torch.randn(5, 4, dtype=torch.float64)
    a, b = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((2, 4), (5, 2)))
    scales = torch.rand(4, dtype=torch.float64, requires_grad=not frozen_norm)

    def step(h, a, b, own=False):
        torch.manual_seed(1)
        x = scales * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6))
        seen = x.clone() if own else x
        product = Product(a, b) if kind == "matrix" else None
        return x, product.linear(seen, matrix) if product else lora_linear(seen, matrix, None, None, a, b, 0.5, p)

    x, out = step(h, a, b)
    assert x.data_ptr() not in {t.data_ptr() for t in out.grad_fn.saved_tensors if t is not None}
    torch.testing.assert_close(
        *(torch.autograd.grad(step(h, a, b, own)[1].square().sum(), (h, a, b)) for own in (False, True))
    )
    assert gradcheck(lambda *some: step(*some)[1], (h, a, b))
    assert gradgradcheck(lambda *some: step(*some)[1], (h, a, b))


def test_under_func_transforms_it_is_the_plain_formula():
    x, weight, bias, a, b = (t.detach() for t in tensors())
    loss = lambda a: lora_linear(x, weight, bias, None, a, b, 0.7).square().sum()
    plain = lambda a: lora_linear_plain(x, weight, bias, None, a, b, 0.7, 0.0).square().sum()
    torch.testing.assert_close(torch.func.grad(loss)(a), torch.func.grad(plain)(a))
    rows = torch.func.vmap(lambda row: lora_linear(row, weight, bias, None, a, b, 0.7))(x)
    torch.testing.assert_close(rows, lora_linear_plain(x, weight, bias, None, a, b, 0.7, 0.0))
    _, tangent = torch.func.jvp(loss, (a,), (torch.ones_like(a),))
    torch.testing.assert_close(tangent, torch.func.jvp(plain, (a,), (torch.ones_like(a),))[1])


# ---- dropout


@settings(deadline=None, max_examples=30)
@given(p=st.floats(0.001, 0.999), numel=st.integers(1, 500))
def test_masks_have_a_bit_per_element_and_two_values(p, numel):
    mask = draw_mask(numel, p, torch.device("cpu"))
    assert mask.dtype == torch.uint8 and numel / 8 <= len(mask) < numel / 8 + 8
    factors = mask_factors(mask, p, torch.empty(numel))
    keep = 1 - drop_probability(p)
    assert abs(drop_probability(p) - p) <= 2**-12
    assert all(value == 0 or value == pytest.approx(1 / keep, rel=1e-5) for value in factors.tolist())


@pytest.mark.parametrize("p", [0.05, 0.1, 0.25, 0.5, 0.9])
def test_masks_drop_the_share_they_are_asked_to_independently(p):
    torch.manual_seed(0)
    n = 400_000
    kept = mask_factors(draw_mask(n, p, torch.device("cpu")), p, torch.empty(n)) > 0
    deviation = (p * (1 - p) / n) ** 0.5
    assert abs(kept.float().mean().item() - (1 - p)) < 5 * deviation + 2**-12
    centred = kept.float() - kept.float().mean()
    for distance in (1, 2, 7, 8, 63, 64):
        assert abs((centred[distance:] * centred[:-distance]).mean().item()) < 5 * p * (1 - p) / n**0.5


def test_a_seed_gives_the_same_mask():
    torch.manual_seed(4)
    first = draw_mask(1000, 0.1, torch.device("cpu"))
    assert not torch.equal(first, draw_mask(1000, 0.1, torch.device("cpu")))
    torch.manual_seed(4)
    assert torch.equal(first, draw_mask(1000, 0.1, torch.device("cpu")))


# ---- in a model


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 5)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def adapted(dropout=0.0, dtype=torch.float32, plain=False):
    torch.manual_seed(0)
    model = peft.get_peft_model(
        Two().to(dtype),
        peft.LoraConfig(r=3, target_modules=["first", "second"], init_lora_weights=False, lora_dropout=dropout),
    )
    if plain:  # somebody who watches a factor has it called, so nothing is fused
        for name, module in model.named_modules():
            if name.endswith(("lora_A.default", "lora_B.default")):
                module.register_forward_hook(lambda *_: None)
    return model


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def train_step(model, run=lambda model, x: model(x), dtype=torch.float32):
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
    output = run(model, x)
    output.float().square().sum().backward()
    return output.detach(), x.grad, gradients(model)


def assert_same_step(got, expected, tolerance=1e-5, factors=4):
    torch.testing.assert_close(got[0], expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got[1], expected[1], rtol=tolerance, atol=tolerance)
    assert list(got[2]) == list(expected[2]) and len(got[2]) == factors
    for name in got[2]:
        torch.testing.assert_close(got[2][name], expected[2][name], rtol=tolerance, atol=tolerance)


def test_a_step_is_that_of_the_plain_formula():
    assert_same_step(train_step(adapted()), train_step(adapted(plain=True)))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    def run(model, x):
        return checkpoint(model, x, use_reentrant=use_reentrant)

    for dropout in (0.0, 0.5):
        torch.manual_seed(9)
        expected = train_step(adapted(dropout).train())
        torch.manual_seed(9)
        assert_same_step(train_step(adapted(dropout).train(), run), expected)


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_checkpointing_with_a_frozen_factor_drops_the_same(frozen):
    """The first pass runs without gradients, the second with: both must draw the same mask."""
    steps = []
    for reentrant in (None, True, False):
        model = adapted(dropout=0.3).train()
        for name, parameter in model.named_parameters():
            if frozen in name:
                parameter.requires_grad_(False)
        torch.manual_seed(3)
        run = (lambda model, x: model(x)) if reentrant is None else (
            lambda model, x, reentrant=reentrant: checkpoint(model, x, use_reentrant=reentrant)
        )  # fmt: skip
        steps.append(train_step(model, run))
    assert_same_step(steps[1], steps[0], factors=2)
    assert_same_step(steps[2], steps[0], factors=2)


def test_autocast_on_cpu_agrees_within_the_rounding_of_bfloat16():
    def run(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    fused, exact = train_step(adapted(), run), train_step(adapted())
    assert fused[0].dtype == torch.bfloat16
    assert_same_step((fused[0].float(), *fused[1:]), exact, 0.2)
    assert all(gradient.dtype == torch.float32 for gradient in fused[2].values())


class Strided(nn.Linear):
    """A linear layer whose output does not lie row by row in memory."""

    def forward(self, x):
        return super().forward(x).transpose(0, -1).contiguous().transpose(0, -1)


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_few_rows_beside_a_base_in_half_precision_are_rounded_no_more_than_many(rows, adapter):
    x, weight, bias, a, b = tensors(torch.bfloat16, rows=(rows,), size=(64, 48), r=8)
    a, b = a.to(adapter), b.to(adapter)
    with torch.no_grad():
        found = lora_linear(x, weight, bias, None, a, b, 0.5)
        exact = lora_linear(*(t.double() for t in (x, weight, bias)), None, a.double(), b.double(), 0.5)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=0.02, atol=0.05 * exact.abs().max().item())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", [nn.Linear, Strided])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (1, 1, 64), (2, 64), (2, 3, 64), (40, 64), (0, 64)])
def test_few_vectors_get_what_many_get_in_whatever_dtypes_and_strides(shape, kind, autocast):
    torch.manual_seed(0)
    layer = kind(64, 48, dtype=torch.bfloat16 if autocast else torch.float32)
    layer.bias.data = layer.bias.data.float()
    config = peft.LoraConfig(target_modules=["0"], r=8, init_lora_weights=False)
    model, x = peft.get_peft_model(nn.Sequential(layer), config).eval(), torch.randn(shape, dtype=layer.weight.dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = model(x).detach()
        with torch.no_grad():
            found = model(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, **({"rtol": 0.05, "atol": 0.05} if autocast else {}))


def test_autocast_leaves_float64_alone():
    layer = nn.Sequential(nn.Linear(8, 8, dtype=torch.float64))
    model = peft.get_peft_model(layer, peft.LoraConfig(target_modules=["0"], init_lora_weights=False))
    x = torch.randn(3, 8, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    torch.testing.assert_close(found, model(x))


def test_hooks_on_the_base_module_see_its_own_output():
    model = adapted()
    seen = []
    base = model.base_model.model.first.base_layer
    base.register_forward_hook(lambda module, inputs, output: seen.append(output))
    x = torch.randn(4, 6)
    model(x)
    torch.testing.assert_close(seen[0], F.linear(x, base.weight, base.bias))


def test_a_trained_base_weight_gets_its_gradient():
    expected = adapted(plain=True)
    model = adapted()
    for each in (model, expected):
        each.base_model.model.first.base_layer.weight.requires_grad_(True)
    got, want = train_step(model), train_step(expected)
    assert len(got[2]) == 5
    for name in want[2]:
        torch.testing.assert_close(got[2][name], want[2][name])


@newer_torch
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_torch_compile_needs_one_graph(dropout):
    model = adapted(dropout).train()
    torch._dynamo.reset()
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend="aot_eager")
    if dropout == 0:
        assert_same_step(train_step(model, lambda _, x: compiled(x)), train_step(copy.deepcopy(adapted())))
    else:
        assert torch.isfinite(train_step(model, lambda _, x: compiled(x))[0]).all()


def test_half_precision_base_with_float32_adapter():
    got = train_step(adapted(dtype=torch.bfloat16), dtype=torch.bfloat16)
    want = train_step(adapted(dtype=torch.bfloat16, plain=True), dtype=torch.bfloat16)
    assert got[0].dtype == torch.bfloat16
    assert_same_step(got, want, 0.1)
    assert all(gradient.dtype == torch.float32 for gradient in got[2].values())


def test_what_is_kept_for_backward():
    """Beyond the frozen layer: x, the r columns of its product with A, and with dropout a bit per element."""
    n, size, r = 512, 256, 4
    torch.manual_seed(0)
    x, weight = torch.randn(n, size, requires_grad=True), torch.randn(size, size)
    a, b = torch.randn(r, size, requires_grad=True), torch.randn(size, r, requires_grad=True)

    def kept(p):
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            lora_linear(x, weight, None, None, a, b, 1.0, p)
        return sum(storages.values()) - sum(t.nbytes for t in (weight, a, b))

    assert kept(0.0) == x.nbytes + n * r * 4
    assert kept(0.1) == x.nbytes + n * r * 4 + n * size // 8


@pytest.mark.parametrize("shape", [(3, 5), (700, 513), (1, 4), (4, 1)])
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_low_rank_change_is_added_in_fp32_and_rounded_once(shape, layout, dtype):
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(*size, generator=generator) for size in (shape, (2, shape[1]), (shape[0], 2)))
    weight = weight.to(dtype) if layout == "rows" else weight.to(dtype).T.contiguous().T
    before = weight.clone()
    outcome = add_low_rank(weight, a, b, 0.5)
    tolerance = torch.finfo(dtype).eps / 2 + 1e-6
    exact = weight.double() + 0.5 * b.double() @ a.double()
    torch.testing.assert_close(outcome.double(), exact, rtol=tolerance, atol=1e-6)
    assert outcome.dtype == dtype
    assert outcome.stride() == weight.stride()
    assert torch.equal(weight, before)


def watch_base(model):
    model.base_model.model.first.base_layer.register_forward_hook(lambda module, inputs, output: output + 1)


def watch_factor(model):
    model.base_model.model.first.lora_A["default"].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))


def change_in_place(model):
    model.base_model.model.first.lora_B["default"].weight.data.mul_(3)


def scale(model):
    model.base_model.model.first.set_scale("default", 3.0)


def switch_off(model):
    model.base_model.model.first.enable_adapters(False)


def merge(model):
    model.base_model.model.first.merge()


def train_with_dropout(model):
    model.base_model.model.first.lora_dropout["default"] = nn.Dropout(1.0).train()


@pytest.mark.parametrize(
    "change", [watch_base, watch_factor, change_in_place, scale, switch_off, merge, train_with_dropout]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_sees_what_has_changed(change, dtype):
    model, x = adapted(dtype=dtype).eval(), torch.randn(1, 6, generator=torch.Generator().manual_seed(3)).to(dtype)
    with torch.no_grad():
        before = model(x)
    change(model)
    with torch.no_grad():
        after = model(x)
    with torch.enable_grad():
        expected = model(x.clone().requires_grad_())
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(after, expected, rtol=tolerance, atol=tolerance)
    assert change is merge or not torch.allclose(before, after, rtol=tolerance, atol=tolerance)


def test_decoding_under_autocast_is_in_its_dtype():
    model, x = adapted().eval(), torch.randn(1, 6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model.base_model.model.first(x).dtype == torch.bfloat16


@pytest.mark.parametrize("make", [lambda a: a.exp() * a, lambda a: a * torch.arange(16.0)])
def test_an_input_whose_graph_is_gone_can_be_used_again(make):
    module = nn.Sequential(nn.Linear(16, 16))
    model = peft.get_peft_model(module, peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    x = make(torch.randn(8, 16, requires_grad=True))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(model(x.detach()).sum(), trained)
    x.sum().backward()
    for found, wanted in zip(torch.autograd.grad(model(x).sum(), trained), expected, strict=True):
        torch.testing.assert_close(found, wanted)
