"""A saved adapter, read and ready to go on a model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from peft.checkpoint.files import load_peft_weights, read_adapter, renamed
from peft.config import CONFIG_NAME, PeftConfig, read_form
from peft.errors import AdapterFileError, NoAdapterError, warn
from peft.hub import split_hub_arguments
from peft.integrations.transformers import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from peft.registry import method_of
from peft.untrusted import check_sizes

#: arguments of loading that are not the hub's; the last ones speak of the base model, other packages pass them along
FOR_LOADING = {
    "subfolder", "torch_device", "ignore_mismatched_sizes", "trust_remote_code", "torch_dtype", "dtype", "adapters",
    "use_safetensors",
}  # fmt: skip


class Source:
    """A saved adapter, read; its tensors have been given other names if `is_renamed`."""

    def __init__(self, name: str, config: PeftConfig, tensors: dict[str, Tensor], is_renamed: bool = False):
        self.name, self.config, self.tensors, self.is_renamed = name, config, tensors, is_renamed

    @classmethod
    def read(
        cls,
        model_id: str | os.PathLike,
        key_mapping: dict[str, str] | None,
        options: dict[str, Any],
        config: PeftConfig | None,
        is_trainable: bool,
        ephemeral_gpu_offload: bool,
    ) -> Source:
        """Reads configuration (unless given) and tensors, both of the same save."""
        hub, rest = split_hub_arguments(options)
        warn_of_unknown(set(rest) - FOR_LOADING, "Loading")
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
        return cls(os.fspath(model_id), config, tensors, key_mapping is not None)

    @classmethod
    def read_first(cls, name: str, candidates: Sequence[tuple[str, dict[str, Any]]]) -> Source:
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
        """Names layers as the base model has them now: some had other names, and some experts are fused by now."""
        if hasattr(self.config, "_said_by"):  # a file's, not the caller's own
            sizes = {size for tensor in self.tensors.values() for size in tensor.shape}
            sizes |= {size for parameter in model.parameters() for size in parameter.shape}
            modules = sum(1 for _ in model.modules())
            try:
                check_sizes(self.config, sizes, len(self.tensors), modules)
            except ValueError as error:
                raise AdapterFileError(f"{CONFIG_NAME} of {self.name!r}: {error}") from error
        old_names = getattr(model, "_checkpoint_conversion_mapping", None)
        if old_names and not self.is_renamed and not self.config.is_prompt_learning:
            self.tensors = renamed(self.tensors, old_names)
        convert_peft_config_for_transformers(self.config, model, state_dict=self.tensors)
        self.tensors = convert_peft_adapter_state_dict_for_transformers(model, self.config, self.tensors)


def warn_of_unknown(names: set[str], function: str) -> None:
    if names:
        warn(f"{function} does not know the argument {', '.join(map(repr, sorted(names)))}; ignored.")
