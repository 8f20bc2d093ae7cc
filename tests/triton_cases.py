"""The Triton kernels against their twins in plain torch. `test_ops_fused.py` runs this file in a process of its own:
without a GPU in Triton's interpreter, which has to be chosen before triton is imported.
"""

from __future__ import annotations

import os
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import peft
from peft.ops import fused, triton_lora
from peft.ops.lora import lora_linear, lora_linear_plain

torch.set_num_threads(1)
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
#: largest difference allowed, relative to the largest entry of what is expected
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(autouse=True)
def switched_on(monkeypatch):
    monkeypatch.setattr(fused, "enabled", True)
    monkeypatch.setattr(fused, "MIN_ROWS", 20)


def draw(*shape, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def seeded(p, value=2**40 + 12345):
    return torch.tensor([value], device=DEVICE) if p else None


def assert_near(got, expected, dtype):
    assert got.shape == expected.shape
    gap = (got.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert gap < TOLERANCE[dtype], gap


# ---- each kernel alone


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("rows", "size", "r", "splits", "dtype"),
    [
        (3, 20, 1, 1, torch.float16),  # within a tile
        (37, 141, 5, 2, torch.float32),  # tiles and a rest, the sums in two pieces
        (37, 141, 5, 1, torch.bfloat16),
        (16, 128, 16, 1, torch.bfloat16),  # a tile
    ],
)
def test_kernels_compute_what_their_twins_do(rows, size, r, splits, dtype, p):
    x, low, a = draw(rows, size, dtype=dtype), draw(rows, r, dtype=dtype), draw(r, size, dtype=dtype)
    seed = seeded(p)
    for factor in (a, a.T.contiguous().T):
        expected = fused.down_plain(x.double(), a.double(), 0.7, p, seed)
        assert_near(triton_lora.down(x, factor, 0.7, p, seed, splits=splits), expected, dtype)
    expected = fused.summed_plain(low.double(), x.double(), 0.7, p, seed)
    assert_near(triton_lora.summed(low, x, 0.7, p, seed, splits), expected, dtype)
    for base in (None, x):
        above = None if base is None else base.double()
        expected = fused.add_up_plain(above, low.double(), a.T.double(), 0.7, p, seed)
        assert_near(triton_lora.add_up(base, low, a.T, 0.7, p, seed), expected, dtype)
    assert triton_lora.add_up_(x, low, a.T, 0.7, p, seed) is x
    assert_near(x, expected, dtype)


@pytest.mark.parametrize("value", [0, 2**63 - 1])
def test_masks_follow_from_the_seed(value):
    rows, size, p, seed = 21, 150, 0.25, seeded(1, value)
    kept = torch.ones(rows, 1, device=DEVICE), torch.ones(size, 1, device=DEVICE)
    mask = triton_lora.add_up(None, *kept, 1 - p, p, seed)
    torch.testing.assert_close(mask, fused.keep_mask(seed, rows, size, p).float())


# ---- a linear layer


def tensors(dtype=torch.float32, rows=(4, 5), size=(45, 34), r=3, x_grad=True):
    x = draw(*rows, size[0], dtype=dtype).requires_grad_(x_grad)
    a, b = draw(r, size[0], dtype=dtype).requires_grad_(), draw(size[1], r, dtype=dtype).requires_grad_()
    return x, draw(size[1], size[0], dtype=dtype), draw(size[1], dtype=dtype), a, b


def twin(x, weight, bias, a, b, p, scaling=0.7):
    """The layer in plain torch, with the mask that the kernels have after the same `manual_seed`."""
    seed = torch.empty(1, dtype=torch.int64, device=DEVICE).random_() if p else None
    low = fused.down_plain(x.flatten(0, -2), a, 1.0, p, seed)
    return lora_linear_plain(x, weight, bias, None, a * 0, b, 0.0, 0.0) + (low @ b.T * scaling).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("given", ["weight", "weight, and no gradient of x", "result", "result to overwrite"])
def test_a_layer_and_its_gradients_agree_with_the_twin(dtype, p, given):
    x, weight, bias, a, b = tensors(dtype, x_grad="no gradient" not in given)
    torch.manual_seed(5)
    if given.startswith("weight"):
        out = lora_linear(x, weight, bias, None, a, b, 0.7, p)
    else:
        overwrite = given != "result"
        out = lora_linear(x, None, None, x @ weight.T + bias, a, b, 0.7, p, overwrite=overwrite)
    assert "FusedLoraLinear" in out.grad_fn.name()
    wanted = [t for t in (x, a, b) if t.requires_grad]
    cotangent = draw(*out.shape, dtype=dtype, seed=7)
    got = torch.autograd.grad(out, wanted, cotangent)

    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, weight, bias, a, b)]
    torch.manual_seed(5)
    expected = twin(*exact, p)
    assert_near(out, expected, dtype)
    wanted = [t for t in exact if t.requires_grad]
    for gradient, right in zip(got, torch.autograd.grad(expected, wanted, cotangent.double()), strict=True):
        assert gradient.dtype == dtype and gradient.is_contiguous()
        assert_near(gradient, right, dtype)


def test_without_gradients_the_mask_is_the_same():
    x, weight, bias, a, b = tensors()
    torch.manual_seed(5)
    expected = lora_linear(x, weight, bias, None, a, b, 0.7, 0.4)
    for mode in (torch.no_grad, torch.inference_mode):
        torch.manual_seed(5)
        with mode():
            torch.testing.assert_close(lora_linear(x, weight, bias, None, a, b, 0.7, 0.4), expected.detach())


def test_second_derivatives_agree_with_the_twin():
    def second(function):
        x, weight, bias, a, b = tensors()
        torch.manual_seed(5)
        out = function(x, weight, bias, a, b)
        first = torch.autograd.grad(out.square().sum(), (x, a, b), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (x, a, b))

    got = second(lambda x, weight, bias, a, b: lora_linear(x, weight, bias, None, a, b, 0.7, 0.4))
    for gradient, expected in zip(got, second(lambda *args: twin(*args, 0.4)), strict=True):
        assert_near(gradient, expected, torch.float32)


def test_for_a_mask_nothing_is_kept_but_its_seed():
    x, weight, _, a, b = tensors()

    def kept(p):
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            lora_linear(x, weight, None, None, a, b, 1.0, p)
        return sum(storages.values()) - sum(t.nbytes for t in (x, weight, a, b))

    low = x[..., 0].numel() * len(a) * 4
    assert (kept(0.0), kept(0.4)) == (low, low + 8)


def test_an_input_that_is_a_product_is_not_kept_beside_its_factors():
    _, weight, _, a, b = tensors()
    u, v = (draw(20, 45, seed=seed).requires_grad_() for seed in (3, 4))
    held = {}

    def run(function):
        inputs = torch.tanh(u), torch.sigmoid(v)
        held.update(inputs=inputs, out=function(inputs[0] * inputs[1]))
        return torch.autograd.grad(held["out"].square().sum(), (u, v, a, b))

    got = run(lambda x: lora_linear(x, weight, None, None, a, b, 0.7))
    run_again = lora_linear(held["inputs"][0] * held["inputs"][1], weight, None, None, a, b, 0.7)
    saved = {t.data_ptr() for t in run_again.grad_fn.saved_tensors if t is not None}
    assert {t.data_ptr() for t in held["inputs"]} <= saved
    expected = run(lambda x: lora_linear_plain(x, weight, None, None, a, b, 0.7, 0.0))
    for gradient, right in zip(got, expected, strict=True):
        assert_near(gradient, right, torch.float32)


# ---- when they run


def test_they_run_only_where_they_can(monkeypatch):
    x, weight, _, a, b = tensors(rows=(20,))
    assert fused.wanted(x, 3, a, b, None)
    assert not fused.wanted(x[:19], 3, a) and fused.wanted(x[:1], 3, a, few=True)
    assert not fused.wanted(x.double(), 3) and not fused.wanted(x, 3, a.half())
    assert fused.wanted(x.half(), 128) and not fused.wanted(x, 128) and not fused.wanted(x[:, :0], 3)
    with FlopCounterMode(display=False) as counter:  # who counts operations sees none in a kernel
        assert "Fused" not in lora_linear(x, weight, None, None, a, b, 0.7).grad_fn.name()
    assert counter.get_total_flops()
    monkeypatch.setattr(fused, "enabled", False)
    assert not fused.wanted(x, 3, a, b, None)
    assert "Fused" not in lora_linear(x, weight, None, None, a, b, 0.7).grad_fn.name()


def test_without_triton_it_is_said_what_to_do(monkeypatch):
    monkeypatch.setattr(fused, "_installed", lambda: False)
    with pytest.raises(ImportError, match="PEFT_TRITON=1"):
        fused.wanted(draw(64, 8), 3)


def test_under_torch_compile_and_transforms_it_is_the_plain_formula():
    x, weight, bias, a, b = (t.detach() for t in tensors())
    expected = lora_linear_plain(x, weight, bias, None, a, b, 0.7, 0.0)
    torch._dynamo.reset()
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, bias, None, a, b, 0.7), expected)
    rows = torch.func.vmap(lambda row: lora_linear(row, weight, bias, None, a, b, 0.7))(x)
    torch.testing.assert_close(rows, expected)


# ---- in a model


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 5)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def adapted(dropout=0.0, ranks=(3,)):
    torch.manual_seed(0)
    model = None
    for index, r in enumerate(ranks):
        config = peft.LoraConfig(
            r=r, target_modules=["first", "second"], init_lora_weights=False, lora_dropout=dropout, lora_alpha=2 + index
        )
        if model is None:
            model = peft.get_peft_model(Two(), config, adapter_name="a0")
        else:
            model.add_adapter(f"a{index}", config)
    return model.to(DEVICE)


def step(model, run=lambda model, x: model(x), autocast=False):
    x = draw(4, 5, 6).requires_grad_()
    torch.manual_seed(9)
    with torch.autocast(DEVICE, torch.bfloat16) if autocast else nullcontext():
        out = run(model, x)
    out.float().square().sum().backward()
    return out.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_is_that_without_kernels(monkeypatch, autocast):
    got = step(adapted().train(), autocast=autocast)
    monkeypatch.setattr(fused, "enabled", False)
    for value, expected in zip(got, step(adapted().train(), autocast=autocast), strict=True):
        assert value.dtype == expected.dtype
        assert_near(value, expected, torch.bfloat16 if autocast else torch.float32)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_makes_the_same_masks_again(use_reentrant):
    expected = step(adapted(0.5).train())
    got = step(adapted(0.5).train(), lambda model, x: checkpoint(model, x, use_reentrant=use_reentrant))
    for value, right in zip(got, expected, strict=True):
        torch.testing.assert_close(value, right)


# ---- several adapters in a batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_several_owners(dtype):
    """Owners of one row, of several blocks with a rest, and of none; one row that nobody owns."""
    size, out, r = 140, 150, 5
    rows = [[7], [*range(8, 45), 0], [], [1, 2, 4, 5, 6]]
    x, result = draw(45, size, dtype=dtype), draw(45, out, dtype=dtype)
    a, b = draw(4, r, size, dtype=dtype), draw(4, out, r, dtype=dtype)
    before, expected = result.clone(), fused.add_routed_plain(*(t.double() for t in (x, result, a, b)), rows, 0.5)
    got = fused.add_routed(x, result, a, b, fused.row_blocks(rows, x.device), 0.5)
    assert got is result and torch.equal(got[3], before[3])
    assert_near(got, expected, dtype)


@pytest.mark.parametrize(
    "names", [["a0", "a1", "__base__", "a2", "a0"], ["a1"] * 4 + ["a0"], ["a2", "a0", "a1", "a2", "a2"]]
)
@torch.no_grad()
def test_a_mixed_batch_is_that_without_kernels(monkeypatch, names):
    model, x = adapted(ranks=(3, 8, 1)).eval(), draw(5, 7, 6)
    calls = []
    by_kernels = fused.add_routed
    monkeypatch.setattr(fused, "add_routed", lambda *args: calls.append(args) or by_kernels(*args))
    got = [model(x, adapter_names=names) for _ in range(2)]
    assert len(calls) == 4  # two layers, twice
    monkeypatch.setattr(fused, "enabled", False)
    for value in got:
        torch.testing.assert_close(value, model(x, adapter_names=names))
    assert len(calls) == 4
