"""What is special to WaveFT: how many coefficients a module gets, and what its settings do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import peft


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 40), nn.Linear(40, 2))


def counts(model: nn.Module) -> list[int]:
    return [layer.waveft_spectrum["default"].numel() for layer in model.base_model.model]


def test_coefficients_in_proportion_to_the_weights(tmp_path):
    config = peft.WaveFTConfig(target_modules=["0", "1", "2"], n_frequency=20, proportional_parameters=True)
    model = peft.get_peft_model(net(), config)
    assert counts(model) == [round(60 * size / (96 + 480 + 80)) for size in (96, 480, 80)]
    nn.init.normal_(model.base_model.model[1].waveft_spectrum["default"])
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = peft.PeftModel.from_pretrained(net(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        x = torch.randn(3, 8)
        torch.testing.assert_close(loaded(x), model(x))


def test_more_coefficients_than_entries():
    model = net()
    with pytest.raises(ValueError, match=r"n_frequency=224 is more than the entries of the weight of '0'"):
        config = peft.WaveFTConfig(target_modules=["0", "1"], n_frequency=672, proportional_parameters=True)
        peft.get_peft_model(model, config)
    assert all(type(layer) is nn.Linear for layer in model)
    with pytest.raises(ValueError, match=r"n_frequency=97 is more than the entries of the weight of '0'"):
        peft.get_peft_model(model, peft.WaveFTConfig(target_modules=["0"], n_frequency=97))


def test_pattern_and_plain_entries():
    config = peft.WaveFTConfig(
        target_modules=["0", "1"], n_frequency=5, n_frequency_pattern={"1": 7}, use_idwt=False, scaling=3.0
    )
    model = peft.get_peft_model(net(), config)
    assert [layer.waveft_spectrum["default"].numel() for layer in model.base_model.model[:2]] == [5, 7]
    layer = model.base_model.model[1]
    with torch.no_grad():
        layer.waveft_spectrum["default"].copy_(torch.arange(1.0, 8.0))
    i, j = layer.waveft_indices["default"]
    expected = torch.zeros(40, 12)
    expected[i, j] = 3 * torch.arange(1.0, 8.0)
    torch.testing.assert_close(layer.get_delta_weight("default"), expected)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"wavelet_family": "db0"}, "wavelet_family='db0' is not known"),
        ({"n_frequency": 0}, "n_frequency must be a positive"),
        ({"n_frequency_pattern": {"0": 0}}, "got 0 for '0'"),
    ],
)
def test_settings_that_mean_nothing(settings, message):
    with pytest.raises(ValueError, match=message):
        peft.WaveFTConfig(target_modules=["0"], **settings)


def test_shares_by_size_reach_the_output_projection_of_attention(tmp_path):
    def attention() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "small": nn.Linear(8, 2)})

    config = peft.WaveFTConfig(target_modules=["attn", "small"], n_frequency=10, proportional_parameters=True)
    model = peft.get_peft_model(attention(), config)
    found = [len(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(found) == [2, 18, 18], "192 and 16 of the entries that are counted, and as many beside the first"
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(attention(), tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
