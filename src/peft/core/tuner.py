"""A model with adapters: their life over all its layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peft.config import PeftConfig
from peft.core import unloading
from peft.core.biases import check_mixture
from peft.core.call import calling, current, remember_for_backward
from peft.core.injection import Injector
from peft.core.method import Method
from peft.core.routing import BASE, Route
from peft.core.storage.flat import feed_leaves
from peft.core.watch import watch_anew
from peft.core.whole import alone, passing, whole
from peft.errors import warn


class BaseTuner(Injector):
    """A model with adapters on its layers; what is special about their method is asked of a [`Method`].

    Args:
        model: the base model, changed in place.
        peft_config: the configuration of the first adapter, or configurations by name.
        adapter_name: the first adapter's name.
        low_cpu_mem_usage: make the adapter's tensors without memory (on the meta device), to be loaded next.
        state_dict: an adapter's tensors; their names decide which modules get the adapter.

    Given by name, as a `PeftModel` does, an adapter is in float32 where the base is in half precision; else it has the
    base weight's dtype.

    Raises:
        ValueError, TypeError, NotImplementedError: the configuration does not fit the model; the model is as before.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ):
        super().__init__(model)
        configs = peft_config if isinstance(peft_config, dict) else {adapter_name: peft_config}
        self._stays = isinstance(peft_config, dict)  # one that is made for an injection is thrown away
        if configs.get(adapter_name) is not None:
            self.inject_adapter(
                self.model, adapter_name, self._stays, low_cpu_mem_usage, state_dict, config=configs[adapter_name]
            )

    # ---- adapters and their state

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes these adapters the active ones; trainable unless `inference_mode`, all others not.

        Raises:
            ValueError: none is named or one does not exist, or two of them train the same module in full.
        """
        names = self.check_names(adapter_name)
        if not names:
            raise ValueError("set_adapter() needs the name of an adapter; disable_adapter() does without any.")
        parts = [part for _, part in self.parts()]
        for part in parts:
            part.check_active(names)
        with whole(self, parts, names):
            for part in parts:
                part.set_adapter(names, inference_mode)
            self._active = names
        watch_anew(self)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Makes adapters trainable or not, active or not."""
        names = self.check_names(adapter_names)
        for _, part in self.parts():
            part.set_requires_grad(names, requires_grad)

    def enable_adapter_layers(self) -> None:
        """Switches the adapters on again; what was trainable before is so again."""
        self._switch(True)

    def disable_adapter_layers(self) -> None:
        """Lets the model act as its base model; keeps which adapters were active and trainable."""
        self._switch(False)

    def _switch(self, on: bool) -> None:
        parts = [part for _, part in self.parts()]
        with whole(self, parts):
            for part in parts:
                part.enable_adapters(on)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter. If it was the only active one, the first that is left becomes active.

        Raises:
            ValueError: there is no such adapter.
        """
        self.check_names(adapter_name)
        shared = [container for method in self.methods() for container in method.shared.values()]
        with whole(self, [part for _, part in self.parts()], deleted=True, held=shared):
            unloading.delete(self, adapter_name)
        self.__dict__.pop("_watches", None)  # another of this name may come

    def routed(self, adapter_names: Sequence[str]) -> AbstractContextManager[Any]:
        """While it lasts, each sample of a batch gets the adapter named at its place (`"__base__"`: none).

        Raises:
            ValueError: a name is unknown, or adapters are merged.
        """
        self.check_names([name for name in dict.fromkeys(adapter_names) if name != BASE])
        check_mixture(self.parts(), {*adapter_names, *self.active_adapters})
        return calling(route=Route(adapter_names))

    # ---- merging

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Makes adapters (the active ones if None) part of the base weights; `unmerge_adapter` undoes it bit for bit.

        For that, the original of every merged weight is kept: as much memory again as those weights take
        (`merge_memory()` says how much). A call that raises leaves all weights as they were. Adapters that are merged
        act before those that are not: of several that do more than add to a weight, merge the first ones, or all; all
        where a module and a parameter of it are targets, for then those that are merged act first on both.

        Raises:
            ValueError: `safe_merge`, and some weight would not be finite.
            NotImplementedError: some adapter cannot be merged.
        """
        self._check_merge(adapter_names)
        if self.disabled:
            warn(
                "The adapters are disabled, and merged all the same: until they are unmerged, the model does not act as"
                " its base model."
            )
        with whole(self, [part for _, part in self.parts()]):
            unloading.merge_all(self, adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Gives the base weights back as they were before merging, bit for bit."""
        with whole(self, [part for _, part in self.parts()]):
            unloading.unmerge_all(self)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether [`convert_to_lora`] can turn an adapter into a LoRA: all its changes are changes of weights."""
        layers = [layer for layer in self.adapter_layers() if layer.has(adapter_name)]
        return bool(layers) and all(layer.supports_lora_conversion(adapter_name) for layer in layers)

    def merge_memory(self) -> int:
        """Bytes kept to undo the present merge."""
        return sum(layer.merge_memory() for layer in self.adapter_layers())

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """Makes adapters part of the base weights for good and gives the base model back, without adapter layers.

        Args:
            progressbar: show one.
            safe_merge: check first that all outcomes are finite.
            adapter_names: which; the active ones if None.

        Raises:
            ValueError: `safe_merge`, and some weight would not be finite.
            NotImplementedError: some adapter cannot be merged.
        """
        self._check_merge(adapter_names)
        if safe_merge:
            unloading.check_finite(self, adapter_names)
        return self._unload_and_optionally_merge(merge=True, progressbar=progressbar, adapter_names=adapter_names)

    def unload(self) -> nn.Module:
        """The base model as it was, without adapter layers; merged adapters are taken out first."""
        with alone(self):
            for layer in self.adapter_layers():
                if layer.merged:
                    layer.unmerge()
            return self._unload_and_optionally_merge(merge=False)

    _check_merge = unloading.check_merge
    _unload_and_optionally_merge = unloading.unload

    # ---- being the model

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """With what layers have in common, and leave to this model."""
        yield from super().named_children()
        for layer in self.adapter_layers():
            yield from ((slot, layer._modules[slot]) for slot in layer._left if not layer.slots[slot].shared)  # type: ignore[misc]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        feed_leaves(self)
        with calling(), passing(self):
            return self._forward(self.methods(), args, kwargs)

    def _forward(self, methods: Sequence[Method], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's output inside of what these methods put around it."""
        if methods:
            with methods[0].around_forward(args, kwargs):
                return methods[0].after_forward(self._forward(methods[1:], args, kwargs))
        watch, call = self.__dict__.get("_watch"), current()
        output = self.model(*args, **kwargs) if watch is None else watch.run(self, args, kwargs)
        if call and torch.is_grad_enabled():
            remember_for_backward(output, call)
        return output

    @contextmanager
    def around_generate(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[None]:
        """Stands around a generation, which is many forward passes."""
        with passing(self), ExitStack() as stack:
            for method in self.methods():
                stack.enter_context(method.around_generate(args, kwargs))
            yield
