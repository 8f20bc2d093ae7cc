"""Linear layers as other packages hold them in few bits, made from plain ones; for tests."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
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
    # On processors with bf16 instructions it rounds otherwise where no gradient is wanted; tests compare both.
    made.support_avx512bf16_for_cpu = False
    return made.to("cpu").requires_grad_(False).train(linear.training)


def torchao(linear: nn.Linear, config: str = "Int8WeightOnlyConfig", **settings: Any) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    holder = nn.Sequential(copy.deepcopy(linear))
    if "weight_dtype" in settings:
        settings["weight_dtype"] = getattr(torch, settings["weight_dtype"])  # not in older versions of torch
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
    "torchao int4": lambda linear: torchao(linear, "IntxWeightOnlyConfig", weight_dtype="int4"),
    "torchao int8 groups": lambda linear: torchao(linear, "Int8WeightOnlyConfig", granularity=_groups(4)),
    "torchao float8": lambda linear: torchao(linear, "Float8WeightOnlyConfig"),
    "hqq 3 bits": lambda linear: hqq(linear, 3),
    "hqq 8 bits": lambda linear: hqq(linear, 8),
}


def gptq(linear: nn.Linear) -> nn.Module:
    qlinear = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
    made = qlinear.TorchLinear(*_BY_GROUP, *_sizes(linear))
    scales, zeros, _ = _grid(linear)
    made.pack_original(linear, scales, zeros, torch.arange(linear.in_features) // 16)
    made.optimized = True  # no compiling
    made.post_init()
    return made.train(linear.training)


def awq(linear: nn.Linear) -> nn.Module:
    qlinear = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch_awq")
    made = qlinear.AwqTorchLinear(*_BY_GROUP, *_sizes(linear))
    scales, zeros, _ = _grid(linear)
    made.pack(linear, scales, zeros)
    made.post_init()
    return made.train(linear.training)


#: 4 bits, groups of 16 inputs, not symmetric, in order
_BY_GROUP = (4, 16, False, False)


def inc(linear: nn.Linear, optimum: bool = False) -> nn.Module:
    modules = pytest.importorskip("neural_compressor.torch.algorithms.weight_only.modules")
    sizes, bias = _sizes(linear)[:2], linear.bias is not None
    made = modules.INCWeightOnlyLinear(*sizes, group_size=16, zp=True, bias=bias, use_optimum_format=optimum)
    scales, zeros, entries = _grid(linear)
    made.pack(entries.int(), scales, zeros.int(), linear.bias)
    return made.train(linear.training)


def aqlm(linear: nn.Linear) -> nn.Module:
    """Codes at random: what they are learned from is data, not a weight."""
    package = pytest.importorskip("aqlm")
    size, bits = 4, 4
    made = package.QuantizedLinear(*_sizes(linear)[:2], size, 1, 2, bits, bias=linear.bias is not None)
    with torch.no_grad():
        made.codebooks.normal_(std=0.2)
        made.codes.copy_(torch.randint(0, 2**bits, made.codes.shape))
        made.scales.uniform_(0.5, 1)
        if linear.bias is not None:
            made.bias.copy_(linear.bias)
    return made.train(linear.training)


def eetq(linear: nn.Linear) -> nn.Module:
    """transformers' layer, whose kernel there is for CUDA only: with the same product on a CPU."""
    pytest.importorskip("transformers", minversion="5.0", reason="the layer is in the package eetq before")
    module = pytest.importorskip("transformers.integrations.eetq")
    product = lambda x, weight, scales: x @ (weight.to(x.dtype) * scales.to(x.dtype))
    module.eetq_kernels_hub = SimpleNamespace(w8_a16_gemm=product)
    made = module.EetqLinear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    scales = linear.weight.abs().amax(dim=1) / 127
    with torch.no_grad():
        made.weight.copy_((linear.weight / scales[:, None]).round().T)
        made.weight_scales.copy_(scales)
        if linear.bias is not None:
            made.bias.copy_(linear.bias)
    return made.requires_grad_(False).train(linear.training)


def _grid(linear: nn.Linear, size: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Scales and zeros [out, groups] of groups of inputs, and the entries [out, in], in 4 bits."""
    groups = linear.weight.detach().unflatten(1, (-1, size))
    scales = (groups.amax(-1) - groups.amin(-1)) / 15
    zeros = (-groups.amin(-1) / scales).round().clamp(0, 15)
    entries = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
    return scales, zeros, entries.flatten(1)


#: those that are read and not written
READ_ONLY: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "gptq": gptq,
    "awq": awq,
    "inc": inc,
    "inc as optimum has it": lambda linear: inc(linear, True),
    "aqlm": aqlm,
    "eetq": eetq,
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
