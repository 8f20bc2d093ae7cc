"""The first passes with new active adapters, watched: is every layer called, does every one get gradients?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft.core.auxiliary import ModulesToSaveWrapper
from peft.core.call import current_route, with_gradient
from peft.core.layer import AdapterLayer
from peft.core.method import Adapters
from peft.core.part import Part
from peft.core.tokens import TrainableTokensLayer
from peft.errors import listed, warn
from peft.ops.internals import backward_pass, is_transformed

#: training passes after which a layer that none of them has called is named: some blocks are left out at random
_TRIES = 3


class Watch:
    """What is known of the layers with some adapters; a pass from which no more is to be learnt costs nothing."""

    def __init__(self) -> None:
        self.is_over = False
        self._called: set[int] = set()
        self._tries = _TRIES
        self._reached: set[int] | None = None
        self._went_back = False
        self._handles: list[Any] = []

    def run(self, tuner: Adapters, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's output."""
        run = partial(tuner.model, *args, **kwargs)
        if torch.compiler.is_compiling() or is_transformed() or current_route() is not None or tuner.disabled:
            return run()
        trains = tuner.training and torch.is_grad_enabled()
        is_done = not self._tries and not (trains and (self._reached is None or self._went_back))
        # Checkpointing runs the model once more; its gradients are still to come.
        if is_done or backward_pass() != -1:
            return run()
        if not _can_be_watched(tuner.model):
            self._end(tuner)
            return run()
        if trains and self._went_back:
            self._report_gradients(tuner)
        starts = trains and self._reached is None
        for method in tuner.methods() if starts else ():
            method.check_before_training()
        output = self._watch_calls(tuner, run) if self._tries else run()
        if starts and tuner.__dict__.get("_watch") is self:
            self._watch_gradients(tuner, output)
        return output

    def _watch_calls(self, tuner: Adapters, run: Callable[[], Any]) -> Any:
        layers = [(key, layer) for key, layer in _outer_layers(tuner) if id(layer) not in self._called]
        for _, layer in layers:
            layer.__dict__["forward"] = partial(_note_call, layer, self._called)
        try:
            output = run()
        finally:
            for _, layer in layers:
                layer.__dict__.pop("forward", None)
        missed = [key for key, layer in layers if id(layer) not in self._called]
        self._tries = self._tries - 1 if missed and tuner.training else 0
        if missed and not self._tries:
            warn(
                f"Adapters on {_listed(missed)} were not called in a forward pass of the whole model, so they had no"
                " part in it. They may be for inputs of another kind; or the model does not call these modules at all."
            )
        return output

    def _watch_gradients(self, tuner: Adapters, output: Any) -> None:
        parts = _trained_parts(tuner)
        tensors = with_gradient(output)
        if not parts or not tensors:
            if parts:
                _warn_of_gradients([key for key, _ in parts])
            self._end(tuner)
            return
        _warn_of_idle_adapters(tuner)
        reached = self._reached = set()

        def note(place: int, grad: Tensor) -> None:
            reached.add(place)

        def goes_back(grad: Tensor) -> None:
            self._went_back = True

        self._handles = [tensor.register_hook(goes_back) for tensor in tensors]
        for _, part in parts:
            noted = partial(note, id(part))
            for parameter in _trained_parameters(part):
                # Under checkpointing, torch 2.4 calls the second alone; autograd.grad() the first alone.
                self._handles.append(parameter.register_hook(noted))
                self._handles.append(parameter.register_post_accumulate_grad_hook(noted))

    def _report_gradients(self, tuner: Adapters) -> None:
        dead = [key for key, part in _trained_parts(tuner) if id(part) not in (self._reached or ())]
        if dead:
            _warn_of_gradients(dead)
        self._went_back = False
        if not self._tries:
            self._end(tuner)
        self.let_go()

    def _end(self, tuner: Adapters) -> None:
        tuner.__dict__.pop("_watch", None)
        self.is_over = True
        self.let_go()

    def let_go(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __reduce__(self) -> tuple[Any, ...]:  # copies too begin anew
        return Watch, ()


def watch_anew(tuner: Adapters) -> None:
    """Has the next passes of a model watched, where that is not over for the adapters that are active now."""
    before = tuner.__dict__.pop("_watch", None)
    if before is not None:
        before.let_go()
    # By adapters: whoever switches for each request is not to pay each time.
    watch = tuner.__dict__.setdefault("_watches", {}).setdefault(frozenset(tuner.active_adapters), Watch())
    if not watch.is_over:
        tuner.__dict__["_watch"] = watch


def _note_call(layer: AdapterLayer, called: set[int], *args: Any, **kwargs: Any) -> Any:
    called.add(id(layer))
    layer.__dict__.pop("forward", None)
    return layer.forward(*args, **kwargs)


def _outer_layers(tuner: Adapters) -> Iterable[tuple[str, AdapterLayer]]:
    """Layers with adapters that act when they are called; of several around one module the outermost."""
    inner = {id(layer.below) for layer in tuner.adapter_layers()}
    for key, part in tuner.parts():
        if not isinstance(part, AdapterLayer) or isinstance(part, TrainableTokensLayer) or id(part) in inner:
            continue
        if part.live() and not part.is_read and part.without_samples != "tokens" and "forward" not in part.__dict__:
            yield key, part


def _trained_parameters(part: Part) -> list[nn.Parameter]:
    return [p for name in part.active_adapters for p in part.trainable_parameters(name) if p.requires_grad]


def _trained_parts(tuner: Adapters) -> list[tuple[str, Part]]:
    return [
        (key, part)
        for key, part in tuner.parts()
        if isinstance(part, (AdapterLayer, ModulesToSaveWrapper))
        and getattr(part, "without_samples", None) != "tokens"
        and any(parameter.is_leaf for parameter in _trained_parameters(part))
    ]


def _warn_of_idle_adapters(tuner: Adapters) -> None:
    parts = [part for _, part in tuner.parts()]
    idle = {
        name
        for part in parts
        for name in set(part.adapter_names()).difference(tuner.active_adapters)
        if any(parameter.requires_grad for parameter in part.trainable_parameters(name))
    }
    if idle:
        warn(
            f"{listed(sorted(map(repr, idle)))} can be trained and gets no gradient, for it is not active:"
            " set_adapter() makes an adapter active, and set_requires_grad() says which are to be trained."
        )


def _can_be_watched(model: nn.Module) -> bool:
    """Whether parameters are where they seem, and layers are what is called: not so if sharded or compiled."""
    for module in model.modules():
        if type(module).__name__.startswith(("FSDP", "FullyShardedDataParallel", "OptimizedModule")):
            return False
        if module._compiled_call_impl is not None:
            return False
    return not any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _warn_of_gradients(keys: Sequence[str]) -> None:
    warn(
        f"Adapters on {_listed(keys)} got no gradient in training, so they stay as they are. Either the loss does not"
        " depend on these modules, or something around them lets no gradient through (torch.no_grad, a quantised layer"
        " in evaluation mode, checkpointing of frozen inputs)."
    )


def _listed(keys: Sequence[str]) -> str:
    return listed([repr(".".join(part for part in key.split(".") if part != "base_layer")) for key in keys], 4)
