"""Changes applied to a weight: adapters made part of it and taken out again bit for bit, and what they change it by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from peft.core.adapted import AdaptedModule, Entry, Ledger, apply_to_bias
from peft.core.base_op import ParameterOp
from peft.core.change import Change, LowRank, Statistics, bias_with, weight_with
from peft.core.storage import onloaded, read_bias, storage_of
from peft.core.storage.sharded import is_managed, reshard
from peft.core.undo import replaced

# ---- a weight with changes


def apply(layer: AdaptedModule, changes: Sequence[Change], native: Tensor) -> Tensor:
    """A weight in the module's shape and dtype with changes, the very tensor where there are none.

    Computed in the dtype of the adapters.
    """
    op, module = layer.op, layer.get_base_layer()
    before = op.matrix(native)
    alone = len(changes) == 1 and type(changes[0]) is LowRank  # it computes in its own dtype, a few rows at a time
    if changes and not alone:
        before = before.to(layer.adapter_dtype() or before.dtype)
    matrix = weight_with(changes, op, module, before)
    return native if matrix is before else op.unmatrix(matrix, native).to(native.dtype)


def changed(layer: AdaptedModule, changes: Sequence[Change]) -> tuple[Tensor, Tensor | None]:
    """Weight (in the module's shape) and bias with these changes, on top of what the layers below make of them."""
    below = layer.below
    if below is not None and not isinstance(layer.op, ParameterOp):
        native, bias = changed(below, below.changes(below.acting()))
    else:
        native, bias = layer.get_base_weight(), layer.get_base_bias()
    bias = apply_to_bias(changes, bias)
    return apply(layer, changes, native), bias if bias is None else bias.to(native.dtype)


def difference(layer: AdaptedModule, name: str) -> Tensor:
    """What adapter `name` by itself changes the matrix by: [out, in], in the dtype of the adapter."""
    base = layer.get_base_layer()
    with onloaded(base), without_dropout(layer), layer.gathered():
        changes = layer.changes([name])
        native = layer.original_weight()
        matrix = layer.op.matrix(native).to(layer.dtype_of(name) or native.dtype)
        if all(change.additive for change in changes):  # the sum would round what is small beside the weight
            return weight_with(changes, layer.op, base, torch.zeros_like(matrix))
        return weight_with(changes, layer.op, base, matrix) - matrix


@torch.no_grad()
def bias_difference(layer: AdaptedModule, name: str) -> Tensor | None:
    """What adapter `name` changes the bias by [out], if it does."""
    with onloaded(layer.get_base_layer()), without_dropout(layer), layer.gathered():
        bias = layer.get_base_bias()
        after = bias_with(layer.changes([name]), bias)
    return None if after is bias else after if bias is None or after is None else after - bias


def without_dropout(layer: AdaptedModule) -> AbstractContextManager[None]:
    """While it lasts, what the adapters change is what it is in evaluation."""
    return replaced(layer, "training", False)


# ---- merging


def merge(
    layer: AdaptedModule, names: Sequence[str], safe: bool = False, keep: bool = True, own: bool | None = None
) -> None:
    """Makes adapters part of the base weight, in all or not at all.

    Args:
        layer: the layer that they are on.
        names: the adapters, none of them merged.
        safe: check that all values are finite.
        keep: keep the original, so that they can be taken out again.
        own: whether modules that share the weight keep the original; None for what was decided before.

    Raises:
        ValueError: `safe`, and they are not.
    """
    ledger = layer.ledger
    rewrite(layer, [*ledger.entries, *((layer, name) for name in names)], safe, ledger.own if own is None else own)
    if not keep:
        ledger.settled, ledger.originals = list(ledger.entries), {}


def unmerge(layer: AdaptedModule, names: Iterable[str] | None = None) -> None:
    """Takes adapters of a layer (all if None) out of the base weight, those that are paused too."""
    gone = set(layer.adapter_names() if names is None else names)
    ledger = layer.ledger
    ledger.paused = [(other, name) for other, name in ledger.paused if other is not layer or name not in gone]
    entries = [(other, name) for other, name in ledger.entries if other is not layer or name not in gone]
    if len(entries) != len(ledger.entries) or (ledger.originals and not entries):
        rewrite(layer, entries)


def switch(layer: AdaptedModule, on: bool) -> None:
    """Takes what is merged out of the base weight until it is switched on again."""
    ledger = layer.ledger
    before, after = (ledger.paused, ledger.entries) if on else (ledger.entries, ledger.paused)
    here, left = [e for e in before if e[0] is layer], [e for e in before if e[0] is not layer]
    if here:
        moved = [*after, *here]
        rewrite(layer, moved if on else left)
        ledger.paused = left if on else moved


def check_finite(layer: AdaptedModule, names: Sequence[str]) -> None:
    """Raises ValueError where merging these adapters would write what is not finite."""
    base, ledger = layer.get_base_layer(), layer.ledger
    with onloaded(base), torch.no_grad():
        _check_finite(_values(base, ledger, [*ledger.entries, *((layer, name) for name in names)]), names)


def _check_finite(values: Mapping[str, Tensor], names: Iterable[str]) -> None:
    if not all(bool(value.isfinite().all()) for value in values.values()):
        raise ValueError(
            f"NaN or infinite values would be merged by adapter {', '.join(dict.fromkeys(names))}; the weights are left"
            " as they are."
        )


def rewrite(layer: AdaptedModule, entries: list[Entry], safe: bool = False, own: bool | None = None) -> None:
    """Gives the base module's tensors the values that they have with exactly these adapters merged.

    All values are made from the originals before the first is written, and a call that ends early puts back what it
    wrote: whatever happens, the originals are in the ledger or in the module.
    """
    base, ledger = layer.get_base_layer(), layer.ledger
    own = ledger.own if own is None else own
    if is_managed(base):
        reshard()
    with onloaded(base), torch.no_grad():
        values = _values(base, ledger, entries)
        if safe:
            _check_finite(values, (name for _, name in entries))
        originals, merged = dict(ledger.originals), (ledger.entries, ledger.own)
        before = {name: storage_of(base, name).keep(base, name) for name in originals}
        try:
            for name, value in values.items():
                storage, alone = storage_of(base, name), own and name not in (*ledger.originals, *base._buffers)
                ledger.originals.setdefault(name, storage.keep(base, name, alone))
                storage.write(base, name, value, alone)
            for name in (name for name in originals if name not in values):
                storage_of(base, name).restore(base, name, originals[name])
            ledger.entries, ledger.own = entries, own
        except BaseException:
            for name, original in ledger.originals.items():
                storage_of(base, name).restore(base, name, before.get(name, original))
            ledger.originals, (ledger.entries, ledger.own) = originals, merged
            raise
        ledger.originals = {name: value for name, value in ledger.originals.items() if name in values}


def _values(base: nn.Module, ledger: Ledger, entries: Sequence[Entry]) -> dict[str, Tensor]:
    """The tensors of a base module with adapters merged: those of layers that act first, whatever was merged first."""
    layers = sorted({id(layer): layer for layer, _ in entries}.values(), key=AdaptedModule.turn)
    values: dict[str, Tensor] = {}
    for layer in layers:
        names = [entry[1] for entry in entries if entry[0] is layer and entry not in ledger.settled]
        if not names:
            continue
        with without_dropout(layer), layer.gathered():
            changes = layer.changes(names)
            name, bias_name = layer.op.weight_name, layer.op.bias_name
            native = values[name] if name in values else ledger.original(base, name)
            after = apply(layer, changes, native)
            if after is not native:
                values[name] = after
            # Of modules that share a weight, one may have no bias.
            if bias_name is not None and read_bias(base, bias_name) is not None:
                bias = values[bias_name] if bias_name in values else ledger.original(base, bias_name)
                changed_bias = apply_to_bias(changes, bias)
                if changed_bias is not bias and changed_bias is not None:
                    values[bias_name] = changed_bias
            values |= {name: buffer.clone() for name, buffer in Statistics.of(changes).items()}
    return values
