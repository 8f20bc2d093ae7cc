"""`PeftModel`: a base model and its named adapters."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft.checkpoint import (
    get_peft_model_state_dict,
    model_card,
    read_adapter,
    set_peft_model_state_dict,
    write_adapter,
)
from peft.checkpoint.files import load_peft_weights
from peft.checkpoint.state import IncompatibleKeys
from peft.config import CONFIG_NAME, PeftConfig, read_form, saved_form
from peft.core import status
from peft.core.auxiliary import save_modules, unsave_modules
from peft.core.injection import check_adapter_name
from peft.core.method import Method
from peft.core.part import as_names
from peft.core.targets import modules_named
from peft.core.tuner import BaseTuner
from peft.core.undo import all_or_nothing, undone_on_error
from peft.core.walk import parts_of
from peft.errors import AdapterFileError, NoAdapterError, PeftWarning
from peft.folder import replace_files
from peft.html import table
from peft.hub import CARD_NAME, push, split_hub_arguments
from peft.integrations.training import let_gradients_through_inputs
from peft.integrations.transformers import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from peft.registry import method_of
from peft.tuners.prompts.base import PromptHost
from peft.untrusted import check_sizes

if TYPE_CHECKING:
    from peft.delegated import Delegated
else:
    Delegated = object  # `__getattr__` finds its names; a type checker that saw that would let every misspelling pass

#: task type -> the class for it; filled by `peft.tasks`
TASK_CLASSES: dict[str, type[PeftModel]] = {}

#: keyword arguments of `save_pretrained` and `push_to_hub` that go to the hub
FOR_HUB = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")
#: those of loading that are not the hub's; the last ones speak of the base model, and other packages pass them along
FOR_LOADING = {
    "subfolder", "torch_device", "ignore_mismatched_sizes", "trust_remote_code", "torch_dtype", "dtype", "adapters",
    "use_safetensors",
}  # fmt: skip


#: fields in which an adapter may differ from the file that is loaded over it: they say nothing of what it does
_MAY_DIFFER = {
    "inference_mode", "base_model_name_or_path", "revision", "peft_version", "auto_mapping", "task_type",
    "target_modules", "exclude_modules", "rank_pattern", "total_step", "layers_pattern", "fan_in_fan_out",
    "modules_to_save",
}  # fmt: skip
#: those that say how an adapter started, where that leaves the base model alone
_STARTS = {"init_lora_weights", "init_weights", "eva_config", "corda_config", "lora_ga_config", "loftq_config"}


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
        warnings.warn(
            f"The model has adapter {', '.join(sorted(there))} on its modules already: it stays there, and one of"
            " the same name is replaced. To start afresh, use what unload() gives back.",
            PeftWarning,
            stacklevel=4,
        )


def warn_of_name(adapter_name: str, config: PeftConfig) -> None:
    """Warns of a name of an adapter that is part of the names of its tensors, whatever the adapter is called."""
    prefix = method_of(config.peft_type or "").prefix
    if adapter_name in prefix:
        warnings.warn(
            f"An adapter called {adapter_name!r} is easily mistaken for the beginning of its tensors' names,"
            f" {prefix!r}; better choose another name.",
            PeftWarning,
            stacklevel=4,
        )


class PeftModel(PromptHost, Delegated):
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
        if not isinstance(peft_config, PeftConfig):
            raise TypeError(
                f"peft_config must be a PeftConfig, such as LoraConfig(...); got {type(peft_config).__name__}."
            )
        check_base_model(model)
        self.peft_type = peft_config.peft_type
        self._active_prompt: str | None = None
        if peft_config.is_prompt_learning:
            self._peft_config: dict[str, Any] | None = {}
            self.base_model = model
            self.add_adapter(adapter_name, peft_config, low_cpu_mem_usage)
        else:
            self._peft_config = None
            tuner_class: Any = method_of(peft_config.peft_type or "").model_class
            convert_peft_config_for_transformers(peft_config, model)
            if tuner_class.method_class.members is not Method.members:  # which are loaded before it
                self.base_model = tuner_class(model, {}, adapter_name)
                self._inject(adapter_name, peft_config, autocast_adapter_dtype, low_cpu_mem_usage)
            else:
                warn_of_name(adapter_name, peft_config)
                more = {} if autocast_adapter_dtype else {"autocast_adapter_dtype": False}
                named = {adapter_name: peft_config}
                self.base_model = tuner_class(model, named, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, **more)
        self.prepare_model_for_gradient_checkpointing(model)
        base_config: Any = getattr(self.get_base_model(), "config", None)
        if getattr(base_config, "pretraining_tp", 1) != 1:
            # Sharded linear layers of old Llama code would bypass the adapters.
            base_config.pretraining_tp = 1

    # ---- what there is

    @property
    def peft_config(self) -> dict[str, Any]:  # type: ignore[override]
        """The configurations by adapter name."""
        return self.base_model.peft_config if self._peft_config is None else self._peft_config

    @property
    def _tuner(self) -> BaseTuner | None:
        return self.base_model if isinstance(self.base_model, BaseTuner) else None

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        if self._tuner is not None:
            return self._tuner.active_adapters
        return [self._active_prompt] if self._active_prompt is not None else []

    @property
    def active_adapter(self) -> Any:
        """Name of the active adapter; a list if there are several."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @active_adapter.setter
    def active_adapter(self, name: str | list[str]) -> None:
        self.set_adapter(name)

    @property
    def active_peft_config(self) -> Any:
        """Configuration of the (first) active adapter."""
        return self.peft_config[self.active_adapters[0]]

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that adapters train in full; None if there are none."""
        names = {
            name for config in self.peft_config.values() for name in getattr(config, "modules_to_save", None) or ()
        }
        return names or None

    @property
    def config(self) -> Any:
        """The base model's configuration; no attribute where that has none."""
        return self.get_base_model().config

    def get_base_model(self) -> nn.Module:
        """The base model, with its adapter layers."""
        return self._tuner.model if self._tuner is not None else self.base_model

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                if name == "base_model" or "base_model" not in self.__dict__.get("_modules", {}):
                    raise
                return getattr(self.base_model, name)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters."""
        return status.count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Prints how many parameters are trained, of how many."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    def _repr_html_(self) -> str:
        """The adapters, for notebooks."""
        trainable, total = self.get_nb_trainable_parameters()
        caption = f"{type(self).__name__} on {type(self.get_base_model()).__name__}: {trainable:,d} of {total:,d}"
        active = self.active_adapters
        rows = [
            (name, _value(config.peft_type), "yes" if name in active else "no", getattr(config, "r", ""))
            for name, config in self.peft_config.items()
        ]
        return table(f"{caption} parameters are trained", ("adapter", "method", "active", "rank"), rows)

    def get_layer_status(self) -> list[status.TunerLayerStatus]:
        """The status of every adapted module, see [`get_layer_status`]."""
        return status.get_layer_status(self)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `convert_to_lora` works: not for soft prompts, nor where a layer's method has no such form."""
        return self._tuner is not None and self._tuner.supports_lora_conversion(adapter_name)

    def get_model_status(self) -> status.TunerModelStatus:
        """The status of all adapters together, see [`get_model_status`]."""
        return status.get_model_status(self)

    # ---- adapters

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Adds an adapter of the same method, not active yet.

        Raises:
            ValueError: the name is taken, the method is another, or the configuration does not fit.
        """
        check_adapter_name(adapter_name)
        if adapter_name in self.peft_config:
            raise ValueError(f"An adapter {adapter_name!r} exists already; delete it first, or choose another name.")
        self._check_new_adapter_config(peft_config, is_trainable=False)
        if peft_config.is_prompt_learning:
            self._add_prompt(adapter_name, peft_config)
        else:
            convert_peft_config_for_transformers(peft_config, self.get_base_model())
            self._inject(adapter_name, peft_config, autocast_adapter_dtype, low_cpu_mem_usage)

    def _inject(self, name: str, config: PeftConfig, autocast_adapter_dtype: bool, low_cpu_mem_usage: bool) -> None:
        """Adds an adapter with the saved ones that it is made of; all of them, or none."""
        warn_of_name(name, config)
        with all_or_nothing():
            self._load_members(name, config)
            self.base_model.inject_adapter(
                self.get_base_model(), name, autocast_adapter_dtype, low_cpu_mem_usage, config=config
            )

    def _check_new_adapter_config(self, peft_config: PeftConfig, is_trainable: bool) -> None:
        if not isinstance(peft_config, PeftConfig):
            raise TypeError(
                f"peft_config must be a PeftConfig, such as LoraConfig(...); got {type(peft_config).__name__}."
            )
        if peft_config.peft_type != self.peft_type:
            raise ValueError(
                f"All adapters of a PeftModel have the same PEFT type: this one has {_value(self.peft_type)},"
                " the new adapter"
                f" {_value(peft_config.peft_type)}. Use get_peft_model(..., mixed=True) to mix methods."
            )
        if is_trainable:
            _check_trainable(peft_config)

    def _add_prompt(self, name: str, config: PeftConfig) -> None:
        warn_of_name(name, config)
        trained = [(parameter, parameter.requires_grad) for parameter in self.base_model.parameters()]
        active = self._active_prompt

        def take_back() -> None:
            self.peft_config.pop(name, None)
            self._delete_prompt_encoder(name)
            unsave_modules(self.base_model, name)
            self._active_prompt = active
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)

        with undone_on_error(take_back):
            self.peft_config[name] = config
            self._setup_prompt_encoder(name)
            keys = modules_named(self.base_model, getattr(config, "modules_to_save", None) or ())
            save_modules(self.base_model, keys, name)
            if self._active_prompt is None:
                self.set_adapter(name, config.inference_mode)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Makes an adapter (or several) the active one; trainable unless `inference_mode`, all others not.

        Raises:
            ValueError: there is no such adapter.
        """
        if self._tuner is not None:
            self._tuner.set_adapter(adapter_name, inference_mode)
            return
        names = as_names(adapter_name)
        missing = [name for name in names if name not in self.peft_config]
        if missing:
            raise ValueError(f"Adapter {', '.join(missing)} not found; there are {', '.join(self.peft_config)}.")
        if len(names) != 1:
            raise ValueError(f"One soft prompt at a time can be active, not {len(names)} ({', '.join(names)}).")
        name = names[0]
        self._active_prompt = name
        for other, encoder in self.prompt_encoder.items():
            encoder.requires_grad_(other == name and not inference_mode and not self.peft_config[other].inference_mode)
        for _, part in parts_of(self.base_model):
            part.set_adapter(name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Makes adapters trainable or not, active or not.

        Raises:
            TypeError: the adapter is a soft prompt.
        """
        if self._tuner is None:
            raise TypeError("set_requires_grad() is for adapters on layers; this model has a soft prompt.")
        self._tuner.set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter. If it was the only active one, the first that is left becomes active.

        Raises:
            ValueError: there is no such adapter.
        """
        if self._tuner is not None:
            self._tuner.delete_adapter(adapter_name)
            return
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist; there are {', '.join(self.peft_config)}.")
        del self.peft_config[adapter_name]
        self._delete_prompt_encoder(adapter_name)
        for _, part in parts_of(self.base_model):
            part.delete_adapter(adapter_name)
        if self._active_prompt == adapter_name:
            self._active_prompt = None
            if self.peft_config:
                self.set_adapter(next(iter(self.peft_config)))

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """While it lasts, the model acts as its base model. May be nested; afterwards all is as before."""
        tuner = self._tuner
        if tuner is None:
            parts = [part for _, part in parts_of(self.base_model) if not part.disable_adapters]
            for part in parts:
                part.enable_adapters(False)
            try:
                with self._without_prompt():
                    yield
            finally:
                for part in parts:
                    part.enable_adapters(True)
            return
        was_disabled = tuner.disabled
        if len({part.disable_adapters for _, part in tuner.parts()}) > 1:
            warnings.warn(
                "Adapters are switched off on some modules and on on others: afterwards they are "
                + ("off" if was_disabled else "on")
                + " on all of them.",
                PeftWarning,
                stacklevel=3,
            )
        tuner.disable_adapter_layers()
        try:
            yield
        finally:
            if not was_disabled:
                tuner.enable_adapter_layers()

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

    @contextmanager
    def routed(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[None]:
        """Takes `adapter_names` out of `kwargs`; while it lasts, each sample gets the adapter named at its place.

        Raises:
            ValueError: there is not one name per sample, or mixed batches cannot be used at present.
        """
        names = kwargs.pop("adapter_names", None)
        with nullcontext() if names is None else self._mixed(names, args, kwargs):
            yield

    def _mixed(self, names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]) -> AbstractContextManager[None]:
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
        # transformers renames the attribute, and warns of the old name.
        new = "is_activation_checkpointing"
        if not getattr(model, new if hasattr(type(model), new) else "is_gradient_checkpointing", False):
            return
        if getattr(model, "_require_grads_hook", None) is None:  # else transformers has seen to it
            let_gradients_through_inputs(model)

    # ---- files

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        selected_adapters: str | Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> None:
        """Saves adapters: `default` into the folder itself, others into subfolders of their names.

        Each is replaced as a whole: a process that is killed meanwhile leaves the old files or the new ones.

        Args:
            save_directory: the folder, made if need be.
            safe_serialization: write safetensors; False writes a pickle (`.bin`).
            selected_adapters: names of the adapters to save; all if None.
            save_embedding_layers: take the base model's embeddings along; `"auto"` where they belong to the change.
            is_main_process: False gathers what there is to gather and writes nothing.
            path_initial_model_for_weight_conversion: the adapter as it was before training, for initialisations that
                change the base weights: what is saved then works on the original base model.
            kwargs: `state_dict`, where it has to be gathered from several processes; `push_to_hub=True` with what
                `push_to_hub` takes.

        Raises:
            ValueError: the directory is a file, or an adapter does not exist.
            OSError: the files could not be written; what was there before is still whole.
        """
        if os.path.isfile(save_directory):
            raise ValueError(f"{os.fspath(save_directory)!r} is a file; a directory is needed to save adapters.")
        names = list(self.peft_config) if selected_adapters is None else as_names(selected_adapters)
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise ValueError(
                f"selected_adapters names {', '.join(unknown)}, which does not exist; there are"
                f" {', '.join(self.peft_config)}."
            )
        gathered = kwargs.pop("state_dict", None)
        if gathered is not None and not is_main_process:
            return  # there is nothing left to gather
        to_hub = kwargs.pop("push_to_hub", False)
        if not to_hub:
            _warn_of_unknown(set(kwargs) - {"repo_id", *FOR_HUB}, "save_pretrained")
        card = self._card(save_directory)
        saves = []
        for name in names:
            config = self.peft_config[name]
            tensors = get_peft_model_state_dict(self, gathered, name, save_embedding_layers=save_embedding_layers)
            content, more = saved_form(config)
            content |= {"inference_mode": True, **self._facts(config)}
            if path_initial_model_for_weight_conversion is not None:
                if self._tuner is None:
                    raise ValueError(
                        "path_initial_model_for_weight_conversion is for initialisations that change the base weights;"
                        f" adapter {name!r} is a soft prompt. Save without it."
                    )
                initial = load_peft_weights(path_initial_model_for_weight_conversion, "cpu")
                tensors, content = self._tuner.method(config).without_start(name, tensors, content, initial)
            saves.append((name, tensors, content, more))
        if not is_main_process:
            return
        for name, tensors, content, more in saves:
            owner = self._tuner.method(self.peft_config[name]).owner(name) if self._tuner is not None else None
            path = [part for part in (owner, name) if part not in (None, "default")]
            folder = os.path.join(save_directory, *path)
            own_card = card if name == "default" else None
            write_adapter(folder, content, tensors, card=own_card, safe_serialization=safe_serialization, more=more)
        if "default" not in names:
            self.create_or_update_model_card(save_directory)
        if to_hub:
            self.push_to_hub(kwargs.pop("repo_id", os.path.basename(os.path.abspath(save_directory))), **kwargs)

    def _facts(self, config: PeftConfig) -> dict[str, Any]:
        """What a saved configuration says of the base model."""
        base = self.get_base_model()
        facts: dict[str, Any] = {}
        if config.base_model_name_or_path is None:
            facts["base_model_name_or_path"] = base.__dict__.get("name_or_path") or None
        if config.task_type is None:
            facts["auto_mapping"] = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
        return facts

    def _card(self, folder: str | os.PathLike) -> str | None:
        """The text of a folder's model card; None where the one that is there is to be left alone."""
        base_config = getattr(self.get_base_model(), "config", None)
        quantization: Any = getattr(base_config, "quantization_config", None)
        config = next(iter(self.peft_config.values()))
        base: Any = self.get_base_model()
        tags = ["transformers"] if type(base).__module__.startswith("transformers") else []
        tags += getattr(base, "model_tags", None) or []
        return model_card(
            folder,
            method=str(_value(self.peft_type)),
            base_model=config.base_model_name_or_path or getattr(base_config, "_name_or_path", None),
            task_type=_value(config.task_type) if config.task_type else None,
            quantization=quantization.to_dict() if hasattr(quantization, "to_dict") else quantization,
            tags=tags,
        )

    def create_or_update_model_card(self, output_dir: str | os.PathLike) -> None:
        """Writes the model card (`README.md`) of a folder, or brings the one that is there up to date."""
        text = self._card(output_dir)
        if text is not None:
            replace_files(output_dir, {CARD_NAME: text.encode()})

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Commits the adapters to a hub repository, which is made if need be.

        Args:
            repo_id: the repository.
            kwargs: what `save_pretrained` takes, and `token`, `private`, `revision`, `commit_message`,
                `commit_description`, `create_pr`, `tags` for the hub.

        Returns:
            huggingface_hub's `CommitInfo`.
        """
        hub = {key: kwargs.pop(key) for key in FOR_HUB if key in kwargs}
        return push(lambda folder: self.save_pretrained(folder, **kwargs), repo_id, **hub)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """A base model with a saved adapter on it.

        Args:
            model: the base model, changed in place.
            model_id: a folder, or a repository id on the hub.
            adapter_name: the name the adapter gets.
            is_trainable: whether it is to be trained further; frozen otherwise.
            config: its configuration; read from the files if None.
            autocast_adapter_dtype: keep the adapter in float32 where the base is in half precision.
            ephemeral_gpu_offload: see `LoraRuntimeConfig`.
            low_cpu_mem_usage: make no values that loading replaces; so it is anyway, unless they change the base model.
            key_mapping: regular expressions for names in the file -> what to put in their place.
            kwargs: `subfolder`; `revision`, `token`, `cache_dir`, `local_files_only`, ... for the hub; `torch_device`.

        Raises:
            ValueError: there is no adapter, or it does not fit; the model is as before.
            RuntimeError: its tensors have other shapes; the model is as before.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be the base model, an nn.Module; got {type(model).__name__}.")
        if config is not None and not isinstance(config, PeftConfig):
            raise ValueError(f"config must be a PeftConfig, got {type(config).__name__}.")
        if not isinstance(model_id, (str, os.PathLike)) or not os.fspath(model_id):
            raise ValueError(f"model_id must be a folder or a repository id, got {model_id!r}.")
        source = _Source.read(model_id, key_mapping, kwargs, config, is_trainable, ephemeral_gpu_offload)
        source.fit(model)
        if cls is PeftModel and source.config.task_type in TASK_CLASSES:
            cls = TASK_CLASSES[source.config.task_type]
        if is_trainable:
            _check_trainable(source.config)
        with all_or_nothing():
            peft_model = cls(
                model,
                source.config,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage or source.needs_no_start,
            )
            peft_model._load_tensors(adapter_name, source, kwargs)
        if not is_trainable:
            peft_model.eval()
        return peft_model

    def load_adapter(
        self,
        model_id: str | os.PathLike,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | torch.device | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> IncompatibleKeys:
        """Loads a saved adapter beside those that are there; the active adapter stays the active one.

        Where an adapter of that name exists, its tensors are replaced; its settings have to be those of the file.

        Args:
            model_id: a folder, or a repository id on the hub.
            adapter_name: the name the adapter gets.
            is_trainable: whether it is to be trained further.
            torch_device: where to read the file to; by default where the model is.
            autocast_adapter_dtype, ephemeral_gpu_offload, low_cpu_mem_usage, key_mapping: as for `from_pretrained`.
            kwargs: `subfolder`; `revision`, `token`, `cache_dir`, `local_files_only`, ... for the hub.

        Returns:
            Names of the adapter that the file has no value for, and names in the file that the model has no place for;
            both are warned of as well.

        Raises:
            ValueError: there is no adapter, or it does not fit; the model is as before.
            RuntimeError: its tensors have other shapes; the model is as before.
        """
        check_adapter_name(adapter_name)
        there = self.peft_config.get(adapter_name)
        kwargs["torch_device"] = torch_device
        source = _Source.read(model_id, key_mapping, kwargs, None, is_trainable, ephemeral_gpu_offload)
        source.fit(self.get_base_model())
        self._check_new_adapter_config(source.config, is_trainable and there is None)
        if there is not None:
            self._check_replaceable(adapter_name, source.config)
        with all_or_nothing():
            if there is None:
                self.add_adapter(
                    adapter_name,
                    source.config,
                    low_cpu_mem_usage=low_cpu_mem_usage or source.needs_no_start,
                    autocast_adapter_dtype=autocast_adapter_dtype,
                )
            result = self._load_tensors(adapter_name, source, kwargs)
        if there is not None:
            there.inference_mode = not is_trainable
        if not is_trainable:
            self.eval()
        elif self._tuner is not None:
            self._tuner.set_requires_grad(adapter_name)
        return result

    def _check_replaceable(self, adapter_name: str, new: PeftConfig) -> None:
        """Raises ValueError where loading tensors into an adapter would not make it the one that was saved."""
        if any(adapter_name in part.merged_adapters for _, part in parts_of(self.base_model)):
            raise ValueError(f"Adapter {adapter_name!r} is merged; call unmerge_adapter() before loading over it.")
        old = self.peft_config[adapter_name]
        values = [config.to_json_dict() for config in (old, new)]
        replaceable = self._tuner is None or all(map(self._tuner.method(old).start_is_replaceable, (old, new)))
        ignored = _MAY_DIFFER | (_STARTS if replaceable else set())
        differ = [
            field
            for field in values[0].keys() | values[1].keys()
            if field not in ignored and values[0].get(field) != values[1].get(field)
        ]
        if differ:
            listed = "; ".join(
                f"{field} is {values[0].get(field)!r} there and {values[1].get(field)!r} in the file"
                for field in sorted(differ)
            )
            raise ValueError(
                f"The saved adapter cannot be loaded over {adapter_name!r}, which has other settings: {listed}. Call"
                f" delete_adapter({adapter_name!r}) first, or load it under another name."
            )

    def _load_members(self, adapter_name: str, config: PeftConfig) -> None:
        """Loads the saved adapters that a new one is made of, if its method is of that kind."""
        tuner, model = self.base_model, self.get_base_model()
        places = tuner.method(config).members(adapter_name, config)
        if not places:
            return
        sources = {name: _Source.read_first(name, candidates) for name, candidates in places.items()}
        for name, source in sources.items():
            source.fit(model)
            tuner.method(source.config).check_config(name, source.config)
        for name, source in sources.items():
            tuner.inject_adapter(model, name, low_cpu_mem_usage=source.needs_no_start, config=source.config)
            self._load_tensors(name, source, {})

    def _load_tensors(self, adapter_name: str, source: _Source, options: dict[str, Any]) -> IncompatibleKeys:
        result = set_peft_model_state_dict(
            self,
            source.tensors,
            adapter_name,
            ignore_mismatched_sizes=options.get("ignore_mismatched_sizes", False),
        )
        if self._tuner is not None:
            self._tuner.fill_in(adapter_name)
        for keys, what in (
            (result.missing_keys, "has no value for"),
            (result.unexpected_keys, "has what the model has no place for:"),
        ):
            if keys:
                listed = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
                warnings.warn(f"Adapter {adapter_name!r}: {source.name} {what} {listed}.", PeftWarning, stacklevel=4)
        return result

    def _get_base_model_class(self, is_prompt_tuning: bool = False) -> type:
        return type(self.base_model if is_prompt_tuning else self.get_base_model())


def _check_trainable(config: PeftConfig) -> None:
    """Raises ValueError where a prompt is to be trained further whose file does not hold what is trained."""
    encoder: Any = method_of(config.peft_type or "").model_class
    if config.is_prompt_learning and not encoder.is_whole_in_files(config):
        raise ValueError(
            "A prompt learning adapter that is loaded cannot be trainable; what made it is not saved. Prompts of keys"
            " and values can, those of CARTRIDGE and of PREFIX_TUNING without a projection."
        )


class _Source:
    """A saved adapter, read."""

    def __init__(self, name: str, config: PeftConfig, tensors: dict[str, Tensor]):
        self.name, self.config, self.tensors = name, config, tensors

    @classmethod
    def read(
        cls,
        model_id: str | os.PathLike,
        key_mapping: dict[str, str] | None,
        options: dict[str, Any],
        config: PeftConfig | None,
        is_trainable: bool,
        ephemeral_gpu_offload: bool,
    ) -> _Source:
        """Reads configuration (unless given) and tensors, both of the same save."""
        hub, rest = split_hub_arguments(options)
        _warn_of_unknown(set(rest) - FOR_LOADING, "Loading")
        subfolder = options.get("subfolder")
        device = options.get("torch_device") or "cpu"
        hub["use_safetensors"] = options.get("use_safetensors")
        if config is None:
            content, tensors = read_adapter(model_id, subfolder, device=device, key_mapping=key_mapping, **hub)
            if not content.get("peft_type"):
                raise ValueError(f"The adapter_config.json of {os.fspath(model_id)!r} names no method (peft_type).")
            where = {"subfolder": subfolder, **split_hub_arguments(options)[0]}
            config = read_form(content, model_id, options.get("trust_remote_code", False), where)
        else:
            tensors = load_peft_weights(model_id, device, key_mapping, subfolder=subfolder, **hub)
        config.inference_mode = not is_trainable
        config.was_read(model_id, options)
        runtime = getattr(config, "runtime_config", None)
        if runtime is not None and ephemeral_gpu_offload:
            runtime.ephemeral_gpu_offload = True
        return cls(os.fspath(model_id), config, tensors)

    @classmethod
    def read_first(cls, name: str, candidates: Sequence[tuple[str, dict[str, Any]]]) -> _Source:
        """The saved adapter at the first of the places where there is one; that it is broken sends nobody elsewhere.

        Raises:
            ValueError: there is none, or it cannot be read.
        """
        reasons = []
        for place, options in candidates:
            try:
                return cls.read(place, None, options, None, False, False)
            except NoAdapterError as error:
                reasons.append(str(error))
            except (ValueError, OSError) as error:
                raise AdapterFileError(f"Adapter {name!r} cannot be read. {error}") from error
        raise NoAdapterError(
            f"Adapter {name!r} was not found. {' '.join(reasons)} What a file says of other places is not followed: if"
            f" it lies elsewhere, say where, from_pretrained(..., adapters={{{name!r}: place, ...}})."
        )

    @property
    def needs_no_start(self) -> bool:
        """Whether the adapter need not be given values that loading replaces."""
        model_class: Any = method_of(self.config.peft_type or "").model_class
        return not self.config.is_prompt_learning and model_class.method_class.start_is_replaceable(self.config)

    def fit(self, model: nn.Module) -> None:
        """Names layers as the base model has them now: transformers fuses experts that older files have one by one."""
        if hasattr(self.config, "_said_by"):  # a file's, not the caller's own
            sizes = {size for tensor in self.tensors.values() for size in tensor.shape}
            sizes |= {size for parameter in model.parameters() for size in parameter.shape}
            modules = sum(1 for _ in model.modules())
            try:
                check_sizes(self.config, sizes, len(self.tensors), modules)
            except ValueError as error:
                raise AdapterFileError(f"{CONFIG_NAME} of {self.name!r}: {error}") from error
        convert_peft_config_for_transformers(self.config, model, state_dict=self.tensors)
        self.tensors = convert_peft_adapter_state_dict_for_transformers(model, self.config, self.tensors)


def _warn_of_unknown(names: set[str], function: str) -> None:
    if names:
        listed = ", ".join(map(repr, sorted(names)))
        warnings.warn(f"{function} does not know the argument {listed}; ignored.", PeftWarning, stacklevel=4)


def _value(member: Any) -> Any:
    """The value of an enum's member; other things as they are."""
    return getattr(member, "value", member)
