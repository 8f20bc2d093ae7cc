"""DoRA: the change of a weight taken apart into length and direction."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import ClassVar

import torch
from torch import Tensor, nn

from peft.core.base_op import ConvOp
from peft.core.change import Change, Dropped, ScaleOutput
from peft.core.slots import ModuleSlot, Slot
from peft.core.storage import onloaded
from peft.core.storage.flat import weight_of
from peft.core.undo import replaced
from peft.ops.memo import remember
from peft.ops.norms import changed_row_norms, row_squares
from peft.tuners.lora.base import FactorLayer
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.starts import to_compute
from peft.tuners.lora.variants.base import Variant

#: whether factors of adapters that may still be trained are kept as well, see `dora_caching`
_cache_trained = False


class Magnitude(nn.Module):
    """The lengths of a weight's rows, m: [out], or as convolutions have them [1, out, 1, ...].

    A module of its own, so that wrappers that shard modules find it.
    """

    def __init__(self, values: Tensor):
        super().__init__()
        self.weight = nn.Parameter(values)


class Dora(Variant):
    """W'_i = m_i (W + s B A)_i / ||(W + s B A)_i|| for each row i (arXiv:2402.09353).

    m is trained and starts as the lengths of the rows, so that nothing changes. The lengths in the denominator count
    as constants for the gradient, as the paper proposes (section 4.3).
    """

    label = "DoRA (use_dora)"
    kinds = frozenset(("Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d", "Embedding"))
    slots: ClassVar[dict[str, Slot]] = {"lora_magnitude_vector": ModuleSlot[Magnitude]()}

    def create(self, layer: FactorLayer, name: str, config: LoraConfig) -> None:
        a, _ = layer.factors(name)
        if a.is_meta:
            lengths = torch.empty(layer.out_features, device=a.device)
        else:
            with onloaded(layer.get_base_layer()), torch.no_grad():
                weight = to_compute(layer.start_weight(name), config)
                lengths = _lengths(layer, name, weight, row_squares(weight)).to(layer.get_base_weight().device)
        if isinstance(layer.op, ConvOp):
            lengths = lengths.view(1, -1, *(1 for _ in layer.get_base_layer().kernel_size))
        layer.lora_magnitude_vector[name] = Magnitude(lengths)

    def key_map(self, name: str, keys: dict[str, str]) -> dict[str, str]:
        live = keys.pop("lora_magnitude_vector.weight")
        return {**keys, "lora_magnitude_vector": live}

    def change(self, layer: FactorLayer, name: str) -> tuple[Change, ...]:
        low_rank, scale = layer.low_rank(name), ScaleOutput(self._factor(layer, name), with_bias=False)
        if not low_rank.dropout:
            return low_rank, scale
        # What is scaled is what the adapter sees, which with dropout is another product with W.
        p, low_rank.dropout = low_rank.dropout, 0.0
        return (Dropped((low_rank, scale), p),)

    def _factor(self, layer: FactorLayer, name: str) -> Tensor:
        """m_i / ||(W + s B A)_i||: [out]."""
        m = weight_of(layer.lora_magnitude_vector[name])
        a, b = layer.factors(name)

        def make() -> Tensor:
            return m.flatten() / self._norms(layer, name)

        stays = not (m.requires_grad or a.requires_grad or b.requires_grad) or (_cache_trained and not layer.training)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not stays:
            return make()
        tensors = layer.own_weight, m, a, b
        if any(tensor.is_inference() for tensor in tensors):  # which do not say whether they have changed
            return make()
        stamps = [(id(t), t._version, t.data_ptr()) for t in tensors]
        return self.keep((stamps, layer.scaling[name], layer.merged_adapters), make)

    @staticmethod
    @torch.no_grad()
    def _norms(layer: FactorLayer, name: str) -> Tensor:
        """||(W + s B A)_i||, with W the weight below all adapters: [out]."""
        with onloaded(layer.get_base_layer(), written=False):
            weight = layer.op.matrix(layer.original_weight())
        if layer.ledger.originals:
            squares = row_squares(weight)
        else:
            key = "row squares", layer.op.kind  # tied modules of two kinds have other rows
            squares = remember(layer.own_weight, key, lambda: row_squares(weight))
        return _lengths(layer, name, weight, squares)


def _lengths(layer: FactorLayer, name: str, weight: Tensor, squares: Tensor) -> Tensor:
    """||(W + s B A)_i||: [out].

    Args:
        layer, name: where s, B and A are.
        weight: W [out, in].
        squares: ||W_i||^2: [out].
    """
    a, b = (factor.to(weight.device).flatten(1) for factor in layer.factors(name))
    if a.shape[1] == weight.shape[1]:
        return changed_row_norms(weight, squares, a, b, layer.scaling[name])
    # A convolution with groups: A sees the channels of all of them, W those of one. huggingface/peft takes B and A for
    # matrices that fit, and adapters trained with it have magnitudes for these lengths.
    change = (b.reshape(-1, len(a)) @ a).view(weight.shape)
    return row_squares(weight + layer.scaling[name] * change).sqrt()


def dora_caching(enabled: bool = True) -> AbstractContextManager[None]:
    """While it lasts, evaluation without gradients keeps DoRA's factors of adapters that are still to be trained."""
    return replaced(sys.modules[__name__], "_cache_trained", enabled)
