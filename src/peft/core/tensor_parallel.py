"""Adapters on modules that tensor parallelism shares out: what a change sees is whole, on every process.

Each process has a part of such a module's weight, and of the features that go into it or come out. Parts are put
together before a change sees them and taken apart after it, so every method does on each process what it does in one:
the tensors of an adapter, their gradients, and what is drawn at random, are the same on all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from peft.core.adapted import AdaptedModule
from peft.core.base_op import BaseOp
from peft.core.change import output_with
from peft.core.merge import changed
from peft.core.storage.sharded import data_parallel_dims, is_dtensor, is_managed, joined, of_first, shared_out
from peft.ops.internals import is_put_away

#: kind of module -> the dimension of its weight that its output features lie along; the others are not supported
OUTPUT_DIM = {"Linear": 0, "Conv1D": 1, "Embedding": 1}


def _is_shared_out(module: nn.Module, weight: Any) -> bool:
    """Whether tensor parallelism shares a weight out, by itself or together with `fully_shard`."""
    return is_dtensor(weight) and (not is_managed(module) or weight.device_mesh.ndim > data_parallel_dims(weight))


def check_heads(model: nn.Module, method: str) -> None:
    """Raises ValueError where a model is shared out that a method needs all attention heads of."""
    if any(_is_shared_out(module, weight) for module in model.modules() for weight in module._parameters.values()):
        raise ValueError(
            f"{method} works on the keys and values of all attention heads, which tensor parallelism shares out. Use a"
            " method that changes layers or adds tokens (LORA, PROMPT_TUNING), or a model that is not shared out so."
        )


def check(key: str, module: nn.Module, op: BaseOp) -> None:
    """Raises ValueError where tensor parallelism shares a module out that is of no kind known here."""
    held: Any = module._parameters.get(op.weight_name)
    if op.kind not in OUTPUT_DIM and _is_shared_out(module, held):
        raise ValueError(
            f"Target module {key!r} is a {type(module).__name__} that tensor parallelism shares out as"
            f" {held.placements}. Adapters go on linear layers and embeddings there; leave it out with exclude_modules"
            " (or out of target_parameters)."
        )


def layout_of(layer: AdaptedModule) -> Layout | None:
    """How the module under a layer is shared out in the present forward pass; None if it is not."""
    base = layer.get_base_layer()
    held: Any = base._parameters.get(layer.op.weight_name)
    if held is None or type(held) is nn.Parameter or not is_dtensor(held):
        return None
    mesh, placements = held.device_mesh, tuple(held.placements)
    if is_put_away(base, held):  # what else `fully_shard` holds is put away around forward passes only
        first = data_parallel_dims(held)
        if first == mesh.ndim:
            return None
        mesh, placements = mesh[mesh.mesh_dim_names[first:]], placements[first:]
    return Layout(layer, mesh, placements)


class Layout:
    """A layer's module as one process would have it: called with a whole input, it gives the whole output.

    Args:
        layer: the layer.
        mesh, placements: how the weight of its module lies on which processes.
    """

    def __init__(self, layer: AdaptedModule, mesh: Any, placements: Sequence[Any]):
        self._layer, self._mesh, self._placements = layer, mesh, placements
        self._output_dim = OUTPUT_DIM[layer.op.kind]

    def __getattr__(self, name: str) -> Any:
        """What changes ask a module for."""
        return self._layer.get_base_bias() if name == "bias" else getattr(self._layer.get_base_layer(), name)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self._layer.base_layer(self._input.part(x), *args, **kwargs)
        self._output = self._spread(y, self._output_shape(x), self._output_dim)
        return self._output.whole(y)

    def run(self, names: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The module's output with these adapters, as this process has it."""
        layer, op = self._layer, self._layer.op
        with layer.gathered(), self._same_random():
            changes = layer.changes(names)
            if not all(change.acts(op) for change in changes):
                return self._run_weight(changes, x, *args, **kwargs)
            if all(change.additive for change in changes):
                y = layer.base_layer(x, *args, **kwargs)
                inputs = self._whole_input(x, y)
                output = self._spread(y, self._output_shape(inputs), self._output_dim)
                total = torch.zeros(output.shape, dtype=y.dtype, device=y.device)
                for change in changes:
                    total = change.leave(op, self, inputs, total, None)
                return y + output.part(total)
            inputs, bias = self._whole_input(x), layer.bias_below()
            y = output_with(changes, op, self, inputs, bias, lambda seen: self(seen, *args, **kwargs))
            return self._output.part(y)

    def _run_weight(self, changes: Sequence[Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        base, op = self._layer.get_base_layer(), self._layer.op
        if is_put_away(base, base._parameters[op.weight_name]):
            raise NotImplementedError(
                f"fully_shard was called with the tensor-parallel {type(base).__name__} itself, which then cannot run"
                " with another weight. Call it with the block around instead."
            )
        weight, bias = changed(self._layer, changes)
        tensors = {op.weight_name: shared_out(weight, self._mesh, self._placements)}
        if bias is not None and op.bias_name is not None:
            held: Any = base._parameters[op.bias_name]
            tensors[op.bias_name] = shared_out(bias, self._mesh, held.placements) if is_dtensor(held) else bias
        return functional_call(base, tensors, (x, *args), kwargs)

    # ---- parts and wholes

    def _whole_input(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The input; `y` is what the module makes of it, where that is known."""
        shape = list(x.shape)
        if self._layer.op.linear:
            shape[-1] = self._layer.op.in_features
            if y is not None:
                shape[:-1] = map(max, x.shape[:-1], y.shape[:-1])
        self._input = self._spread(x, shape, 1 - self._output_dim)
        return self._input.whole(x)

    def _output_shape(self, x: Tensor) -> tuple[int, ...]:
        """The shape of the whole output for a whole input."""
        return (*x.shape[: x.dim() - self._layer.op.linear], self._layer.op.out_features)

    def _spread(self, part: Any, shape: Sequence[int], weight_dim: int) -> _Spread:
        """How a tensor of this shape lies on the processes, if this one has that part.

        Args:
            part: what this process has.
            shape: of the whole.
            weight_dim: the dimension of the weight that its features lie along.
        """
        if is_dtensor(part):
            return _Spread(self._mesh, shape, part.placements, True)
        from torch.distributed.tensor import Replicate, Shard

        different = [dim for dim, (own, all_) in enumerate(zip(part.shape, shape, strict=True)) if own != all_]
        placements: list[Any] = [Replicate()] * self._mesh.ndim
        if different == [len(shape) - 1]:
            for place, placement in enumerate(self._placements):
                if getattr(placement, "dim", None) == weight_dim:
                    factor = getattr(placement, "split_factor", None)  # of several matrices that lie in one
                    packed = {} if factor is None else {"split_factor": factor}
                    placements[place] = type(placement)(len(shape) - 1, **packed)
        elif len(different) == self._mesh.ndim == 1:  # of the tokens
            placements = [Shard(different[0])]
        elif different:
            raise NotImplementedError(
                f"A tensor-parallel {type(self._layer.get_base_layer()).__name__} has {tuple(part.shape)} of"
                f" {tuple(shape)} on a process; which part that is cannot be told, so adapters cannot run there."
            )
        return _Spread(self._mesh, shape, placements, False)

    @contextmanager
    def _same_random(self) -> Iterator[None]:
        """While it lasts, all processes draw the same numbers."""
        if not self._layer.training:
            yield
            return
        kind = self._mesh.device_type
        seed = of_first(torch.randint(2**62, (), device=kind), self._mesh)
        devices = [] if kind == "cpu" else [seed.device]
        with torch.random.fork_rng(devices, device_type="cuda" if kind == "cpu" else kind):
            torch.manual_seed(int(seed))
            yield


class _Spread(NamedTuple):
    """How a tensor of some shape lies on the processes, as DTensors or as their plain parts."""

    mesh: Any
    shape: Sequence[int]
    placements: Sequence[Any]
    as_dtensor: bool

    def whole(self, part: Any) -> Tensor:
        if self.as_dtensor:
            return part.full_tensor()
        return part if self._is_everywhere() else joined(part, self.mesh, self.placements, self.shape)

    def part(self, whole: Tensor) -> Tensor:
        """What this process has of a whole tensor."""
        if not self.as_dtensor and self._is_everywhere():
            return whole
        parts = shared_out(whole, self.mesh, self.placements)
        return parts if self.as_dtensor else parts.to_local()

    def _is_everywhere(self) -> bool:
        return all(placement.is_replicate() for placement in self.placements)
