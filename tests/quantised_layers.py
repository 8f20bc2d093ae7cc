"""Linear layers as other packages hold them in few bits, made from plain ones; for tests."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn


def bnb_8bit(linear: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    made = bnb.nn.Linear8bitLt(*_sizes(linear), has_fp16_weights=False)
    made.load_state_dict(linear.state_dict())
    return made.to("cpu").requires_grad_(False).train(linear.training)


def bnb_4bit(linear: nn.Linear, kind: str = "nf4", double: bool = True) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    made = bnb.nn.Linear4bit(*_sizes(linear), compress_statistics=double, quant_type=kind)
    made.load_state_dict(linear.state_dict())
    return made.to("cpu").requires_grad_(False).train(linear.training)


def torchao(linear: nn.Linear, config: str = "Int8WeightOnlyConfig", **settings: Any) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    holder = nn.Sequential(copy.deepcopy(linear))
    quantization.quantize_(holder, getattr(quantization, config)(**settings))
    return holder[0]


def hqq(linear: nn.Linear, bits: int = 4) -> nn.Module:
    quantize = pytest.importorskip("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=bits, group_size=8, axis=1)
    linear = copy.deepcopy(linear).requires_grad_(False)
    made = quantize.HQQLinear(linear, config, compute_dtype=linear.weight.dtype, device="cpu")
    return made.train(linear.training)


#: one for each kind of storage that is read and written
QUANTISED: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "bnb 8bit": bnb_8bit,
    "bnb 4bit": bnb_4bit,
    "torchao int8": torchao,
    "hqq": hqq,
}
#: the others that run on a CPU
FURTHER: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "bnb 4bit fp4": lambda linear: bnb_4bit(linear, "fp4", double=False),
    "torchao int4": lambda linear: torchao(linear, "IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "torchao int8 groups": lambda linear: torchao(linear, "Int8WeightOnlyConfig", granularity=_groups(4)),
    "torchao float8": lambda linear: torchao(linear, "Float8WeightOnlyConfig"),
    "hqq 3 bits": lambda linear: hqq(linear, 3),
    "hqq 8 bits": lambda linear: hqq(linear, 8),
}


def held_bytes(module: Any) -> list[Tensor]:
    """Copies of all tensors that a quantised layer holds for its weight."""
    return [tensor.clone() for tensor in _held(module)]


def _held(module: Any) -> Iterator[Tensor]:
    if hasattr(module, "W_q"):
        yield module.W_q.data
        yield from (value for value in module.meta.values() if isinstance(value, Tensor))
        return
    weight = module.weight
    if hasattr(weight, "__tensor_flatten__"):
        yield from (getattr(weight, name) for name in weight.__tensor_flatten__()[0])
        return
    yield weight.data
    if getattr(weight, "quant_state", None) is not None:
        yield weight.quant_state.absmax
        assert module.quant_state is weight.quant_state
    else:
        yield weight.SCB if weight.SCB is not None else module.state.SCB


def _sizes(linear: nn.Linear) -> tuple[int, int, bool]:
    return linear.in_features, linear.out_features, linear.bias is not None


def _groups(size: int) -> Any:
    return pytest.importorskip("torchao.quantization").PerGroup(size)
