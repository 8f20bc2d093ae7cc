"""Adapters of one layer made part of its base weight, and taken out again bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft.core.storage import onloaded, storage_of

if TYPE_CHECKING:
    from peft.core.layer import AdapterLayer


@dataclass
class Merged:
    """What is part of a base module's tensors at present, and what it takes to undo that."""

    names: list[str] = field(default_factory=list)
    #: the adapters to merge again when those that are switched off are switched on
    paused: list[str] = field(default_factory=list)
    #: name of each changed tensor -> what its storage keeps of the original
    originals: dict[str, Any] = field(default_factory=dict)
    #: whether modules that share a changed tensor have kept the original
    own: bool = False

    def write(self, base: nn.Module, name: str, value: Tensor, keep: bool, own: bool) -> None:
        """Puts `value` in place of a tensor; with `keep`, so that it can be undone."""
        before = storage_of(base, name).write(base, name, value, own)
        if keep:
            self.originals.setdefault(name, before)

    def undo(self, base: nn.Module) -> None:
        """Gives all tensors back as they were."""
        with onloaded(base):
            for name, before in self.originals.items():
                storage_of(base, name).restore(base, name, before)
        self.names, self.paused, self.originals = [], [], {}

    def nbytes(self, base: nn.Module) -> int:
        """Bytes kept to undo it."""
        return sum(storage_of(base, name).nbytes(before) for name, before in self.originals.items())


def merge(layer: AdapterLayer, names: Sequence[str], safe: bool, keep: bool, own: bool) -> None:
    """Makes adapters part of the base weight; what `AdapterLayer.merge` does for names that it has looked through."""
    base, merged = layer.get_base_layer(), layer._merged
    with onloaded(base):
        weight, bias = merged_weight(layer, names, safe)
        merged.write(base, layer.op.weight_name, weight, keep, own)
        if bias is not None and bias is not layer.get_base_bias():
            merged.write(base, layer.op.bias_name or "", bias, keep, own)
    merged.names.extend(names)
    merged.own = own
    layer._refresh()


def merged_weight(layer: AdapterLayer, names: Sequence[str], safe: bool = False) -> tuple[Tensor, Tensor | None]:
    """Weight and bias with these adapters, as merging writes them.

    Raises:
        ValueError: `safe`, and they would not be finite.
    """
    with torch.no_grad(), without_dropout(layer):
        weight, bias = layer.merged_tensors(names)
    if safe and not (weight.isfinite().all() and (bias is None or bias.isfinite().all())):
        raise ValueError(
            f"NaN or infinite values would be merged by adapter {', '.join(names)}; the weights are left as they are."
        )
    return weight, bias


def pause(layer: AdapterLayer) -> None:
    """Takes what is merged out of the base weight until `resume`."""
    names = list(layer._merged.names)
    if names:
        layer.unmerge()
        layer._merged.paused = names


def resume(layer: AdapterLayer) -> None:
    """Merges again what `pause` took out."""
    names, layer._merged.paused = layer._merged.paused, []
    if names:
        layer.merge(adapter_names=names, own=layer._merged.own)


def leave_out(layer: AdapterLayer, name: str) -> None:
    """Takes one adapter out of the base weight, and out of those to be merged again."""
    merged = layer._merged
    if name in merged.names:
        others = [other for other in merged.names if other != name]
        layer.unmerge()
        if others:
            layer.merge(adapter_names=others, own=merged.own)
    merged.paused = [other for other in merged.paused if other != name]


@contextmanager
def without_dropout(layer: AdapterLayer) -> Iterator[None]:
    """While it lasts, the change of the weight is what it is in evaluation."""
    training, layer.training = layer.training, False
    try:
        yield
    finally:
        layer.training = training
