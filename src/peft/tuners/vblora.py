"""Low-rank adaptation by vectors from a bank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft.config import LayerConfig
from peft.core.base_op import BaseOp
from peft.core.layer import AdapterLayer
from peft.core.plan import Plan
from peft.core.products import add_low_rank, run_low_rank
from peft.core.tuner import BaseTuner
from peft.core.walk import parts_of
from peft.ops.vector_bank import mix_vectors, pack_logits, unpack_logits
from peft.registry import PeftType

_LOGITS = ("vblora_logits_A", "vblora_logits_B")


@dataclass
class VBLoRAConfig(LayerConfig):
    """VB-LoRA (arXiv:2405.15179): W' = W + B A, with A [r, in] and B [out, r] made of vectors from a shared bank.

    A row of A is in / vector_length vectors one after the other, a column of B out / vector_length; each is the sum of
    `topk` vectors of `vblora_vector_bank` [num_vectors, vector_length], weighted by the softmax over their logits
    `vblora_logits_A` [r, in / vector_length, num_vectors] or `vblora_logits_B` [out / vector_length, r, num_vectors].

    Args:
        r: rank of the change.
        num_vectors: vectors in the bank.
        vector_length: their length, which has to divide both sides of the adapted weights.
        topk: vectors in a sum.
        save_only_topk_weights: store places and weights of the chosen vectors in place of all logits; such a file
            is for inference and cannot be trained further.
        vblora_dropout: probability of dropout on the adapter's input.
        fan_in_fan_out: whether the layers hold their weight as [in, out]; found out from the layer itself.
        init_vector_bank_bound: the bank starts uniformly in [-bound, bound].
        init_logits_std: standard deviation that the logits start with.
    """

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    save_only_topk_weights: bool = False
    vblora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1

    positive_fields = ("r", "num_vectors", "vector_length", "topk")
    nonnegative_fields = ("init_vector_bank_bound", "init_logits_std")
    fraction_fields = ("vblora_dropout",)
    beyond_reference: ClassVar[frozenset[str]] = frozenset(("target_parameters",))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.VBLORA
        if self.topk > self.num_vectors:
            raise ValueError(f"topk={self.topk} is more than the vectors in the bank (num_vectors={self.num_vectors}).")


class VBLoRALayer(AdapterLayer):
    """A module with logits that choose from the shared bank."""

    adapter_layer_names = _LOGITS
    other_param_names = ("vblora_topk", "vblora_dropout", "vblora_only_topk")
    label = "vblora"

    vblora_logits_A: nn.ParameterDict
    vblora_logits_B: nn.ParameterDict
    vblora_topk: dict[str, int]
    vblora_dropout: dict[str, float]
    #: whether all logits but those of the chosen vectors are lost
    vblora_only_topk: dict[str, bool]

    def __init__(self, base_layer: nn.Module, parameter_name: str | None, bank: nn.ParameterDict):
        super().__init__(base_layer, parameter_name)
        self.vblora_vector_bank = bank

    def create(self, name: str, config: VBLoRAConfig) -> None:
        self.vblora_topk[name], self.vblora_dropout[name] = config.topk, config.vblora_dropout
        self.vblora_only_topk[name] = False
        inputs, outputs = self.in_features // config.vector_length, self.out_features // config.vector_length
        for slot, shape in zip(_LOGITS, ((config.r, inputs), (outputs, config.r)), strict=True):
            logits = torch.randn(*shape, config.num_vectors) * config.init_logits_std
            getattr(self, slot)[name] = nn.Parameter(logits)

    def adapter_parameters(self, name: str) -> Iterator[nn.Parameter]:
        yield from super().adapter_parameters(name)
        if self.has(name):
            yield self.vblora_vector_bank[name]

    def move(self, name: str, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().move(name, device, dtype)
        bank = self.vblora_vector_bank[name]
        bank.data = bank.data.to(device=device, dtype=dtype)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r].

        Raises:
            RuntimeError: they are to be trained, and come from a file with the chosen vectors alone.
        """
        if self.training and self.vblora_only_topk[name] and self.vblora_logits_A[name].requires_grad:
            raise RuntimeError(
                f"VB-LoRA adapter {name!r} was saved with save_only_topk_weights=True: the logits of all other vectors"
                " are lost (minus infinity), so it cannot be trained further. Save it without that for training."
            )
        bank, k = self.vblora_vector_bank[name], self.vblora_topk[name]
        a, b = (mix_vectors(getattr(self, slot)[name], bank, k) for slot in _LOGITS)
        return a.flatten(1), b.transpose(1, 2).flatten(0, 1)

    def delta(self, name: str) -> Tensor:
        a, b = self.factors(name)
        return b @ a

    def cheap(self, name: str) -> bool:
        return self.op.linear

    def adapt(self, name: str, below: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return run_low_rank(self, *self.factors(name), self.dropout_of(name), below, x, *args, **kwargs)

    def add(self, name: str, x: Tensor, result: Tensor) -> Tensor:
        return add_low_rank(self, *self.factors(name), self.dropout_of(name), x, result)

    def dropout_of(self, name: str) -> float:
        """Probability of dropout on the adapter's input at present."""
        return self.vblora_dropout[name] if self.training else 0.0

    @classmethod
    def check(cls, config: VBLoRAConfig, key: str, module: nn.Module, op: BaseOp) -> None:
        for side, size in (("in_features", op.in_features), ("out_features", op.out_features)):
            if size % config.vector_length:
                raise ValueError(
                    f"{side}={size} of {key!r} must be divisible by vector_length={config.vector_length}; choose"
                    " another vector_length, or leave the module out."
                )
        if config.vblora_dropout and not op.linear:
            raise ValueError(f"vblora_dropout needs linear layers; {key!r} is a {op.kind}.")


class VBLoRAModel(BaseTuner):
    """A model with VB-LoRA adapters; `vblora_vector_bank` holds the banks, one for all layers of an adapter."""

    prefix = "vblora_"
    layer_class = VBLoRALayer
    shared_names = ("vblora_vector_bank",)
    injectable = False

    def prepare_shared(self) -> None:
        self.vblora_vector_bank = nn.ParameterDict()

    def prepare(self, plan: Plan, config: VBLoRAConfig, adapter_name: str) -> None:
        self.vblora_vector_bank[adapter_name] = nn.Parameter(_new_bank(config))

    def fill_in(self, adapter_name: str) -> None:
        bank = self.vblora_vector_bank[adapter_name]
        if bank.is_meta:
            made = _new_bank(self.peft_config[adapter_name]).to(bank.dtype)
            self.vblora_vector_bank[adapter_name] = nn.Parameter(made, requires_grad=bank.requires_grad)
        super().fill_in(adapter_name)

    def make_layer(self, config: VBLoRAConfig, target: nn.Module, parameter_name: str | None, key: str) -> VBLoRALayer:
        return VBLoRALayer(target, parameter_name, self.vblora_vector_bank)

    @classmethod
    def write_tensors(cls, model: nn.Module, adapter_name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        config: Any = model.peft_config[adapter_name]  # type: ignore[index]
        if not config.save_only_topk_weights:
            return tensors
        written = {}
        for key, value in tensors.items():
            if key.endswith(_LOGITS):
                written[f"{key}_topk_indices"], written[f"{key}_topk_weights"] = pack_logits(value, config.topk)
            else:
                written[key] = value
        return written

    @classmethod
    def read_tensors(cls, model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        config: Any = model.peft_config[adapter_name]  # type: ignore[index]
        read = dict(tensors)
        packed = [key.removesuffix("_topk_indices") for key in tensors if key.endswith("_topk_indices")]
        for key in packed:
            if f"{key}_topk_weights" in read:
                places, weights = read.pop(f"{key}_topk_indices"), read.pop(f"{key}_topk_weights")
                read[key] = unpack_logits(places, weights, config.num_vectors)
        for _, layer in parts_of(model):
            if isinstance(layer, VBLoRALayer) and layer.has(adapter_name):
                layer.vblora_only_topk[adapter_name] = bool(packed)
        return read

    def get_nb_savable_parameters(self, adapter: str = "default") -> tuple[int, int]:
        """(numbers of VB-LoRA's own that saving an adapter writes, in units of a float32; other trained ones)."""
        layers = [layer for layer in self.layers() if isinstance(layer, VBLoRALayer) and layer.has(adapter)]
        logits = {f"{i}.{slot}": getattr(layer, slot)[adapter] for i, layer in enumerate(layers) for slot in _LOGITS}
        written = self.write_tensors(self, adapter, logits).values()
        integers = sum(t.numel() * t.element_size() for t in written if not t.is_floating_point()) // 4
        own = self.vblora_vector_bank[adapter].numel() + integers
        own += sum(t.numel() for t in written if t.is_floating_point())
        others = {id(p) for layer in layers for name in layer.adapter_names() for p in layer.adapter_parameters(name)}
        return own, sum(p.numel() for p in self.parameters() if p.requires_grad and id(p) not in others)

    def print_savable_parameters(self) -> None:
        """Prints how many numbers saving the default adapter writes."""
        own, others = self.get_nb_savable_parameters()
        print(f"VB-LoRA params to be saved (in float32s): {own:,d} || all params to be saved: {own + others:,d}")


def _new_bank(config: VBLoRAConfig) -> Tensor:
    bank = torch.empty(config.num_vectors, config.vector_length)
    return nn.init.uniform_(bank, -config.init_vector_bank_bound, config.init_vector_bank_bound)
