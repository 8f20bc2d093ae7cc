"""What code written for huggingface/peft reads off a model: names in its state dict, attributes, what is trained."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import peft
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.core.layer import AdapterLayer
from peft.tuners.lora import Linear
from tiny_models import MLP, fill_adapter

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(5))

#: methods that have tensors which files hold or not, or which layers share
SHARING = [
    peft.TinyLoraConfig(u=3, init_weights="uniform"),
    peft.VBLoRAConfig(num_vectors=6, vector_length=4),
    peft.UniLoraConfig(theta_d_length=20),
    peft.VeraConfig(r=4, init_weights=False),
    peft.PveraConfig(r=4, init_weights=False),
    peft.RandLoraConfig(r=4, init_weights=False),
    peft.FrodConfig(sparse_rate=0.1, progressbar=False, init_weights=False),
    peft.SupertuningConfig(sparsity=0.5, save_precomputed_indices=True),
]


def on_both(config, **changes):
    return type(config)(**{**config.to_dict(), "target_modules": ["lin0", "lin1"], **changes})


sharing = pytest.mark.parametrize("config", SHARING, ids=lambda config: config.peft_type.value)


@sharing
def test_what_layers_share_goes_out_of_an_injected_model_and_into_another(config, tmp_path):
    model = inject_adapter_in_model(on_both(config), MLP().eval())
    fill_adapter(model, "default", seed=3)
    tensors = get_peft_model_state_dict(model)
    fresh = inject_adapter_in_model(on_both(config), MLP().eval(), low_cpu_mem_usage=True)
    assert set_peft_model_state_dict(fresh, tensors, low_cpu_mem_usage=True) == ([], [])
    torch.testing.assert_close(fresh(X), model(X))
    wrapped = get_peft_model(MLP().eval(), on_both(config))
    assert set_peft_model_state_dict(wrapped, {f"base_model.model.{key}": v for key, v in tensors.items()}) == ([], [])
    torch.testing.assert_close(wrapped(X), model(X))
    again = inject_adapter_in_model(on_both(config), MLP().eval())
    assert set_peft_model_state_dict(again, get_peft_model_state_dict(wrapped)) == ([], [])
    torch.testing.assert_close(again(X), model(X))


@sharing
@pytest.mark.parametrize("stored", [True, False])
def test_fixed_tensors_are_in_the_state_dict_of_the_model_where_files_have_them(config, stored):
    layer_class = type(get_peft_model(MLP(), on_both(config)).base_model.model.lin0)
    slots = {name: slot.stored for name, slot in layer_class.slots.items() if isinstance(slot.stored, str)}
    config = on_both(config, **dict.fromkeys(slots.values(), stored))
    model = get_peft_model(MLP(), config)
    model.add_adapter("other", config)
    model.base_model.model.lin0.move("default", dtype=torch.float64)  # which makes some of them anew
    fixed = {name for name, _ in model.named_buffers() if name.split(".")[-2] in slots or name.split(".")[-3] in slots}
    assert bool(fixed & model.state_dict().keys()) == (stored and bool(slots))


def test_the_attributes_of_the_base_model_are_reached_through_the_tuner():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])

        def forward(self, x):
            return self.layers[1](self.layers[0](x))

    model = get_peft_model(Stack(), LoraConfig(target_modules=["0", "1"]))
    assert model.base_model.layers[0] is model.layers[0] is model.base_model.model.layers[0]


def test_what_is_trained_of_the_base_model_by_choice_goes_on_being_trained(tmp_path):
    config = LoraConfig(target_modules=["lin0"])
    get_peft_model(MLP(), config).save_pretrained(tmp_path)
    model = get_peft_model(MLP(), config)
    for name in ("lin0.base_layer.weight", "lin1.bias"):
        model.base_model.model.get_parameter(name).requires_grad = True
    before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.add_adapter("other", LoraConfig(target_modules=["lin0", "lin1"]))
    model.load_adapter(tmp_path, "third")
    after = {name.replace(".base_layer.bias", ".bias") for name, p in model.named_parameters() if p.requires_grad}
    assert after == before and len(before) == 4


def test_layers_of_ones_own_are_used_for_the_modules_they_are_registered_for():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Own(Linear):
        def __init__(self, base_layer, adapter_name, **kwargs):
            super().__init__(base_layer, adapter_name, **kwargs)

    base = MLP()
    base.lin1 = Scaled(16, 16)
    config = LoraConfig(target_modules=["lin0", "lin1"], init_lora_weights=False)
    config._register_custom_module({Scaled: Own})
    model = get_peft_model(base, config).base_model.model
    assert type(model.lin1) is Own and type(model.lin0) is Linear
    assert model.lin1(X).shape == (4, 16) and model.lin1.lora_A["default"].weight.requires_grad


def test_rows_that_a_module_does_not_give_back_are_missed():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.gru = nn.Linear(16, 16), nn.GRU(16, 16, batch_first=True)

        def forward(self, x):
            return self.gru(self.lin(x).unsqueeze(1))[0]

    config = LoraConfig(target_modules=["lin"], modules_to_save=["gru"])
    model = get_peft_model(Recurrent(), config, "a")
    model.add_adapter("b", config)
    with pytest.raises(ValueError, match="outputs have a row per sample"):
        model.eval()(X, adapter_names=["a", "b", "a", "__base__"])


@sharing
def test_adapter_layer_names_are_those_of_what_is_trained(config):
    layer = get_peft_model(MLP(), on_both(config)).base_model.model.lin0
    assert isinstance(layer, AdapterLayer) and isinstance(layer.r, dict)
    slots = [getattr(layer, name) for name in layer.adapter_layer_names]
    held = [slot["default"] for slot in slots if "default" in slot]
    tensors = [leaf for entry in held for leaf in (entry.parameters() if isinstance(entry, nn.Module) else [entry])]
    assert tensors and all(tensor.requires_grad for tensor in tensors)
