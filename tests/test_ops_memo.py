"""Values that are kept while the parameter they come from stays as it is."""

from __future__ import annotations

import gc

import torch
from torch import nn

from peft.ops import memo
from peft.ops.memo import remember


class Counted:
    """Doubles a parameter, and counts how often."""

    def __init__(self, parameter):
        self.parameter, self.count = parameter, 0

    def __call__(self) -> torch.Tensor:
        self.count += 1
        return self.parameter * 2

    def value(self) -> torch.Tensor:
        return remember(self.parameter, "double", self)


def test_a_frozen_parameter_is_computed_with_once():
    double = Counted(nn.Parameter(torch.ones(3), requires_grad=False))
    assert torch.equal(double.value(), double.value())
    assert double.count == 1


def test_writing_or_moving_makes_it_anew():
    parameter = nn.Parameter(torch.ones(3), requires_grad=False)
    double = Counted(parameter)
    double.value()
    parameter.fill_(4)
    assert double.value()[0] == 8
    parameter.data = torch.full((3,), 5.0)
    assert double.value()[0] == 10
    assert double.count == 3


def test_a_trained_parameter_is_computed_with_every_time():
    double = Counted(nn.Parameter(torch.ones(3)))
    double.value().sum().backward()
    double.parameter.data.mul_(2)  # as some optimisers write
    assert double.value()[0] == 4


def test_what_was_made_in_inference_mode_serves_in_training_too():
    double = Counted(nn.Parameter(torch.ones(3), requires_grad=False))
    x = torch.ones(3, requires_grad=True)
    with torch.inference_mode():
        double.value()
    (x * double.value()).sum().backward()
    assert double.count == 1 and x.grad[0] == 2


def test_a_parameter_that_is_gone_is_forgotten():
    double = Counted(nn.Parameter(torch.ones(3), requires_grad=False))
    gc.collect()
    before = len(memo._kept)
    double.value()
    assert len(memo._kept) == before + 1
    del double
    gc.collect()
    assert len(memo._kept) == before
