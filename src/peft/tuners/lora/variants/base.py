"""What a variant of LoRA may change."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from peft.core.base_op import BaseOp
from peft.tuners.lora.starts import Remainder

if TYPE_CHECKING:
    from peft.tuners.lora.config import LoraConfig
    from peft.tuners.lora.layer import LoraLayer


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
    kinds: ClassVar[frozenset[str]] = frozenset(("Linear", "Conv1D"))
    #: names of the tensors that an adapter has beside A and B, and the kind of container that holds them
    slots: ClassVar[dict[str, type[nn.Module]]] = {}
    #: whether its effect, in evaluation, is that of a plain LoRA with `factors`
    is_product: ClassVar[bool] = True
    #: whether it changes the base weight when it starts
    changes_base: ClassVar[bool] = False

    def __init__(self, setting: Any, key: str = ""):
        self.setting, self.key = setting, key

    @classmethod
    def check(cls, config: LoraConfig, name: str, module: nn.Module, op: BaseOp, r: int) -> None:
        """Raises ValueError where an adapter of rank r cannot go on this module; before anything is changed."""

    def applies(self, layer: LoraLayer) -> bool:
        """Whether there is anything to do on a layer's module, or a plain LoRA will do there."""
        return True

    def make_factors(self, layer: LoraLayer, name: str, r: int, config: LoraConfig) -> None:
        """Makes A and B, their values still open."""
        layer.make_factors(name, r, config)

    def create(self, layer: LoraLayer, name: str, config: LoraConfig) -> Remainder | None:
        """Makes the tensors beside A and B, which have their start values.

        Returns what is to be left of the base weight, if that changes.
        """
        return None

    def factors(self, layer: LoraLayer, name: str) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] as they are multiplied, where they are not as they are stored."""
        return layer.factors(name)

    def key_map(self, name: str, keys: dict[str, str]) -> dict[str, str]:
        """Names of the adapter's tensors, in files and in the live module, where `keys` is how they are as a rule."""
        return keys

    def cheap(self, layer: LoraLayer, name: str) -> bool:
        """Whether `add` or `adapt` serves in place of `transform`."""
        return layer.is_cheap

    def delta(self, layer: LoraLayer, name: str) -> Tensor:
        """What is added to the weight: [out, in]."""
        return layer.product(name)

    def transform(self, layer: LoraLayer, name: str, weight: Tensor) -> Tensor:
        """The weight [out, in] as the adapter changes it."""
        return weight + self.delta(layer, name)

    def add(self, layer: LoraLayer, name: str, x: Tensor, result: Tensor) -> Tensor:
        """`result`, the output for `x` of what comes before, with the adapter on top."""
        return layer.add_product(name, x, result)

    def adapt(
        self, layer: LoraLayer, name: str, below: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """The module's output with the adapter on top of `below`."""
        return self.add(layer, name, x, below(x, *args, **kwargs))

    def forget(self) -> None:
        """Lets go of what it has kept of the weights."""

    def check_merge(self, layer: LoraLayer, name: str) -> None:
        """Raises NotImplementedError where the adapter cannot become part of the weight."""
