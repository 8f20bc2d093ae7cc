"""Configurations: what an adapter is, as data, and `adapter_config.json` in and out."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from dataclasses import field as define
from pathlib import Path
from typing import Any

from peft.errors import AdapterFileError, NoAdapterError, UnknownMethodError, listed
from peft.fields import ConfigFields, plain
from peft.folder import check_folder, read_at_rest, replace_files
from peft.hub import fetch, push, split_hub_arguments
from peft.registry import METHODS, method_of
from peft.untrusted import check_expressions, note_source, read_json, without_idle_fields
from peft.values import PositiveInt, shown

CONFIG_NAME = "adapter_config.json"


@dataclass
class PeftConfigMixin(ConfigFields):
    """Reading and writing of configurations; see [`ConfigFields`] for the fields that every file has."""

    def save_pretrained(
        self, save_directory: str | os.PathLike, *, auto_mapping_dict: dict | None = None, **kwargs: Any
    ) -> None:
        """Writes `adapter_config.json` into a folder, which is made if need be.

        Args:
            save_directory: the folder.
            auto_mapping_dict: goes into the file as `auto_mapping` in place of the field.
            kwargs: with `push_to_hub=True`, the folder also goes to the hub (see `push_to_hub`).

        Raises:
            ValueError: `save_directory` is a file.
        """
        check_folder(save_directory)
        content = self.to_json_dict()
        if auto_mapping_dict is not None:
            content["auto_mapping"] = auto_mapping_dict
        replace_files(save_directory, {CONFIG_NAME: dump_config(content).encode()})
        if kwargs.pop("push_to_hub", False):
            self.push_to_hub(kwargs.pop("repo_id", os.path.basename(os.fspath(save_directory))), **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Commits `adapter_config.json` to a hub repository; `kwargs` (token, private, ...) go to `huggingface_hub`."""
        return push(self.save_pretrained, repo_id, **{"commit_message": "Upload config", **kwargs})

    def was_read(self, source: str | os.PathLike, options: Mapping[str, Any]) -> None:
        """Told where the configuration, and tensors along with it, have been read from, and with which options."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        """Reads a configuration from a folder or a hub repository.

        Args:
            pretrained_model_name_or_path: a folder, or a repository id.
            subfolder: where in it the adapter lies.
            kwargs: `revision`, `token`, `cache_dir`, `local_files_only` go to the hub; others override fields. With
                `trust_remote_code=True`, what the file says of places and of code is believed.

        Raises:
            ValueError: there is no `adapter_config.json`, or it says what a file may not say.
            KeyError: it names a method that this version does not know.
            TypeError: it has none of the fields that a configuration has.
        """
        hub, overrides = split_hub_arguments(kwargs)
        content = read_config_file(pretrained_model_name_or_path, subfolder, **hub)
        if content and content.keys().isdisjoint(f.name for f in fields(cls)):
            raise TypeError(
                f"{CONFIG_NAME} of {os.fspath(pretrained_model_name_or_path)!r} is no adapter's: it"
                f" has no peft_type, nor any other field of {cls.__name__}, but {listed(sorted(content))}."
            )
        return build_config(content, pretrained_model_name_or_path, overrides, cls)

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike, **kwargs: Any) -> dict[str, Any]:
        """The content of a configuration file, as a dictionary."""
        content = read_json(path_json_file)
        # Files that carry the settings of a run-time only optimisation of other tools
        content.pop("runtime_config", None)
        return {**content, **kwargs}


#: as they are here; a class of another package may have its own, or somebody may have replaced them
_SAVE, _READ = PeftConfigMixin.save_pretrained, PeftConfigMixin.from_pretrained.__func__  # type: ignore[attr-defined]


def saved_form(config: PeftConfigMixin) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What the class of a configuration saves: the content of `adapter_config.json`, and further files by name."""
    if type(config).save_pretrained is _SAVE:
        return config.to_json_dict(), {}
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        files = {entry.name: Path(entry).read_bytes() for entry in os.scandir(folder) if entry.is_file()}
    return json.loads(files.pop(CONFIG_NAME)), files


def read_form(content: Mapping[str, Any], source: str | os.PathLike, trusted: bool, options: dict[str, Any]) -> Any:
    """The configuration that the class for a file's content reads.

    Args:
        content: the file's.
        source: where it lies.
        trusted: whether it may say where else things lie, see `untrusted`.
        options: where in `source`, and the hub's.
    """
    known = isinstance(content.get("peft_type"), str) and content["peft_type"] in METHODS
    config_class: Any = method_of(content["peft_type"]).config_class if known else None
    found = getattr(config_class, "from_pretrained", None)
    if found is None or found.__func__ is _READ:
        return build_config(content, source, {"trust_remote_code": trusted})
    return found(source, **options, **({"trust_remote_code": True} if trusted else {}))


def dump_config(content: Mapping[str, Any]) -> str:
    """`adapter_config.json` as text."""
    # Mappings inside keep their order, which may mean something: the first pattern of a rank_pattern that fits counts.
    return json.dumps(dict(sorted(content.items())), indent=2, default=plain) + "\n"


def read_config_file(source: str | os.PathLike, subfolder: str | None = None, **hub: Any) -> dict[str, Any]:
    """The content of `adapter_config.json` in a folder or hub repository.

    Raises:
        ValueError: there is none, or it is not a mapping with a `peft_type`.
    """
    where = f"{os.fspath(source)!r}" + (f" (subfolder {subfolder!r})" if subfolder else "")

    def read() -> dict[str, Any]:
        try:
            path = fetch(source, CONFIG_NAME, subfolder=subfolder, **hub)
        except Exception as error:
            raise NoAdapterError(f"Can't find {CONFIG_NAME!r} at {where}, which is no folder here: {error}") from error
        if path is None:
            raise NoAdapterError(
                f"Can't find {CONFIG_NAME!r} at {where}. A saved adapter is a folder that holds this file."
            )
        return PeftConfigMixin.from_json_file(path)

    return read_at_rest(os.path.join(source, subfolder or ""), CONFIG_NAME, read)


def build_config(
    content: Mapping[str, Any],
    source: str | os.PathLike,
    overrides: Mapping[str, Any] | None = None,
    config_class: type[PeftConfigMixin] = PeftConfigMixin,
) -> Any:
    """The configuration that the content of an `adapter_config.json` makes.

    Args:
        content: what the file holds; nothing of it is trusted, see `untrusted`.
        source: where it lies, for messages.
        overrides: fields by name, as the caller wants them; those that the file does not have are left out.
            `trust_remote_code=True` trusts the file.
        config_class: the class for content that names no method.

    Raises:
        AdapterFileError: a field is of the wrong type or out of range, or says what a file may not say.
        UnknownMethodError: there is no such method.
    """
    overrides = dict(overrides or {})
    trusted = bool(overrides.pop("trust_remote_code", False))
    given = {key: value for key, value in overrides.items() if key in content}
    try:
        method = content.get("peft_type")
        if method is not None and not isinstance(method, str):
            raise TypeError(f"peft_type must be a text, got {shown(method)}")
        kind: Any = method_of(method).config_class if method else config_class
        config = kind.from_peft_type(**kind.check_kwargs(**without_idle_fields({**content, **given}, source)))
        note_source(config, source, content, believed=content if trusted else given)
    except UnknownMethodError as error:
        raise UnknownMethodError(f"{CONFIG_NAME} of {os.fspath(source)!r}: {error}") from error
    except (TypeError, ValueError) as error:
        raise AdapterFileError(f"{CONFIG_NAME} of {os.fspath(source)!r}: {error}") from error
    return config


@dataclass
class PeftConfig(PeftConfigMixin):
    """Base of all configurations.

    Args:
        base_model_name_or_path: name of the base model that the adapter belongs to; filled in by `get_peft_model`.
        revision: revision of the base model.
        inference_mode: True makes an adapter that is not trained.
    """

    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False


@dataclass
class LayerConfig(PeftConfig):
    """Base of the methods that change layers: which modules get the adapter, and what is trained beside it.

    Args:
        target_modules: names to adapt. A list matches whole names or their last parts (`"q_proj"`,
            `"self_attn.q_proj"`); a string is a regular expression for the whole name, or `"all-linear"`; None takes
            the defaults for the model type.
        exclude_modules: names to leave out, written the same way.
        layers_to_transform: index or indices of the layers to adapt; others are left alone.
        layers_pattern: name of the `nn.ModuleList` that the index counts in, where the common ones do not fit.
        target_parameters: names of `nn.Parameter`s to adapt directly, such as `"experts.up_proj"` of a fused
            mixture of experts.
        modules_to_save: modules that are trained in full and stored with the adapter, such as a new head.
        bias: which biases are trained and stored: `"none"`, `"all"`, or those of adapted layers (`"<method>_only"`).
        left_out: in a file that was saved with `minimal=True`, what it does not hold, with sums to check it by.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    left_out: dict[str, float] | None = define(default=None, kw_only=True)

    def _check_fields(self) -> None:
        super()._check_fields()
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            self.target_modules = "all-linear"
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), (list, tuple)):
                setattr(self, name, set(getattr(self, name)))
        for name in self.pattern_fields:
            if getattr(self, name) is None and not self._is_default(name):
                setattr(self, name, {})
        if isinstance(self.layers_to_transform, (list, tuple)) and not self.layers_to_transform:
            self.layers_to_transform = None
        self.layers_pattern = self.layers_pattern or None
        check_expressions(self)
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} cannot be used when target_modules is a str: put the indices into the"
                        " regular expression."
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern has no effect without layers_to_transform: give both or neither.")


@dataclass
class LayoutConfig(LayerConfig):
    """Base of the methods whose files say how layers hold their weight.

    Args:
        fan_in_fan_out: whether the layers hold their weight as [in, out]; found out from the layer itself.
    """

    fan_in_fan_out: bool = False


@dataclass
class PromptLearningConfig(PeftConfig):
    """Base of the soft prompts. What is None is read from the base model's configuration.

    Args:
        num_virtual_tokens: length of the prompt, in tokens.
        token_dim: width of the base model's embeddings.
        num_transformer_submodules: 1 for a decoder or an encoder, 2 for an encoder-decoder.
        num_attention_heads: attention heads of the base model.
        num_layers: layers of the base model.
        modules_to_save: modules that are trained in full and stored with the prompt.
    """

    num_virtual_tokens: PositiveInt | None = None
    token_dim: PositiveInt | None = None
    num_transformer_submodules: PositiveInt | None = None
    num_attention_heads: PositiveInt | None = None
    num_layers: PositiveInt | None = None
    modules_to_save: list[str] | None = None

    @property
    def is_prompt_learning(self) -> bool:
        return True


def check_is_config(config: Any) -> None:
    """Raises TypeError where somebody has given something else for a configuration."""
    if not isinstance(config, PeftConfig):
        raise TypeError(f"peft_config must be a PeftConfig, such as LoraConfig(...); got {type(config).__name__}.")


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """The configuration of the class that `config_dict["peft_type"]` names.

    Raises:
        KeyError: an unknown `peft_type`.
        TypeError: a field that the class does not have.
    """
    return method_of(config_dict["peft_type"]).config_class(**config_dict)
