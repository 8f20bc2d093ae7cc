"""`PeftModel`: a base model and its named adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from peft.config import PeftConfig, check_is_config
from peft.core.model_config import is_checkpointed
from peft.core.part import check_adapter_name
from peft.core.walk import parts_of
from peft.core.whole import alone, passing
from peft.errors import warn
from peft.integrations.training import let_gradients_through_inputs
from peft.saved import SavedAdapters

if TYPE_CHECKING:
    from peft.delegated import Delegated
else:
    Delegated = object  # `__getattr__` finds its names; a type checker that saw that would let every misspelling pass

#: task type -> the class for it; filled by `peft.tasks`
TASK_CLASSES: dict[str, type[PeftModel]] = {}

#: tuner, or model with soft prompts -> those inside of `disable_adapter()`, and whether it was disabled before them
_DISABLED: WeakKeyDictionary[nn.Module, dict[object, bool]] = WeakKeyDictionary()


def check_base_model(model: Any) -> None:
    """Looks whether a model to be wrapped is a base model; warns where it has adapters from earlier.

    Raises:
        ValueError: it is wrapped already.
    """
    if isinstance(model, PeftModel):
        raise ValueError(
            f"The model is a {type(model).__name__} already, with adapter {', '.join(model.peft_config)}. Use"
            " add_adapter() or load_adapter() for a further one, or unload() for the base model, to start afresh."
        )
    there = {name for _, part in parts_of(model) for name in part.adapter_names()}
    if there:
        warn(
            f"The model has adapter {', '.join(sorted(there))} on its modules already: it stays there, and one of"
            " the same name is replaced. To start afresh, use what unload() gives back."
        )


class PeftModel(SavedAdapters, Delegated):
    """A base model with adapters, each under a name of its own.

    `base_model` is the tuner, which holds the base model (`get_base_model()`); for soft prompts it is the base model.
    Attributes that this class does not have are those of the tuner and the base model.

    Args:
        model: the base model, changed in place; its weights are frozen.
        peft_config: configuration of the first adapter.
        adapter_name: its name.
        autocast_adapter_dtype: keep the adapter in float32 where the base is in half precision.
        low_cpu_mem_usage: make the adapter's tensors without memory (on the meta device), to be loaded next.

    Raises:
        ValueError, TypeError, NotImplementedError: the configuration does not fit; the model is as before.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ):
        super().__init__()
        check_adapter_name(adapter_name)
        check_is_config(peft_config)
        check_base_model(model)
        self.peft_type = peft_config.peft_type
        self._peft_config: dict[str, Any] | None = {} if peft_config.is_prompt_learning else None
        self.base_model = model
        self._add(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype, first=True)
        self.prepare_model_for_gradient_checkpointing(model)
        base_config: Any = getattr(self.get_base_model(), "config", None)
        if getattr(base_config, "pretraining_tp", 1) != 1:
            # Sharded linear layers of old Llama code would bypass the adapters.
            base_config.pretraining_tp = 1

    @classmethod
    def _class_for(cls, task_type: str | None) -> Any:
        return TASK_CLASSES.get(task_type or "", cls) if cls is PeftModel else cls

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """While it lasts, the model acts as its base model, in all threads. May be nested; then all is as before."""
        parts = [part for _, part in parts_of(self.get_base_model())]
        inside, me = _DISABLED.setdefault(self._holder, {}), object()
        try:
            try:
                with alone(self._holder):
                    was_disabled = self._prompt_disabled if self._tuner is None else self._tuner.disabled
                    if len({part.disable_adapters for part in parts}) > 1:
                        now, after = "Adapters are switched off on some modules and on on others", not was_disabled
                        warn(f"{now}: afterwards they are {'on' if after else 'off'} on all.")
                    inside[me] = next(iter(inside.values()), was_disabled)
                    self._switch(False)
                yield
            finally:
                self._leave(inside, me)
        finally:
            self._leave(inside, me)  # what an interrupt has left undone

    def _leave(self, inside: dict[object, bool], who: object) -> None:
        if who in inside:
            with alone(self._holder):
                if len(inside) == 1 and not inside[who]:
                    self._switch(True)
                del inside[who]

    def _switch(self, on: bool) -> None:
        if self._tuner is None:
            with self._whole() as parts:
                for part in parts:
                    part.enable_adapters(on)
                self._prompt_disabled = not on
        else:
            self._tuner.enable_adapter_layers() if on else self._tuner.disable_adapter_layers()

    # ---- being the model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward pass with the active adapters.

        `adapter_names`, one name per sample, gives each sample an adapter of its own (`"__base__"`: none).
        """
        with self.routed(args, kwargs):
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate` with the active adapters; `adapter_names` as for `forward`."""
        tuner = self._tuner
        with self.routed(args, kwargs), nullcontext() if tuner is None else tuner.around_generate(args, kwargs):
            base: Any = self.get_base_model()
            return base.generate(*args, **kwargs)

    def _passing(self) -> AbstractContextManager[None]:
        """Stands around a pass, or a generation, with a soft prompt; a tuner does so itself."""
        return nullcontext() if self._tuner is not None else passing(self)

    def routed(self, args: Sequence[Any], kwargs: dict[str, Any]) -> AbstractContextManager[Any]:
        """Takes `adapter_names` out of `kwargs`; while it lasts, each sample gets the adapter named at its place.

        Raises:
            ValueError: there is not one name per sample, or mixed batches cannot be used at present.
        """
        names = kwargs.pop("adapter_names", None)
        return nullcontext() if names is None else self._mixed(names, args, kwargs)

    def _mixed(self, names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]) -> AbstractContextManager[Any]:
        if self._tuner is None:
            raise ValueError("adapter_names (a mixed batch) cannot be used with soft prompts; use set_adapter.")
        if isinstance(names, str):
            raise ValueError(
                f"adapter_names={names!r} is one name, and one for each sample is needed; set_adapter({names!r}) is for"
                " whole batches."
            )
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim() > 0]
        # Batches come first, or second (sequence first).
        if tensors and not any(len(names) in value.shape[:2] for value in tensors):
            raise ValueError(
                f"adapter_names has length {len(names)}, but no input has that many samples (the first has shape"
                f" {tuple(tensors[0].shape)}); one name per sample is needed."
            )
        return self._tuner.routed(names)

    def prepare_model_for_gradient_checkpointing(self, model: Any) -> None:
        """Lets gradients reach adapters inside checkpointed blocks, whose inputs otherwise need none.

        Args:
            model: the base model; nothing is done unless it checkpoints.
        """
        # transformers may have seen to it.
        if is_checkpointed(model) and getattr(model, "_require_grads_hook", None) is None:
            let_gradients_through_inputs(model)

    def _get_base_model_class(self, is_prompt_tuning: bool = False) -> type:
        return type(self.base_model if is_prompt_tuning else self.get_base_model())
