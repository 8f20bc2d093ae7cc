"""What a variant of LoRA may change."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from peft.core.base_op import BaseOp
from peft.core.change import Change
from peft.core.slots import Slot
from peft.tuners.lora.base import FactorLayer
from peft.tuners.lora.config import LoraConfig

T = TypeVar("T")


class Variant:
    """How one adapter on one layer differs from plain LoRA; what is written here is what plain LoRA does.

    A layer holds the variants of its adapters in `lora_variant[name]`. Adapters without one never come here.

    Args:
        setting: the value of the configuration's field that asks for the variant.
        key: the name of the module that the layer is for.
    """

    #: what the variant is called in messages
    label: ClassVar[str] = ""
    #: kinds of base module it works on
    kinds = frozenset(("Linear", "Conv1D"))
    #: what an adapter has beside A and B
    slots: ClassVar[dict[str, Slot]] = {}
    #: why an adapter {name} cannot become part of the weight, if that is so
    cannot_merge: ClassVar[str] = ""
    #: whether the change is the product of the factors, where it acts
    is_product: ClassVar[bool] = False
    #: whether it changes the base weight when it starts
    changes_base: ClassVar[bool] = False

    def __init__(self, setting: Any, key: str = ""):
        self.setting, self.key = setting, key
        #: what it has made of the weights, and of what state of them
        self._kept: tuple[Any, Any] | None = None

    @classmethod
    def check(cls, config: LoraConfig, name: str, module: nn.Module, op: BaseOp, r: int) -> None:
        """Raises ValueError where an adapter of rank r cannot go on this module; before anything is changed."""

    def applies(self, layer: FactorLayer) -> bool:
        """Whether there is anything to do on a layer's module, or a plain LoRA will do there."""
        return True

    def create(self, layer: FactorLayer, name: str, config: LoraConfig) -> None:
        """Makes the tensors beside A and B, which have their start values."""

    def change(self, layer: FactorLayer, name: str) -> Change | Iterable[Change]:
        """What the adapter does to the module at present."""
        return layer.low_rank(name)

    def penalty(self, layer: FactorLayer, name: str) -> Tensor | float:
        """What is to be added to the loss at present."""
        return 0.0

    def key_map(self, name: str, keys: dict[str, str]) -> dict[str, str]:
        """Names of the adapter's tensors, in files and in the live module, where `keys` is how they are as a rule."""
        return keys

    def keep(self, key: Any, make: Callable[[], T]) -> T:
        """What `make` makes, once as long as the key stays the same, and until `forget`."""
        if self._kept is None or self._kept[0] != key:
            self._kept = key, make()
        return self._kept[1]

    def forget(self) -> None:
        """Lets go of what it has kept of the weights."""
        self._kept = None
