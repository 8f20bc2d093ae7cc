"""What a method says about a whole model of its adapters; what it says about one module is in `layer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from torch import Tensor, nn

from peft.core.layer import AdapterLayer
from peft.core.plan import Plan


class MethodHooks(nn.Module):
    """The questions that `BaseTuner` asks of a method, with the answers of one that has nothing special to say.

    Most methods set `prefix` and `layer_class`, and leave the rest.
    """

    #: beginning of the names of the method's tensors
    prefix: str = ""
    #: the layer of the method
    layer_class: ClassVar[type[AdapterLayer]] = AdapterLayer
    #: containers on this object that hold tensors which all layers of an adapter share
    shared_names: tuple[str, ...] = ()
    #: whether merging for good also takes off the wrappers of modules that are trained in full
    unwraps_saved: ClassVar[bool] = True
    #: path from this object to the base model
    holder: ClassVar[str] = "model"
    #: whether a model outside `PeftModel` can hold the method (its shared tensors need a place to live)
    injectable: ClassVar[bool] = True

    # ---- before the first layer

    def hold(self, model: nn.Module) -> None:
        """Takes in the base model."""
        self.model = model

    def members(self, adapter_name: str, config: Any) -> dict[str, list[tuple[str, dict[str, Any]]]]:
        """The saved adapters that a new adapter is made of, which are loaded before it.

        Returns:
            Name of each -> where to look for it, in that order: (folder or repository, options of loading).

        Raises:
            ValueError: the new adapter does not fit the model.
        """
        return {}

    def owner(self, adapter_name: str) -> str | None:
        """The adapter that this one is a member of; it is saved in a subfolder of that one's folder."""
        return None

    def prepare_shared(self) -> None:
        """Makes the containers of shared tensors; called once."""

    def complete_config(self, config: Any, model_config: dict[str, Any]) -> None:
        """Fills in what a configuration leaves open, beside its targets."""

    def check_config(self, adapter_name: str, config: Any) -> None:
        """Raises ValueError where an adapter does not go together with those that are there."""

    @classmethod
    def start_is_replaceable(cls, config: Any) -> bool:
        """Whether loading may leave out an adapter's start: it may not where that changes the base model."""
        return True

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> Callable[[], None] | None:
        """Changes the model's own structure before it gets adapters, where a configuration asks for it.

        Returns what undoes that.
        """
        return None

    def prepare(self, plan: Plan, config: Any, adapter_name: str) -> None:
        """Makes what the layers of an adapter share; called when the plan is settled, before the first layer."""

    # ---- layer by layer

    def layer_settings(self, config: Any, key: str) -> dict[str, Any]:
        """What the adapter on module (or parameter) `key` gets beyond the configuration (a rank of its own, say)."""
        return {}

    def make_layer(self, config: Any, target: nn.Module, parameter_name: str | None, key: str) -> AdapterLayer:
        """A layer of the method around `target`, without adapters yet."""
        return self.layer_class(target, parameter_name)

    def tie(self, layer: AdapterLayer, to: AdapterLayer, adapter_name: str) -> None:
        """Makes an adapter on one module the same as that on the module it shares its weight with."""
        raise ValueError(
            f"{type(self).__name__} cannot keep the adapters of tied modules the same (ensure_weight_tying)."
        )

    # ---- while the model runs

    def around_forward(self, args: Sequence[Any], kwargs: dict[str, Any]) -> AbstractContextManager[None]:
        """Stands around a forward pass; takes out of `kwargs` what is the method's, not the model's."""
        return nullcontext()

    def around_generate(self, args: Sequence[Any], kwargs: dict[str, Any]) -> AbstractContextManager[None]:
        """Stands around a generation, which is many forward passes."""
        return self.around_forward(args, kwargs)

    # ---- in files

    def key_map(self, adapter_name: str) -> dict[str, str]:
        """Names of tensors that all layers of an adapter share: as files have them -> as this object has them."""
        return {slot: f"{slot}.{adapter_name}" for slot in self.shared_names if adapter_name in getattr(self, slot)}

    @classmethod
    def read_tensors(cls, model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The tensors of a file, of whatever version, by the names that this one has for them.

        Where an adapter is of a size that only its file tells, it gets that size here.

        Raises:
            ValueError: the file is too old to be read.
        """
        return tensors

    @classmethod
    def write_tensors(cls, model: nn.Module, adapter_name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """An adapter's tensors as files have them, where that is not as they are; what `read_tensors` reads."""
        return tensors

    def without_start(
        self, adapter_name: str, tensors: dict[str, Tensor], content: dict[str, Any], initial: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """An adapter that works on the original base model, where its initialisation changed the base weights.

        Args:
            adapter_name: the adapter's name.
            tensors, content: the adapter and its configuration, as they would be saved.
            initial: the adapter's tensors before training.

        Raises:
            ValueError: the initialisation changes nothing, so there is nothing to convert.
        """
        raise ValueError(
            "path_initial_model_for_weight_conversion is for initialisations that change the base weights; that of"
            f" adapter {adapter_name!r} does not. Save without it."
        )
