"""Adapters of a model in files: saved, loaded, pushed to the hub."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft.adapted import AdaptedModel, check_trainable
from peft.checkpoint import (
    get_peft_model_state_dict,
    model_card,
    set_peft_model_state_dict,
    write_adapter,
)
from peft.checkpoint.files import load_peft_weights
from peft.checkpoint.minimal import check_left_out, leave_out
from peft.checkpoint.source import Source, warn_of_unknown
from peft.checkpoint.state import IncompatibleKeys, vocabulary_changed
from peft.config import PeftConfig, saved_form
from peft.core.part import check_adapter_name, known
from peft.core.undo import all_or_nothing, undone_on_error
from peft.core.walk import parts_of
from peft.core.whole import whole
from peft.errors import listed, warn
from peft.folder import check_folder, replace_files
from peft.hub import CARD_NAME, push
from peft.registry import value_of

if TYPE_CHECKING:
    from typing_extensions import Self

#: keyword arguments of `save_pretrained` and `push_to_hub` that go to the hub
FOR_HUB = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")
#: fields in which an adapter may differ from the file that is loaded over it: they say nothing of what it does
_MAY_DIFFER = {
    "inference_mode", "base_model_name_or_path", "revision", "peft_version", "auto_mapping", "task_type",
    "target_modules", "exclude_modules", "rank_pattern", "total_step", "layers_pattern", "fan_in_fan_out",
    "modules_to_save",
}  # fmt: skip
#: those that say how an adapter started, where that leaves the base model alone
_STARTS = {"init_lora_weights", "init_weights", "eva_config", "corda_config", "lora_ga_config", "loftq_config"}


def _train(modules: Sequence[nn.Module]) -> None:
    for module in modules:
        module.training = True


class SavedAdapters(AdaptedModel):
    """What `PeftModel` does with files."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        selected_adapters: str | Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | os.PathLike | None = None,
        minimal: bool = False,
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
            minimal: leave out what seeds and base weights give again in loading, where it is checked that the same
                comes out: fixed tensors, and base weights of embeddings with an adapter. huggingface/peft loads such
                a file where the configuration has a field for it (`save_projection` and its like).
            kwargs: `state_dict`, where it has to be gathered from several processes; `push_to_hub=True` with what
                `push_to_hub` takes.

        Raises:
            ValueError: the directory is a file, or an adapter does not exist.
            OSError: the files could not be written; what was there before is still whole.
        """
        check_folder(save_directory)
        chosen = self.peft_config if selected_adapters is None else selected_adapters
        names = known(chosen, self.peft_config, "selected_adapters:")
        gathered = kwargs.pop("state_dict", None)
        if gathered is not None and not is_main_process:
            return  # there is nothing left to gather
        to_hub = kwargs.pop("push_to_hub", False)
        if not to_hub:
            warn_of_unknown(set(kwargs) - {"repo_id", *FOR_HUB}, "save_pretrained")
        card, initial = self._card(save_directory), path_initial_model_for_weight_conversion
        saves = [self._to_save(name, gathered, save_embedding_layers, initial, minimal) for name in names]
        if not is_main_process:
            return
        for name, (tensors, content, more) in zip(names, saves, strict=True):
            owner = self._tuner.method(self.peft_config[name]).owner(name) if self._tuner is not None else None
            path = [part for part in (owner, name) if part not in (None, "default")]
            own_card, folder = card if name == "default" else None, os.path.join(save_directory, *path)
            write_adapter(folder, content, tensors, card=own_card, safe_serialization=safe_serialization, more=more)
        if "default" not in names:
            self.create_or_update_model_card(save_directory)
        if to_hub:
            self.push_to_hub(kwargs.pop("repo_id", os.path.basename(os.path.abspath(save_directory))), **kwargs)

    def _to_save(
        self,
        name: str,
        gathered: Mapping[str, Tensor] | None,
        embeddings: bool | str,
        initial: str | os.PathLike | None,
        minimal: bool,
    ) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, bytes]]:
        """What is saved of an adapter: tensors, configuration, and further files by name."""
        config = self.peft_config[name]
        embeddings = vocabulary_changed(self, config) if minimal and embeddings == "auto" else embeddings
        tensors = get_peft_model_state_dict(self, gathered, name, save_embedding_layers=embeddings)
        content, more = saved_form(config)
        content["inference_mode"] = True
        base = self.get_base_model()
        if config.base_model_name_or_path is None:
            content["base_model_name_or_path"] = base.__dict__.get("name_or_path") or None
        if config.task_type is None:
            content["auto_mapping"] = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
        if initial is not None:
            if self._tuner is None:
                raise ValueError(
                    "path_initial_model_for_weight_conversion is for initialisations that change the base weights;"
                    f" adapter {name!r} is a soft prompt. Save without it."
                )
            before = load_peft_weights(initial, "cpu")
            tensors, content = self._tuner.method(config).without_start(name, tensors, content, before)
        if minimal and self._tuner is not None:
            tensors, content = leave_out(self, name, tensors, content)
        return tensors, content, more

    def _card(self, folder: str | os.PathLike) -> str | None:
        """The text of a folder's model card; None where the one that is there is to be left alone."""
        base: Any = self.get_base_model()
        base_config, config = getattr(base, "config", None), next(iter(self.peft_config.values()))
        quantization: Any = getattr(base_config, "quantization_config", None)
        tags = ["transformers"] if type(base).__module__.startswith("transformers") else []
        tags += getattr(base, "model_tags", None) or []
        return model_card(
            folder,
            method=str(value_of(self.peft_type)),
            base_model=config.base_model_name_or_path or getattr(base_config, "_name_or_path", None),
            task_type=value_of(config.task_type),
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
    ) -> Self:
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
            key_mapping: regular expressions for names in the file -> what to put in their place; if None, those by
                which models of transformers say what their modules were called once.
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
        source = Source.read(model_id, key_mapping, kwargs, config, is_trainable, ephemeral_gpu_offload)
        source.fit(model)
        cls = cls._class_for(source.config.task_type)
        if is_trainable:
            check_trainable(source.config)
        empty = low_cpu_mem_usage or source.needs_no_start
        how = {"autocast_adapter_dtype": autocast_adapter_dtype, "low_cpu_mem_usage": empty}
        with all_or_nothing():
            peft_model = cls(model, source.config, adapter_name, **how)
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
        source = Source.read(model_id, key_mapping, kwargs, None, is_trainable, ephemeral_gpu_offload)
        source.fit(self.get_base_model())
        self._check_new_adapter_config(source.config, is_trainable and there is None)
        if there is not None:
            self._check_replaceable(adapter_name, source.config)
        empty = low_cpu_mem_usage or source.needs_no_start
        parts = [] if there is None else [part for _, part in parts_of(self.base_model)]
        held = [] if self._tuner else [self.prompt_encoder]
        modes = partial(_train, [module for module in self.modules() if module.training])
        with whole(self._holder, parts, [adapter_name], held=held), undone_on_error(modes), all_or_nothing():
            if there is None:
                self.add_adapter(adapter_name, source.config, empty, autocast_adapter_dtype)
            result = self._load_tensors(adapter_name, source, kwargs)
            if not is_trainable:
                self.eval()
            elif self._tuner is not None:
                self._tuner.set_requires_grad(adapter_name)
            else:
                self.prompt_encoder[adapter_name].requires_grad_(True)
            if there is not None:
                there.inference_mode = not is_trainable
        return result

    def _check_replaceable(self, adapter_name: str, new: PeftConfig) -> None:
        """Raises ValueError where loading tensors into an adapter would not make it the one that was saved."""
        if any(adapter_name in part.merged_adapters for _, part in parts_of(self.base_model)):
            raise ValueError(f"Adapter {adapter_name!r} is merged; call unmerge_adapter() before loading over it.")
        old = self.peft_config[adapter_name]
        there, found = old.to_json_dict(), new.to_json_dict()
        replaceable = self._tuner is None or all(map(self._tuner.method(old).start_is_replaceable, (old, new)))
        fields = sorted((there.keys() | found.keys()) - _MAY_DIFFER - (_STARTS if replaceable else set()))
        values = {field: (there.get(field), found.get(field)) for field in fields}
        differ = [f"{field} is {a!r} there and {b!r} in the file" for field, (a, b) in values.items() if a != b]
        if differ:
            raise ValueError(
                f"The saved adapter cannot be loaded over {adapter_name!r}, which has other settings:"
                f" {'; '.join(differ)}. Call delete_adapter({adapter_name!r}) first, or load it under another name."
            )

    def _load_members(self, adapter_name: str, config: PeftConfig) -> None:
        """Loads the saved adapters that a new one is made of, if its method is of that kind."""
        tuner, model = self.base_model, self.get_base_model()
        places = tuner.method(config).members(adapter_name, config)
        if not places:
            return
        sources = {name: Source.read_first(name, candidates) for name, candidates in places.items()}
        for name, source in sources.items():
            source.fit(model)
            tuner.method(source.config).check_config(name, source.config)
        for name, source in sources.items():
            tuner.inject_adapter(model, name, low_cpu_mem_usage=source.needs_no_start, config=source.config)
            self._load_tensors(name, source, {})

    def _load_tensors(self, adapter_name: str, source: Source, options: dict[str, Any]) -> IncompatibleKeys:
        ignore = options.get("ignore_mismatched_sizes", False)
        result = set_peft_model_state_dict(self, source.tensors, adapter_name, ignore_mismatched_sizes=ignore)
        if self._tuner is not None:
            self._tuner.fill_in(adapter_name)
            check_left_out(self._tuner, adapter_name)
        for keys, what in zip(result, ("has no value for", "has what the model has no place for:"), strict=True):
            if keys:
                warn(f"Adapter {adapter_name!r}: {source.name} {what} {listed(keys)}.")
        return result
