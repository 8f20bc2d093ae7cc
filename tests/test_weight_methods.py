"""LoHa, LoKr, OFT, BOFT, LN tuning, SHiRA, MiSS and trained tokens: what is special about each.

What all methods have in common is in test_conformance.py.
"""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peft
from peft.errors import PeftWarning

torch.set_num_threads(1)


class Model(nn.Module):
    """`target` between nothing: its input is the model's."""

    def __init__(self, target: nn.Module):
        super().__init__()
        self.target = target

    def forward(self, x: Tensor) -> Tensor:
        return self.target(x)


def linear(width: int = 24, out: int = 40) -> Model:
    torch.manual_seed(0)
    return Model(nn.Linear(width, out))


def adapt(model: nn.Module, config: type, *, noise: float = 0.2, name: str = "default", **settings) -> peft.PeftModel:
    """`model` with an adapter on `target` that has an effect."""
    adapted = peft.get_peft_model(model, config(target_modules=["target"], **settings), adapter_name=name)
    return shake(adapted, noise)


def shake(model: peft.PeftModel, noise: float = 0.2, seed: int = 1) -> peft.PeftModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def same_as_merged(model: peft.PeftModel, x: Tensor) -> None:
    expected = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-4, atol=1e-5)


def weight_of(model: peft.PeftModel) -> Tensor:
    return model.base_model.model.target.get_delta_weight("default")


# ---- LoHa and LoKr


@pytest.mark.parametrize("r", [2, 12], ids=["thin", "dense"])
def test_loha_of_any_rank(r):
    same_as_merged(adapt(linear(), peft.LoHaConfig, r=r), torch.randn(3, 24))


@pytest.mark.parametrize(
    "settings",
    [{"decompose_both": True}, {"decompose_factor": 8}, {"decompose_factor": 3, "decompose_both": True}, {"r": 30}],
)
def test_lokr_in_all_its_forms(settings):
    model = adapt(linear(), peft.LoKrConfig, **{"r": 2, **settings})
    same_as_merged(model, torch.randn(2, 5, 24))


def test_lokr_trains_as_many_factors_as_it_says():
    model = adapt(linear(64, 64), peft.LoKrConfig, r=2, decompose_both=True)
    names = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"}


@pytest.mark.parametrize("config", [peft.LoHaConfig, peft.LoKrConfig])
@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_kernels_are_decomposed_too(config, conv):
    model = adapt(Model(conv(12, 18, 3, groups=2)).double(), config, r=2, use_effective_conv2d=True)
    layer = model.base_model.model.target
    core = layer.hada_t1 if config is peft.LoHaConfig else layer.lokr_t2
    assert core["default"].shape[:2] == (2, 2) and core["default"][0, 0].numel() == layer.get_base_layer().kernel_size[
        0
    ] ** (layer.weight.dim() - 2)
    # The gradients of LoHa's w1_a and w2_a are not the true ones, see the test below.
    untrue = "hada_w1_a", "hada_w2_a"
    parameters = {
        n: p for n, p in model.named_parameters() if p.requires_grad and not any(name in n for name in untrue)
    }
    x = torch.randn(1, 12, *[3] * (layer.weight.dim() - 2), dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *values: torch.func.functional_call(model, dict(zip(parameters, values, strict=True)), (x,)),
        tuple(parameters.values()),
    )


def test_loha_exchanges_its_cores_in_two_gradients_as_the_reference_does():
    layer = adapt(Model(nn.Conv2d(4, 6, 3)), peft.LoHaConfig, r=2, use_effective_conv2d=True).base_model.model.target
    a1, b1, a2, b2 = (getattr(layer, f"hada_w{i}_{side}")["default"] for i in "12" for side in "ab")
    t1, t2 = layer.hada_t1["default"], layer.hada_t2["default"]
    grad = torch.randn(6, 4 * 9)
    layer.get_delta_weight("default").flatten(1).backward(grad)

    def expand(core, a, b):
        return torch.einsum("ij...,ip,jq->pq...", core, a, b).flatten(1)

    grad = grad * layer.scaling["default"]
    for a, core, b, other, b_other, a_other in ((a1, t1, b1, t2, b2, a2), (a2, t2, b2, t1, b1, a1)):
        (exchanged,) = torch.autograd.grad(expand(other, a, b_other), a, grad * expand(other, a_other, b_other))
        (true,) = torch.autograd.grad(expand(core, a, b), a, grad * expand(other, a_other, b_other))
        torch.testing.assert_close(a.grad, exchanged)
        assert not torch.allclose(a.grad, true, rtol=1e-2)


@pytest.mark.parametrize("config", [peft.LoHaConfig, peft.LoKrConfig, peft.HiraConfig])
def test_the_weight_of_a_convolution_as_a_parameter_is_a_stack_of_matrices(config):
    settings = {"target_modules": [], "target_parameters": ["target.weight"], "r": 2, "init_weights": False}
    model = peft.get_peft_model(Model(nn.Conv1d(4, 6, 3)), config(**settings))
    matrix = weight_of(model).flatten(0, 1)
    assert torch.linalg.matrix_rank(matrix) > 1, "not the same for all of the kernel"
    same_as_merged(model, torch.randn(2, 4, 9))


@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
@pytest.mark.parametrize("config, scales", [(peft.LoHaConfig, True), (peft.LoKrConfig, False)])
def test_rank_dropout_leaves_out_rows_in_training(config, scales, kind):
    torch.manual_seed(0)
    base = {"linear": nn.Linear(24, 40), "conv": nn.Conv1d(3, 40, 2), "embedding": nn.Embedding(24, 40)}[kind]
    model = adapt(Model(base), config, r=2, rank_dropout=0.5)
    x = {"linear": torch.randn(64, 24), "conv": torch.randn(4, 3, 9), "embedding": torch.arange(24)[None]}[kind]
    with model.disable_adapter():
        plain = model(x)
    whole = model(x) - plain
    model.train()
    change = model(x) - plain
    dim = 1 if kind == "conv" else -1
    kept = change.movedim(dim, 0).flatten(1).norm(dim=1) > 1e-6
    assert 5 < kept.sum() < 35
    factor = 40 / kept.sum() if scales else 1.0
    expected = whole.movedim(dim, 0) * kept.view(-1, *[1] * (whole.dim() - 1)) * factor
    torch.testing.assert_close(change.movedim(dim, 0), expected, rtol=1e-3, atol=1e-4)


def test_module_dropout_leaves_out_the_adapter_now_and_then():
    model = adapt(linear(), peft.LoKrConfig, r=2, module_dropout=0.5)
    x = torch.randn(3, 24)
    whole = model(x)
    with model.disable_adapter():
        plain = model(x)
    model.train()
    torch.manual_seed(0)
    outcomes = [model(x) for _ in range(20)]
    with_it = sum(torch.allclose(y, whole) for y in outcomes)
    assert 2 < with_it < 18
    assert all(torch.allclose(y, whole) or torch.equal(y, plain) for y in outcomes)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_merging_in_training_mode_takes_no_dropout_along(kind):
    base = Model(nn.Conv1d(3, 40, 2)) if kind == "conv" else linear()
    model = adapt(base, peft.LoHaConfig, r=2, rank_dropout=0.5, module_dropout=0.5)
    x = torch.randn(2, 3, 9) if kind == "conv" else torch.randn(3, 24)
    expected = model(x)
    model.train()
    model.merge_adapter()
    torch.testing.assert_close(model.eval()(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [peft.LoHaConfig, peft.LoKrConfig])
def test_scale(config):
    model = adapt(linear(), config, r=2, alpha=6)
    layer, x = model.base_model.model.target, torch.randn(3, 24)
    with model.disable_adapter():
        plain = model(x)
    change = model(x) - plain
    assert layer.scaling["default"] == 3
    for scale, factor in ((lambda: layer.scale_layer(2), 2), (lambda: layer.unscale_layer(4), 0.5)):
        scale()
        torch.testing.assert_close(model(x) - plain, factor * change, rtol=1e-3, atol=1e-4)
    layer.unscale_layer()
    torch.testing.assert_close(model(x) - plain, change, rtol=1e-3, atol=1e-4)
    layer.set_scale("default", 3)
    torch.testing.assert_close(model(x) - plain, 3 * change, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [{"rank_pattern": {"target": 0}}, {"rank_dropout": 1.0}, {"module_dropout": -0.1}, {"init_weights": "fast"}],
)
@pytest.mark.parametrize("config", [peft.LoHaConfig, peft.LoKrConfig])
def test_settings_that_make_no_sense(config, settings):
    with pytest.raises((TypeError, ValueError), match=next(iter(settings)).split("_pattern")[0]):
        config(target_modules=["target"], **settings)


# ---- OFT and BOFT


def rotation_of(model: peft.PeftModel, width: int) -> Tensor:
    """What the adapter multiplies inputs with, worked out from outside."""
    layer = model.base_model.model.target
    square = Model(nn.Linear(width, width, bias=False))
    square.target.weight.data = torch.eye(width)
    twin = peft.get_peft_model(square, model.peft_config["default"]).eval()
    own = dict(twin.base_model.model.target.named_parameters())
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "oft_" in name and name in own and own[name].shape == parameter.shape:
                own[name].copy_(parameter)
    return twin(torch.eye(width))


@pytest.mark.parametrize(
    "config, settings",
    [
        (peft.OFTConfig, {"oft_block_size": 6, "num_cayley_neumann_terms": 9}),
        (peft.OFTConfig, {"oft_block_size": 0, "r": 3, "use_cayley_neumann": False}),
        (peft.OFTConfig, {"oft_block_size": 8, "block_share": True, "num_cayley_neumann_terms": 9}),
        (peft.BOFTConfig, {"boft_block_size": 4}),
        (peft.BOFTConfig, {"boft_block_size": 6, "boft_n_butterfly_factor": 3, "boft_all_factors": True}),
    ],
)
def test_rotations_are_orthogonal(config, settings):
    model = adapt(linear(), config, noise=0.02, **settings)
    r = rotation_of(model, 24)
    assert not torch.allclose(r, torch.eye(24), atol=1e-2)
    torch.testing.assert_close(r @ r.T, torch.eye(24), rtol=0, atol=1e-5)
    same_as_merged(model, torch.randn(3, 24))


@pytest.mark.parametrize("settings, size", [({"oft_block_size": 5}, 4), ({"oft_block_size": 0, "r": 7}, 4)])
def test_oft_takes_the_nearest_size_that_fits(settings, size):
    with pytest.warns(PeftWarning, match="does not divide 24"):
        model = adapt(linear(), peft.OFTConfig, **settings)
    assert model.base_model.model.target.oft_block_size["default"] == size


def test_oft_stays_within_its_radius():
    model = adapt(linear(), peft.OFTConfig, oft_block_size=4, coft=True, eps=0.3)
    rotation = model.base_model.model.target.oft_R["default"]
    before = rotation.weight.detach().clone()
    model(torch.randn(3, 24))
    norms = rotation.weight.detach().norm(dim=1) * 2**0.5
    limit = 0.3 / 6**0.5
    assert (norms <= limit * 1.0001).all() and (norms > 0.99 * limit).any()
    torch.testing.assert_close(torch.nn.functional.cosine_similarity(rotation.weight, before), torch.ones(6))
    kept = rotation.weight.detach().clone()
    model(torch.randn(3, 24))
    torch.testing.assert_close(rotation.weight, kept)


@pytest.mark.parametrize(
    "config, settings",
    [
        (peft.OFTConfig, {"oft_block_size": 4, "module_dropout": 0.5}),
        (peft.BOFTConfig, {"boft_block_size": 4, "boft_dropout": 0.5}),
    ],
)
def test_blocks_are_left_out_in_training(config, settings):
    base = linear(24, 24)
    base.target.weight.data, base.target.bias.data = torch.eye(24), torch.zeros(24)
    model = adapt(base, config, **settings)
    if config is peft.BOFTConfig:
        model.base_model.model.target.boft_s["default"].data.fill_(1)
    whole = model(torch.eye(24))
    model.train()
    part = model(torch.eye(24))
    blocks = [slice(i, i + 4) for i in range(0, 24, 4)]
    left_out = [torch.allclose(part[block, block], torch.eye(4), atol=1e-6) for block in blocks]
    assert sum(left_out) == 3
    for block, out in zip(blocks, left_out, strict=True):
        assert out or torch.allclose(part[block, block], whole[block, block], atol=1e-6)


def test_a_frozen_rotation_follows_its_parameters(tmp_path):
    """It is computed once and kept, but not longer than it is right."""
    model = adapt(linear(), peft.OFTConfig, oft_block_size=4)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(linear(), tmp_path)
    x = torch.randn(3, 24)
    torch.testing.assert_close(loaded(x), model(x))
    tensors = {key: 0.5 * value for key, value in peft.get_peft_model_state_dict(loaded).items()}
    peft.set_peft_model_state_dict(loaded, tensors)
    peft.set_peft_model_state_dict(model, tensors)
    torch.testing.assert_close(loaded(x), model(x))


def test_old_oft_checkpoints_are_refused(tmp_path):
    model = adapt(linear(), peft.OFTConfig, oft_block_size=4)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "peft_version": "0.17.1"}))
    with pytest.warns(PeftWarning, match=r"changed in 0\.18"):
        peft.PeftModel.from_pretrained(linear(), tmp_path)
    path.write_text(json.dumps(content))
    save_file({"base_model.model.target.oft_r.default": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="oft_r"):
        peft.PeftModel.from_pretrained(linear(), tmp_path)
    del content["oft_block_size"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="oft_block_size"):
        peft.PeftModel.from_pretrained(linear(), tmp_path)


def test_boft_takes_all_its_factors_only_when_told_to():
    with pytest.warns(PeftWarning, match="boft_all_factors"):
        one = adapt(linear(), peft.BOFTConfig, boft_n_butterfly_factor=2)
    both = adapt(linear(), peft.BOFTConfig, boft_n_butterfly_factor=2, boft_all_factors=True)
    shapes = [model.base_model.model.target.boft_R["default"].shape for model in (one, both)]
    assert shapes == [(1, 6, 4, 4), (2, 6, 4, 4)]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_boft_files_say_how_many_factors_there_are(tmp_path, low_cpu_mem_usage):
    """huggingface/peft writes the same configuration with one factor and with all."""
    model = adapt(linear(), peft.BOFTConfig, boft_n_butterfly_factor=2, boft_all_factors=True)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    content = json.loads(path.read_text())
    del content["boft_all_factors"]
    path.write_text(json.dumps(content))
    loaded = peft.PeftModel.from_pretrained(linear(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    x = torch.randn(3, 24)
    torch.testing.assert_close(loaded(x), model(x))


def test_boft_keeps_the_bias_out_of_its_scale():
    model = adapt(linear(), peft.BOFTConfig, bias="boft_only")
    bias = model.base_model.model.target.get_base_layer().bias
    assert bias.requires_grad
    torch.testing.assert_close(model(torch.zeros(1, 24))[0], bias)
    model(torch.zeros(1, 24)).sum().backward()
    torch.testing.assert_close(bias.grad, torch.ones(40))


@pytest.mark.parametrize(
    "settings, error",
    [
        ({"boft_block_size": 5}, "divisible"),
        ({"boft_block_size": 0, "boft_block_num": 7}, "divisible"),
        ({"boft_block_size": 3, "boft_n_butterfly_factor": 2, "boft_all_factors": True}, "even size"),
        ({"boft_block_size": 8, "boft_n_butterfly_factor": 2, "boft_all_factors": True}, "multiple of 2"),
    ],
)
def test_boft_blocks_have_to_fit(settings, error):
    model = linear()
    with pytest.raises(ValueError, match=error):
        peft.get_peft_model(model, peft.BOFTConfig(target_modules=["target"], **settings))
    assert type(model.target) is nn.Linear


# ---- LN tuning


class RMSNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / x.norm(dim=-1, keepdim=True)


NORMS = {"layer": lambda: nn.LayerNorm(8), "group": lambda: nn.GroupNorm(2, 8), "rms": lambda: RMSNorm(8)}


@pytest.mark.parametrize("norm", NORMS)
def test_ln_tuning_exchanges_weight_and_bias(norm):
    torch.manual_seed(0)
    base, x = Model(NORMS[norm]()), torch.randn(5, 8)
    model = adapt(base, peft.LNTuningConfig)
    copies = model.base_model.model.target.ln_tuning_layers["default"]
    expected = torch.func.functional_call(base.target.get_base_layer(), dict(copies.items()), (x,))
    torch.testing.assert_close(model(x), expected)
    same_as_merged(model, x)


def test_what_two_copies_have_changed_adds_up():
    model = adapt(Model(nn.LayerNorm(8)), peft.LNTuningConfig)
    model.add_adapter("other", peft.LNTuningConfig(target_modules=["target"]))
    model.set_adapter("other")
    shake(model, seed=2)
    layer = model.base_model.model.target
    weights = [layer.ln_tuning_layers[name]["weight"] for name in ("default", "other")]
    base = layer.get_base_layer().weight.detach().clone()
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(layer.effective()[0], weights[0] + weights[1] - base)
    x = torch.randn(5, 8)
    expected = model(x)
    model.merge_adapter(["other"])
    torch.testing.assert_close(model(x), expected)
    model.merge_adapter(["default"])
    torch.testing.assert_close(model(x), expected)


def test_merging_leaves_what_ln_tuning_trained_in_full_in_its_wrapper():
    base = nn.ModuleDict({"norm": nn.LayerNorm(8), "head": nn.Linear(8, 2)})
    config = peft.LNTuningConfig(target_modules=["norm"], modules_to_save=["head"])
    model = shake(peft.get_peft_model(base, config))
    trained = model.base_model.model["head"].current_module().weight.detach().clone()
    with pytest.warns(PeftWarning, match=r"leaves 'head' in its ModulesToSaveWrapper"):
        merged = model.merge_and_unload()
    assert type(merged["norm"]) is nn.LayerNorm
    assert torch.equal(merged["head"].current_module().weight, trained)
    assert torch.equal(merged["head"](torch.eye(8)[:1]), merged["head"].current_module()(torch.eye(8)[:1]))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(8, affine=False), nn.LayerNorm(8, elementwise_affine=False)])
def test_norms_that_cannot_be_tuned(norm):
    with pytest.raises(ValueError, match="not supported"):
        peft.get_peft_model(Model(norm), peft.LNTuningConfig(target_modules=["target"]))


GATHERING = {
    "batch": lambda: nn.BatchNorm1d(8),
    "batch, mean of all": lambda: nn.BatchNorm1d(8, momentum=None),
    "instance": lambda: nn.InstanceNorm1d(8, affine=True, track_running_stats=True),
}


@pytest.mark.parametrize("kind", GATHERING)
def test_ln_tuning_gathers_statistics_of_its_own(kind, tmp_path):
    norm = GATHERING[kind]()
    alone, x = copy.deepcopy(norm), 3 * torch.randn(6, 8, 4) - 1
    base = Model(norm)
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    plain = base.eval()(x)
    model = adapt(base, peft.LNTuningConfig).train()
    trained = dict(model.base_model.model.target.ln_tuning_layers["default"].named_parameters())
    for _ in range(3):
        model(x)
        torch.func.functional_call(alone, trained, (x,))
    expected = torch.func.functional_call(alone.eval(), trained, (x,))
    torch.testing.assert_close(model.eval()(x), expected)
    assert not torch.allclose(plain, expected)

    def base_is_as_it_was() -> bool:
        held = model.base_model.model.target.get_base_layer().state_dict()
        return all(torch.equal(held[key], value) for key, value in before.items())

    with model.disable_adapter():
        assert torch.equal(model(x), plain)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.train()(x)
    model.eval().unmerge_adapter()
    assert base_is_as_it_was()
    torch.testing.assert_close(model(x), expected)

    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in file} == before.keys()
    restored = GATHERING[kind]()
    restored.load_state_dict(before)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(Model(restored), tmp_path).eval()(x), expected)
    model.add_adapter("other", peft.LNTuningConfig(target_modules=["target"]))
    with pytest.raises(ValueError, match="statistics"):
        model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(model(x, adapter_names=["default"] * 4 + ["__base__"] * 2)[4:], plain[4:])
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), expected)
    assert torch.equal(merged.target.running_mean, file["base_model.model.target.ln_tuning_layers.running_mean"])


# ---- SHiRA


def test_shira_positions_follow_from_the_seed():
    one, two, other = (adapt(linear(), peft.ShiraConfig, r=2, random_seed=seed) for seed in (3, 3, 4))
    positions = [model.base_model.model.target.shira_indices["default"] for model in (one, two, other)]
    assert torch.equal(positions[0], positions[1]) and not torch.equal(positions[0], positions[2])
    changed = weight_of(one).nonzero()
    assert torch.equal(changed.T.int(), positions[0])


@pytest.mark.parametrize("tokens", [1, 400], ids=["entries looked up", "entries in the weight"])
def test_shira_gradients_are_those_of_the_weight(tokens):
    model = adapt(linear(), peft.ShiraConfig, r=2, random_seed=3)
    layer, x = model.base_model.model.target, torch.randn(tokens, 24)
    y = model(x)
    y.square().sum().backward()
    rows, columns = layer.shira_indices["default"].long()
    expected = (2 * y.detach().T @ x)[rows, columns]
    torch.testing.assert_close(layer.shira_weight["default"].grad, expected, rtol=1e-4, atol=1e-3)


def diagonals(base: nn.Module, r: int, **settings) -> Tensor:
    mask = torch.zeros_like(base.weight)
    mask.view(-1)[: r * sum(base.weight.shape)] = 1
    return mask


def test_shira_mask_of_ones_own(tmp_path):
    config = peft.ShiraConfig(target_modules=["target"], r=2)
    config.mask_fn = diagonals
    model = shake(peft.get_peft_model(linear(), config))
    changed = weight_of(model) != 0
    assert torch.equal(changed, diagonals(linear().target, 2).bool())
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(linear(), tmp_path)
    x = torch.randn(3, 24)
    torch.testing.assert_close(loaded(x), model(x))


def test_shira_mask_of_the_wrong_size():
    config, model = peft.ShiraConfig(target_modules=["target"], r=2), linear()
    config.mask_fn = lambda base, r: torch.ones_like(base.weight)
    with pytest.raises(ValueError, match="128 ones"):
        peft.get_peft_model(model, config)
    assert type(model.target) is nn.Linear


def test_shira_without_a_mask_says_so():
    with pytest.warns(PeftWarning, match="mask_fn"):
        config = peft.ShiraConfig(target_modules=["target"], r=2, mask_type="mine")
    model = peft.get_peft_model(linear(), config)
    with pytest.raises(ValueError, match="mask_fn"):
        model(torch.randn(3, 24))


def test_shira_scale_and_too_many_values():
    model = adapt(linear(), peft.ShiraConfig, r=2)
    change = weight_of(model)
    model.base_model.model.target.set_scale("default", 3)
    torch.testing.assert_close(weight_of(model), 3 * change, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="more than the 960"):
        peft.get_peft_model(linear(), peft.ShiraConfig(target_modules=["target"], r=20))


# ---- MiSS


@pytest.mark.parametrize("width", [24, 26])
@pytest.mark.parametrize("settings", [{}, {"init_weights": False}, {"init_weights": "mini", "mini_r": 5}])
def test_miss_shards(settings, width):
    model = adapt(linear(width), peft.MissConfig, r=8, **settings)
    change = weight_of(model)
    torch.testing.assert_close(change[:, :8], change[:, 8:16], rtol=1e-4, atol=1e-6)
    if "mini_r" in settings:
        torch.testing.assert_close(change[:5], change[5:10], rtol=1e-4, atol=1e-6)
    same_as_merged(model, torch.randn(3, width))


def test_miss_bat():
    model = adapt(linear(), peft.MissConfig, r=8, init_weights="bat")
    assert model.base_model.model.target.miss_block["default"].shape == (5, 8, 8)
    same_as_merged(model, torch.randn(3, 24))


def test_miss_dropout_acts_on_the_input():
    model = adapt(linear(), peft.MissConfig, r=8, miss_dropout=0.5)
    x = torch.ones(1, 24)
    with model.disable_adapter():
        plain = model(x)
    block = model.base_model.model.target.miss_block["default"]
    model.train()
    sums = torch.linalg.lstsq(block.T, (model(x) - plain).T).solution.flatten()
    torch.testing.assert_close(sums / 2, (sums / 2).round(), rtol=0, atol=1e-3)
    assert sums.min() >= -1e-3 and sums.max() <= 6.001 and sums.std() > 0


@pytest.mark.parametrize(
    "settings, error",
    [
        ({"r": 25}, "too large"),
        ({"r": 10, "init_weights": "bat"}, "both sides"),
        ({"r": 8, "init_weights": "mini", "mini_r": 7}, "mini_r=7"),
    ],
)
def test_miss_blocks_have_to_fit(settings, error):
    with pytest.raises(ValueError, match=error):
        peft.get_peft_model(linear(), peft.MissConfig(target_modules=["target"], **settings))


def test_bone_adapters_are_read(tmp_path):
    model = adapt(linear(), peft.MissConfig, r=8, bias="miss_only")
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    content = json.loads(path.read_text())
    old = {key: content[key] for key in ("r", "target_modules", "init_weights", "inference_mode")}
    path.write_text(json.dumps({**old, "peft_type": "BONE", "bias": "bone_only"}))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(
        {key.replace("miss_", "bone_"): value for key, value in tensors.items()}, tmp_path / "adapter_model.safetensors"
    )
    loaded = peft.PeftModel.from_pretrained(linear(), tmp_path)
    assert loaded.peft_config["default"].peft_type == peft.PeftType.MISS
    x = torch.randn(3, 24)
    torch.testing.assert_close(loaded(x), model(x))


# ---- trained tokens


class Tied(nn.Module):
    """A language model whose output layer shares the embedding's weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(12, 6, padding_idx=0)
        self.head = nn.Linear(6, 12, bias=False)
        self.head.weight = self.embedding.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(x)))


def test_tied_modules_share_the_trained_tokens():
    config = peft.TrainableTokensConfig(token_indices=[3, -1])
    model = shake(peft.get_peft_model(Tied(), config))
    assert config.target_modules == "embedding"
    (delta,) = (p for p in model.parameters() if p.requires_grad)
    plain, x = Tied(), torch.tensor([[3, 11, 5, 0]])
    weight = plain.embedding.weight.detach().clone()
    weight[[3, 11]] = delta.detach()
    plain.embedding.weight.data = weight
    torch.testing.assert_close(model(x), plain(x))
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    torch.testing.assert_close(delta.grad, plain.embedding.weight.grad[[3, 11]])
    merged = model.merge_and_unload()
    assert merged.head.weight is merged.embedding.weight
    torch.testing.assert_close(merged(x), plain(x))


def test_a_trained_padding_token_gets_no_gradient_from_the_input():
    """As in `nn.Embedding`."""
    model = peft.get_peft_model(
        Model(nn.Embedding(12, 6, padding_idx=0)),
        peft.TrainableTokensConfig(target_modules=["target"], token_indices=[4, 0]),
    )
    model(torch.tensor([[0, 4]])).sum().backward()
    (delta,) = (p for p in model.parameters() if p.requires_grad)
    assert delta.grad.tolist() == [[1.0] * 6, [0.0] * 6]


def test_embeddings_that_scale_themselves():
    """As Gemma's: the scale holds for trained tokens too."""

    class Scaled(nn.Embedding):
        embed_scale = torch.tensor(3.0)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.embed_scale

    model = adapt(Model(Scaled(12, 6)), peft.TrainableTokensConfig, token_indices=[4])
    same_as_merged(model, torch.tensor([[4, 5]]))


def test_random_start_of_tokens():
    model = peft.get_peft_model(
        Tied(), peft.TrainableTokensConfig(target_modules=["embedding"], token_indices=[3], init_weights=False)
    )
    x = torch.tensor([[3]])
    assert not torch.allclose(model(x), Tied()(x))


def test_no_base_embedding_is_stored_with_tokens(tmp_path):
    model = adapt(Model(nn.Embedding(12, 6)), peft.TrainableTokensConfig, token_indices=[4])
    model.save_pretrained(tmp_path)
    assert list(load_file(tmp_path / "adapter_model.safetensors")) == ["base_model.model.target.trainable_tokens_delta"]


@pytest.mark.parametrize("indices, error", [([12], IndexError), ([-13], IndexError), (["a"], TypeError)])
def test_tokens_that_are_none(indices, error):
    model = Model(nn.Embedding(12, 6))
    with pytest.raises(error):
        peft.get_peft_model(model, peft.TrainableTokensConfig(target_modules=["target"], token_indices=indices))
    assert type(model.target) is nn.Embedding


def test_tokens_of_two_adapters():
    model = adapt(Model(nn.Embedding(12, 6)), peft.TrainableTokensConfig, token_indices=[1, 2])
    model.add_adapter("other", peft.TrainableTokensConfig(target_modules=["target"], token_indices=[3]))
    model.add_adapter("same", peft.TrainableTokensConfig(target_modules=["target"], token_indices=[2, 4]))
    model.base_model.set_adapter(["default", "other"])
    x = torch.arange(12)[None]
    together = model(x)
    with pytest.raises(ValueError, match=r"token indices \[2\]"):
        model.merge_adapter(["default", "same"])
    torch.testing.assert_close(model(x), together)
    torch.testing.assert_close(model.merge_and_unload()(x), together)
