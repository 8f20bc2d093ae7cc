"""What depends on other libraries: preparing models for training, questions about backends, FSDP."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

from peft import (
    LoraConfig,
    PeftWarning,
    cast_mixed_precision_params,
    get_peft_model,
    prepare_model_for_kbit_training,
    shift_tokens_right,
)
from peft.integrations import backends
from peft.integrations.fsdp import fsdp_auto_wrap_policy
from tiny_models import llama, tokens


def quantized(**marks):
    """A model in half precision that says of itself that it is quantised, as transformers marks it."""
    model = llama().to(torch.bfloat16)
    for name, value in marks.items():
        setattr(model, name, value)
    return model


@pytest.mark.parametrize(
    ("marks", "dtype", "checkpointing"),
    [
        ({}, torch.float32, False),
        ({"is_loaded_in_4bit": True, "quantization_method": "bitsandbytes"}, torch.float32, True),
        ({"is_loaded_in_8bit": True}, torch.float32, True),
        # kernels of other backends expect the dtype that their layers have
        ({"quantization_method": "gptq"}, torch.bfloat16, True),
        ({"quantization_method": "awq"}, torch.bfloat16, True),
        ({"hqq_quantized": True}, torch.bfloat16, True),
    ],
)
@pytest.mark.parametrize("wanted", [True, False])
def test_a_model_is_prepared_by_how_it_is_quantised(marks, dtype, checkpointing, wanted):
    model = quantized(**marks)
    assert prepare_model_for_kbit_training(model, use_gradient_checkpointing=wanted) is model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.model.layers[0].gradient_checkpointing == (checkpointing and wanted)


@pytest.mark.parametrize("reentrant", [True, False])
def test_adapters_learn_in_a_prepared_model(reentrant):
    model = quantized(is_loaded_in_8bit=True)
    settings = {"use_reentrant": reentrant}
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=settings)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")).train()
    model(tokens(), labels=tokens()).loss.backward()
    trained = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    assert len(trained) == 4
    assert all(parameter.grad.abs().sum() > 0 for parameter in trained)


def test_packed_weights_are_not_cast():
    class Params4bit(nn.Parameter):
        pass

    model = quantized(is_loaded_in_4bit=True)
    packed = Params4bit(model.lm_head.weight.data.clone(), requires_grad=False)
    model.lm_head.weight = packed
    prepare_model_for_kbit_training(model)
    assert model.lm_head.weight is packed
    assert packed.dtype == torch.bfloat16


def test_settings_without_effect_are_warned_of():
    with pytest.warns(PeftWarning, match="not quantised"):
        prepare_model_for_kbit_training(quantized(), gradient_checkpointing_kwargs={"use_reentrant": False})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_frozen_parameters_are_cast_and_trained_ones_are_not(dtype):
    model = get_peft_model(llama(), LoraConfig(), autocast_adapter_dtype=False).to(torch.float64)
    model.register_buffer("steps", torch.zeros(2, dtype=torch.int64))
    cast_mixed_precision_params(model, dtype)
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in model.parameters()}
    assert dtypes == {True: torch.float32, False: dtype}
    assert model.steps.dtype == torch.int64


def test_mixed_precision_needs_a_half_precision():
    model = llama()
    with pytest.raises(ValueError, match="float64"):
        cast_mixed_precision_params(model, torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_labels_become_inputs_of_a_decoder():
    assert shift_tokens_right(torch.tensor([[5, -100, 7]]), 0, 9).tolist() == [[9, 5, 0]]
    with pytest.raises(ValueError, match="pad_token_id"):
        shift_tokens_right(torch.tensor([[5]]), None, 9)


# ---- backends


def test_packages_are_found_without_being_imported(monkeypatch, tmp_path):
    (tmp_path / "some_backend").mkdir()
    (tmp_path / "some_backend" / "__init__.py").write_text("raise RuntimeError('imported')")
    is_installed = backends._is_installed.__wrapped__  # which looks each time
    assert not is_installed("some_backend")
    monkeypatch.syspath_prepend(tmp_path)
    assert is_installed("some_backend")
    assert not is_installed("no_such_backend.part")
    assert "some_backend" not in sys.modules


def test_a_dense_weight_is_its_own_dequantisation():
    layer = nn.Linear(3, 2)
    assert backends.dequantize_module_weight(layer) is layer.weight
    model = get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"]))
    assert backends.dequantize_module_weight(model.base_model.model[0]) is layer.weight
    assert backends.get_bnb_param_type(layer.weight) is False


def test_quantisation_settings_are_those_of_the_method_in_use():
    model = llama()
    assert backends.get_quantization_config(model, "gptq") is None
    model.quantization_method, model.config.quantization_config = "gptq", {"bits": 4}
    assert backends.get_quantization_config(model, "gptq") == {"bits": 4}
    assert backends.get_quantization_config(model, "awq") is None


def test_modules_without_memory():
    with backends.init_empty_weights():
        norm, plain = nn.BatchNorm1d(3, affine=True), torch.zeros(1)
    assert norm.weight.is_meta
    assert norm.weight.requires_grad
    assert not norm.running_mean.is_meta
    assert not plain.is_meta
    with backends.init_empty_weights(include_buffers=True):
        assert nn.BatchNorm1d(3).running_mean.is_meta
    assert not nn.Linear(2, 2).weight.is_meta


def test_parameters_are_gathered_only_where_deepspeed_shards_them(monkeypatch):
    calls = []
    zero = types.SimpleNamespace(GatheredParameters=lambda params, **kwargs: calls.append((params, kwargs)))
    parameter, sharded = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    sharded.ds_id = 3
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)  # where an earlier test has loaded it
    with backends.gather_params_ctx(sharded):
        pass
    monkeypatch.setitem(sys.modules, "deepspeed", types.SimpleNamespace(zero=zero))
    backends.gather_params_ctx(parameter)
    assert calls == []
    backends.gather_params_ctx([parameter, sharded], modifier_rank=None)
    assert calls == [([parameter, sharded], {"modifier_rank": None, "fwd_module": None})]


# ---- FSDP


def wrapped(model):
    policy = fsdp_auto_wrap_policy(model)
    assert all(policy(module=module, recurse=True, nonwrapped_numel=0) for module in model.modules())
    return [n for n, module in model.named_modules() if policy(module=module, recurse=False, nonwrapped_numel=0)]


def test_fsdp_wraps_blocks_and_trained_leaves(monkeypatch):
    model = get_peft_model(llama(num_hidden_layers=1), LoraConfig(target_modules=["q_proj"]))
    block = "base_model.model.model.layers.0"
    leaves = [f"{block}.self_attn.q_proj.lora_{side}.default" for side in "AB"]
    assert wrapped(model) == [block, *leaves]
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMLP, LlamaAttention")
    assert wrapped(model) == [f"{block}.self_attn", *leaves, f"{block}.mlp"]
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "NoSuchBlock")
    with pytest.raises(TypeError, match="NoSuchBlock"):
        fsdp_auto_wrap_policy(model)
