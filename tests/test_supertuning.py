"""What is special to super-tuning: which entries it trains, and how they are stored."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), Conv1D(6, 12))


def adapted(**settings) -> nn.Module:
    config = peft.SupertuningConfig(target_modules=["0", "1"], **{"sparsity": 0.9, **settings})
    model = peft.get_peft_model(net(), config)
    with torch.no_grad():
        for layer in model.base_model.model:
            layer.supertuning_values["default"].copy_(
                torch.arange(1.0, 1 + layer.supertuning_values["default"].numel())
            )
    return model


@pytest.mark.parametrize("select_top", [True, False])
def test_values_go_to_the_entries_of_largest_or_smallest_magnitude(select_top):
    model = adapted(select_top=select_top)
    for layer in model.base_model.model:
        weight, change = layer.base_layer.weight, layer.get_delta_weight("default")
        assert change.shape == weight.shape
        order = weight.abs().flatten().sort(descending=select_top).indices[: int(0.1 * weight.numel())]
        expected = torch.zeros(weight.numel())
        expected[order] = torch.arange(1.0, 1 + len(order))
        torch.testing.assert_close(change, expected.view_as(weight))


@pytest.mark.parametrize("stored", [True, False])
def test_places_are_stored_or_found_again(tmp_path, stored):
    model = adapted(save_precomputed_indices=stored, r=2)
    model.save_pretrained(tmp_path)
    kept = {key.rpartition("supertuning_")[2] for key in load_file(tmp_path / "adapter_model.safetensors")}
    assert kept == {"values", "lora_A.weight", "lora_B.weight"} | ({"indices"} if stored else set())
    base = net()
    if stored:  # the places are those of the weights it was trained on
        with torch.no_grad():
            base[0].weight.neg_().mul_(torch.rand(12, 8))
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    for mine, theirs in zip(model.base_model.model, loaded.base_model.model, strict=True):
        assert torch.equal(mine.supertuning_indices["default"], theirs.supertuning_indices["default"])
        torch.testing.assert_close(mine.get_delta_weight("default"), theirs.get_delta_weight("default"))


def test_places_are_those_of_the_original_weight():
    model = adapted()
    model.merge_adapter()
    model.add_adapter("again", peft.SupertuningConfig(target_modules=["0", "1"], sparsity=0.9))
    for layer in model.base_model.model:
        assert torch.equal(*(layer.supertuning_indices[name] for name in ("default", "again")))


def test_product_beside_the_entries():
    model = adapted(r=2, lora_dropout=0.5)
    assert model.peft_config["default"].lora_alpha == 4
    layer = model.base_model.model[0]
    plain = layer.get_delta_weight("default")
    with torch.no_grad():
        layer.supertuning_lora_B["default"].weight.normal_()
    down, up = (factors["default"].weight for factors in (layer.supertuning_lora_A, layer.supertuning_lora_B))
    torch.testing.assert_close(layer.get_delta_weight("default"), plain + 2 * up @ down)
    x = torch.randn(3, 8)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sparsity": 1.0}, "sparsity must be at least 0 and less than 1"),
        ({"r": 0}, "r must be a positive integer"),
        ({"lora_alpha": 3.0}, "lora_alpha=3.0 has no effect without a rank"),
    ],
)
def test_settings_that_mean_nothing(settings, message):
    with pytest.raises(ValueError, match=message):
        peft.SupertuningConfig(target_modules=["0"], **settings)


def test_too_sparse_for_a_module():
    model = net()
    with pytest.raises(ValueError, match=r"sparsity=0\.99 leaves no entry of '0'"):
        peft.get_peft_model(model, peft.SupertuningConfig(target_modules=["0"]))
    assert type(model[0]) is nn.Linear
