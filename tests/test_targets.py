"""Which modules a configuration means, and what is written of that."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import peft
from peft import IA3Config, LoraConfig, get_peft_model
from tiny_models import MLP, bert, gpt2, llama, t5


def targets(model: nn.Module, **settings) -> list[str]:
    """The names of the modules that got an adapter."""
    return get_peft_model(model, LoraConfig(**settings)).base_model.targeted_module_names


def test_layers_are_counted_in_the_outermost_stack():
    """T5's blocks are lists of layers themselves."""
    names = targets(t5(), target_modules=["q", "wi"], layers_to_transform=[1])
    assert len(names) == 5 and all(".block.1." in name for name in names)


def test_a_model_that_is_a_layer_itself_has_no_place_for_an_adapter():
    layer = nn.Linear(4, 4)
    for everything in (".*", "all-linear", [""]):
        with pytest.raises(ValueError, match=r"nn\.Sequential"):
            get_peft_model(layer, LoraConfig(target_modules=everything))
    assert targets(nn.Sequential(layer), target_modules=".*") == ["0"]


def test_all_linear_names_are_as_short_as_they_can_be(tmp_path):
    model = get_peft_model(t5(), LoraConfig(target_modules="all-linear"))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(saved["target_modules"]) == {"q", "k", "v", "o", "wi", "wo"}
    assert "lm_head" not in model.base_model.targeted_module_names


def test_names_stay_whole_where_a_part_would_mean_other_modules_too():
    base = nn.ModuleDict({f"block{i}": MLP() for i in range(24)})
    chosen = [f"block{i}.lin0" for i in range(20)]
    model = get_peft_model(base, LoraConfig(target_modules=chosen))
    assert model.base_model.targeted_module_names == chosen
    assert model.peft_config["default"].target_modules == set(chosen)


@pytest.mark.parametrize("prefix", ["body.", ""])
def test_many_names_become_few_whether_they_are_whole_or_not(prefix):
    base = nn.ModuleDict({"body": nn.ModuleDict({f"block{i}": MLP() for i in range(20)})})
    chosen = [f"{prefix}block{i}.lin0" for i in range(20)]
    model = get_peft_model(base, LoraConfig(target_modules=chosen))
    assert model.peft_config["default"].target_modules == {"lin0"}
    with pytest.warns(peft.PeftWarning, match="absent"):
        model.add_adapter("other", LoraConfig(target_modules=[*chosen, "absent"]))


def test_ia3_with_many_names_is_loaded_again(tmp_path):
    blocks = lambda: nn.ModuleDict({f"block{i}": MLP() for i in range(20)})
    names = [f"block{i}.lin0" for i in range(20)]
    get_peft_model(blocks(), IA3Config(target_modules=names, feedforward_modules=names[:3])).save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(blocks(), tmp_path).base_model
    assert [loaded.get_submodule(f"model.{name}").is_feedforward for name in names] == [True] * 3 + [False] * 17


@pytest.mark.parametrize("names", ["all-linear", ["q_proj"], ["q_proj", "down_proj"], ["0.mlp.down_proj", "q_proj"]])
def test_ia3_scales_the_inputs_that_are_usual_for_the_model(names, tmp_path):
    get_peft_model(llama(), IA3Config(target_modules=names)).save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path).base_model
    found = {name: loaded.get_submodule(f"model.{name}").is_feedforward for name in loaded.targeted_module_names}
    assert found == {name: name.endswith("down_proj") for name in found}


def test_all_linear_leaves_the_head_of_a_classifier_to_the_task_wherever_it_is_added():
    config = LoraConfig(target_modules="all-linear", task_type="SEQ_CLS")
    model = peft.inject_adapter_in_model(config, bert())
    assert not any(name.startswith("classifier") and "lora_" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(("model", "transposed"), [(gpt2, True), (llama, False)])
def test_the_file_says_how_the_layers_hold_their_weight(model, transposed, tmp_path):
    config = LoraConfig(target_modules=["c_attn", "q_proj"], fan_in_fan_out=not transposed)
    get_peft_model(model(), config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is transposed


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_of_embeddings_those_are_saved_that_have_an_adapter(target, tmp_path):
    get_peft_model(llama(), LoraConfig(target_modules=[target])).save_pretrained(tmp_path)
    base = [key for key in load_file(tmp_path / "adapter_model.safetensors") if "lora_" not in key]
    assert len(base) == 1 and base[0].endswith(f"{target}.base_layer.weight")


def test_parameters_are_adapted_whatever_modules_are_left_out():
    settings = {"target_modules": ["lin0", "lin1"], "target_parameters": ["lin1.weight"], "exclude_modules": ["lin1"]}
    tuner = get_peft_model(MLP(), LoraConfig(**settings)).base_model
    assert tuner.targeted_module_names == ["lin0"] and tuner.targeted_parameter_names == ["lin1.weight"]


def test_one_adapter_trains_biases():
    model = get_peft_model(MLP(), LoraConfig(target_modules=["lin0"], bias="all"))
    model.add_adapter("other", LoraConfig(target_modules=["lin0"]))
    with pytest.raises(ValueError, match="only 1 adapter with bias"):
        model.add_adapter("third", LoraConfig(target_modules=["lin0"], bias="lora_only"))
    assert torch.isfinite(model(torch.ones(1, 16))).all()
