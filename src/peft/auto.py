"""An adapter and the base model it belongs to, loaded by one call."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any, ClassVar

from peft.config import PeftConfig
from peft.hub import fetch, split_hub_arguments
from peft.model import PeftModel
from peft.registry import TaskType
from peft.tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.values import shown

#: packages from which a saved configuration may name the class of its base model
IMPORT_ALLOWLIST = ("diffusers", "lerobot", "megatron-core", "transformers")

#: keyword arguments of `PeftModel.from_pretrained`; others go to the base model, `low_cpu_mem_usage` to both
_ADAPTER_ARGUMENTS = ("autocast_adapter_dtype", "ephemeral_gpu_offload", "key_mapping", "torch_device")
#: what transformers' `from_pretrained` takes of the keyword arguments for the hub
_SHARED_HUB_ARGUMENTS = ("token", "cache_dir", "local_files_only", "force_download")


class AutoPeftModel:
    """Loads a saved adapter together with its base model.

    The adapter's configuration says which base model that is, and the task type, or the class of base model that was
    noted on saving, how to load it. The classes below expect one task type.
    """

    #: the class of transformers that loads the base model
    base_class: ClassVar[str | None] = None
    task_type: ClassVar[TaskType | None] = None

    def __init_subclass__(cls, task_type: TaskType | None = None, base_class: str | None = None) -> None:
        if task_type is not None:
            cls.task_type, cls.base_class = task_type, base_class or cls.__name__.replace("Peft", "")

    def __init__(self, *args: Any, **kwargs: Any):
        name = type(self).__name__
        # OSError as the auto classes of transformers have it
        raise OSError(f"{name} makes no objects of its own: use {name}.from_pretrained().")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """The base model with the adapter on it.

        If a tokenizer was saved with the adapter and knows more tokens than the base model, the base model's
        embeddings are made larger first.

        Args:
            pretrained_model_name_or_path: folder or hub repository of the adapter.
            adapter_name: the name it gets.
            is_trainable: False loads it for inference.
            config: replaces the configuration that was saved with the adapter.
            revision: revision of the adapter; that of the base model stands in the configuration.
            import_allowlist: packages that a configuration without a task type may name the class of its base model
                from, in place of `IMPORT_ALLOWLIST`.
            kwargs: `token`, `cache_dir`, `local_files_only`, `force_download` go to the hub for adapter, tokenizer and
                base model; `subfolder` is the adapter's; what `PeftModel.from_pretrained` knows goes there, and the
                rest (`dtype`, `device_map`, `trust_remote_code`, ...) to the base model's `from_pretrained`.

        Raises:
            ValueError: there is no adapter; it belongs to another task; or its configuration does not say, or may not
                say, how to load the base model.
        """
        hub, base_arguments = split_hub_arguments({**kwargs, "revision": revision})
        where = {"subfolder": base_arguments.pop("subfolder", None), **hub}
        more = {key: base_arguments.pop(key) for key in _ADAPTER_ARGUMENTS if key in base_arguments}
        if "low_cpu_mem_usage" in base_arguments:
            more["low_cpu_mem_usage"] = base_arguments["low_cpu_mem_usage"]

        saved = PeftConfig.from_pretrained(pretrained_model_name_or_path, **where)
        loader = cls._for_task(saved, pretrained_model_name_or_path)
        base_class = loader._base_class(saved, import_allowlist)
        if saved.base_model_name_or_path is None:
            raise ValueError(
                f"The configuration of {os.fspath(pretrained_model_name_or_path)!r} names no base model. Load the base"
                " model yourself and use PeftModel.from_pretrained(model, ...)."
            )
        base_arguments |= {key: value for key, value in hub.items() if key in _SHARED_HUB_ARGUMENTS}
        base_model = base_class.from_pretrained(
            saved.base_model_name_or_path, revision=saved.revision, **base_arguments
        )
        _make_room_for_tokens(base_model, pretrained_model_name_or_path, where, base_arguments)
        peft_class = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[loader.task_type] if loader.task_type else PeftModel
        source = pretrained_model_name_or_path
        return peft_class.from_pretrained(base_model, source, adapter_name, is_trainable, config, **where, **more)

    @classmethod
    def _for_task(cls, config: PeftConfig, source: str | os.PathLike) -> type[AutoPeftModel]:
        """The class that loads adapters with the task type of `config`: this one, or the one it stands for."""
        if config.task_type is None or config.task_type == cls.task_type:
            return cls
        right = next(kind for kind in AutoPeftModel.__subclasses__() if kind.task_type == config.task_type)
        if cls.task_type is None:
            return right
        raise ValueError(
            f"{os.fspath(source)!r} was saved with task_type={TaskType(config.task_type).value!r}, which makes it a"
            f" {MODEL_TYPE_TO_PEFT_MODEL_MAPPING[config.task_type].__name__};"
            f" {cls.__name__} loads a {MODEL_TYPE_TO_PEFT_MODEL_MAPPING[cls.task_type].__name__}. Use {right.__name__}."
        )

    @classmethod
    def _base_class(cls, config: PeftConfig, import_allowlist: Sequence[str] | None) -> Any:
        """The class that loads the base model."""
        if cls.base_class is not None:
            return getattr(import_module("transformers"), cls.base_class)
        mapping = config.auto_mapping or {}
        library, name = mapping.get("parent_library"), mapping.get("base_model_class")
        if not library or not name:
            raise ValueError(
                "The configuration has neither a task type nor the class of the base model (auto_mapping), so the base"
                " model cannot be loaded. Load it yourself and use PeftModel.from_pretrained(model, ...), or use the"
                f" class for your task: {', '.join(kind.__name__ for kind in AutoPeftModel.__subclasses__())}."
            )
        if not isinstance(library, str) or not isinstance(name, str):
            raise ValueError(f"auto_mapping must name a class and its module by two texts, got {shown(mapping)}.")
        # A downloaded configuration must not decide what is imported, and thereby run, here.
        allowed = IMPORT_ALLOWLIST if import_allowlist is None else import_allowlist
        if not any(library == package or library.startswith(f"{package}.") for package in allowed):
            raise ValueError(
                f"The configuration wants {name!r} imported from {library!r}, which is not among the packages that may"
                f" be imported ({', '.join(allowed) or 'none'}). If you trust it, pass import_allowlist=[{library!r}]."
            )
        try:
            found = getattr(import_module(library), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"The class of the base model, {name!r} of {library!r}, cannot be had: {error}") from error
        if not isinstance(found, type) or not hasattr(found, "from_pretrained"):
            raise ValueError(f"{name!r} of {library!r} is no class of models that from_pretrained() loads.")
        return found


def _make_room_for_tokens(
    base_model: Any, source: str | os.PathLike, where: dict[str, Any], base_arguments: dict[str, Any]
) -> None:
    """Enlarges the embeddings to hold all tokens of the tokenizer that lies with the adapter, if there is one."""
    try:
        resizes = hasattr(base_model, "resize_token_embeddings")
        place = fetch(source, "tokenizer_config.json", **where) if resizes else None
    except FileNotFoundError:  # offline, and it is not in the cache
        return
    if place is None:
        return
    from transformers import AutoTokenizer

    hub = {key: value for key, value in where.items() if key in ("revision", *_SHARED_HUB_ARGUMENTS)}
    trusted = base_arguments.get("trust_remote_code", False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, subfolder=where["subfolder"] or "", trust_remote_code=trusted, **hub
        )
    except OSError:  # offline, when nobody can say that no config.json lies beside it
        tokenizer = AutoTokenizer.from_pretrained(os.path.dirname(place), trust_remote_code=trusted)
    if len(tokenizer) > base_model.get_input_embeddings().weight.shape[0]:
        base_model.resize_token_embeddings(len(tokenizer))


class AutoPeftModelForCausalLM(AutoPeftModel, task_type=TaskType.CAUSAL_LM):
    """Loads an adapter for continuing a text."""


class AutoPeftModelForSeq2SeqLM(AutoPeftModel, task_type=TaskType.SEQ_2_SEQ_LM):
    """Loads an adapter for text to text."""


class AutoPeftModelForSequenceClassification(AutoPeftModel, task_type=TaskType.SEQ_CLS):
    """Loads an adapter for classifying texts."""


class AutoPeftModelForTokenClassification(AutoPeftModel, task_type=TaskType.TOKEN_CLS):
    """Loads an adapter for classifying tokens."""


class AutoPeftModelForQuestionAnswering(AutoPeftModel, task_type=TaskType.QUESTION_ANS):
    """Loads an adapter for finding answers in texts."""


class AutoPeftModelForFeatureExtraction(AutoPeftModel, task_type=TaskType.FEATURE_EXTRACTION, base_class="AutoModel"):
    """Loads an adapter for hidden states."""
