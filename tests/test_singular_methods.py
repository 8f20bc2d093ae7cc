"""TinyLoRA, Uni-LoRA, Lily, FRoD and OSF: what is special about each."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peft
from peft.ops.principal import principal_factors
from peft.ops.singular import Framed, common_basis, coordinates, keeping_off
from peft.ops.sparse import Entries, in_row_order, off_diagonal_positions
from peft.tuners.frod import kind_of, number_of
from peft.tuners.unilora import assign_entries

torch.set_num_threads(1)


def chain(*widths: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))


def saved(model: peft.PeftModel, folder) -> dict[str, Tensor]:
    model.save_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    return {key: value.clone() for key, value in tensors.items()}  # old versions of safetensors read no earlier


# ---- TinyLoRA


def test_principal_factors_are_the_best_approximation_and_balanced():
    matrix = torch.randn(7, 5, dtype=torch.float64)
    values = torch.linalg.svdvals(matrix)
    a, b = principal_factors(matrix, 2, even=True)
    torch.testing.assert_close(torch.linalg.matrix_norm(matrix - b @ a), values[2:].norm())
    torch.testing.assert_close(b.T @ b, torch.diag(values[:2]))
    torch.testing.assert_close(a @ a.T, torch.diag(values[:2]))
    assert principal_factors(matrix, 9, even=True)[0].shape == (5, 5)


def tiny(**settings) -> peft.TinyLoraConfig:
    return peft.TinyLoraConfig(target_modules=["0", "1", "2", "3"], **{"u": 3, "init_weights": "uniform", **settings})


@pytest.mark.parametrize("tying, groups", [(0.0, [0, 1, 2, 3]), (0.3, [0, 1, 2, 2]), (0.5, [0, 0, 1, 1]), (1, [0] * 4)])
def test_tinylora_ties_vectors_of_neighbours(tying, groups):
    model = peft.get_peft_model(chain(8, 6, 8, 6, 8), tiny(weight_tying=tying))
    vectors = [next(iter(layer.adapter_parameters("default"))) for layer in model.base_model.adapter_layers()]
    for i, vector in enumerate(vectors):
        assert [vector is other for other in vectors] == [group == groups[i] for group in groups]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == len(set(groups)) and all(parameter.shape == (3,) for parameter in trained)


def test_tinylora_changes_the_weight_within_its_leading_part():
    net = chain(8, 6, 8)
    model = peft.get_peft_model(net, peft.TinyLoraConfig(target_modules=["0", "1"], u=5, r=3, init_weights="uniform"))
    for layer in model.base_model.adapter_layers():
        left, _, right = torch.linalg.svd(layer.original_weight(), full_matrices=False)
        delta = layer.get_delta_weight("default").detach()
        assert delta.abs().max() > 1e-4
        inside = left[:, :3] @ left[:, :3].T @ delta @ right[:3].T @ right[:3]
        torch.testing.assert_close(inside, delta)


def test_a_loaded_tinylora_needs_no_decomposition_unless_its_file_lacks_factors(tmp_path, monkeypatch):
    model = peft.get_peft_model(chain(8, 6, 8, 6, 8), tiny())
    x = torch.randn(2, 8)
    tensors = saved(model, tmp_path)
    made = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda m, **kw: made.append(m.is_meta) or svd(m, **kw))
    assert torch.equal(peft.PeftModel.from_pretrained(chain(8, 6, 8, 6, 8), tmp_path)(x), model(x))
    assert made and all(made)
    left_out = {k: v for k, v in tensors.items() if not k.endswith(("0.tinylora_A", "1.tinylora_P"))}
    save_file(left_out, tmp_path / "adapter_model.safetensors")
    made.clear()
    with pytest.warns(peft.errors.PeftWarning, match="has no value for"):
        loaded = peft.PeftModel.from_pretrained(chain(8, 6, 8, 6, 8), tmp_path)
    assert made.count(False) == 1  # of layer 0; the projections come from the seed
    assert torch.equal(loaded(x), model(x))


def test_what_a_tinylora_does_not_store_it_draws_again(tmp_path):
    model = peft.get_peft_model(chain(8, 6, 8, 6, 8), tiny(save_projection=False))
    assert not any(key.endswith("tinylora_P") for key in saved(model, tmp_path))
    x = torch.randn(2, 8)
    assert torch.equal(peft.PeftModel.from_pretrained(chain(8, 6, 8, 6, 8), tmp_path)(x), model(x))


def test_tinylora_refuses_what_it_cannot_mean():
    for wrong in ({"weight_tying": 1.5}, {"init_weights": "zeros"}, {"r": 0}, {"u": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            tiny(**wrong)
    with pytest.raises(ValueError, match="tinylora_dropout needs linear layers"):
        config = peft.TinyLoraConfig(target_modules=["0"], tinylora_dropout=0.5)
        peft.get_peft_model(nn.Sequential(nn.Embedding(9, 4)), config)


# ---- Uni-LoRA


@pytest.mark.parametrize("count, length", [(50, 7), (49, 7), (5, 7)])
def test_entries_are_dealt_out_evenly_and_keep_the_norm(count, length):
    index, scale = assign_entries(count, length, 3)
    times = index.bincount(minlength=length)
    assert times.max() - times.min() <= 1 and len(index) == len(scale) == count
    vector = torch.randn(length) * (times > 0)
    torch.testing.assert_close((vector[index] * scale).norm(), vector.norm())
    assert not torch.equal(index, index.sort().values)


def test_unilora_layers_are_one_projection_of_one_vector():
    model = peft.get_peft_model(chain(8, 6, 8), peft.UniLoraConfig(target_modules=["0", "1"], r=2, theta_d_length=5))
    index, scale = assign_entries(2 * (8 + 6) * 2, 5, 42)
    values = model.base_model.unilora_theta_d["default"][index] * scale
    for layer, part in zip(model.base_model.adapter_layers(), values.split(28), strict=True):
        a, b = part[: 2 * layer.in_features].view(2, -1), part[2 * layer.in_features :].view(-1, 2)
        torch.testing.assert_close(layer.get_delta_weight("default"), b @ a)


def test_unilora_files_hold_the_vector_and_its_use_only_if_asked(tmp_path):
    def config(**settings):
        return peft.UniLoraConfig(target_modules=["0", "1"], r=2, theta_d_length=9, **settings)

    x = torch.randn(2, 8)
    model = peft.get_peft_model(chain(8, 6, 8), config(init_weights=False))
    assert {key: value.shape for key, value in saved(model, tmp_path / "a").items()} == {
        "base_model.unilora_theta_d": (9,)
    }
    assert torch.equal(peft.PeftModel.from_pretrained(chain(8, 6, 8), tmp_path / "a")(x), model(x))
    model = peft.get_peft_model(chain(8, 6, 8), config(init_weights=False, save_indices=True))
    tensors = saved(model, tmp_path / "b")
    assert len(tensors) == 9 and tensors["base_model.model.0.unilora_indices_A"].dtype == torch.int64
    key = "base_model.model.1.unilora_indices_B"
    tensors[key] = tensors[key].flip(0).contiguous()  # what the file says counts, not the seed
    save_file(tensors, tmp_path / "b" / "adapter_model.safetensors")
    loaded = peft.PeftModel.from_pretrained(chain(8, 6, 8), tmp_path / "b")
    assert torch.equal(saved(loaded, tmp_path / "c")[key], tensors[key])
    assert not torch.allclose(loaded(x), model(x))


# ---- Lily


class Blocks(nn.Module):
    """`count` blocks with two linear layers of one shape and one of another, and a last layer named like the first."""

    def __init__(self, count: int = 3):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(8, 8), "v": nn.Linear(8, 8), "o": nn.Linear(8, 8)}) for _ in range(count)
        )
        self.q = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["o"](layer["q"](x) + layer["v"](x).tanh())
        return self.q(x)


def lily(**settings) -> peft.LilyConfig:
    return peft.LilyConfig(target_modules=["q", "v"], **{"r": 2, "num_B": 3, "init_weights": False, **settings})


def test_lily_shares_by_name_shape_and_stride():
    model = peft.get_peft_model(Blocks(), lily(stride_A=2))
    held = {}
    for key, module in model.base_model.model.named_modules():
        if hasattr(module, "lily_A"):
            held[key] = module.lily_A["default"].weight, module.lily_B["default"].weight
    alike = {
        (one, other, i)
        for one in held
        for other in held
        for i in (0, 1)
        if one < other and held[one][i] is held[other][i]
    }
    last, first, second = (f"layers.{i}" for i in (2, 0, 1))
    assert alike == {
        *((f"{first}.{name}", f"{second}.{name}", 0) for name in "qv"),
        *((f"{one}.{name}", f"{other}.{name}", 1) for name in "qv" for one, other in ((first, second), (first, last))),
        *((f"{second}.{name}", f"{last}.{name}", 1) for name in "qv"),
    }
    routers = {id(parameter) for key, parameter in model.named_parameters() if "lily_router" in key}
    assert len(routers) == 7


@pytest.mark.parametrize(
    ("targets", "groups"),
    [(["layers.0.q", "layers.1.q"], 2), (["q"], 1), ([r"0.q", "q"], 2), (r"layers\.\d\.(q|v)", 1)],
)
def test_lily_shares_among_what_one_entry_of_the_targets_means(targets, groups):
    """As huggingface/peft does, so that its files have a tensor for each."""
    net = Blocks(2)
    del net.q
    model = peft.get_peft_model(net, peft.LilyConfig(target_modules=targets))
    names = [name for name, _ in model.named_parameters() if "lily_B" in name]
    assert len(names) == groups


def test_lily_adds_what_its_formula_says():
    model = peft.get_peft_model(chain(6, 5), peft.LilyConfig(target_modules=["0"], r=2, num_B=3, scaling=0.7))
    layer = model.base_model.model[0]
    nn.init.normal_(layer.lily_B["default"].weight)
    x = torch.randn(4, 3, 6)
    low = x @ layer.lily_A["default"].weight.T
    p = (low @ layer.lily_router["default"].weight.T).softmax(-1).mean((0, 1))
    factors = layer.lily_B["default"].weight.chunk(3)
    added = 0.7 * sum(share * (low @ factor) for share, factor in zip(p, factors, strict=True))
    torch.testing.assert_close(model(x), layer.base_layer(x) + added)
    empty = model(x[:0])
    empty.sum().backward()
    assert empty.shape == (0, 3, 5) and layer.lily_B["default"].weight.grad.isfinite().all()


def test_a_lily_file_may_hold_shared_factors_once(tmp_path, recwarn):
    model = peft.get_peft_model(Blocks(), lily(stride_A=2))
    x = torch.randn(2, 8)
    tensors = saved(model, tmp_path)
    assert len(tensors) == 7 * 3
    once = {}
    for key, value in tensors.items():
        if not any(torch.equal(value, other) for other in once.values()):
            once[key] = value
    assert len(once) == 5 + 3 + 7
    for content in (tensors, once):
        save_file(content, tmp_path / "adapter_model.safetensors")
        recwarn.clear()
        loaded = peft.PeftModel.from_pretrained(Blocks(), tmp_path, is_trainable=True)
        assert not recwarn.list
        assert torch.equal(loaded(x), model(x))
        a, b = (loaded.base_model.model.layers[i]["q"].lily_A["default"].weight for i in (0, 1))
        assert a is b and a.requires_grad


def test_factors_of_lily_that_a_file_lacks_are_fresh_and_still_shared(tmp_path):
    tensors = saved(peft.get_peft_model(Blocks(), lily()), tmp_path)
    rest = {key: value for key, value in tensors.items() if not key.endswith("v.lily_B.weight")}
    save_file(rest, tmp_path / "adapter_model.safetensors")
    with pytest.warns(peft.errors.PeftWarning, match="has no value for"):
        loaded = peft.PeftModel.from_pretrained(Blocks(), tmp_path)
    factors = [loaded.base_model.model.layers[i]["v"].lily_B["default"].weight for i in range(3)]
    assert not factors[0].is_meta and factors[0].abs().max() > 0 and all(factor is factors[0] for factor in factors)


def test_lily_needs_a_choice():
    with pytest.raises(ValueError, match="num_B must be at least 2"):
        lily(num_B=1)


# ---- FRoD


@pytest.mark.parametrize("rows", [(6, 6), (9, 4, 5), (2, 3)])
def test_matrices_are_diagonal_in_their_common_basis(rows):
    matrices = [torch.randn(count, 6) for count in rows]
    basis = common_basis(matrices, 1e-3)
    for matrix in matrices:
        left, lengths = coordinates(matrix, basis)
        torch.testing.assert_close(left @ torch.diag(lengths) @ basis.T, matrix, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(left.norm(dim=0), torch.ones(6))


@pytest.mark.parametrize("seed", range(5))
def test_coordinates_of_a_matrix_that_is_not_of_full_rank(seed):
    torch.manual_seed(seed)
    matrix = torch.randn(5, 2) @ torch.randn(2, 4)
    basis = common_basis([matrix, torch.zeros(3, 4)], 1e-3)
    basis[:, 0] = basis[:, 1]  # singular, and what is in its span can still be told
    matrix = torch.randn(5, 4) @ basis.T
    left, lengths = coordinates(matrix, basis)
    torch.testing.assert_close(left @ torch.diag(lengths) @ basis.T, matrix, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tokens", [1, 50])
def test_framed_matrices_multiply_as_what_they_stand_for(tokens):
    generator = torch.Generator().manual_seed(0)
    positions = off_diagonal_positions(6, 9, generator)
    assert len(set(map(tuple, positions.T.tolist()))) == 9 and (positions[0] != positions[1]).all()
    assert off_diagonal_positions(6, 99, generator).unique(dim=1).shape == (2, 30)
    values = torch.randn(9, requires_grad=True)
    order, sorted_positions = in_row_order(positions)
    diagonal, left, right = torch.randn(6, requires_grad=True), torch.randn(4, 6), torch.randn(6, 6)
    core = torch.zeros(6, 6).index_put(tuple(positions), values) + torch.diag(diagonal)
    plain = left @ core @ right.T
    framed = Framed(left, Entries(sorted_positions, values[order], (6, 6)), diagonal, right)
    flipped = Framed(left, framed.core, diagonal, right, transposed=True)
    x = torch.randn(tokens, 6, requires_grad=True)
    torch.testing.assert_close(framed.dense(), plain)
    torch.testing.assert_close(flipped.dense(), plain.T)
    torch.testing.assert_close(flipped.columns(torch.tensor([[1, 3]])), plain[torch.tensor([[1, 3]])])
    grad = torch.randn(tokens, 4)
    mine = torch.autograd.grad(framed.apply(x), (x, values, diagonal), grad, retain_graph=True)
    torch.testing.assert_close(framed.apply(x), x @ plain.T)
    torch.testing.assert_close(mine, torch.autograd.grad(x @ plain.T, (x, values, diagonal), grad))


def test_names_of_kinds():
    assert kind_of("model.layers.0.self_attn.q_proj") == "self_attn_q_proj"
    assert kind_of("layers.0.q") == "q" and kind_of("3") == "3" and kind_of("a.b.1") == "b_1"
    assert kind_of("layer.1.attention.output.dense") == "attention_output"
    assert kind_of("layer.1.output.dense") == "output_dense"
    assert [number_of(key, 5) for key in ("h.2.layers.3.q", "h.2.1.q", "q")] == [3, 2, 5]


def test_a_frod_basis_comes_from_the_last_layer_of_each_number():
    net = nn.ModuleDict({side: nn.ModuleList([nn.ModuleDict({"q": nn.Linear(4, 6)})]) for side in ("first", "last")})
    both = peft.get_peft_model(net, frod()).base_model
    basis = both.frod_V["default"]["q"]
    one = peft.get_peft_model(nn.ModuleDict({"last": both.unload()["last"]}), frod()).base_model
    assert torch.equal(basis, one.frod_V["default"]["q"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_frod_in_half_precision(dtype):
    model = peft.get_peft_model(Blocks(), frod(), autocast_adapter_dtype=False).to(dtype).eval()
    x = torch.randn(3, 8, dtype=dtype)
    with torch.no_grad():
        expected = model(x)
        model.merge_adapter()
        torch.testing.assert_close(model(x), expected, atol=0.02, rtol=0.02)


def test_frod_without_sparse_entries():
    config = peft.FrodConfig(target_modules=["q"], progressbar=False, sparse_rate=0)
    model = filled(peft.get_peft_model(Blocks(), config))
    x = torch.randn(2, 8)
    want = model(x)
    assert not any(p.numel() for name, p in model.named_parameters() if "s_values" in name)
    torch.testing.assert_close(model.merge_and_unload()(x), want)


def frod(**settings) -> peft.FrodConfig:
    return peft.FrodConfig(target_modules=["q"], progressbar=False, sparse_rate=0.1, init_weights=False, **settings)


def filled(model: peft.PeftModel) -> peft.PeftModel:
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("stored", [True, False])
def test_frod_is_the_same_after_loading_whatever_the_signs_of_its_basis(tmp_path, stored, monkeypatch):
    model = filled(peft.get_peft_model(Blocks(), frod(save_projection=stored)))
    x = torch.randn(2, 8)
    tensors = saved(model, tmp_path)
    assert any("frod_V" in key for key in tensors) == stored
    assert not any(key.endswith(("frod_U", "frod_start")) for key in tensors)
    eigh = torch.linalg.eigh
    if stored:  # as on a machine that computes otherwise
        monkeypatch.setattr(torch.linalg, "eigh", lambda m: (eigh(m)[0], -eigh(m)[1].flip(1)))
    for low_cpu_mem_usage in (True, False):
        loaded = peft.PeftModel.from_pretrained(Blocks(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        torch.testing.assert_close(loaded(x), model(x))
    fresh = peft.get_peft_model(Blocks(), frod(save_projection=stored))
    peft.set_peft_model_state_dict(fresh, tensors)
    torch.testing.assert_close(fresh(x), model(x))


def test_a_basis_that_a_frod_file_lacks_is_made_from_the_weights(tmp_path):
    model = filled(peft.get_peft_model(Blocks(), frod()))
    tensors = {key: value for key, value in saved(model, tmp_path).items() if "frod_V" not in key}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.warns(peft.errors.PeftWarning, match="has no value for"):
        loaded = peft.PeftModel.from_pretrained(Blocks(), tmp_path)
    x = torch.randn(2, 8)
    torch.testing.assert_close(loaded(x), model(x))


def test_frod_layers_of_one_name_and_two_widths_have_two_bases():
    net = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(width, 5)}) for width in (4, 4, 7)])
    model = peft.get_peft_model(net, frod())
    assert {key: basis.shape for key, basis in model.base_model.frod_V["default"].named_buffers()} == {
        "q": (4, 4), "q_7": (7, 7),
    }  # fmt: skip


def test_frod_refuses_what_it_cannot_mean():
    with pytest.raises(ValueError, match="sparse_rate"):
        peft.FrodConfig(sparse_rate=1.5)
    model = peft.get_peft_model(Blocks(), frod())
    with pytest.raises(ValueError, match="same projection_prng_key"):
        model.add_adapter("other", frod(projection_prng_key=3))


# ---- OSF


def test_gradients_keep_off_a_basis():
    parameter = torch.randn(6, 3, requires_grad=True)
    basis = torch.linalg.qr(torch.randn(6, 2))[0]
    same = keeping_off(parameter, basis)
    assert torch.equal(same, parameter)
    gradient = torch.randn(6, 3)
    (got,) = torch.autograd.grad(same, parameter, gradient)
    torch.testing.assert_close(got, gradient - basis @ basis.T @ gradient)
    assert (basis.T @ got).abs().max() < 1e-6


@pytest.mark.parametrize("again", ["at once", "loaded", "moved"])
def test_training_osf_leaves_the_large_directions_alone(tmp_path, again):
    """Also where the parameters are not those of the beginning any more."""
    net = chain(8, 6)
    weight = net[0].weight.detach().clone()
    model = peft.get_peft_model(net, peft.OSFConfig(target_modules=["0"], effective_rank=2))
    if again == "loaded":
        model.save_pretrained(tmp_path)
        model = peft.PeftModel.from_pretrained(chain(8, 6), tmp_path, is_trainable=True)
    elif again == "moved":
        model.base_model.model[0].move("default", dtype=torch.float64)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(5):
        optimizer.zero_grad()
        (model(torch.randn(16, 8)) - 1).square().sum().backward()
        optimizer.step()
    changed = model.base_model.model[0].effective()[0].detach().float()
    assert (changed - weight).abs().max() > 0.01
    torch.testing.assert_close(left[:, :2].T @ changed @ right[:2].T, torch.diag(values[:2]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(left[:, :2].T @ changed, values[:2, None] * right[:2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(changed @ right[:2].T, left[:, :2] * values[:2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings, trained",
    [
        ({}, [8, 8]), ({"effective_rank": 0.25}, [12, 12]), ({"effective_rank": 1.0}, [0, 0]),
        ({"effective_rank": 99}, [0, 0]), ({"effective_rank": 2, "rank_pattern": {"0": 3}}, [13, 14]),
        ({"rank_pattern": {"^1$": 0.25}}, [8, 12]),
    ],
)  # fmt: skip
def test_osf_keeps_as_many_directions_as_asked(settings, trained):
    model = peft.get_peft_model(chain(20, 16, 20), peft.OSFConfig(target_modules=["0", "1"], **settings))
    assert [len(layer.osf_svd_params["default"]["S_low"]) for layer in model.base_model.adapter_layers()] == trained


def test_osf_refuses_to_keep_nothing_and_takes_all_linear_layers_of_unknown_models():
    for wrong in ({"effective_rank": 0}, {"effective_rank": 0.01}, {"rank_pattern": {"0": -1}}):
        with pytest.raises(ValueError, match="effective_rank"):
            peft.get_peft_model(chain(8, 6), peft.OSFConfig(target_modules=["0"], **wrong))
    assert peft.get_peft_model(chain(8, 6, 4), peft.OSFConfig()).peft_config["default"].target_modules == {"0", "1"}


def test_osf_files_hold_what_is_trained(tmp_path):
    model = filled(peft.get_peft_model(chain(8, 6, 4), peft.OSFConfig(effective_rank=2)))
    assert {key: value.shape for key, value in saved(model, tmp_path).items()} == {
        "base_model.model.0.osf_svd_params.U_low": (6, 4), "base_model.model.0.osf_svd_params.S_low": (4,),
        "base_model.model.0.osf_svd_params.V_low": (4, 8), "base_model.model.1.osf_svd_params.U_low": (4, 2),
        "base_model.model.1.osf_svd_params.S_low": (2,), "base_model.model.1.osf_svd_params.V_low": (2, 6),
    }  # fmt: skip
    x = torch.randn(2, 8)
    for low_cpu_mem_usage in (True, False):
        loaded = peft.PeftModel.from_pretrained(chain(8, 6, 4), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        torch.testing.assert_close(loaded(x), model(x))
