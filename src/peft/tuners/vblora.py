"""Low-rank adaptation by vectors from a bank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft.config import LayoutConfig
from peft.core.change import LowRank
from peft.core.layer import AdapterLayer
from peft.core.method import Method
from peft.core.part import without
from peft.core.plan import Plan
from peft.core.slots import Dropout, Setting, Slot
from peft.core.tuner import BaseTuner
from peft.core.walk import layers_of
from peft.ops.vector_bank import mix_vectors, pack_logits, unpack_logits
from peft.registry import PeftType
from peft.values import Divisor, Fraction, NonNegativeFloat, PositiveInt

_LOGITS = ("vblora_logits_A", "vblora_logits_B")


@dataclass
class VBLoRAConfig(LayoutConfig, peft_type=PeftType.VBLORA):
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
        init_vector_bank_bound: the bank starts uniformly in [-bound, bound].
        init_logits_std: standard deviation that the logits start with.
    """

    r: PositiveInt = 4
    num_vectors: PositiveInt = 256
    vector_length: Divisor = 256
    topk: PositiveInt = 2
    save_only_topk_weights: bool = False
    vblora_dropout: Fraction = 0.0
    init_vector_bank_bound: NonNegativeFloat = 0.02
    init_logits_std: NonNegativeFloat = 0.1

    def check(self) -> None:
        if self.topk > self.num_vectors:
            raise ValueError(f"topk={self.topk} is more than the vectors in the bank (num_vectors={self.num_vectors}).")


class VBLoRALayer(AdapterLayer):
    """A module with logits that choose from the shared bank."""

    vblora_logits_A = Slot()
    vblora_logits_B = Slot()
    vblora_vector_bank = Slot(shared=True)

    vblora_topk = Setting[int]("topk")
    vblora_dropout = Dropout()
    #: whether all logits but those of the chosen vectors are lost
    vblora_only_topk = Setting[bool]()

    def create(self, name: str, config: VBLoRAConfig) -> None:
        self.vblora_only_topk[name] = False
        inputs, outputs = self.in_features // config.vector_length, self.out_features // config.vector_length
        bank, drawn = self.vblora_vector_bank[name].data, _new_bank(config)
        if name not in self.vblora_logits_A and not drawn.is_meta:
            bank.copy_(drawn)  # at each layer, so that a seed means the values that it means to huggingface/peft
        for slot, shape in zip(_LOGITS, ((config.r, inputs), (outputs, config.r)), strict=True):
            logits = torch.empty(*shape, config.num_vectors).normal_(0, config.init_logits_std)
            getattr(self, slot)[name] = nn.Parameter(logits)

    def change(self, name: str) -> LowRank:
        if self.training and self.vblora_only_topk[name] and self.vblora_logits_A[name].requires_grad:
            raise RuntimeError(
                f"VB-LoRA adapter {name!r} was saved with save_only_topk_weights=True: the logits of all other vectors"
                " are lost (minus infinity), so it cannot be trained further. Save it without that for training."
            )
        bank, k = self.vblora_vector_bank[name], self.vblora_topk[name]
        a, b = (mix_vectors(getattr(self, slot)[name], bank, k) for slot in _LOGITS)
        return LowRank(a.flatten(1), b.transpose(1, 2).flatten(0, 1), dropout=self.dropout_of(name))


def _new_bank(config: VBLoRAConfig) -> Tensor:
    bound = config.init_vector_bank_bound
    return torch.empty(config.num_vectors, config.vector_length).uniform_(-bound, bound)


class VBLoRAMethod(Method):
    """What VB-LoRA shares: the bank."""

    def share(self, plan: Plan, config: VBLoRAConfig, adapter_name: str) -> dict[str, Tensor]:
        made = _new_bank(config) if plan.waits_for_file else torch.zeros(config.num_vectors, config.vector_length)
        return {"vblora_vector_bank": made}

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
        for layer in layers_of(model, VBLoRALayer, adapter_name).values():
            layer.vblora_only_topk[adapter_name] = bool(packed)
        return read

    def get_nb_savable_parameters(self, adapter: str = "default") -> tuple[int, int]:
        """(numbers of VB-LoRA's own that saving an adapter writes, in units of a float32; other trained ones)."""
        layers = layers_of(self.model, VBLoRALayer, adapter)
        logits = {f"{key}.{slot}": getattr(layer, slot)[adapter] for key, layer in layers.items() for slot in _LOGITS}
        written = list(self.write_tensors(self.tuner, adapter, logits).values())
        integers = sum(t.numel() * t.element_size() for t in written if not t.is_floating_point()) // 4
        floats = [self.shared["vblora_vector_bank"][adapter], *(t for t in written if t.is_floating_point())]
        parts = (p for layer in layers.values() for one in layer.adapter_names() for p in layer.adapter_parameters(one))
        others = sum(p.numel() for p in without(self.tuner.parameters(), parts) if p.requires_grad)
        return integers + sum(t.numel() for t in floats), others

    def print_savable_parameters(self) -> None:
        """Prints how many numbers saving the default adapter writes."""
        own, others = self.get_nb_savable_parameters()
        print(f"VB-LoRA params to be saved (in float32s): {own:,d} || all params to be saved: {own + others:,d}")


class VBLoRAModel(BaseTuner, layer=VBLoRALayer, method=VBLoRAMethod, prefix="vblora_"):
    """A model with VB-LoRA adapters; `vblora_vector_bank` holds the banks, one for all layers of an adapter."""
