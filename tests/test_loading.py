"""Loading beside and over adapters that are there, and what counts as a name: what a user can get wrong."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import peft
import tiny_models
from damaged_files import base_for, seeds
from peft import LoraConfig, PeftModel, get_peft_config, get_peft_model, get_peft_model_state_dict
from peft.checkpoint import set_peft_model_state_dict
from peft.errors import AdapterFileError, PeftWarning
from test_conformance import LAYER_METHODS, SUPPORTED, build, inputs_of
from test_conformance import adapted as adapted_by

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
X = torch.ones(2, 16)


def lora(**fields) -> LoraConfig:
    return LoraConfig(**{"target_modules": ["lin0", "lin1"], "r": 4, "init_lora_weights": False, **fields})


def adapted(seed: int = 1, adapter_name: str = "default", **fields) -> PeftModel:
    base = tiny_models.MLP()
    torch.manual_seed(seed)
    return get_peft_model(base, lora(**fields), adapter_name=adapter_name).eval()


def trained(model: torch.nn.Module) -> dict[str, bool]:
    """Adapter -> whether all its tensors are trained; raises if some are and some are not."""
    found: dict[str, set[bool]] = {}
    for key, parameter in model.named_parameters():
        for name in model.peft_config:
            if f".{name}." in f"{key}.":
                found.setdefault(name, set()).add(parameter.requires_grad)
    return {name: one for name, (one,) in found.items()}


# ---- a string is a name


def test_a_string_is_one_name_not_its_letters(tmp_path):
    model = adapted(adapter_name="ab")
    model.add_adapter("a", lora())
    model.add_adapter("b", lora())
    expected, base = model(X), tiny_models.MLP()(X)
    model.set_adapter("a")
    model.merge_adapter("ab")
    assert {tuple(layer.merged_adapters) for layer in model.base_model.adapter_layers()} == {("ab",)}
    model.unmerge_adapter()
    model.save_pretrained(tmp_path, selected_adapters="ab")
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"ab"}
    model.add_weighted_adapter("ab", [1.0], "one")
    model.set_adapter("one")
    assert torch.allclose(model(X), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"'ab' is one name"):
        model(X, adapter_names="ab")
    merged = model.merge_and_unload(adapter_names="ab")
    assert torch.allclose(merged(X), expected, atol=1e-5) and not torch.allclose(merged(X), base)


def test_a_safe_merge_by_a_string():
    model = adapted()
    expected = model(X)
    assert torch.allclose(model.merge_and_unload(safe_merge=True, adapter_names="default")(X), expected, atol=1e-5)


def test_no_name_is_no_adapter():
    for model in (adapted(), get_peft_model(tiny_models.llama(), get_peft_config(dict(seeds()[26])))):
        active = model.active_adapters
        with pytest.raises(ValueError):
            model.set_adapter([])
        assert model.active_adapters == active


# ---- settings


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_are_finite(value):
    for fields in ({"lora_alpha": value}, {"alpha_pattern": {"lin0": value}}):
        with pytest.raises(ValueError, match="must be finite"):
            lora(**fields)


def test_dropout_is_a_probability():
    for config_class, field in (
        (LoraConfig, "lora_dropout"), (peft.LoHaConfig, "module_dropout"), (peft.MissConfig, "miss_dropout"),
        (peft.AdaLoraConfig, "lora_dropout"), (peft.PromptEncoderConfig, "encoder_dropout"),
    ):  # fmt: skip
        fields = {"total_step": 10} if config_class is peft.AdaLoraConfig else {}
        for value in (-0.1, 1.1):
            with pytest.raises(ValueError, match=field):
                config_class(**fields, **{field: value})
    assert LoraConfig(lora_dropout=1.0).lora_dropout == 1.0


def test_nothing_given_is_not_given():
    config = lora(layers_to_transform=[], layers_pattern="")
    assert config.layers_to_transform is None and config.layers_pattern is None
    assert len(list(get_peft_model(tiny_models.MLP(), config).base_model.adapter_layers())) == 2


def test_what_is_no_model_and_no_configuration(tmp_path):
    adapted().save_pretrained(tmp_path)
    calls = [
        lambda: get_peft_model(None, lora()),
        lambda: get_peft_model(tiny_models.MLP(), None),
        lambda: PeftModel(tiny_models.MLP(), None),
        lambda: PeftModel.from_pretrained(None, tmp_path),
        lambda: peft.inject_adapter_in_model(None, tiny_models.MLP()),
        lambda: peft.inject_adapter_in_model(lora(), None),
        lambda: adapted().add_adapter("b", None),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"(model|peft_config) must be"):
            call()
    with pytest.raises(ValueError, match="model_id must be"):
        PeftModel.from_pretrained(tiny_models.MLP(), None)


def test_an_empty_state_dict_says_no_targets():
    for tensors in ({}, {"lin0.weight": torch.ones(1)}):
        model = tiny_models.MLP()
        with pytest.raises(ValueError, match="state_dict has no tensors of a lora adapter"):
            peft.inject_adapter_in_model(lora(), model, state_dict=tensors)
        assert not hasattr(model, "peft_config")


# ---- loading beside and over what is there


def test_a_loaded_adapter_is_trained_if_so_asked(tmp_path):
    adapted().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_models.MLP(), tmp_path)
    model.load_adapter(tmp_path, "b", is_trainable=True)
    assert trained(model) == {"default": False, "b": True} and model.active_adapters == ["default"]
    model = PeftModel.from_pretrained(tiny_models.MLP(), tmp_path, is_trainable=True)
    model.load_adapter(tmp_path, "b")
    assert trained(model) == {"default": True, "b": False}
    assert not model.peft_config["default"].inference_mode and model.peft_config["b"].inference_mode


@pytest.mark.parametrize("safe", [True, False])
def test_a_load_that_fails_over_a_name_changes_nothing(tmp_path, safe):
    adapted().save_pretrained(tmp_path, safe_serialization=safe)
    model = adapted(seed=2)
    before, config = tiny_models.state(model), repr(model.peft_config)
    if safe:
        tensors = load_file(tmp_path / WEIGHTS)
        tensors["base_model.model.lin1.lora_B.weight"] = torch.ones(3, 3)
        save_file(tensors, tmp_path / WEIGHTS)
    else:
        tensors = torch.load(tmp_path / PICKLE)
        torch.save({**tensors, "base_model.model.lin1.lora_B.weight": "text"}, tmp_path / PICKLE)
    with pytest.raises((RuntimeError, ValueError), match=r"lin1\.lora_B\.weight"):
        model.load_adapter(tmp_path, "default", use_safetensors=safe)
    tiny_models.assert_same_state(model, before)
    assert repr(model.peft_config) == config and not model.peft_config["default"].inference_mode


@pytest.mark.parametrize("fields", [{"lora_alpha": 32}, {"use_rslora": True}, {"alpha_pattern": {"lin0": 2}}])
def test_loading_over_a_name_does_not_lose_what_the_file_says(tmp_path, fields):
    adapted(**fields).save_pretrained(tmp_path)
    model = adapted(seed=2)
    before = tiny_models.state(model)
    with pytest.raises(ValueError, match=rf"{next(iter(fields))} is .* there and .* in the file.*delete_adapter"):
        model.load_adapter(tmp_path, "default")
    tiny_models.assert_same_state(model, before)


def test_loading_over_a_name(tmp_path):
    saved = adapted()
    saved.save_pretrained(tmp_path)
    expected = saved(X)
    model = adapted(seed=2, init_lora_weights=True)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert model(X).equal(expected) and trained(model) == {"default": True}
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"'default' is merged; call unmerge_adapter"):
        model.load_adapter(tmp_path, "default")
    assert torch.allclose(model(X), expected, atol=1e-5)


def test_a_start_that_took_from_the_base_is_not_loaded_over_another(tmp_path):
    adapted(init_lora_weights="pissa").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"init_lora_weights is True there and 'pissa' in the file"):
        adapted(init_lora_weights=True).load_adapter(tmp_path, "default")


# ---- tensors by name


@pytest.mark.parametrize("name", ["default", "other"])
def test_a_raw_state_dict_in_a_file_is_read(tmp_path, name):
    model = adapted(adapter_name=name, target_modules=["lin0"], modules_to_save=["lin1"])
    with torch.no_grad():
        model.base_model.model.lin1.modules_to_save[name].weight.add_(1)
    model.save_pretrained(tmp_path)
    folder = tmp_path / name if name != "default" else tmp_path
    raw = {key: value for key, value in model.state_dict().items() if f".{name}." in key}
    save_file(raw, folder / WEIGHTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        for loaded_as in ("default", "third"):
            loaded = PeftModel.from_pretrained(tiny_models.MLP(), folder, adapter_name=loaded_as)
            assert loaded(X).equal(model(X))
    save_file(model.state_dict(), folder / WEIGHTS)  # with the base weights in it, which are left out
    with pytest.warns(PeftWarning, match="Refused"):
        loaded = PeftModel.from_pretrained(tiny_models.MLP(seed=3), folder)
    assert not loaded(X).equal(model(X))
    assert loaded.base_model.model.lin0.lora_A["default"].weight.equal(model.base_model.model.lin0.lora_A[name].weight)


def test_of_several_adapters_in_a_raw_state_dict_the_one_of_the_name_is_taken():
    model = adapted()
    model.add_adapter("b", lora())
    raw = {key: value.clone() for key, value in model.state_dict().items() if "lora_" in key}
    for name, meant in (("b", "b"), ("default", "default"), ("new", "default")):
        other = adapted(seed=5, adapter_name=name)
        result = set_peft_model_state_dict(other, raw, adapter_name=name)
        assert result.missing_keys == []
        model.set_adapter(meant)
        assert other(X).equal(model(X))


@pytest.mark.parametrize("number", range(len(seeds())))
@pytest.mark.filterwarnings("ignore")
def test_the_tensors_of_every_method_can_be_written_by_safetensors(tmp_path, number):
    model = get_peft_model(base_for(seeds()[number]), get_peft_config(copy.deepcopy(seeds()[number])))
    tensors = get_peft_model_state_dict(model)
    save_file(tensors, tmp_path / WEIGHTS)
    read = load_file(tmp_path / WEIGHTS)
    assert {key: tuple(value.shape) for key, value in read.items()} == {k: tuple(v.shape) for k, v in tensors.items()}
    set_peft_model_state_dict(model, read)


def test_the_configuration_is_written_as_it_was_read(tmp_path):
    adapted().save_pretrained(tmp_path / "a")
    content = json.loads((tmp_path / "a" / CONFIG).read_text())
    (tmp_path / "a" / CONFIG).write_text(json.dumps({**content, "megatron_core": "megatron.core"}))
    PeftModel.from_pretrained(tiny_models.MLP(), tmp_path / "a").save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b" / CONFIG).read_text()) == {**content, "megatron_core": "megatron.core"}


@pytest.mark.parametrize("method", [method for method in LAYER_METHODS if (method, "Linear") in SUPPORTED])
def test_a_file_that_lacks_a_tensor_loads_with_a_warning_or_is_refused(method, tmp_path):
    """What the file lacks has the values of a fresh adapter; what it has is taken."""
    adapted_by(method, "Linear").save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    whole = {key: value.clone() for key, value in load_file(path).items()}  # the file is written over
    for missing in whole:
        rest = {key: value for key, value in whole.items() if key != missing}
        save_file(rest or {"other": torch.ones(1)}, path)
        base = build("Linear")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                model = PeftModel.from_pretrained(base, tmp_path)
            except AdapterFileError:
                continue  # no tensor accounts for a setting any more
        last = missing.rpartition(".")[2]
        there = any(key.endswith(last) for key in rest)  # what layers share may be there twice
        assert there or any(last in str(one.message) for one in said), missing
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        assert model(inputs_of(model)).isfinite().all()
        now = get_peft_model_state_dict(model)
        assert all(torch.equal(now[key], value) for key, value in rest.items())


@pytest.mark.parametrize("config", [peft.LoraConfig, peft.HRAConfig])
def test_what_is_filled_in_is_not_rounded_to_the_dtype_of_the_base_model(config):
    models = []
    for without_memory in (False, True):
        net = torch.nn.Sequential(torch.nn.Linear(8, 8)).bfloat16()
        torch.manual_seed(0)
        model = get_peft_model(net, config(target_modules=["0"]), low_cpu_mem_usage=without_memory)
        torch.manual_seed(0)
        model.base_model.fill_in("default")
        models.append(get_peft_model_state_dict(model))
    fresh, filled = models
    assert any(not torch.equal(value, value.bfloat16().float()) for value in fresh.values())
    for key, value in fresh.items():
        assert torch.equal(value, filled[key]), key
