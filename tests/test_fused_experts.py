"""Adapters of mixture models whose experts transformers 5 fuses into one parameter per projection."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
import transformers
from safetensors.torch import save_file

from peft import LoraConfig, PeftModel, get_peft_model
from peft.integrations.transformers import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
    fuse_lora_a,
    fuse_lora_b,
)
from tiny_models import EXPERTS, MIXTURE, _build, mixtral, qwen2, qwen3

IS_5_0 = transformers.__version__.startswith("5.0.")

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("transformers.conversion_mapping")

R, ALPHA = 2, 6
IDS = torch.arange(3, 13).view(2, 5)


#: model, names of the expert layers (gate, up, down), what else the adapter targets, where experts were before
MODELS = {
    "mixtral": (mixtral, ("w1", "w3", "w2"), ("q_proj",), ".block_sparse_moe."),
    "qwen3": (qwen3, ("gate_proj", "up_proj", "down_proj"), ("v_proj",), ".mlp."),
    "qwen2": (qwen2, ("gate_proj", "up_proj", "down_proj"), ("v_proj",), ".mlp."),
}


def adapter_of_before(model, projections, others, container, folder, **fields):
    """Saves a LoRA as earlier versions of transformers had it, a pair per expert; returns the changed model."""
    gate, up, down = projections
    generator = torch.Generator().manual_seed(1)
    tensors, changed = {}, copy.deepcopy(model)

    def change(name, weight):
        a = torch.randn(R, weight.shape[1], generator=generator) * 0.3
        b = torch.randn(weight.shape[0], R, generator=generator) * 0.3
        prefix = "base_model.model." + name.replace(".mlp.", container)
        tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"] = a, b
        weight += ALPHA / R * b @ a

    with torch.no_grad():
        for name, module in changed.named_modules():
            if hasattr(module, "gate_up_proj") and module.gate_up_proj.dim() == 3:
                for expert in range(EXPERTS):
                    halves = module.gate_up_proj[expert].chunk(2)
                    change(f"{name}.{expert}.{gate}", halves[0])
                    change(f"{name}.{expert}.{up}", halves[1])
                    change(f"{name}.{expert}.{down}", module.down_proj[expert])
            elif isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in (*projections, *others):
                change(name, module.weight)
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", r=R, lora_alpha=ALPHA, lora_dropout=0.1, bias="none")
    config |= dict(target_modules=[*projections, *others], inference_mode=True, **fields)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return changed


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_of_before_acts_as_it_did(name, tmp_path):
    build, *layers = MODELS[name]
    want = logits(adapter_of_before(build(), *layers, tmp_path / "old"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        model = PeftModel.from_pretrained(build(), tmp_path / "old")
    torch.testing.assert_close(logits(model), want)
    assert not torch.allclose(want, logits(build()), atol=1e-2)
    # Saved again, it is an adapter of today, and merged it is a model of today.
    model.save_pretrained(tmp_path / "new")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(build(), tmp_path / "new")), want)
    torch.testing.assert_close(logits(model.merge_and_unload()), want)


@pytest.mark.skipif(IS_5_0, reason="transformers 5.0 reads such experts wrongly, and not at all with huggingface/peft")
@pytest.mark.parametrize("name", ["mixtral", "qwen3"])
def test_transformers_loads_an_adapter_of_before(name, tmp_path):
    build, *layers = MODELS[name]
    want = logits(adapter_of_before(build(), *layers, tmp_path / "old"))
    model = build()
    info = model.load_adapter(tmp_path / "old")
    assert not info.missing_keys
    assert not info.unexpected_keys
    torch.testing.assert_close(logits(model), want)


def test_a_second_adapter_of_before_beside_the_first(tmp_path):
    build, *layers = MODELS["mixtral"]
    want = logits(adapter_of_before(build(), *layers, tmp_path / "old"))
    model = get_peft_model(build(), LoraConfig(task_type="CAUSAL_LM", target_modules=["w1", "w2", "w3"]))
    model.load_adapter(tmp_path / "old", "old")
    torch.testing.assert_close(logits(model), logits(build()))
    model.set_adapter("old")
    torch.testing.assert_close(logits(model), want)


def test_experts_that_an_adapter_of_before_left_alone_stay_as_they_are(tmp_path):
    build, *layers = MODELS["mixtral"]
    adapter_of_before(build(), *layers, tmp_path / "old")
    only_first = ["experts.0.w1", "experts.0.w3", "experts.0.w2"]
    config = LoraConfig(task_type="CAUSAL_LM", r=R, lora_alpha=ALPHA, target_modules=only_first)
    generator = torch.Generator().manual_seed(2)
    stem = "base_model.model.model.layers.0.block_sparse_moe.experts.0"
    sizes = {"w1": (24, 16), "w3": (24, 16), "w2": (16, 24)}
    tensors = {}
    for layer, (rows, columns) in sizes.items():
        tensors[f"{stem}.{layer}.lora_A.weight"] = torch.randn(R, columns, generator=generator)
        tensors[f"{stem}.{layer}.lora_B.weight"] = torch.randn(rows, R, generator=generator)
    model = build()
    convert_peft_config_for_transformers(config, model, state_dict=tensors)
    converted = convert_peft_adapter_state_dict_for_transformers(model, config, tensors)
    b = converted["base_model.model.model.layers.0.mlp.experts.lora_B.weight"].view(16, R, EXPERTS)
    assert torch.equal(b[:, :, 0], tensors[f"{stem}.w2.lora_B.weight"])
    assert not b[:, :, 1:].any()


def test_fused_factors_multiply_to_the_stacked_products():
    generator = torch.Generator().manual_seed(0)
    a = [[torch.randn(R, 5, generator=generator) for _ in range(EXPERTS)] for _ in range(2)]
    b = [[torch.randn(4, R, generator=generator) for _ in range(EXPERTS)] for _ in range(2)]
    fused_a, fused_b = fuse_lora_a(a), fuse_lora_b(b)
    assert fused_a.shape == (EXPERTS * 2 * R, 5)
    assert fused_b.shape == (2 * 4, 2 * R * EXPERTS)
    per_expert = torch.bmm(fused_b.view(8, 2 * R, EXPERTS).permute(2, 0, 1), fused_a.view(EXPERTS, 2 * R, 5))
    want = torch.stack([torch.cat([b[p][e] @ a[p][e] for p in range(2)]) for e in range(EXPERTS)])
    torch.testing.assert_close(per_expert, want)


def converted(build, target_modules, **fields):
    config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=target_modules, **fields)
    convert_peft_config_for_transformers(config, build())
    return config


@pytest.mark.parametrize(
    ("build", "targets", "modules", "parameters"),
    [
        (mixtral, ["w1", "w2", "w3"], set(), ["down_proj", "gate_up_proj"]),
        (mixtral, ["w2", "q_proj"], {"q_proj"}, ["down_proj"]),
        (mixtral, ["q_proj", "gate"], {"q_proj"}, ["gate.weight"]),
        (mixtral, r".*\.(w[13]|q_proj)", r".*\.(w[13]|q_proj)", ["gate_up_proj"]),
        (mixtral, r".*experts.*\.w2", set(), ["down_proj"]),
        (mixtral, "all-linear", "all-linear", ["down_proj", "gate.weight", "gate_up_proj"]),
        (mixtral, ["q_proj"], {"q_proj"}, None),
        # The first layer keeps its own layers of these names.
        (qwen3, ["gate_proj", "up_proj"], {"gate_proj", "up_proj"}, ["gate_up_proj"]),
        # Here the names mean the shared expert; adapters made so must stay what they are.
        pytest.param(
            qwen2, ["gate_proj", "up_proj"], {"gate_proj", "up_proj"}, None,
            marks=pytest.mark.skipif(IS_5_0, reason="transformers 5.0 has them mean the experts as well"),
        ),
    ],
)
def test_what_a_configuration_means(build, targets, modules, parameters):
    config = converted(build, targets)
    assert config.target_modules == modules
    assert config.target_parameters == parameters
    # Each of the two layers in one parameter has the rank, and the scale, that it had.
    fused = {r".*\.gate_up_proj": 2} if parameters and "gate_up_proj" in parameters else {}
    assert config.rank_pattern == {key: factor * R for key, factor in fused.items()}
    assert config.alpha_pattern == {key: factor * ALPHA for key, factor in fused.items()}


def test_layers_and_excludes_are_kept():
    both = dict(mlp_only_layers=[])
    config = converted(lambda: qwen3(**both), ["down_proj"], layers_to_transform=[1])
    assert config.target_parameters == ["model.layers.1.mlp.experts.down_proj"]
    config = converted(lambda: qwen3(**both), ["down_proj", "q_proj"], exclude_modules=r".*layers\.1\.mlp.*")
    assert config.target_parameters == ["model.layers.0.mlp.experts.down_proj"]


def test_half_of_a_parameter_is_refused():
    with pytest.raises(ValueError, match="w3"):
        converted(mixtral, ["w1", "w2"])
    with pytest.raises(ValueError, match="rank_pattern"):
        converted(mixtral, ["w1", "w3"], rank_pattern={"w1": 4})
    assert converted(mixtral, ["w1", "w3"], rank_pattern={"w1": 4, "w3": 4}).rank_pattern[r".*\.gate_up_proj"] == 8


def test_other_models_and_methods_are_left_alone():
    from peft import HRAConfig

    config = HRAConfig(target_modules=["w1", "w3"])
    convert_peft_config_for_transformers(config, mixtral())
    assert config.target_parameters is None
    plain = LoraConfig(target_modules=["w1"])
    convert_peft_config_for_transformers(plain, torch.nn.Sequential(torch.nn.Linear(2, 2)))
    assert plain.target_modules == {"w1"}


def llama():
    fields = {name: value for name, value in MIXTURE.items() if name != "num_experts_per_tok"}
    return _build("LlamaConfig", "LlamaForCausalLM", 0, **fields)


@pytest.mark.parametrize(
    ("build", "given", "modules"),
    [(llama, None, {"q_proj", "v_proj"}), (llama, [], set()), (mixtral, None, set()), (qwen3, None, set())],
)
def test_defaults_join_the_parameters_as_in_huggingface_peft(build, given, modules):
    parameter = "mlp.gate_proj.weight" if build is llama else "experts.down_proj"
    model = get_peft_model(build(), LoraConfig(target_modules=given, target_parameters=[parameter]))
    assert model.peft_config["default"].target_modules == modules
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert {".mlp." in name for name in names} == ({True, False} if modules else {True})


def test_experts_after_transformers_has_changed_their_layer(monkeypatch):
    """transformers 5.0 replaces `update_layer` with one that swaps the features, once it has loaded an adapter."""
    from transformers.integrations import peft as theirs

    from peft.tuners.lora.layer import ParamWrapper

    if not hasattr(theirs, "patch_moe_parameter_targeting"):
        pytest.skip("this version of transformers leaves the layer as it is")
    monkeypatch.setattr(ParamWrapper, "update_layer", ParamWrapper.update_layer)
    model = mixtral()
    before = logits(model)
    theirs.patch_moe_parameter_targeting(model, None)
    torch.testing.assert_close(logits(get_peft_model(model, LoraConfig(target_parameters=["down_proj"]))), before)
