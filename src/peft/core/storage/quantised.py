"""Weights that other packages hold in few bits: how each is read, and packed again after a change.

A weight is put in by quantising it as the package does, with the settings that the old one had; the old one, with all
that belongs to it, is kept aside and comes back as it was.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from inspect import Parameter, signature
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from peft.core.storage.base import Storage


def _loaded(path: str, *names: str) -> tuple[type, ...]:
    """Classes of a module, if that is loaded: without it, there can be no objects of them."""
    module = sys.modules.get(path)
    return tuple(found for name in names if isinstance(found := getattr(module, name, None), type))


class Quantised(Storage):
    """What these kinds have in common."""

    backend: str

    def holds(self, module: nn.Module, name: str, weight: Any) -> bool:
        """Whether the weight `name` of `module`, which is `weight` if it is an attribute, is held in this way."""
        raise NotImplementedError

    def parts(self, module: nn.Module, name: str) -> tuple[str, ...]:
        """The attributes that hold a weight: the first is its tensor, the others belong to it."""
        return (name,)

    def may_pack(self, module: Any) -> bool:
        """Whether evaluation may make another form of the weight, which gradients do not go through."""
        return False

    def unpack(self, module: Any) -> None:
        """Makes the weight again what it was before that."""

    def pack(self, module: Any, name: str, value: Tensor) -> tuple[Any, ...]:
        """`value` in the storage's form, on the weight's device: what goes into each of `parts`."""
        raise NotImplementedError

    def passes_gradient(self, module: nn.Module, name: str) -> bool:
        """Whether the module's own forward pass is one that gradients get through, to its input."""
        return True

    def held(self, module: nn.Module, name: str) -> Tensor:
        return getattr(module, self.parts(module, name)[0])

    def keep(self, module: nn.Module, name: str, own: bool = False) -> Any:
        return tuple(attrgetter(part)(module) for part in self.parts(module, name))

    def write(self, module: nn.Module, name: str, value: Tensor, own: bool = False) -> None:
        self.check_write(module, name)
        device = self.held(module, name).device
        with torch.no_grad():
            self._put(module, name, self.pack(module, name, value.detach().to(device).contiguous()))

    def restore(self, module: nn.Module, name: str, before: Any) -> None:
        device = self.held(module, name).device
        self._put(module, name, before if before[0].device == device else _to(before, device))

    def original(self, module: nn.Module, name: str, before: Any) -> Tensor:
        now = self.keep(module, name)
        self.restore(module, name, before)
        try:
            return self.read(module, name)
        finally:
            self.restore(module, name, now)

    def nbytes(self, before: Any) -> int:
        return sum({t.data_ptr(): t.numel() * t.element_size() for t in _tensors(before)}.values())

    def _put(self, module: nn.Module, name: str, values: tuple[Any, ...]) -> None:
        for part, value in zip(self.parts(module, name), values, strict=True):
            path, _, leaf = part.rpartition(".")
            setattr(attrgetter(path)(module) if path else module, leaf, value)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The plain tensors in a weight and what belongs to it."""
    if isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
    elif isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        yield from (getattr(value, name) for name in value.__tensor_flatten__()[0])
    elif isinstance(value, Tensor):
        yield value
        yield from _tensors([vars(value).get(name) for name in ("SCB", "CB", "quant_state")])
    elif type(value).__name__ == "QuantState":
        yield from _tensors([value.absmax, value.state2])


def _to(value: Any, device: torch.device) -> Any:
    """The same on another device."""
    if isinstance(value, (tuple, list)):
        return tuple(_to(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    if type(value).__name__ == "QuantState":
        value.to(device)
        return value
    if type(value) is nn.Parameter:
        return nn.Parameter(value.data.to(device), requires_grad=value.requires_grad)
    return value.to(device) if isinstance(value, Tensor) else value


class Bnb8bit(Quantised):
    """bitsandbytes' LLM.int8() (arXiv:2208.07339): int8 rows and the largest magnitude of each."""

    backend = "bnb 8bit"

    def holds(self, module: nn.Module, name: str, weight: Any) -> bool:
        known = isinstance(weight, _loaded("bitsandbytes.nn", "Int8Params"))
        return known and getattr(weight, "dtype", None) == torch.int8  # else it is not packed yet

    def read(self, module: Any, name: str) -> Tensor:
        weight = getattr(module, name)
        # The first forward pass moves the scales from the weight to the module.
        scales = weight.SCB if weight.SCB is not None else module.state.SCB
        return weight.data.float() * (scales / 127)[:, None]

    def parts(self, module: nn.Module, name: str) -> tuple[str, ...]:
        return (name, "state.CB", "state.SCB") if hasattr(module, "state") else (name,)  # else an embedding

    def pack(self, module: Any, name: str, value: Tensor) -> tuple[Any, ...]:
        make = type(getattr(module, name))
        packed, scales, _ = sys.modules["bitsandbytes.functional"].int8_vectorwise_quant(value.half())
        weight = make(packed, requires_grad=False, has_fp16_weights=False, CB=packed, SCB=scales)
        return (weight, None, None)[: len(self.parts(module, name))]


class Bnb4bit(Quantised):
    """bitsandbytes' 4 bits per weight in blocks (QLoRA, arXiv:2305.14314): nf4 and fp4, scales quantised too or not."""

    backend = "bnb 4bit"

    def holds(self, module: nn.Module, name: str, weight: Any) -> bool:
        # FSDP turns the parameter into a plain one; the module still knows.
        known = isinstance(weight, _loaded("bitsandbytes.nn", "Params4bit"))
        known = known or (name == "weight" and isinstance(module, _loaded("bitsandbytes.nn", "Linear4bit")))
        return known and self._state(module, weight) is not None

    def parts(self, module: nn.Module, name: str) -> tuple[str, ...]:
        return (name, "quant_state") if "quant_state" in vars(module) else (name,)

    @staticmethod
    def _state(module: Any, weight: Any) -> Any:
        state = getattr(weight, "quant_state", None)
        return getattr(module, "quant_state", None) if state is None else state

    def _unpacked(self, module: Any, name: str) -> tuple[Tensor, Any]:
        """The packed weight and its state, in the order that bitsandbytes quantises to."""
        weight = getattr(module, name)
        data, state = weight.data, self._state(module, weight)
        if getattr(state, "packing_format_for_cpu", False):  # what evaluation on some CPUs makes of it
            functional = sys.modules["bitsandbytes.functional"]
            data, state = functional._convert_weight_packed_for_cpu_inverse(data, copy.deepcopy(state))
        return data, state

    def may_pack(self, module: Any) -> bool:
        return bool(getattr(module, "support_avx512bf16_for_cpu", False))

    def unpack(self, module: Any) -> None:
        weight = module.weight
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            weight.data, weight.quant_state = self._unpacked(module, "weight")

    def read(self, module: Any, name: str) -> Tensor:
        return sys.modules["bitsandbytes.functional"].dequantize_4bit(*self._unpacked(module, name))

    def pack(self, module: Any, name: str, value: Tensor) -> tuple[Any, ...]:
        old, (data, before) = getattr(module, name), self._unpacked(module, name)
        settings = {
            "blocksize": before.blocksize,
            "compress_statistics": before.nested,
            "quant_type": before.quant_type,
            "quant_storage": data.dtype,
        }
        packed, state = sys.modules["bitsandbytes.functional"].quantize_4bit(value.to(before.dtype), **settings)
        make = sys.modules["bitsandbytes.nn"].Params4bit
        module_of = getattr(old, "module", None)
        weight = make(packed, quant_state=state, module=module_of, bnb_quantized=True, **settings)
        return (weight, weight.quant_state)[: len(self.parts(module, name))]


class TorchAO(Quantised):
    """torchao's tensors, which are parameters of plain modules: int8, int4, float8, nf4."""

    backend = "torchao"

    def holds(self, module: nn.Module, name: str, weight: Any) -> bool:
        return "torchao" in sys.modules and any(
            kind.__module__.partition(".")[0] == "torchao" for kind in type(weight).__mro__
        )

    def read(self, module: nn.Module, name: str) -> Tensor:
        weight: Any = getattr(module, name)
        with torch.no_grad():
            value = weight.get_original_weight() if hasattr(weight, "get_original_weight") else weight.dequantize()
            scale = getattr(weight, "act_pre_scale", None)  # what the activations are multiplied with first
            return value if scale is None else value * scale

    def passes_gradient(self, module: nn.Module, name: str) -> bool:
        rounds_input = ("act_quant_kwargs", "act_quant_scale", "activation_quantization")
        return all(getattr(getattr(module, name), setting, None) is None for setting in rounds_input)

    def check_write(self, module: nn.Module, name: str) -> None:
        self._settings(getattr(module, name))

    def pack(self, module: nn.Module, name: str, value: Tensor) -> tuple[Any, ...]:
        weight: Any = getattr(module, name)
        make, settings = self._settings(weight)
        scale = getattr(weight, "act_pre_scale", None)
        packed = make(value.to(weight.dtype) if scale is None else (value / scale).to(weight.dtype), **settings)
        return (nn.Parameter(packed, requires_grad=weight.requires_grad),)

    @staticmethod
    def _settings(weight: Any) -> tuple[Any, dict[str, Any]]:
        """What makes a tensor of this kind, and the arguments that made `weight`.

        Raises:
            NotImplementedError: they are not known.
        """
        kind = type(weight)
        make = getattr(kind, "from_hp", None) or getattr(kind, "from_tensor", None)
        if make is None:
            raise NotImplementedError(
                f"torchao's {kind.__name__} cannot be quantised again, so nothing can be merged into it. Merge into a"
                " base model that is not quantised, and quantise the outcome."
            )
        settings = {}
        for argument in list(signature(make).parameters.values())[1:]:
            known = _TORCHAO_SETTINGS.get(argument.name, attrgetter(argument.name))
            try:
                settings[argument.name] = known(weight)
            except AttributeError:
                if argument.default is Parameter.empty:
                    raise NotImplementedError(
                        f"torchao's {kind.__name__} does not say with which {argument.name!r} it was quantised, so"
                        " nothing can be merged into it."
                    ) from None
        return make, {key: value for key, value in settings.items() if value is not None}


def _granularity(weight: Any) -> Any:
    """Which entries share a scale, in torchao's words."""
    words = sys.modules["torchao.quantization.granularity"]
    block, shape = tuple(weight.block_size), tuple(weight.shape)
    if block == shape:
        return words.PerTensor()
    if all(size == 1 for size in block[:-1]):
        return words.PerRow() if block[-1] == shape[-1] else words.PerGroup(block[-1])
    return words.PerBlock(block)


def _mapping_type(weight: Any) -> Any:
    kinds = sys.modules["torchao.quantization.quant_primitives"].MappingType
    zero = weight.zero_point
    return kinds.SYMMETRIC if zero is None or not zero.any() else kinds.ASYMMETRIC


def _afresh(weight: Any) -> None:
    """For what is worked out from the values."""


#: arguments that are no attributes of the same name
_TORCHAO_SETTINGS: dict[str, Callable[[Any], Any]] = {
    "granularity": _granularity,
    "mapping_type": _mapping_type,
    "float8_dtype": attrgetter("qdata.dtype"),
    "scale": _afresh,
    "zero_point": _afresh,
}


class HQQ(Quantised):
    """Half-quadratic quantisation: `HQQLinear`, packed integers in `W_q` and the rest in `meta`."""

    backend = "hqq"

    def parts(self, module: nn.Module, name: str) -> tuple[str, ...]:
        return "W_q", "meta"

    def holds(self, module: nn.Module, name: str, weight: Any) -> bool:
        return name == "weight" and isinstance(module, _loaded("hqq.core.quantize", "HQQLinear"))

    def read(self, module: Any, name: str) -> Tensor:
        with torch.no_grad():
            return module.dequantize()

    def check_write(self, module: Any, name: str) -> None:
        if not module.quant_config:
            raise NotImplementedError(
                "This HQQLinear does not say how it was quantised (quant_config), so nothing can be merged into it."
            )

    def pack(self, module: Any, name: str, value: Tensor) -> tuple[Any, ...]:
        settings = {**module.quant_config, "offload_meta": module.offload_meta}
        twin = type(module)(None, settings, compute_dtype=module.compute_dtype, device=value.device, initialize=False)
        twin.quantize(value, **twin.quant_config)
        return twin.W_q, twin.meta


class CallOnly(Quantised):
    """Linear layers that are called and no more: the weight is read off what they make of the identity matrix.

    Args:
        backend: the name of the kind.
        path, classes: where the layers are, and what they are called.
    """

    def __init__(self, backend: str, path: str = "", *classes: str):
        self.backend, self.path, self.classes = backend, path, classes

    def holds(self, module: nn.Module, name: str, weight: Any) -> bool:
        return name == "weight" and isinstance(module, _loaded(self.path, *self.classes))

    def held(self, module: nn.Module, name: str) -> Tensor:
        return next(iter((*module.parameters(), *module.buffers())))

    def read(self, module: Any, name: str) -> Tensor:
        device = self.held(module, name).device
        floating = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point() and t.itemsize > 1]
        dtype = floating[0].dtype if floating else torch.float16
        bias, module.bias = module.bias, None  # in half precision, to add it and take it away would cost digits
        try:
            with torch.no_grad():
                inputs = module.in_features if hasattr(module, "in_features") else len(module.weight)  # EETQ: [in, out]
                return module(torch.eye(inputs, dtype=dtype, device=device)).T
        finally:
            module.bias = bias

    def check_write(self, module: nn.Module, name: str) -> None:
        raise NotImplementedError(
            f"{type(module).__name__} of {type(module).__module__.partition('.')[0]} cannot be given another weight, so"
            " nothing can be merged into it. Merge into a base model that is not quantised, and quantise the outcome;"
            " or leave the adapter as it is."
        )


class NeuralCompressor(CallOnly):
    """Intel Neural Compressor's weight-only layers; their first call changes the bias, so they are asked instead."""

    def read(self, module: Any, name: str) -> Tensor:
        unpacked = getattr(module, name, None)  # kept by the layer's first call
        if unpacked is None:
            return module.recover() if hasattr(module, "recover") else super().read(module, name)
        return unpacked


class TransformerEngine(CallOnly):
    """Transformer Engine's `Linear` whose weight is one of its 8 or 4-bit tensors."""

    def held(self, module: nn.Module, name: str) -> Tensor:
        return getattr(module, name)

    def read(self, module: nn.Module, name: str) -> Tensor:
        with torch.no_grad():
            return getattr(module, name).dequantize()


class PackedByGroup(CallOnly):
    """Layers of any package that hold what GPTQ and AWQ make, by the name that it has in files."""

    def holds(self, module: nn.Module, name: str, weight: Any) -> bool:
        return name == "weight" and ("qweight" in module._buffers or "qweight" in module._parameters)


#: first match wins
QUANTISED: list[Quantised] = [
    TorchAO(),
    Bnb4bit(),
    Bnb8bit(),
    HQQ(),
    # GPTQModel's layers for AWQ are among its layers, so they are asked for first.
    CallOnly("awq", "gptqmodel.nn_modules.qlinear", "AWQuantLinear"),
    CallOnly("gptq", "gptqmodel.nn_modules.qlinear", "BaseQuantLinear"),
    CallOnly("eetq", "eetq", "EetqLinear"),
    CallOnly("eetq", "transformers.integrations.eetq", "EetqLinear"),
    CallOnly("aqlm", "aqlm.inference", "QuantizedLinear"),
    NeuralCompressor("inc", "neural_compressor.torch.algorithms.weight_only.modules", "WeightOnlyLinear"),
    CallOnly("inc", "neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules", "PatchedLinearBase"),
    TransformerEngine("te", "transformer_engine.pytorch", "Linear"),
    PackedByGroup("gptq"),
]
