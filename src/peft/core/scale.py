"""Layers whose adapters have a scale that can be changed at run time."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peft.core.layer import AdapterLayer
from peft.core.slots import Setting


class ScaledLayer(AdapterLayer):
    """A module with adapters whose change is multiplied by `scaling[name]`, at the start `initial_scaling(name)`."""

    scaling = Setting[float]()

    def new_record(self, name: str, config: Any, own: Any = None) -> None:
        super().new_record(name, config, own)
        self.scaling[name] = self.initial_scaling(name)

    def initial_scaling(self, name: str) -> float:
        """The scale of an adapter as its configuration says."""
        return getattr(self.configs[name], "scaling", 1.0)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Sets the scale of an adapter to `scale` times what its configuration says."""
        if self.has(adapter):
            self._set_scaling(adapter, scale * self.initial_scaling(adapter))

    def scale_layer(self, scale: float) -> None:
        """Multiplies the scale of the active adapters."""
        for name in self.live():
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the scale of the active adapters; without `scale`, sets it to what the configuration says."""
        for name in self.live():
            self._set_scaling(name, self.initial_scaling(name) if scale is None else self.scaling[name] / scale)

    def _set_scaling(self, name: str, value: float) -> None:
        held: object = self.scaling[name]
        if isinstance(held, Tensor):
            held.fill_(value)  # compiled code goes on using it
        else:
            self.scaling[name] = value
