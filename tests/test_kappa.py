"""Targets chosen by the condition numbers of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import peft


class Experts(nn.Module):
    def __init__(self, spread: float):
        super().__init__()
        self.up_proj = nn.Parameter(torch.stack([torch.diag(torch.tensor([spread, 1.0])), torch.eye(2)]))
        self.other = nn.Parameter(torch.ones(2, 2, 2))


def with_values(*values: float) -> nn.Linear:
    layer = nn.Linear(len(values), len(values))
    rotation = torch.linalg.qr(torch.randn(len(values), len(values))).Q
    layer.weight.data = torch.diag(torch.tensor(values)) @ rotation
    return layer


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = with_values(9.0, 1.0), with_values(2.0, 1.0), with_values(4.0, 2.0, 1.0), Experts(5.0), Experts(3.0)
    return nn.Sequential(*layers, nn.Conv1d(2, 2, 1))


def test_numbers_and_choices():
    selector = peft.KappaTuneSelector(net(), show_progress=False)
    assert selector.condition_numbers == {"0": pytest.approx(9), "1": pytest.approx(2), "2": pytest.approx(4)}
    assert selector.parameter_condition_numbers == {"3.up_proj": pytest.approx(3), "4.up_proj": pytest.approx(2)}
    best = selector.get_best_targets
    assert best() == ["1", "2", "0"]
    assert best(top_p=0.7) == ["1", "2"] and best(top_p=0.01) == ["1"]
    assert best(num_modules=2, top_p=0.01) == ["1", "2"] and best(num_modules=9) == best()
    assert best(threshold=4.5) == ["1", "2"]
    assert selector.get_best_target_parameters(num_modules=1) == ["4.up_proj"]
    narrow = peft.KappaTuneSelector(net(), 2, (".other",), show_progress=False)
    assert set(narrow.condition_numbers) == {"0", "1"}
    assert set(narrow.parameter_condition_numbers) == {"3.other", "4.other"}
    for wrong in ({"top_p": 0.0}, {"top_p": 1.5}, {"num_modules": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            best(**wrong)


def test_what_a_configuration_takes(capsys):
    found = peft.find_kappa_target_modules(net(), top_p=0.4)
    assert found == {"target_modules": ["1"], "target_parameters": ["4.up_proj"]}
    assert "Singular values" in capsys.readouterr().err
    plain = nn.Sequential(with_values(3.0, 1.0))
    found = peft.find_kappa_target_modules(plain, show_progress=False)
    assert found == {"target_modules": ["0"], "target_parameters": None}
    model = peft.get_peft_model(plain, peft.LoraConfig(**found))
    again = peft.find_kappa_target_modules(model.get_base_model(), show_progress=False)
    assert again == found, "names are those without adapters"
