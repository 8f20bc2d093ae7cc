"""Methods whose change depends on the base weight: what it is, and what a training step keeps of it."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from safetensors.torch import load_file
from torch import nn

import peft
import test_conformance as conformance
import tiny_models as tiny
from peft.ops.dropout import draw_mask, mask_factors
from peft.ops.matrix import product_with
from peft.ops.principal import principal_factors

torch.set_num_threads(1)
over = pytest.mark.parametrize
WEIGHTS = "adapter_model.safetensors"


def adapted(config: peft.PeftConfig, module: nn.Module | None = None, seed: int = 0) -> peft.PeftModel:
    torch.manual_seed(seed)
    model = peft.get_peft_model(nn.Sequential(module or nn.Linear(24, 20)), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def layer_of(model: peft.PeftModel):
    return model.base_model.model[0]


# ---- the mathematics


def _operands():
    torch.manual_seed(0)
    shapes = (3, 5, 6), (4, 6), (4,), (4, 2), (2, 6)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def test_a_product_with_a_weight_that_is_read_anew():
    _, weight, _, factor, _ = _operands()
    reads = []
    read = lambda: reads.append(1) or weight
    rows = factor.T.contiguous().requires_grad_()
    assert torch.equal(product_with(rows, read), rows @ weight)
    assert torch.autograd.gradcheck(lambda rows: product_with(rows, read), [rows])
    assert torch.autograd.gradgradcheck(lambda rows: product_with(rows, read), [rows])
    reads.clear()
    product_with(rows, read).sum().backward()
    assert len(reads) == 2


# ---- a training step keeps no second matrix of the size of W

KEEPS_NOTHING = [
    peft.HiraConfig(r=2),
    peft.HiraConfig(r=2, hira_dropout=0.5),
    peft.DeftConfig(r=2),
    peft.DeftConfig(r=2, decomposition_method="qr", deft_dropout=0.5),
    peft.GloraConfig(r=2),
    peft.GloraConfig(config_A_B="vector", config_C="vector", config_D_E="vector"),
    peft.GloraConfig(config_A_B="constant", config_C="none"),
    peft.PsoftConfig(r=2),
    peft.PeanutConfig(r=2, depth=2, act_fn="gelu"),
]


@over("dtype", [torch.float32, torch.bfloat16])
@over("config", KEEPS_NOTHING, ids=repr)
def test_nothing_of_the_size_of_the_weight_is_kept_for_backward(config, dtype):
    config.target_modules = ["0"]
    model = adapted(config, nn.Linear(24, 20).to(dtype)).train()
    weight = layer_of(model).get_base_layer().weight
    kept = []

    def keep(tensor):
        if tensor.numel() >= weight.numel() and tensor.data_ptr() != weight.data_ptr():
            kept.append(tuple(tensor.shape))
        return tensor

    x = torch.randn(3, 24, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(x).float().square().sum()
    assert not kept
    loss.backward()
    assert all(p.grad is not None for p in (x, *model.parameters()) if p.requires_grad)


OFFLOADED = [
    peft.HiraConfig(r=2), peft.DeftConfig(r=2), peft.GloraConfig(r=2), peft.PsoftConfig(r=2),
    peft.LoraConfig(r=2, use_dora=True), peft.LNTuningConfig(),
]  # fmt: skip


@over("config", [*OFFLOADED, peft.PeanutConfig(r=2)], ids=repr)
def test_base_weights_that_are_offloaded(config):
    config.target_modules = ["0"]
    base = nn.Linear(24, 20)
    whole = nn.Sequential(copy.deepcopy(base))
    cpu_offload(whole, torch.device("cpu"))
    offloaded = whole[0]
    expected, model = adapted(config, base), adapted(config, offloaded)
    assert offloaded.weight.is_meta
    x = torch.randn(5, 24)
    torch.testing.assert_close(model(x), expected(x))
    model(x).sum().backward()
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected(x), rtol=1e-4, atol=1e-5)


#: not LILY: accelerate looks for its factors by names that a state dict does not have for them
WITH_MODEL = [
    (method, kind)
    for method, kind in conformance.SUPPORTED
    if kind in ("Linear", "Embedding", "Parameter") and method != "LILY"
]


@over(("method", "kind"), WITH_MODEL)
def test_adapters_that_are_offloaded_with_the_model(method, kind):
    model = conformance.adapted(method, kind, names=("first", "second"))
    x = conformance.inputs_of(model)
    names = ["first", "second", "__base__", "first"]
    expected, mixed = model(x), model(x, adapter_names=names)
    other = copy.deepcopy(model)
    cpu_offload(model, torch.device("cpu"))
    cpu_offload(other, torch.device("cpu"))
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(other(x, adapter_names=names), mixed)


@over("beside", [{"modules_to_save": ["lm_head"]}, {"modules_to_save": ["mlp"]}, {"trainable_token_indices": [1, 2]}])
def test_what_is_trained_beside_on_a_model_that_is_offloaded(beside, tmp_path):
    ids = tiny.tokens()
    model = peft.get_peft_model(tiny.llama(), peft.LoraConfig(target_modules=["q_proj"], r=2, **beside)).eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn_like(parameter))
        expected = model(ids).logits
    model.save_pretrained(tmp_path / "one")
    base = tiny.llama()
    cpu_offload(base, torch.device("cpu"))
    before = {name: value.clone() for name, value in tiny.llama().state_dict().items()}
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "one", is_trainable=True).eval()
    torch.testing.assert_close(loaded(ids).logits, expected)
    assert sum(p.requires_grad for p in loaded.parameters()) == sum(p.requires_grad for p in model.parameters())
    optimiser = torch.optim.SGD([p for p in loaded.parameters() if p.requires_grad], lr=0.1)
    loaded(ids).logits.square().sum().backward()
    assert all(p.grad is not None for p in loaded.parameters() if p.requires_grad)
    optimiser.step()
    loaded.save_pretrained(tmp_path / "two")
    again = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "two").eval()
    trained = loaded(ids).logits
    torch.testing.assert_close(trained, again(ids).logits)
    assert all(base.model.norm._hf_hook.weights_map.dataset[name].equal(value) for name, value in before.items())
    torch.testing.assert_close(loaded.merge_and_unload()(ids).logits, trained, rtol=1e-4, atol=1e-4)


@over("config", [peft.LoraConfig(r=2), peft.LoraConfig(r=2, use_dora=True)], ids=repr)
def test_merged_weights_that_are_on_the_disk_stay_there(config, tmp_path):
    """Also where a method looks at a weight while it is there for the merge (DoRA)."""
    config.target_modules = ["0"]
    base = nn.Linear(24, 20)
    whole = nn.Sequential(copy.deepcopy(base))
    disk_offload(whole, tmp_path, torch.device("cpu"))
    expected, model = adapted(config, base), adapted(config, whole[0])
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.dat")}
    x = torch.randn(5, 24)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected(x), rtol=1e-4, atol=1e-5)
    loader = whole[0]._hf_hook.weights_map.dataset
    assert not loader.state_dict and whole[0].weight.is_meta
    changed = [name for name, content in before.items() if (tmp_path / name).read_bytes() != content]
    assert changed == ["0.weight.dat"]
    model.unmerge_adapter()
    assert (tmp_path / "0.weight.dat").read_bytes() == before["0.weight.dat"]


# ---- HiRA


def test_hira_multiplies_the_weight_entry_by_entry():
    model = adapted(peft.HiraConfig(r=3, target_modules=["0"]))
    layer = layer_of(model)
    factor = layer.hira_B["default"] @ layer.hira_A["default"]
    weight, bias = layer.get_base_layer().weight, layer.get_base_layer().bias
    x = torch.randn(5, 24)
    torch.testing.assert_close(model(x), nn.functional.linear(x, weight * (1 + factor), bias))
    assert torch.linalg.matrix_rank(layer.get_delta_weight("default")) > 3


def test_hira_ranks_and_starts():
    pair = nn.Sequential(nn.Linear(6, 8), nn.Embedding(9, 6))
    config = peft.HiraConfig(r=4, rank_pattern={"1": 2}, target_modules=["0", "1"], init_weights="gaussian")
    linear, embedding = peft.get_peft_model(pair, config).base_model.model
    assert linear.hira_A["default"].shape == (4, 6) and not linear.hira_B["default"].any()
    assert embedding.hira_embedding_A["default"].shape == (2, 9) and not embedding.hira_embedding_A["default"].any()
    random = adapted(peft.HiraConfig(r=4, target_modules=["0"], init_weights=None))
    assert layer_of(random).hira_B["default"].any()


def test_hira_files_that_have_one_rank_in_spite_of_rank_pattern(tmp_path):
    """huggingface/peft writes such files: there, `rank_pattern` has no effect."""
    pair = nn.Sequential(nn.Linear(6, 8), nn.Embedding(9, 6))
    config = peft.HiraConfig(r=4, target_modules=["0", "1"], init_weights=False)
    peft.get_peft_model(copy.deepcopy(pair), config).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rank_pattern": {"0": 3, "1": 2}}))
    loaded = peft.PeftModel.from_pretrained(pair, tmp_path)
    assert loaded.base_model.model[1].r["default"] == 4
    tensors = peft.get_peft_model_state_dict(loaded)
    assert all(torch.equal(tensors[key], value) for key, value in load_file(tmp_path / WEIGHTS).items())
    again = peft.get_peft_model(nn.Sequential(nn.Linear(6, 8)), peft.HiraConfig(r=4, target_modules=["0"]))
    wrong = {key: value for key, value in tensors.items() if ".0." in key}
    wrong = {key: value[:2] if "hira_A" in key else value[:, :2] for key, value in wrong.items()}
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.set_peft_model_state_dict(again, wrong)


def test_hira_dropout_is_on_the_input_of_the_change_alone():
    model = adapted(peft.HiraConfig(r=3, hira_dropout=0.5, target_modules=["0"])).train()
    layer, x = layer_of(model), torch.randn(5, 24)
    torch.manual_seed(1)
    output = model(x)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(output, layer.get_base_layer()(x) + dropped @ layer.get_delta_weight("default").T)
    with pytest.raises(ValueError, match="hira_dropout"):
        adapted(peft.HiraConfig(hira_dropout=0.5, target_modules=["0"]), nn.MultiheadAttention(8, 2))


# ---- DEFT


@over("alpha, scale", [(None, 1.0), (8, 2.0)])
def test_deft_takes_a_part_out_and_puts_another_in(alpha, scale):
    layer = layer_of(adapted(peft.DeftConfig(r=4, alpha=alpha, target_modules=["0"])))
    p, r, weight = layer.deft_P["default"], layer.deft_R["default"], layer.get_base_layer().weight
    expected = scale * p @ r - p @ p.relu().T @ weight
    torch.testing.assert_close(layer.get_delta_weight("default"), expected)


def test_deft_by_a_basis_projects():
    """Without R, the outputs have nothing left of the subspace, and taking it out again changes nothing."""
    model = adapted(peft.DeftConfig(r=4, decomposition_method="qr", para=True, target_modules=["0"]))
    layer = layer_of(model)
    assert not layer.deft_R
    weight = layer.get_base_layer().weight
    left = weight + layer.get_delta_weight("default")
    assert torch.linalg.matrix_rank(left) == 20 - 4
    torch.testing.assert_close(layer.deft_P["default"].T @ left, torch.zeros(4, 24), rtol=0, atol=1e-5)


@over("method", ["relu", "qr"])
def test_deft_starts_without_effect_whatever_alpha(method):
    torch.manual_seed(0)
    base = nn.Linear(24, 20)
    config = peft.DeftConfig(r=50, alpha=8, decomposition_method=method, target_modules=["0"])
    layer = layer_of(peft.get_peft_model(nn.Sequential(base), config))
    assert layer.deft_P["default"].shape == (20, 20)
    torch.testing.assert_close(layer.get_delta_weight("default"), torch.zeros(20, 24), rtol=0, atol=1e-6)


def test_deft_drops_the_input_of_what_is_put_in_alone():
    model = adapted(peft.DeftConfig(r=4, deft_dropout=0.5, target_modules=["0"])).train()
    layer, x = layer_of(model), torch.randn(5, 24)
    torch.manual_seed(1)
    output = model(x)
    torch.manual_seed(1)
    expected = layer.get_base_layer()(x) - x @ (layer.deft_P["default"] @ layer.taken_out("default")).T
    put_in = layer.deft_P["default"] @ layer.deft_R["default"]
    torch.testing.assert_close(output, expected + _dropped(x, 0.5) @ put_in.T)


def _dropped(x, p):
    """x with the mask that a fused low-rank product draws."""
    return x * mask_factors(draw_mask(x.numel(), p, x.device), p, x)


FROM_BASE = [
    peft.DeftConfig(r=4),
    peft.DeftConfig(r=4, decomposition_method="qr"),
    peft.PeanutConfig(r=4, depth=1),
    peft.GloraConfig(r=2),
]


@over("config", FROM_BASE, ids=repr)
def test_what_a_frozen_adapter_keeps_follows_the_weight(config):
    config.target_modules = ["0"]
    model = adapted(config).eval()
    model.requires_grad_(False)
    x, weight = torch.randn(5, 24), layer_of(model).get_base_layer().weight
    for _ in range(2):
        kept = model(x)
        assert torch.equal(model(x), kept)
        # Nothing is kept of what may be trained.
        torch.testing.assert_close(kept, copy.deepcopy(model).requires_grad_(True)(x))
        with torch.no_grad():
            weight.mul_(2.0)
        assert not torch.allclose(model(x), kept)


# ---- GLoRA

FORMS = [("lora", "lora", "constant"), ("vector", "vector", "vector"), ("constant", "none", "constant")]
FORMS += [("none", "lora", "none"), ("lora", "none", "none")]


@over("with_bias", [True, False])
@over("a_b, c, d_e", FORMS)
def test_glora_scales_and_shifts_weight_and_bias(a_b, c, d_e, with_bias):
    config = peft.GloraConfig(r=2, config_A_B=a_b, config_C=c, config_D_E=d_e, target_modules=["0"])
    model = adapted(config, nn.Linear(24, 20, bias=with_bias))
    layer, x = layer_of(model), torch.randn(5, 24)
    weight, bias = layer.get_base_layer().weight, layer.get_base_layer().bias

    def part(slot):
        tensors = getattr(layer, slot)["default"]
        return tensors["Xd"] @ tensors["Xu"] if "Xd" in tensors else dict(tensors).get("X", 0.0)

    a, b, c, d, e = (part(f"glora_{letter}") for letter in "ABCDE")
    if with_bias:
        bias = bias + bias * d + e + (0.0 if isinstance(c, float) else (weight @ c).squeeze(1))
    else:
        assert c == d == e == 0.0
    torch.testing.assert_close(model(x), nn.functional.linear(x, weight + weight * a + b, bias))
    fresh = peft.get_peft_model(nn.Sequential(nn.Linear(24, 20, bias=with_bias)), config)
    assert torch.equal(fresh(x), fresh.get_base_model()[0].get_base_layer()(x))


def test_glora_files_hold_zeros_for_what_is_left_out(tmp_path):
    """They have the shape of what is left out; in memory there is nothing."""
    config = peft.GloraConfig(config_A_B="none", config_C="vector", config_D_E="none", target_modules=["0"])
    model = adapted(config)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 24
    assert not list(model.buffers())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    shapes = {key.removeprefix("base_model.model.0.glora_"): tuple(value.shape) for key, value in tensors.items()}
    zeros = {"A.zeros": (20, 24), "B.zeros": (20, 24), "D.zeros": (20,), "E.zeros": (20,)}
    assert shapes == {**zeros, "C.X": (24, 1)}
    loaded = peft.PeftModel.from_pretrained(nn.Sequential(layer_of(model).get_base_layer()), tmp_path)
    x = torch.randn(5, 24)
    torch.testing.assert_close(loaded(x), model(x))


# ---- PSOFT


@over("iterations", [None, 4])
@over("even", [True, False])
def test_principal_factors(even, iterations):
    torch.manual_seed(0)
    matrix = torch.randn(20, 6) @ torch.randn(6, 24)
    state = torch.random.get_rng_state()
    a, b = principal_factors(matrix, 6, 2.0, even, iterations, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.testing.assert_close(2 * b @ a, matrix, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(a @ a.T, b.T @ b if even else torch.eye(6), rtol=1e-3, atol=1e-3)
    again = principal_factors(matrix, 6, 2.0, even, iterations, seed=3)
    assert torch.equal(again[0], a) and torch.equal(again[1], b)


@over("magnitudes", [(True, True), (True, False), (False, True), (False, False)])
@over("orthogonal", [True, False])
def test_psoft_rotates_the_principal_part_and_leaves_the_rest(orthogonal, magnitudes):
    rows, columns = magnitudes
    config = peft.PsoftConfig(
        r=4, psoft_alpha=8, psoft_orth=orthogonal, psoft_mag_b=rows, psoft_mag_a=columns, target_modules=["0"]
    )
    layer = layer_of(adapted(config).requires_grad_(False))
    left, values, right = torch.linalg.svd(layer.get_base_layer().weight, full_matrices=False)
    changed = layer.get_base_layer().weight + layer.get_delta_weight("default")
    inside = left[:, :4].T @ changed @ right[:4].T  # b R a times the singular values
    torch.testing.assert_close(changed - left[:, :4] @ inside @ right[:4], left[:, 4:] * values[4:] @ right[4:])
    rotation = inside / values[:4, None]
    r = layer.psoft_R["default"]
    rotation = rotation / (r.vector_b[:, None] if rows else 1.0) / (r.vector_a if columns else 1.0)
    if orthogonal:
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(4), rtol=0, atol=1e-4)
    else:
        torch.testing.assert_close(rotation, r.weight, rtol=0, atol=1e-4)


def test_psoft_by_a_series_stays_within_its_radius():
    config = peft.PsoftConfig(
        r=4, use_cayley_neumann=True, num_cayley_neumann_terms=30, cayley_neumann_eps=0.5, target_modules=["0"]
    )
    rotation = layer_of(adapted(config)).psoft_R["default"]
    with torch.no_grad():
        rotation.weight.mul_(10)
        rotation.vector_a.fill_(1.0)
        rotation.vector_b.fill_(1.0)
    r = rotation.change() + torch.eye(4)
    torch.testing.assert_close(r @ r.T, torch.eye(4), rtol=0, atol=1e-5)
    skew = torch.linalg.solve(torch.eye(4) + r, r - torch.eye(4))
    torch.testing.assert_close(skew.norm(), torch.tensor(0.5))
    rotation.weight.data.zero_()
    rotation.change().sum().backward()
    assert rotation.weight.grad.isfinite().all()


def test_psoft_wants_a_subspace_that_there_is():
    with pytest.raises(ValueError, match="shorter side"):
        adapted(peft.PsoftConfig(r=21, target_modules=["0"]))
    for field in ("cayley_neumann_eps", "num_cayley_neumann_terms", "psoft_svd_lowrank_niter"):
        with pytest.warns(UserWarning, match=f"{field} has no effect"):
            peft.PsoftConfig(**{field: 0.5 if field.endswith("eps") else 7})


# ---- PEANuT


@over("depth", [0, 1, 3])
@over("act_fn", ["tanh", "gelu"])
def test_peanut_puts_the_weight_through_a_network(depth, act_fn):
    model = adapted(peft.PeanutConfig(r=3, depth=depth, act_fn=act_fn, scaling=0.5, target_modules=["0"]))
    layer, f = layer_of(model), {"tanh": torch.tanh, "gelu": nn.functional.gelu}[act_fn]
    rows = [f(layer.peanut_A["default"](layer.get_base_layer().weight.T))]  # [in, r], as linear layers have it
    for encoder in layer.peanut_encoders["default"] if depth else ():
        rows.append(f(encoder(rows[-1])))
    h = rows[-1]
    for i, decoder in enumerate(layer.peanut_decoders["default"] if depth else ()):
        h = f(decoder(h)) + rows[depth - 1 - i]
    expected = 0.5 * layer.peanut_B["default"](h).T
    torch.testing.assert_close(layer.get_delta_weight("default"), expected)
    x = torch.randn(5, 24)
    torch.testing.assert_close(model(x), layer.get_base_layer()(x) + x @ expected.T)


@over("act_fn, words", [("step", "transformers has"), ("xielu", "values of its own")])
def test_peanut_wants_an_activation_that_it_can_use(act_fn, words):
    with pytest.raises(ValueError, match=words):
        adapted(peft.PeanutConfig(r=3, act_fn=act_fn, target_modules=["0"]))


# ---- settings

OUT_OF_RANGE = [
    (peft.HiraConfig, dict(r=0), "r must be a positive integer"),
    (peft.HiraConfig, dict(rank_pattern={"0": 0}), "rank_pattern"),
    (peft.HiraConfig, dict(hira_dropout=1.0), "hira_dropout"),
    (peft.HiraConfig, dict(init_weights="zeros"), "init_weights"),
    (peft.GloraConfig, dict(r=0), "r must be a positive integer"),
    (peft.GloraConfig, dict(config_A_B="matrix"), "config_A_B"),
    (peft.GloraConfig, dict(config_C="constant"), "config_C"),
    (peft.GloraConfig, dict(config_D_E="lora"), "config_D_E"),
    (peft.GloraConfig, dict(config_A_B="none", config_C="none", config_D_E="none"), "nothing to train"),
    (peft.PeanutConfig, dict(r=0), "r must be a positive integer"),
    (peft.PeanutConfig, dict(depth=-1), "depth must be non-negative"),
    (peft.PsoftConfig, dict(r=0), "r must be a positive integer"),
    (peft.PsoftConfig, dict(psoft_alpha=0), "psoft_alpha must be a positive integer"),
    (peft.PsoftConfig, dict(num_cayley_neumann_terms=0), "num_cayley_neumann_terms"),
    (peft.PsoftConfig, dict(psoft_svd_lowrank_niter=-1), "psoft_svd_lowrank_niter must be non-negative"),
    (peft.PsoftConfig, dict(use_cayley_neumann=True, cayley_neumann_eps=1.0), "between 0 and 1"),
    (peft.PsoftConfig, dict(ab_svd_init="svd"), "ab_svd_init"),
    (peft.PsoftConfig, dict(psoft_svd="fast"), "psoft_svd"),
    (peft.PsoftConfig, dict(psoft_dropout=-0.1), "psoft_dropout"),
    (peft.DeftConfig, dict(r=-1), "r must be a positive integer"),
    (peft.DeftConfig, dict(alpha=0), "alpha must be a positive integer"),
    (peft.DeftConfig, dict(init_scale=-1.0), "init_scale must be non-negative"),
    (peft.DeftConfig, dict(decomposition_method="lu"), "decomposition_method"),
    (peft.DeftConfig, dict(deft_dropout=1.0), "deft_dropout"),
]


@over("config, settings, words", OUT_OF_RANGE)
def test_settings_out_of_range(config, settings, words):
    with pytest.raises(ValueError, match=words):
        config(**settings)
