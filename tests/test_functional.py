"""Adapters injected into a model that stays what it is, and small tools around models with adapters."""

from __future__ import annotations

import copy
import dataclasses
import inspect

import pytest
import torch
from torch import nn

from peft import (
    HRAConfig,
    LoraConfig,
    PeftWarning,
    PromptTuningConfig,
    VeraConfig,
    functional,
    get_peft_model,
    get_peft_model_state_dict,
    helpers,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.errors import NoMatchingPeftModuleError
from tiny_models import MLP, assert_same_state, fill_adapter, llama, state, tokens

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def model():
    """An MLP with two injected LoRA adapters, `first` and `second`; the second is active."""
    model = MLP()
    for name, seed in (("first", 1), ("second", 2)):
        assert inject_adapter_in_model(LoraConfig(target_modules=["lin0"]), model, name) is model
        fill_adapter(model, name, seed)
    return model


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_an_injected_model_keeps_its_class_and_its_names(model):
    assert type(model) is MLP
    assert set(model.peft_config) == {"first", "second"}
    assert {"lin0.base_layer.weight", "lin0.lora_A.first.weight"} < {name for name, _ in model.named_parameters()}
    assert model.lin0.active_adapters == ["second"]
    assert trainable(model) == {"lin0.lora_A.second.weight", "lin0.lora_B.second.weight"}


def test_injected_adapters_are_set_frozen_and_deleted(model):
    outputs = {}
    for name in ("first", "second"):
        functional.set_adapter(model, name)
        outputs[name] = model(X)
        assert trainable(model) == {f"lin0.lora_{side}.{name}.weight" for side in "AB"}
    base = MLP()(X)
    assert not torch.allclose(outputs["first"], outputs["second"])
    functional.set_adapter(model, ["first", "second"], inference_mode=True)
    assert trainable(model) == set()
    torch.testing.assert_close(model.lin0(X) - MLP().lin0(X), sum_of_changes(model))
    functional.set_requires_grad(model, "first")
    assert trainable(model) == {"lin0.lora_A.first.weight", "lin0.lora_B.first.weight"}
    assert functional.delete_adapter(model, "second", prefix="lora_") == ["first"]
    torch.testing.assert_close(model(X), outputs["first"])
    with pytest.warns(PeftWarning, match="'second'"):  # again: as transformers does with a name given twice
        assert functional.delete_adapter(model, "second", prefix="lora_") == ["first"]
    assert functional.delete_adapter(model, "first", prefix="lora_") is None
    assert torch.equal(model(X), base)


def sum_of_changes(model):
    return sum(X @ model.lin0.get_delta_weight(name).T for name in ("first", "second"))


def test_state_goes_out_and_in_without_a_wrapper(model):
    tensors = get_peft_model_state_dict(model, adapter_name="first")
    assert set(tensors) == {"lin0.lora_A.weight", "lin0.lora_B.weight"}
    other = inject_adapter_in_model(LoraConfig(target_modules=["lin0"]), MLP(), "first", low_cpu_mem_usage=True)
    assert all(parameter.is_meta for name, parameter in other.named_parameters() if "lora_" in name)
    result = set_peft_model_state_dict(other, tensors, "first", low_cpu_mem_usage=True)
    assert result.missing_keys == result.unexpected_keys == []
    functional.set_adapter(model, "first")
    assert torch.equal(other(X), model(X))


def test_a_state_dict_decides_where_the_adapter_goes():
    wide = inject_adapter_in_model(LoraConfig(target_modules=["lin0", "lin1"]), MLP())
    tensors = {key: value for key, value in get_peft_model_state_dict(wide).items() if key.startswith("lin1")}
    narrow = inject_adapter_in_model(LoraConfig(target_modules=["lin0", "lin1"]), MLP(), state_dict=tensors)
    assert [name for name, module in narrow.named_modules() if hasattr(module, "lora_A")] == ["lin1"]


@pytest.mark.parametrize("targets, other", [(["lin0"], ["lin0", "lin1"]), (["lin0", "lin1"], ["lin0"])])
def test_a_state_dict_that_means_other_modules_than_the_configuration_says_so(targets, other):
    tensors = get_peft_model_state_dict(inject_adapter_in_model(LoraConfig(target_modules=targets), MLP()))
    with pytest.warns(RuntimeWarning, match="the configuration says otherwise of lin1"):
        inject_adapter_in_model(LoraConfig(target_modules=other), MLP(), state_dict=tensors)


@pytest.mark.parametrize("both", [False, True])
def test_a_state_dict_decides_on_a_compiled_model(both):
    config = LoraConfig(target_modules=["lin0"], init_lora_weights=False)
    model = inject_adapter_in_model(config, torch.compile(MLP()) if both else MLP())
    tensors = {key if not both else f"_orig_mod.{key}": v for key, v in get_peft_model_state_dict(model).items()}
    compiled = inject_adapter_in_model(config, torch.compile(MLP()), state_dict=tensors)
    assert set_peft_model_state_dict(compiled, get_peft_model_state_dict(model)) == ([], [])
    torch.testing.assert_close(compiled._orig_mod(X), getattr(model, "_orig_mod", model)(X))


def test_a_state_dict_of_a_peft_model_decides_too():
    model = fill_adapter(get_peft_model(MLP(), LoraConfig(target_modules=["lin0"])))
    tensors = get_peft_model_state_dict(model)
    plain = inject_adapter_in_model(LoraConfig(target_modules=["lin1"]), MLP(), state_dict=tensors)
    assert set_peft_model_state_dict(plain, tensors).unexpected_keys == []
    assert torch.equal(plain(X), model(X))


def test_a_state_dict_with_parameters_as_targets_puts_one_layer_on_each():
    config = LoraConfig(target_modules=[], target_parameters=["lin0.weight"])
    tensors = get_peft_model_state_dict(fill_adapter(inject_adapter_in_model(config, MLP())))
    model = inject_adapter_in_model(config, MLP(), state_dict=tensors)
    assert set_peft_model_state_dict(model, tensors) == ([], [])


def test_a_state_dict_of_another_model_is_refused():
    tensors = get_peft_model_state_dict(inject_adapter_in_model(LoraConfig(target_modules=["lin0"]), MLP()))
    other = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(NoMatchingPeftModuleError, match=r"No module of Sequential .* tensors of the adapter on lin0"):
        inject_adapter_in_model(LoraConfig(target_modules=["0"]), other, state_dict=tensors)
    assert not hasattr(other, "peft_config")


def test_adapters_of_two_methods_can_be_injected():
    model = inject_adapter_in_model(HRAConfig(target_modules=["lin0"], r=4), MLP(), "hra")
    fill_adapter(model, "hra")
    alone = model(X)
    inject_adapter_in_model(LoraConfig(target_modules=["lin0"], init_lora_weights=False), model, "lora")
    functional.set_adapter(model, "hra")
    torch.testing.assert_close(model(X), alone)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: functional.set_adapter(m, "third"), "third"),
        (lambda m: functional.set_requires_grad(m, ["first", "third"]), "third"),
        (lambda m: inject_adapter_in_model(LoraConfig(target_modules=["lin1"]), m, "first"), "exists"),
        (lambda m: inject_adapter_in_model(LoraConfig(target_modules=["nope"]), m, "third"), "nope"),
        (lambda m: inject_adapter_in_model(PromptTuningConfig(num_virtual_tokens=2), m, "third"), "prompt"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_changes(model, call, message):
    before = state(model)
    with pytest.raises(ValueError, match=message):
        call(model)
    assert_same_state(model, before)
    assert set(model.peft_config) == {"first", "second"}


def test_functions_keep_a_peft_model_consistent():
    model = get_peft_model(MLP(), LoraConfig(target_modules=["lin0"]), "first")
    model.add_adapter("second", LoraConfig(target_modules=["lin0"]))
    functional.set_adapter(model, "second")
    assert model.active_adapters == ["second"]
    assert functional.delete_adapter(model, "second") == ["first"]
    assert model.active_adapters == list(model.peft_config) == ["first"]


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("base", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("config", [LoraConfig(), HRAConfig(r=4), VeraConfig(r=4)], ids=["lora", "hra", "vera"])
def test_an_injected_adapter_has_the_dtype_of_its_base_unless_nothing_is_computed_in_it(config, base, empty):
    config = dataclasses.replace(config, target_modules=["lin0"])
    model = inject_adapter_in_model(config, MLP().to(base), low_cpu_mem_usage=empty)
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    assert dtypes == {torch.float32 if base.itemsize == 1 else base}


@pytest.mark.parametrize(("autocast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_adapters_are_cast_for_training(model, autocast, dtype):
    model.to(torch.bfloat16)
    functional.cast_adapter_dtype(model, "first", autocast_adapter_dtype=autocast)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes.pop("lin0.lora_A.first.weight") == dtypes.pop("lin0.lora_B.first.weight") == dtype
    assert set(dtypes.values()) == {torch.bfloat16}


# ---- helpers


def test_a_signature_is_taken_over_by_one_model_alone():
    model, other = (get_peft_model(llama(), LoraConfig()) for _ in range(2))
    helpers.update_signature(model)
    base = model.get_base_model()
    for method in ("forward", "generate"):
        assert inspect.signature(getattr(model, method)) == inspect.signature(getattr(base, method))
        assert getattr(model, method).__doc__ == getattr(base, method).__doc__
        assert "args" in inspect.signature(getattr(other, method)).parameters
    ids = tokens()
    assert torch.equal(model(ids).logits, model(input_ids=ids).logits)
    assert (
        model(input_ids=ids, adapter_names=["default"] * 3).logits.shape == (3, 7, 40) if not model.training else True
    )
    # A copy calls itself.
    twin = copy.deepcopy(model)
    fill_adapter(twin)
    assert not torch.allclose(twin.forward(ids).logits, model.forward(ids).logits)


def test_signatures_of_unknown_methods_and_models_without_generate():
    model = get_peft_model(MLP(), LoraConfig(target_modules=["lin0"]))
    with pytest.raises(ValueError, match="'backward'"):
        helpers.update_signature(model, "backward")
    helpers.update_signature(model)
    assert list(inspect.signature(model.forward).parameters) == ["x"]
    assert "generate" not in model.__dict__


def test_what_is_an_adapter_and_what_is_not(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "adapter_config.json").write_text("{}")
    get_peft_model(MLP(), LoraConfig(target_modules=["lin0"])).save_pretrained(tmp_path / "adapter")
    found = {name: helpers.check_if_peft_model(tmp_path / name) for name in ("adapter", "other", "nothing")}
    assert found == {"adapter": True, "other": False, "nothing": False}


def test_rescaling_scales_the_change_of_an_injected_adapter(model):
    functional.set_adapter(model, "first")
    change = model.lin0(X) - MLP().lin0(X)
    with helpers.rescale_adapter_scale(model, 0.5):
        torch.testing.assert_close(model.lin0(X) - MLP().lin0(X), change / 2)
        with helpers.rescale_adapter_scale(model, 0):
            torch.testing.assert_close(model.lin0(X), MLP().lin0(X))
    torch.testing.assert_close(model.lin0(X) - MLP().lin0(X), change)


def test_rescaling_leaves_the_scales_of_before_to_who_holds_them():
    model = get_peft_model(MLP(), LoraConfig(target_modules=["lin0"]))
    model.add_adapter("second", LoraConfig(target_modules=["lin0"]))
    for seed, name in enumerate(("default", "second")):
        fill_adapter(model, name, seed)
    model.eval()
    layer, names = model.base_model.model.lin0, ["default", "second"] * 2
    with torch.no_grad():
        outputs = layer(X, adapter_names=names)  # mixed batches to come find the factors of this one kept
        before = layer.scaling
        with helpers.rescale_adapter_scale(model, 0.5):
            assert layer.scaling == {name: scale / 2 for name, scale in before.items()} != before
            base = layer.base_layer(X)
            torch.testing.assert_close(layer(X, adapter_names=names) - base, (outputs - base) / 2)
        assert layer.scaling == before
        torch.testing.assert_close(layer(X, adapter_names=names), outputs)


def test_rescaling_says_what_it_cannot_scale(model):
    with pytest.raises(TypeError, match="float"), helpers.rescale_adapter_scale(model, "0.5"):
        pass
    with pytest.raises(ValueError, match="scaling"), helpers.rescale_adapter_scale(MLP(), 0.5):
        pass
    model.lin0.merge()
    with pytest.warns(PeftWarning, match="merged"), helpers.rescale_adapter_scale(model, 0.5):
        pass


@pytest.mark.parametrize("active", [True, False])
def test_inputs_keep_their_dtype(model, active):
    # A base model in half precision under adapters in float32: activations go in and come out as they are.
    model.lin0.base_layer.to(torch.bfloat16)
    seen = []
    model.lin0.base_layer.register_forward_hook(lambda module, args, output: seen.append(args[0].dtype))
    with helpers.disable_input_dtype_casting(model, active):
        assert model.lin0(X.bfloat16()).dtype == torch.bfloat16
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("stored", [torch.float16, torch.float8_e4m3fn])
def test_weights_that_hooks_cast_when_they_are_called_leave_the_input_alone(model, stored):
    # As diffusers has it: modules rest in one dtype, and run in that of the activations.
    functional.set_adapter(model, "first")
    model.lin0.set_scale("first", 0.5)
    modules = [module for module in model.lin0.modules() if isinstance(module, nn.Linear)]
    for module in modules:
        module.to(stored).float()  # what is stored is rounded here, and not below
    expected = model.lin0(X)
    for module in modules:
        module.to(stored)
        module.register_forward_pre_hook(lambda module, args: module.float() and None)
        module.register_forward_hook(lambda module, args, output: module.to(stored) and None)
    for _ in range(2):
        with helpers.disable_input_dtype_casting(model):
            torch.testing.assert_close(model.lin0(X), expected)
        with pytest.raises(RuntimeError, match="dtype"), helpers.disable_input_dtype_casting(model, active=False):
            model.lin0(X)
