"""Fixed tensors of adapters, such as those that all layers of one share."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn


class SharedTensors(nn.Module):
    """Frozen tensors by adapter name, as buffers: they move with the model and are not trained.

    Args:
        persistent: whether they are part of the model's state dict.
    """

    def __init__(self, persistent: bool = True):
        super().__init__()
        self.persistent = persistent

    def __setitem__(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value, persistent=self.persistent)

    def __getitem__(self, name: str) -> Tensor:
        return self._buffers[name]  # type: ignore[return-value]

    def __delitem__(self, name: str) -> None:
        del self._buffers[name]

    def __contains__(self, name: object) -> bool:
        return name in self._buffers

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __len__(self) -> int:
        return len(self._buffers)
