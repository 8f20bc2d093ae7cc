"""RoAd, GraLoRA, BEFT, C3A, DeLoRA and PVeRA: what is special about each.

What all methods have in common is in test_conformance.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peft
from peft.ops.circulant import BlockCirculant
from peft.ops.granular import Granular
from tiny_models import fill_adapter

torch.set_num_threads(1)
over = pytest.mark.parametrize


def linear(width: int = 16, out: int = 24, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, out, bias=bias))


def adapt(config: type, base: nn.Module | None = None, **settings) -> peft.PeftModel:
    """A linear layer with an adapter that has an effect."""
    model = peft.get_peft_model(linear() if base is None else base, config(target_modules=["0"], **settings))
    return fill_adapter(model).eval()


def layer_of(model: peft.PeftModel):
    return model.base_model.model[0]


# ---- RoAd


@over("variant", ["road_1", "road_4"])
def test_pairs_lie_half_a_group_apart(variant):
    layer = layer_of(adapt(peft.RoadConfig, linear(4, 12), variant=variant, group_size=4))
    s, t = (factors.expand(3, 2, 2) for factors in layer.factors("default"))
    x, rotated = torch.arange(12.0), layer.change("default").map(torch.arange(12.0))
    for group in range(3):
        for i in range(2):
            a, b = 4 * group + i, 4 * group + i + 2
            torch.testing.assert_close(rotated[a], s[group, 0, i] * x[a] - t[group, 0, i] * x[b])
            torch.testing.assert_close(rotated[b], s[group, 1, i] * x[b] + t[group, 1, i] * x[a])


@over("variant, values", [("road_1", 24), ("road_2", 48), ("road_4", 96)])
def test_variants_of_road(variant, values):
    model = adapt(peft.RoadConfig, variant=variant, group_size=6)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == values
    x = torch.randn(5, 16)
    expected = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-4, atol=1e-5)


def test_angles_alone_keep_the_length_of_outputs():
    model = adapt(peft.RoadConfig, group_size=8)
    layer_of(model).road_alpha["default"].data.fill_(1.0)
    x = torch.randn(5, 16)
    with model.disable_adapter():
        plain = model(x)
    assert not torch.allclose(model(x), plain, atol=1e-2)
    torch.testing.assert_close(model(x).norm(dim=-1), plain.norm(dim=-1))


def test_small_angles_show_in_half_precision():
    model = peft.get_peft_model(linear().bfloat16(), peft.RoadConfig(target_modules=["0"], group_size=8))
    with torch.no_grad():
        layer_of(model).road_alpha["default"].fill_(1.003)  # 1 in bfloat16
        x = torch.randn(4096, 16, dtype=torch.bfloat16)
        with model.disable_adapter():
            plain = model(x).double()
        assert (model(x).double().norm() / plain.norm()).item() == pytest.approx(1.003, abs=5e-4)


def test_road_trains_on_little_more_than_the_output():
    """Autograd keeps the outputs that are rotated, and no copies of them."""
    layer = layer_of(adapt(peft.RoadConfig, linear(256, 256), group_size=64)).train()
    x, kept = torch.randn(512, 256), {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    y.sum().backward()
    assert sum(kept.values()) < 1.1 * y.numel() * y.element_size()


def test_a_mixed_batch_of_road_runs_the_base_once():
    model = adapt(peft.RoadConfig, group_size=8)
    model.add_adapter("other", peft.RoadConfig(target_modules=["0"], group_size=8, variant="road_4"))
    calls = []
    layer_of(model).get_base_layer().register_forward_hook(lambda *args: calls.append(args))
    model(torch.randn(4, 16), adapter_names=["default", "other", "__base__", "other"])
    assert len(calls) == 1


# ---- GraLoRA


@over("k, r", [(1, 3), (2, 4), (4, 8)])
def test_granular_matrices_are_blocks_of_their_own_factors(k, r):
    a, b = torch.randn(k, 16 // k, r).double(), torch.randn(k, r, 24 // k).double()
    dense, size = Granular(a, b).dense(), r // k
    for m in range(k):
        for n in range(k):
            block = dense[m * 24 // k : (m + 1) * 24 // k, n * 16 // k : (n + 1) * 16 // k]
            ranks = slice(m * size, (m + 1) * size), slice(n * size, (n + 1) * size)
            torch.testing.assert_close(block, (a[n][:, ranks[0]] @ b[m][ranks[1]]).T)
    assert torch.linalg.matrix_rank(dense) == min(k * r, 16)
    torch.testing.assert_close(Granular(a, b, 1.5).added_to(dense), 2.5 * dense)


@over("k, r", [(1, 3), (2, 4), (4, 8)])
def test_granular_matrices_have_their_gradients_by_blocks(k, r):
    shapes = (5, 3, 16), (k, 16 // k, r), (k, r, 24 // k)
    tensors = [torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in shapes]
    weight = torch.randn(24, 16).double()
    plain = F.linear(tensors[0], weight + Granular(*tensors[1:], 1.5).dense())
    product = Granular(*tensors[1:], 1.5).linear(tensors[0], weight)
    grad = torch.randn_like(plain)
    torch.testing.assert_close(product, plain)
    expected = torch.autograd.grad(plain, tensors, grad)
    torch.testing.assert_close(torch.autograd.grad(product, tensors, grad), expected)


def test_gralora_has_the_values_of_a_lora_of_its_rank_and_a_rank_k_times_that():
    model = adapt(peft.GraloraConfig, r=4, gralora_k=2)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4 * (16 + 24)
    assert torch.linalg.matrix_rank(layer_of(model).get_delta_weight("default")) == 8


def test_dropout_of_gralora_is_drawn_for_each_part_by_itself():
    model = adapt(peft.GraloraConfig, r=4, hybrid_r=4, gralora_dropout=0.5).train()
    x = torch.zeros(500, 16)
    x[:, 3] = 1.0
    with model.disable_adapter():
        plain = model(x)
    outcomes = (model(x) - plain).detach().mul(1e4).round().unique(dim=0)
    assert len(outcomes) == 4  # neither part, one, the other, both


@over("width, out", [(15, 24), (16, 25)])
def test_blocks_of_gralora_have_to_fit(width, out):
    base = linear(width, out)
    with pytest.raises(ValueError, match="gralora_k=2"):
        peft.get_peft_model(base, peft.GraloraConfig(target_modules=["0"]))
    assert type(base[0]) is nn.Linear


# ---- BEFT


def test_beft_adds_a_vector_and_merges_it_into_the_bias():
    model, x = adapt(peft.BeftConfig), torch.randn(5, 16)
    with model.disable_adapter():
        plain = model(x)
    expected = model(x)
    vector = layer_of(model).beft_bias["default"].detach()
    torch.testing.assert_close(expected, plain + vector)
    weight, bias = (value.clone() for value in layer_of(model).get_base_layer().parameters())
    merged = model.merge_and_unload()
    assert torch.equal(merged[0].weight, weight) and torch.equal(merged[0].bias, bias + vector[0])


def test_beft_on_a_module_without_bias_says_where_it_cannot_be_merged():
    model, x = adapt(peft.BeftConfig, linear(bias=False)), torch.randn(5, 16)
    expected = model(x)
    with pytest.raises(ValueError, match="cannot be merged into"):
        model.merge_adapter()
    assert torch.equal(model(x), expected)
    config, tensors = peft.convert_to_lora(adapt(peft.BeftConfig), rank=1)
    assert config.lora_bias and any(key.endswith("lora_B.bias") for key in tensors)


def test_beft_trains_on_nothing_but_what_goes_through():
    """The gradient of a vector that is added needs neither input nor output."""
    layer, kept = layer_of(adapt(peft.BeftConfig)).train(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor), lambda tensor: tensor):
        layer(torch.randn(512, 16))
    assert sum(tensor.numel() for tensor in kept) < 512


# ---- C3A


@over("b", [1, 2, 5, 6])
def test_circulant_products_are_those_of_the_matrix(b):
    torch.manual_seed(0)
    kernel = torch.randn(3, 2, b, dtype=torch.float64, requires_grad=True)
    dense = BlockCirculant(kernel).dense()
    for i in range(b):
        torch.testing.assert_close(dense[i::b, ::b], kernel[..., -i % b])
        torch.testing.assert_close(dense[::b, i::b], kernel[..., i])
    x, index = torch.randn(2, 3, 2 * b, dtype=torch.float64, requires_grad=True), torch.randint(2 * b, (2, 4))
    with torch.no_grad():
        torch.testing.assert_close(BlockCirculant(kernel).apply(x), x @ dense.T)
    torch.testing.assert_close(BlockCirculant(kernel).columns(index), dense.T[index])


def test_the_gradient_of_the_input_is_that_of_a_reversed_one_as_in_the_reference():
    x, kernel = torch.randn(3, 8, dtype=torch.float64, requires_grad=True), torch.randn(3, 2, 4, dtype=torch.float64)
    grad = torch.randn(3, 12, dtype=torch.float64)
    reversed_ = grad.unflatten(1, (3, 4))[..., [0, 3, 2, 1]].flatten(1)
    mine = torch.autograd.grad(BlockCirculant(kernel).linear(x), x, grad)[0]
    torch.testing.assert_close(mine, reversed_ @ BlockCirculant(kernel).dense())


@over("rows, by_waves", [(1, True), (2000, False)])
def test_c3a_computes_the_same_by_waves_and_as_a_weight(rows, by_waves, monkeypatch):
    layer = layer_of(adapt(peft.C3AConfig, linear(64, 96), block_size=16))
    products, apply = [], BlockCirculant.apply
    monkeypatch.setattr(BlockCirculant, "apply", lambda self, x: products.append(x) or apply(self, x))
    x = torch.randn(rows, 64)
    with torch.no_grad():
        y = layer(x)
    assert bool(products) == by_waves
    weight = layer.weight + BlockCirculant(layer.c3a_kernel["default"] / 64).dense()
    torch.testing.assert_close(y, nn.functional.linear(x, weight, layer.bias))
    torch.testing.assert_close(layer(x), y)


def test_block_sizes_of_single_modules():
    base = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 12))
    config = peft.C3AConfig(target_modules=["0", "1"], block_size=8, block_size_pattern={"1": 4})
    model = peft.get_peft_model(base, config).base_model.model
    assert model[0].c3a_kernel["default"].shape == (3, 2, 8) and model[1].c3a_kernel["default"].shape == (3, 6, 4)
    with pytest.raises(ValueError, match="block_size_pattern"):
        peft.get_peft_model(nn.Sequential(nn.Linear(16, 12)), peft.C3AConfig(target_modules=["0"], block_size=8))
    for settings in ({"block_size_pattern": {"1": 0}}, {"init_weights": "ones"}, {"block_size": 0}):
        with pytest.raises(ValueError, match=r"init_weights|block"):
            peft.C3AConfig(**settings)


# ---- DeLoRA


@over("spread", [0.01, 1.0, 100.0])
def test_lambda_bounds_the_change_of_delora_whatever_the_factors(spread):
    model = adapt(peft.DeloraConfig, r=3, delora_lambda=0)
    layer = layer_of(model)
    with torch.no_grad():
        layer.delora_lambda["default"].fill_(5.0)
        for factor in (layer.delora_A["default"], layer.delora_B["default"]):
            factor.mul_(spread)
    norms = layer.weight.norm(dim=0)
    torch.testing.assert_close(layer.delora_w_norm["default"], norms.detach())
    change = layer.get_delta_weight("default") / norms
    assert 1.0 < change.norm() <= 5.0
    ranks = torch.linalg.svdvals(change)
    assert ranks[2] > 1e-3 and ranks[3] < 1e-5
    # Factors of another length are the same change.
    before = layer.get_delta_weight("default")
    with torch.no_grad():
        layer.delora_A["default"].mul_(torch.tensor([[2.0], [3.0], [4.0]]))
    torch.testing.assert_close(layer.get_delta_weight("default"), before)


def test_the_norms_of_the_columns_are_those_of_the_file(tmp_path):
    model, x = adapt(peft.DeloraConfig, r=3), torch.randn(4, 16)
    norms = layer_of(model).delora_w_norm["default"].clone()
    model.save_pretrained(tmp_path)
    other = linear()
    other[0].weight.data.mul_(2.0)
    loaded = peft.PeftModel.from_pretrained(other, tmp_path)
    torch.testing.assert_close(layer_of(loaded).delora_w_norm["default"], norms)
    base = layer_of(loaded).get_base_layer()
    torch.testing.assert_close(loaded(x) - base(x), model(x) - layer_of(model).get_base_layer()(x))


def test_norms_are_of_the_weight_without_what_is_merged():
    norms = linear()[0].weight.norm(dim=0).detach()
    model = peft.get_peft_model(linear(), peft.LoraConfig(target_modules=["0"], r=2), adapter_name="a", mixed=True)
    fill_adapter(model, "a")
    model.base_model.merge_adapter()
    model.add_adapter("b", peft.DeloraConfig(target_modules=["0"]))
    torch.testing.assert_close(model.base_model.model[0].delora_w_norm["b"], norms)


def test_a_start_of_delora_learns():
    """B starts at zero, where its norm has no slope."""
    model = peft.get_peft_model(linear(), peft.DeloraConfig(target_modules=["0"], r=2)).train()
    model(torch.randn(5, 16)).square().sum().backward()
    layer = layer_of(model)
    assert layer.delora_B["default"].grad.isfinite().all() and layer.delora_B["default"].grad.abs().max() > 0
    assert layer.delora_A["default"].grad.isfinite().all()


def test_patterns_of_delora():
    base = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 12))
    config = peft.DeloraConfig(target_modules=["0", "1"], rank_pattern={"1": 3}, lambda_pattern={"0": 2.5})
    model = peft.get_peft_model(base, config).base_model.model
    assert [len(layer.delora_A["default"]) for layer in model] == [8, 3]
    assert [layer.delora_lambda["default"].item() for layer in model] == [2.5, 15.0]
    for settings in ({"rank_pattern": {"0": 0}}, {"lambda_pattern": {"0": -1}}, {"delora_lambda": -0.5}):
        with pytest.raises(ValueError, match=r"rank|lambda"):
            peft.DeloraConfig(**settings)


# ---- PVeRA


def latent(model: peft.PeftModel, x: Tensor) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of z, by the formula."""
    layer = layer_of(model)
    halves = (x @ layer.pvera_A["default"].T * layer.pvera_lambda_d["default"]).chunk(2, dim=-1)
    return halves[0], (0.5 * halves[1]).exp()


def effect(model: peft.PeftModel, z: Tensor) -> Tensor:
    layer = layer_of(model)
    return z @ layer.pvera_B["default"].T * layer.pvera_lambda_b["default"]


@over("settings, training", [({}, True), ({"sample_at_inference": True}, False), ({"generator_seed": 5}, True)])
def test_pvera_draws_its_latent_from_the_distribution(settings, training):
    model, x = adapt(peft.PveraConfig, r=4, **settings).train(training), torch.randn(3, 16)
    mean, deviation = latent(model, x)
    plain = layer_of(model).get_base_layer()(x)
    torch.manual_seed(5)
    noise = torch.randn(3, 4, generator=torch.Generator().manual_seed(5) if "generator_seed" in settings else None)
    torch.manual_seed(5)
    torch.testing.assert_close(model(x), plain + effect(model, mean + deviation * noise))
    assert not torch.allclose(model(x), model(x))


def test_pvera_takes_the_mean_in_evaluation_and_in_the_weight():
    for settings in ({}, {"sample_at_inference": True}):
        model, x = adapt(peft.PveraConfig, r=4, **settings), torch.randn(3, 16)
        expected = layer_of(model).get_base_layer()(x) + effect(model, latent(model, x)[0])
        if not settings:
            torch.testing.assert_close(model(x), expected)
        model.train().merge_adapter()
        torch.testing.assert_close(model(x), expected)


def test_pvera_trains_means_and_variances():
    model = adapt(peft.PveraConfig, r=4).train()
    model(torch.randn(6, 16)).square().sum().backward()
    assert (layer_of(model).pvera_lambda_d["default"].grad != 0).all()
    assert (layer_of(model).pvera_lambda_b["default"].grad != 0).all()


class _Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.o = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.o(self.q(x) * self.k(x))


def test_pvera_projects_what_several_layers_get_once(monkeypatch):
    model = peft.get_peft_model(_Attention(), peft.PveraConfig(r=4, target_modules=["q", "k", "o"], generator_seed=1))
    fill_adapter(model)
    x, outcomes, made = torch.randn(6, 16, requires_grad=True), [], []
    linear = torch.nn.functional.linear
    monkeypatch.setattr("peft.tuners.pvera.F.linear", lambda x, w, *b: made.append(w.shape) or linear(x, w, *b))
    for run in (model, model.base_model.model):  # the second knows of no call
        for layer in model.base_model.adapter_layers():
            layer.pvera_generator.clear()
        made.clear()
        y = run(x)
        outcomes.append(
            [y, *torch.autograd.grad(y.square().sum(), [x, *(p for p in model.parameters() if p.requires_grad)])]
        )
        assert made.count((8, 16)) == (2 if run is model else 3)
    torch.testing.assert_close(*outcomes)


def test_pvera_in_a_block_that_checkpointing_runs_again():
    """Where the block's input is that of the layer, the second run computes what the first has."""
    model = peft.get_peft_model(nn.Sequential(_Attention()), peft.PveraConfig(r=4, target_modules=["q", "k"])).train()
    block = fill_adapter(model).get_base_model()[0]
    x, gradients = torch.randn(3, 16, requires_grad=True), []
    plain = block.forward
    for forward in (plain, lambda x: checkpoint(plain, x, use_reentrant=False)):
        block.forward = forward
        torch.manual_seed(1)
        trained = [x, *(p for p in model.parameters() if p.requires_grad)]
        gradients.append(torch.autograd.grad(model(x).square().sum(), trained))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@over("changes", [{"projection_prng_key": 1}, {"save_projection": False}])
@over("config", [peft.VeraConfig, peft.PveraConfig, peft.RandLoraConfig])
def test_projections_are_the_same_for_all_adapters_of_a_model(config, changes):
    model = peft.get_peft_model(linear(), config(target_modules=["0"], r=4))
    with pytest.raises(ValueError, match=f"same {next(iter(changes))}"):
        model.add_adapter("other", config(target_modules=["0"], r=4, **changes))
    assert list(model.peft_config) == ["default"]


def test_projections_of_pvera_come_back_from_the_seed(tmp_path):
    model, x = adapt(peft.PveraConfig, r=4, save_projection=False, projection_prng_key=8), torch.randn(3, 16)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(linear(), tmp_path)
    assert not [key for key in peft.get_peft_model_state_dict(loaded) if "pvera_A" in key]
    assert torch.equal(loaded(x), model(x))


# ---- settings


@over(
    "config, settings, words",
    [
        (peft.RoadConfig, {"variant": "road_3"}, "variant"),
        (peft.RoadConfig, {"group_size": 7}, "even"),
        (peft.RoadConfig, {"group_size": 0}, "group_size"),
        (peft.GraloraConfig, {"r": 5}, "gralora_k"),
        (peft.GraloraConfig, {"gralora_k": 0}, "gralora_k"),
        (peft.GraloraConfig, {"hybrid_r": -1}, "hybrid_r"),
        (peft.GraloraConfig, {"gralora_dropout": 1.0}, "gralora_dropout"),
        (peft.DeloraConfig, {"r": 0}, "r must be"),
        (peft.DeloraConfig, {"module_dropout": 1.0}, "module_dropout"),
        (peft.PveraConfig, {"r": 0}, "r must be"),
        (peft.PveraConfig, {"pvera_dropout": -0.1}, "pvera_dropout"),
    ],
)
def test_settings_out_of_range(config, settings, words):
    with pytest.raises(ValueError, match=words):
        config(target_modules=["0"], **settings)


@over(
    "config, settings, module",
    [
        (peft.RoadConfig, {"group_size": 16}, nn.Linear(16, 24)),
        (peft.RoadConfig, {"group_size": 16}, nn.MultiheadAttention(8, 2)),  # its output projection has 8 outputs
        (peft.C3AConfig, {"block_size": 16}, nn.Linear(16, 24)),
        (peft.GraloraConfig, {"r": 6, "gralora_k": 3}, nn.Linear(16, 24)),
        (peft.GraloraConfig, {"gralora_dropout": 0.1}, nn.Embedding(16, 24)),
        (peft.DeloraConfig, {"module_dropout": 0.1}, nn.Embedding(16, 24)),
    ],
)
def test_what_does_not_fit_a_module_is_said_before_anything_is_changed(config, settings, module):
    base = nn.Sequential(module)
    with pytest.raises(ValueError, match=f"{list(settings)[-1]}|block size"):
        peft.get_peft_model(base, config(target_modules=["0"], **settings))
    assert base[0] is module and all(parameter.requires_grad for parameter in base.parameters())
