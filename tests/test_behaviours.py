"""What users of huggingface/peft find here as they know it: attributes, warnings, classes of errors."""

from __future__ import annotations

import json
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peft
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    HRAConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    ShadowConfig,
    get_layer_status,
    get_model_status,
    get_peft_model,
)
from peft.core.layer import AdapterLayer
from peft.core.tuner import BaseTuner
from peft.errors import PeftWarning
from peft.registry import METHODS
from peft.tuners.lora.variants import dora
from tiny_models import fill_adapter, llama, t5, tokens


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


def lora(**fields) -> LoraConfig:
    return LoraConfig(**{"target_modules": ["0"], **fields})


# ---- a model that is wrapped, or was


@pytest.mark.parametrize("mixed", [False, True])
def test_wrapping_a_wrapped_model_is_refused_and_loses_nothing(mixed):
    model = get_peft_model(net(), lora(init_lora_weights=False))
    x = torch.randn(2, 4)
    before, names = model(x), [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="PeftModel already, with adapter default"):
        get_peft_model(model, lora(), mixed=mixed)
    assert torch.equal(model(x), before) and [name for name, _ in model.named_modules()] == names
    assert list(model.peft_config) == ["default"] and model.active_adapter == "default"


def test_loading_onto_a_wrapped_model_is_refused(tmp_path):
    model = get_peft_model(net(), lora())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"load_adapter\(\)"):
        PeftModel.from_pretrained(model, tmp_path)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_base_model_that_carries_adapters_is_warned_of(mixed):
    base = net()
    get_peft_model(base, lora())
    with pytest.warns(PeftWarning, match="adapter default on its modules already"):
        get_peft_model(base, lora(), mixed=mixed)
    base = net()
    get_peft_model(base, lora()).unload()
    with warnings_as_errors():
        get_peft_model(base, lora(), mixed=mixed)


@contextmanager
def warnings_as_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        yield


@pytest.mark.parametrize("name", ["lora", "lora_", "ora"])
def test_a_name_that_is_part_of_those_of_its_tensors_is_warned_of(name, tmp_path):
    saved = get_peft_model(net(), lora())
    saved.save_pretrained(tmp_path)
    for add in (
        lambda: get_peft_model(net(), lora(), adapter_name=name),
        lambda: get_peft_model(net(), lora(), adapter_name=name, mixed=True),
        lambda: get_peft_model(net(), lora()).add_adapter(name, lora()),
        lambda: get_peft_model(net(), lora()).load_adapter(tmp_path, name),
    ):
        with pytest.warns(PeftWarning, match="choose another name"):
            add()


def test_a_name_that_only_contains_the_prefix_is_no_trouble():
    with warnings_as_errors():
        get_peft_model(net(), lora(), adapter_name="my_lora_adapter")


# ---- what a model says of itself


def test_a_model_without_configuration_has_none():
    model = get_peft_model(net(), lora())
    assert not hasattr(model, "config") and not hasattr(model.base_model, "config")
    assert get_peft_model(llama(), LoraConfig()).config.model_type == "llama"


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_soft_prompts_do_not_become_lora(config):
    model = get_peft_model(llama(), config(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    assert model.supports_lora_conversion() is False


def test_methods_that_change_weights_become_lora():
    assert get_peft_model(net(), HRAConfig(target_modules=["0"])).supports_lora_conversion() is True


def test_checkpointing_is_prepared_on_request():
    model, base = get_peft_model(net(), lora()), llama()
    model.prepare_model_for_gradient_checkpointing(base)
    assert not base.get_input_embeddings()._forward_hooks, "it does not checkpoint"
    base.gradient_checkpointing_enable()
    model.prepare_model_for_gradient_checkpointing(base)
    assert base.get_input_embeddings()(torch.tensor([1])).requires_grad


def test_adapters_that_are_off_on_some_modules_are_noticed():
    model = get_peft_model(net(), lora(target_modules=["0", "2"]))
    model.base_model.model[0].enable_adapters(False)
    with pytest.warns(PeftWarning, match="switched off on some modules"), model.disable_adapter():
        pass


# ---- configurations


@pytest.mark.parametrize("method", list(METHODS))
def test_a_dictionary_has_what_a_file_has(method, tmp_path):
    needs = {
        "ADALORA": {"total_step": 10},
        "CPT": {"task_type": "CAUSAL_LM"},
        "XLORA": {"hidden_size": 8, "adapters": {"0": "here"}},
    }
    config = METHODS[method].config_class(**needs.get(method, {}))
    config.save_pretrained(tmp_path)
    found = json.loads(json.dumps(config.to_dict(), default=sorted))
    assert found == type(config).from_json_file(tmp_path / "adapter_config.json")


def test_a_configuration_made_of_the_dictionary_of_another_is_the_same():
    config = lora(target_parameters=["w"], rank_pattern={"0": 3}, exclude_modules={"x"})
    assert LoraConfig(**{**config.to_dict(), "peft_type": None}).to_dict() == config.to_dict()


@pytest.mark.parametrize("config_class", [PeftConfig, LoraConfig, PromptTuningConfig])
def test_json_that_is_no_configuration_is_a_type_error(config_class, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"foo": 1}')
    with pytest.raises(TypeError, match="no peft_type, nor any other field"):
        config_class.from_pretrained(tmp_path)


def test_all_linear_is_understood_in_any_case():
    assert get_peft_model(net(), lora(target_modules="All-Linear")).targeted_module_names == ["0", "2"]


@pytest.mark.parametrize(
    "fields", [{"rank_pattern": {"no": 3}}, {"alpha_pattern": {"no": 3}}, {"target_parameters": ["no"]}]
)
def test_settings_that_match_nothing_are_a_runtime_warning(fields):
    with pytest.warns(RuntimeWarning, match="nothing matches") as caught:
        get_peft_model(net(), lora(**fields))
    assert any(issubclass(warning.category, PeftWarning) for warning in caught)


# ---- helpers


def test_caching_of_dora_for_a_while_and_for_good(monkeypatch):
    model = get_peft_model(net(), lora(use_dora=True)).eval()
    x = torch.randn(2, 4)

    computed = mock.Mock(side_effect=dora.changed_row_norms)
    monkeypatch.setattr(dora, "changed_row_norms", computed)

    def looks_up() -> bool:
        """Whether a second pass computes no norm anew."""
        with torch.no_grad():
            model(x)
            computed.reset_mock()
            model(x)
        return not computed.called

    caching = peft.helpers.DoraCaching
    assert not looks_up()
    with caching():
        assert looks_up()
        with caching():
            pass
        assert looks_up()
    assert not looks_up()
    assert caching()() is None and looks_up()
    caching()(enabled=False)
    assert not looks_up()


# ---- settings of LoRA


@pytest.mark.parametrize(("name", "means"), [("OLoRA", "olora"), ("PiSSA", "pissa"), ("Gaussian", "gaussian")])
def test_names_of_starts_are_understood_in_any_case(name, means):
    config = lora(init_lora_weights=name, r=2)
    assert config.init_lora_weights == means
    get_peft_model(net(), config)


def test_dora_and_megatron_exclude_each_other():
    with pytest.raises(ValueError, match="megatron_config"):
        lora(use_dora=True, megatron_config={"hidden_size": 8})


def test_the_scale_of_velora_is_positive():
    with pytest.raises(ValueError, match="scale must be positive"):
        peft.VeloraConfig(scale=-1.0)


# ---- the configuration of a model


@dataclass
class Settings:
    model_type: str = "mine"


class Speaks:
    def to_dict(self):
        return {"model_type": "mine"}


@pytest.mark.parametrize("config", [{"model_type": "mine"}, Settings(), Speaks()])
def test_a_models_configuration_is_read_whatever_holds_it(config):
    model = net()
    model.config = config
    assert BaseTuner.get_model_config(model) == {"model_type": "mine"}
    assert BaseTuner.get_model_config(net()) == {"model_type": "custom"}


# ---- what modules around an adapter look for


class OwnLinear(nn.Linear):
    """Says more of itself than a linear layer does, as modules around it may ask."""

    gain = 2.0

    def __init__(self):
        super().__init__(4, 4)
        self.stride, self._width = (2,), 4
        self.cores = nn.ModuleDict({"one": nn.Identity()})
        self._hook_of_another_library = object()

    def halved(self):
        return self.gain / 2


def test_a_layer_has_what_its_module_has():
    model = get_peft_model(nn.Sequential(OwnLinear()), lora())
    layer = model.base_model.model[0]
    assert (layer.gain, layer.stride, layer._width, layer.halved(), len(layer.cores)) == (2.0, (2,), 4, 1.0, 1)
    assert not hasattr(layer, "_hook_of_another_library") and not hasattr(layer, "no_such_thing")


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2))


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return nn.Transformer(8, 2, 1, 1, 16, 0.0, batch_first=True)


@pytest.mark.parametrize("build", [encoder, transformer])
@pytest.mark.parametrize("bias", [False, True])
def test_attention_inside_torchs_transformer(build, bias):
    config = lora(target_modules=["self_attn", "multihead_attn"], init_lora_weights=False, lora_bias=bias)
    model = get_peft_model(build(), config)
    if bias:
        for name, parameter in model.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                nn.init.normal_(parameter)
    x = (torch.randn(2, 5, 8),) * (2 if build is transformer else 1)
    trained = model.train()(*x)
    trained.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(*x), trained)  # the fast path
        model.merge_adapter()
        torch.testing.assert_close(model(*x), trained)
    attention = next(m for n, m in model.named_modules() if n.endswith("self_attn"))
    assert attention.embed_dim == 8 and attention.num_heads == 2 and attention.batch_first
    assert attention.merge_masks(None, None, x[0])[0] is None


# ---- modules trained in full, and what files hold


def test_an_entry_of_modules_to_save_is_the_end_of_a_name():
    with pytest.warns(PeftWarning, match="input_layernorm, norm, post_attention_layernorm"):
        model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]))
    kept = [key for key in peft.get_peft_model_state_dict(model) if "lora" not in key]
    assert len(kept) == 5 and all(key.endswith("norm.weight") for key in kept)
    with warnings_as_errors():
        get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["head"]))


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        (dict(target_modules=["embed_tokens", "q_proj"], layers_to_transform=[0]), []),
        (dict(target_modules=["embed_tokens", "q_proj"], exclude_modules=["embed_tokens"]), []),
        (dict(target_modules=["lm_head", "q_proj"], exclude_modules=["lm_head"]), []),
        (dict(target_modules=["model.embed_tokens", "q_proj"]), []),
        (dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]), ["model.embed_tokens.weight"]),
        (dict(target_modules=["lm_head"]), ["lm_head.base_layer.weight"]),
        (dict(target_modules=".*embed_tokens"), ["model.embed_tokens.base_layer.weight"]),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_files_hold_embeddings_where_adapters_are_on_them(fields, kept, tied):
    model = get_peft_model(llama(tie_word_embeddings=tied), LoraConfig(**fields))
    keys = [key.removeprefix("base_model.model.") for key in peft.get_peft_model_state_dict(model)]
    assert [key for key in keys if "lora" not in key] == kept


def test_merging_that_unties_says_so_in_the_configuration():
    model = get_peft_model(llama(tie_word_embeddings=True), LoraConfig(target_modules=["lm_head"]))
    with pytest.warns(PeftWarning, match="tie_word_embeddings is now False"):
        assert model.merge_and_unload().config.tie_word_embeddings is False
    kept = get_peft_model(llama(tie_word_embeddings=True), LoraConfig(target_modules=["q_proj"]))
    assert kept.merge_and_unload().config.tie_word_embeddings is True


@pytest.mark.parametrize("bias", ["lora_only", "hra_only", "other_only"])
def test_biases_may_be_asked_for_by_any_name(bias):
    model = get_peft_model(net(), HRAConfig(target_modules=["0"], bias=bias))
    assert [key for key in peft.get_peft_model_state_dict(model) if key.endswith("bias")]
    with pytest.raises(NotImplementedError, match="hra_only"):
        get_peft_model(net(), HRAConfig(target_modules=["0"], bias="hra"))


def test_trained_tokens_of_an_output_layer_alone_leave_the_embedding_tied_to_it():
    config = peft.TrainableTokensConfig(target_modules=["lm_head"], token_indices=[1])
    keys = list(peft.get_peft_model_state_dict(get_peft_model(llama(tie_word_embeddings=True), config)))
    assert keys == ["base_model.model.lm_head.trainable_tokens_delta"]


def test_norms_of_other_packages_are_tuned():
    model = get_peft_model(t5(), peft.LNTuningConfig())
    assert len(peft.get_peft_model_state_dict(model)) == 12
    ids = torch.tensor([[3, 1, 2]])
    model(input_ids=ids, decoder_input_ids=ids).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "config", [LoraConfig(target_modules=["q_proj"], lora_bias=True), peft.BeftConfig(target_modules=["q_proj"])]
)
def test_what_has_no_bias_to_be_merged_into_is_warned_of(config):
    with pytest.warns(PeftWarning, match="merged into"):
        get_peft_model(llama(), config)


def test_embeddings_that_cannot_be_found_to_be_saved_are_warned_of(tmp_path):
    with pytest.warns(PeftWarning, match="does not say which its embeddings are"):
        get_peft_model(net(), lora()).save_pretrained(tmp_path, save_embedding_layers=True)


# ---- what is looked into


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.mixed])
def test_settings_of_layers_are_dictionaries(method):
    layer = METHODS[method].model_class.layer_class(nn.Linear(4, 4))
    AdapterLayer.new_record(layer, "default", None)
    for name in layer.other_param_names:
        held = getattr(layer, name)
        held["default"] = 3
        assert isinstance(held, dict) and json.dumps(getattr(layer, name)) == '{"default": 3}', name
    AdapterLayer.new_record(layer, "default", None)
    assert not any(getattr(layer, name) for name in layer.other_param_names)


def test_what_acts_is_said_by_models_and_by_layers():
    model = get_peft_model(net(), lora(init_lora_weights="mica", r=2))
    layer = model.base_model.model[0]
    assert model.has_active_enabled_adapter and model.active_adapter == "default"
    assert layer.active_adapter == layer._active_adapter == ["default"]
    assert layer.frozen_peft_weight_names == {"default": ("lora_B",)}
    with model.disable_adapter():
        assert not model.has_active_enabled_adapter
    prompt = get_peft_model(llama(), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    assert prompt.has_active_enabled_adapter
    with prompt.disable_adapter():
        assert not prompt.has_active_enabled_adapter


@pytest.mark.parametrize(("method", "shares"), [("VERA", True), ("UNILORA", True), ("LORA", False)])
def test_models_of_methods_say_whether_layers_share_tensors(method, shares):
    assert METHODS[method].model_class.uses_shared_state is shares


def test_status_is_not_for_prompts_and_counts_what_the_tuner_holds():
    config = AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM")
    for status in (get_layer_status, get_model_status):
        with pytest.raises(TypeError):
            status(get_peft_model(llama(), config))
    model = get_peft_model(llama(), ShadowConfig(task_type="CAUSAL_LM"))
    status = get_model_status(model)
    assert (status.trainable_params, status.total_params) == model.get_nb_trainable_parameters()


# ---- names and settings that belong together


def test_names_of_old_in_files_are_mapped_as_the_model_says(tmp_path):
    model = fill_adapter(get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM")))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key.replace("model.layers", "decoder.layers"): value for key, value in load_file(path).items()}, path)
    base = llama()
    base._checkpoint_conversion_mapping = {r"^decoder\.layers": "model.layers"}
    loaded = PeftModel.from_pretrained(base, tmp_path)
    loaded.load_adapter(tmp_path, "b")
    expected = model(tokens()).logits
    assert torch.equal(loaded(tokens()).logits, expected)
    loaded.set_adapter("b")
    assert torch.equal(loaded(tokens()).logits, expected)


@pytest.mark.parametrize("second", ["0", "2"])
def test_adalora_twice_in_a_mixed_model(second):
    model = get_peft_model(net(), AdaLoraConfig(target_modules=["0"], total_step=10), "a", mixed=True)
    model.add_adapter("b", AdaLoraConfig(target_modules=[second], total_step=10))
    model.set_adapter(["a", "b"])
    x = torch.randn(2, 4)
    before = model(x)
    fill_adapter(model, "a"), fill_adapter(model, "b")
    assert not torch.allclose(model(x), before)
    trained = {name.split(".")[-1] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"a", "b"}


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_tied_modules_are_in_no_layer_that_could_be_left_out(target):
    config = LoraConfig(target_modules=[target, "q_proj"], layers_to_transform=[0], ensure_weight_tying=True)
    model = get_peft_model(llama(tie_word_embeddings=True), config)
    adapted = {name.rpartition(".")[2] for name in model.base_model.targeted_module_names}
    assert adapted == {"embed_tokens", "lm_head", "q_proj"}


def test_the_bias_beside_an_adapted_parameter_is_trained():
    config = LoraConfig(r=2, target_modules=[], target_parameters=["0.weight"], bias="lora_only")
    model = get_peft_model(net(), config)
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 3


def test_an_odd_number_of_reflections_starts_at_random_and_loads(tmp_path):
    with pytest.warns(PeftWarning, match="starts at random"):
        model = get_peft_model(net(), HRAConfig(r=3, target_modules=["0"]))
    model.save_pretrained(tmp_path)
    x = torch.randn(2, 4)
    with warnings_as_errors():
        loaded = PeftModel.from_pretrained(net(), tmp_path)
    assert torch.equal(loaded(x), model(x)) and not torch.allclose(model(x), net()(x))
