"""How LoRA's factors can start: what the adapted model computes then, and what becomes of it when it is saved."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from torch import nn

import peft
from peft import LoraConfig, PeftModel, get_peft_model
from peft.ops.quantise import int8_rounded, nf4_rounded
from peft.tuners.lora import preprocess_corda, preprocess_loraga
from tiny_models import gpt2, llama, tokens


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.token = nn.Linear(12, 16), nn.Linear(16, 12), nn.Embedding(20, 12)

    def forward(self, x):
        return self.down(torch.relu(self.up(x if x.is_floating_point() else self.token(x))))


def mlp() -> Mlp:
    torch.manual_seed(0)
    return Mlp().eval()


def config_of(start, **settings) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["up", "down"], "init_lora_weights": start, **settings})


X = torch.randn(32, 12, generator=torch.Generator().manual_seed(1))


def prepared(start: str, **settings) -> tuple[Mlp, LoraConfig]:
    """A model and a configuration, the data seen if the start needs that."""
    model, config = mlp(), config_of(start, **settings)
    if start == "corda":
        preprocess_corda(model, config, lambda: model(X))
    elif start == "lora_ga":
        peft.preprocess_loraga(model, config, lambda: model(X).square().sum().backward())
    return model, config


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    "start", ["pissa", "pissa_niter_8", "olora", "orthogonal", "mica", "corda", "lora_ga", "gaussian", "eva"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_starts_as_the_base_model(start, dtype):
    base = mlp().to(dtype)
    model, config = prepared(start)
    expected = base(X.to(dtype))
    adapted = get_peft_model(model.to(dtype), config).eval()
    precision = {torch.float32: 1e-4, torch.bfloat16: 0.06}[dtype]
    torch.testing.assert_close(adapted(X.to(dtype)), expected, rtol=precision, atol=precision)
    changed = any(
        not torch.allclose(getattr(adapted.base_model.model, name).base_layer.weight, getattr(base, name).weight)
        for name in ("up", "down")
    )
    assert changed == (start in ("pissa", "pissa_niter_8", "olora", "corda", "lora_ga"))


def test_pissa_takes_the_largest_singular_values():
    model = get_peft_model(mlp(), config_of("pissa")).base_model.model
    values = torch.linalg.svdvals(mlp().up.weight)
    torch.testing.assert_close(torch.linalg.svdvals(model.up.get_delta_weight("default"))[:4], values[:4])
    torch.testing.assert_close(torch.linalg.svdvals(model.up.base_layer.weight)[:8], values[4:])


def test_orthogonal_factors():
    layer = get_peft_model(mlp(), config_of("orthogonal")).base_model.model.up
    assert layer.lora_A["default"].weight.norm() > 0.1 and layer.lora_B["default"].weight.norm() > 0.1
    assert layer.get_delta_weight("default").abs().max() < 1e-5


def test_mica_trains_a_alone():
    model = get_peft_model(mlp(), config_of("mica"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_A" in name for name in trained)
    b = model.base_model.model.up.lora_B["default"].weight
    least = torch.linalg.svd(mlp().up.weight).U[:, 8:12]
    torch.testing.assert_close(b @ b.T, least @ least.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method, kept", [("ipm", "largest"), ("kpm", "smallest")])
def test_corda_keeps_what_the_data_shows(method, kept):
    """The part that is trained is the most, or the least, of what the layer makes of such data."""
    setting = {"corda_config": {"corda_method": method}}
    narrow = X @ torch.diag(torch.tensor([10.0] * 4 + [0.01] * 8))  # the data lies in four directions
    model, config = mlp(), config_of("corda", **setting)
    preprocess_corda(model, config, lambda: model(narrow))
    layer = get_peft_model(model, config).base_model.model.up
    part = narrow @ layer.get_delta_weight("default").T
    whole = narrow @ mlp().up.weight.T
    share = (part.norm() / whole.norm()).item()
    assert share > 0.99 if kept == "largest" else share < 0.01


def test_corda_finds_its_files_again(tmp_path):
    files = {"cache_file": str(tmp_path / "a" / "cache.pt"), "covariance_file": str(tmp_path / "covariance.pt")}
    outputs = []
    for run in (lambda model: model(X), None):
        model, config = mlp(), config_of("corda", corda_config=files)
        preprocess_corda(model, config, None if run is None else lambda: run(model))  # noqa: B023
        outputs.append(parameters(get_peft_model(model, config)))
    assert all(torch.equal(outputs[0][name], outputs[1][name]) for name in outputs[0])


def test_corda_without_data_is_refused_before_anything_changes():
    model = mlp()
    before = parameters(model)
    with pytest.raises(ValueError, match="preprocess_corda"):
        get_peft_model(model, config_of("corda"))
    with pytest.raises(ValueError, match="run_model"):
        preprocess_corda(model, config_of("corda"))
    assert list(model.state_dict()) == list(before)
    other, config = prepared("corda", r=3)
    config.r = 5
    with pytest.raises(ValueError, match="rank 3"):
        get_peft_model(other, config)


def test_lora_ga_starts_along_the_gradient():
    """A spans the r most important inputs of the gradient, B the r outputs that follow."""
    model, config = prepared("lora_ga", lora_ga_config={"direction": "ArB2r"})
    reference = mlp()
    reference(X).square().sum().backward()
    u, _, vh = torch.linalg.svd(reference.up.weight.grad)
    layer = get_peft_model(model, config).base_model.model.up
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(a.T @ a, vh[:4].T @ vh[:4], rtol=1e-3, atol=1e-3)
    directions = nn.functional.normalize(b, dim=0)
    torch.testing.assert_close(directions @ directions.T, u[:, 4:8] @ u[:, 4:8].T, rtol=1e-3, atol=1e-3)


def test_lora_ga_is_for_linear_layers_and_others_start_as_by_default():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Conv1d(4, 6, 1), nn.Linear(6, 4)).eval()
    config = peft.LoraConfig(r=2, target_modules=["0", "1", "2"], init_lora_weights="lora_ga", lora_ga_config={})

    def train_step() -> None:
        model[2](torch.randn(3, 6)).sum().backward()

    preprocess_loraga(model, config, train_step)
    adapted = get_peft_model(model, config).base_model.model
    assert not adapted[1].lora_B["default"].weight.any() and adapted[1].lora_A["default"].weight.any()
    assert adapted[2].lora_B["default"].weight.any()


def test_lora_ga_leaves_the_model_as_it_was_and_keeps_a_file(tmp_path):
    model, config = mlp(), config_of("lora_ga", lora_ga_config={})
    before = parameters(model)
    path = str(tmp_path / "gradients.pt")
    peft.preprocess_loraga(model, config, lambda: model(X).sum().backward(), cache_file=path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not model.training
    again = mlp()
    peft.preprocess_loraga(again, config, lambda: pytest.fail("the file is there"), cache_file=path)
    with pytest.raises(ValueError, match="backward"):
        peft.preprocess_loraga(mlp(), config, lambda: None)
    with pytest.warns(peft.PeftWarning, match="preprocess_loraga"):
        get_peft_model(mlp(), config)


@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_makes_up_for_what_quantising_loses(bits):
    quantise = nf4_rounded if bits == 4 else int8_rounded
    weight = mlp().up.weight.detach()
    errors = [(weight - quantise(weight)).norm()]
    for steps in (1, 5):
        config = config_of("loftq", loftq_config={"loftq_bits": bits, "loftq_iter": steps}, lora_alpha=16)
        layer = get_peft_model(mlp(), config).base_model.model.up
        base = layer.base_layer.weight.detach()
        if bits == 4:
            torch.testing.assert_close(nf4_rounded(base), base)  # what is left can be quantised without loss
        errors.append((weight - base - layer.get_delta_weight("default")).norm())
    assert errors[1] < errors[0] and errors[2] < errors[0]


def test_nf4_is_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(24, 40)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=False)
    torch.testing.assert_close(nf4_rounded(weight), functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"init_lora_weights": "pisa"}, "pissa"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "even"),
        ({"init_lora_weights": "pissa", "r": 13}, "at most 12"),
        ({"init_lora_weights": "loftq"}, "loftq_config"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 3}}, "4 bits"),
        ({"init_lora_weights": "olora", "target_modules": ["conv"]}, "Conv1d"),
    ],
)
def test_starts_that_cannot_be_made(settings, message):
    model = mlp()
    model.conv = nn.Conv1d(4, 4, 3)
    before = parameters(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, LoraConfig(**{"target_modules": ["up"], "r": 4, **settings}))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not hasattr(model, "peft_config")


def test_a_failed_start_leaves_the_base_weights(monkeypatch):
    """The base weights change last: when all layers have their adapters."""
    model = mlp()
    before = parameters(model)
    svd, calls = torch.linalg.svd, []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) > 1:
            raise RuntimeError("did not converge")
        return svd(*args, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", fail)
    with pytest.raises(RuntimeError, match="converge"):
        get_peft_model(model, config_of("pissa"))
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def train_a_little(model: nn.Module, data: torch.Tensor) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        (model(data) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("start", ["pissa", "olora", "orthogonal"])
def test_a_start_that_changes_base_weights_under_other_adapters_says_so(start):
    model = get_peft_model(mlp(), config_of(False, target_modules=["up"]), "first")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        get_peft_model(mlp(), config_of(start))  # alone: nothing to say
        model.add_adapter("second", config_of(start, target_modules=["down"]))
        assert not said
        model.add_adapter("third", config_of(start))
        expected = ["so first, second will act differently"] * (start != "orthogonal")
        assert len(said) == len(expected)
        model.add_adapter("fourth", config_of(False, target_modules=["up"]))
        expected += ["lack what third started with"] * (start != "orthogonal")
    assert [part in str(one.message) for part, one in zip(expected, said, strict=True)] == [True] * len(expected)


@pytest.mark.parametrize("start", ["pissa", "olora", "corda", "lora_ga"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_trained_adapter_is_saved_for_the_original_base(start, use_rslora, tmp_path):
    settings = {"use_rslora": use_rslora, "rank_pattern": {"down": 3}, "alpha_pattern": {"up": 5}}
    model = get_peft_model(*prepared(start, **settings))
    model.save_pretrained(tmp_path / "initial")
    train_a_little(model, X)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial")
    loaded = PeftModel.from_pretrained(mlp(), tmp_path / "plain")
    torch.testing.assert_close(loaded(X), model.eval()(X), rtol=1e-4, atol=1e-4)
    assert loaded.peft_config["default"].init_lora_weights is True
    assert torch.equal(loaded.base_model.model.up.base_layer.weight, mlp().up.weight)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_trained_dora_is_saved_for_the_original_base(start, tmp_path):
    model = get_peft_model(mlp(), config_of(start, use_dora=True))
    # Tutorials set this, so that the untrained adapter can be loaded; what the base weights lack is the same.
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    train_a_little(model, X)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial")
    loaded = PeftModel.from_pretrained(mlp(), tmp_path / "plain")
    torch.testing.assert_close(loaded(X), model.eval()(X), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(loaded(X), mlp()(X), atol=1e-2)


def test_orthogonal_draws_b_rank_by_rank():
    layer = get_peft_model(nn.Sequential(nn.Linear(6, 5)), LoraConfig(target_modules=["0"], r=4)).base_model.model[0]
    torch.manual_seed(3)
    layer.add_adapter("o", LoraConfig(r=4, init_lora_weights="orthogonal"))
    torch.manual_seed(3)
    torch.rand(4 * 6), torch.rand(5 * 4)  # plain factors are drawn first
    basis, _ = torch.linalg.qr(torch.randn(4, 4))
    torch.testing.assert_close(layer.lora_A["o"].weight, (torch.randn(6, 2) @ basis[::2]).T / 10)
    torch.testing.assert_close(layer.lora_B["o"].weight, torch.randn(2, 5).T @ basis[1::2] / 10)


def test_orthogonal_has_no_effect_at_any_rank():
    net = nn.Sequential(nn.Linear(6, 2))
    want = net(torch.ones(6))
    model = get_peft_model(net, LoraConfig(target_modules=["0"], r=4, init_lora_weights="orthogonal"))
    assert model.base_model.model[0].lora_B["default"].weight.any()
    torch.testing.assert_close(model(torch.ones(6)), want)


def test_conversion_of_a_start_that_changes_nothing_is_refused(tmp_path):
    model = get_peft_model(mlp(), config_of(True))
    model.save_pretrained(tmp_path / "initial")
    with pytest.raises(ValueError, match="change the base weights"):
        model.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=tmp_path / "initial")
    pissa = get_peft_model(mlp(), config_of("pissa", r=3))
    with pytest.raises(ValueError, match="before training"):
        pissa.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=tmp_path / "initial")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_makes_the_start_again(start, low_cpu_mem_usage, tmp_path):
    """Files hold A and B alone; the base weights they belong to come from the original ones."""
    model = get_peft_model(mlp(), config_of(start))
    train_a_little(model, X)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    torch.testing.assert_close(loaded(X), model.eval()(X), rtol=1e-4, atol=1e-4)


def test_what_has_changed_the_base_is_not_converted_to_a_plain_lora():
    model = get_peft_model(mlp(), config_of("pissa"))
    assert not model.base_model.supports_lora_conversion()
    assert get_peft_model(mlp(), config_of("orthogonal")).base_model.supports_lora_conversion()


def test_starts_on_embeddings_and_transposed_layers():
    for start in ("pissa", "olora", "orthogonal", "corda", "lora_ga", "mica"):
        model = get_peft_model(mlp(), config_of(start, target_modules=["token"])).eval()
        ids = torch.arange(20)[None]
        torch.testing.assert_close(model(ids), mlp()(ids), rtol=1e-4, atol=1e-5)
        # Files of huggingface/peft need the base weights as they were: there these starts are for other layers.
        assert torch.equal(model.base_model.model.token.base_layer.weight, mlp().token.weight)
    for start in ("pissa", "olora"):
        model = get_peft_model(gpt2(), LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights=start)).eval()
        with torch.no_grad():
            torch.testing.assert_close(model(tokens()).logits, gpt2()(tokens()).logits, rtol=1e-3, atol=1e-4)


# ---- EVA


def eva_model(**settings) -> PeftModel:
    return get_peft_model(mlp(), config_of("eva", **settings))


def start_eva(model: PeftModel, batches, **options) -> None:
    peft.initialize_lora_eva_weights(
        model,
        dataloader=batches,
        forward_fn=lambda model, batch: model(batch),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
        **options,
    )


def test_eva_starts_with_the_principal_components_of_the_inputs():
    data = torch.randn(64, 12) @ torch.diag(torch.tensor([9.0, 7, 5, 3] + [0.1] * 8))
    model = eva_model(eva_config=peft.EvaConfig(rho=1.0))
    start_eva(model, [data[:32], data[32:]])
    a = model.base_model.model.up.lora_A["default"].weight
    components = torch.linalg.svd(data - data.mean(0)).Vh[:4]
    torch.testing.assert_close(a.T @ a, components.T @ components, rtol=1e-2, atol=1e-2)
    assert not model.base_model.model.up.lora_B["default"].weight.any()


def test_eva_shares_out_the_ranks(tmp_path):
    """A layer whose inputs lie on one line needs one rank; the other gets what is left."""
    base = mlp()
    with torch.no_grad():
        base.up.weight.copy_(torch.ones(16, 12))
        base.up.bias.fill_(100.0)  # so that nothing is cut off, and `down` sees one direction
    model = get_peft_model(copy.deepcopy(base), config_of("eva"))
    start_eva(model, [X])
    up, down = model.base_model.model.up, model.base_model.model.down
    assert down.r["default"] < 4 < up.r["default"] <= 8
    assert up.r["default"] + down.r["default"] == 8
    assert up.scaling["default"] == pytest.approx(2)  # alpha grows with the rank
    give = torch.randn(down.lora_B["default"].weight.shape)
    with torch.no_grad():
        down.lora_B["default"].weight.copy_(give)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(loaded(X), model.eval()(X))
    model.train()(X).sum().backward()
    assert up.lora_B["default"].weight.grad is not None


def test_eva_leaves_out_layers_that_get_no_rank():
    model = eva_model()
    found = {"up": torch.eye(12)[:6], "down": torch.empty(0, 16)}
    peft.initialize_lora_eva_weights(model, eva_state_dict=found)
    assert isinstance(model.base_model.model.down, nn.Linear)
    assert model.base_model.model.up.r["default"] == 6
    assert model.peft_config["default"].target_modules == {"up"}


def test_eva_leaves_a_module_out_in_all_its_places():
    base = mlp()
    base.again = base.down
    model = get_peft_model(base, config_of("eva"))
    peft.initialize_lora_eva_weights(model, eva_state_dict={"up": torch.eye(12)[:8], "down": torch.empty(0, 16)})
    assert type(base.down) is nn.Linear and base.again is base.down


def test_eva_inside_of_another_method_names_modules_as_configurations_do():
    model = get_peft_model(mlp(), config_of("eva"), "one", mixed=True)
    model.add_adapter("two", peft.HRAConfig(r=2, target_modules=["up", "down"]))
    found = {"base_model.model.up.base_layer": torch.eye(12)[:6], "down": torch.eye(16)[:2]}
    peft.initialize_lora_eva_weights(model, eva_state_dict=found, adapter_name="one")
    config = model.peft_config["one"]
    assert config.target_modules == {"up", "down"} and config.rank_pattern == {"up": 6, "down": 2}


def test_where_eva_leaves_an_adapter_out_no_other_comes_in_its_place():
    model = eva_model()
    model.add_adapter("other", config_of(False))
    peft.initialize_lora_eva_weights(model, eva_state_dict={"up": torch.randn(8, 12), "down": torch.empty(0, 16)})
    down = model.base_model.model.down
    assert down.active_adapters == ["default"] and down.adapter_names() == ["other"]
    torch.testing.assert_close(down(X.new_ones(2, 16)), down.base_layer(X.new_ones(2, 16)))
    assert not any(parameter.requires_grad for parameter in down.parameters())


def test_eva_on_a_language_model_leaves_out_masked_positions():
    config = LoraConfig(
        r=2, target_modules=["q_proj", "k_proj"], init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0)
    )
    ids, mask = tokens(4, 16), torch.ones(4, 16, dtype=torch.long)
    mask[:, 8:] = 0
    labels = ids.masked_fill(torch.arange(16) < 2, -100)
    found = [
        peft.get_eva_state_dict(
            llama(),
            [{"input_ids": batch, "attention_mask": mask, "labels": labels}],
            config,
            show_progress_bar=False,
        )
        for batch in (ids, torch.where(mask.bool(), ids, 1))
    ]
    assert set(found[0]) == {f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "k_proj")}
    for name, directions in found[0].items():
        torch.testing.assert_close(directions.T @ directions, found[1][name].T @ found[1][name], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(directions @ directions.T, torch.eye(len(directions)), rtol=1e-3, atol=1e-4)


def test_eva_says_what_it_needs():
    with pytest.raises(ValueError, match="eva"):
        start_eva(get_peft_model(mlp(), config_of(True)), [X])
    with pytest.raises(ValueError, match="empty"):
        start_eva(eva_model(), [])
    with pytest.raises(ValueError, match="dataloader"):
        peft.initialize_lora_eva_weights(eva_model())
    with pytest.raises(ValueError, match="larger batches"):
        start_eva(eva_model(), [X[:3]])
    with pytest.warns(peft.PeftWarning, match="no effect"):
        LoraConfig(eva_config=peft.EvaConfig())


@pytest.mark.parametrize(
    "start, settings",
    [
        ("pissa_niter_0", {}),
        ("lora_ga", {"lora_ga_config": peft.LoraGAConfig(direction="random")}),
        ("lora_ga", {"lora_ga_config": peft.LoraGAConfig(scale="weight_svd")}),
    ],
)
def test_a_random_start_is_the_same_again_on_loading(start, settings, tmp_path):
    torch.manual_seed(1)
    model, config = prepared(start, **settings)
    adapted = get_peft_model(model, config).eval()
    with torch.no_grad():
        adapted.base_model.model.up.lora_B["default"].weight.mul_(1.5)
    adapted.save_pretrained(tmp_path)
    for number in range(2):
        torch.manual_seed(2 + number)
        loaded = peft.PeftModel.from_pretrained(prepared(start, **settings)[0], tmp_path)
        torch.testing.assert_close(loaded(X), adapted(X), atol=1e-3, rtol=1e-3)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content.pop("init_seed") == adapted.peft_config["default"].init_seed
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="does not say what .* was drawn from"):
        peft.PeftModel.from_pretrained(prepared(start, **settings)[0], tmp_path)
