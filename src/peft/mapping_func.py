"""From a base model and a configuration to an adapted model of the class that fits the task."""

from __future__ import annotations

from torch import nn

from peft.config import PeftConfig, check_is_config
from peft.core.undo import as_before, undone_on_error
from peft.errors import warn
from peft.mixed import PeftMixedModel
from peft.model import PeftModel
from peft.tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel | PeftMixedModel:
    """Adds a new adapter to a base model, which is changed in place.

    Args:
        model: the base model, of transformers or any other `nn.Module`.
        peft_config: the adapter's configuration; `base_model_name_or_path` and `revision` are filled in.
        adapter_name: the adapter's name.
        mixed: give a [`PeftMixedModel`], which holds adapters of several methods.
        autocast_adapter_dtype: keep the adapter in float32 where the base model is in half precision.
        revision: revision of the base model.
        low_cpu_mem_usage: make the adapter's tensors on the meta device, to be loaded next.

    Returns:
        The class that `peft_config.task_type` names, or [`PeftModel`].

    Raises:
        ValueError: the configuration does not fit the model, which is then as before.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be the base model, an nn.Module; got {type(model).__name__}.")
    check_is_config(peft_config)
    named = peft_config.base_model_name_or_path
    name = getattr(model, "name_or_path", None) or named
    if named is not None and named != name:
        warn(
            f"The configuration was made for the base model {named!r}, and this one is {name!r}: the adapter will be"
            " saved as belonging to the latter. Make sure that it is the right model."
        )
    if revision is not None and peft_config.revision not in (None, revision):
        warn(f"The configuration has revision {peft_config.revision!r} of the base model: overwritten by {revision!r}.")
    with undone_on_error(as_before(peft_config)):
        peft_config.base_model_name_or_path = name
        peft_config.revision = revision if revision is not None else peft_config.revision
        task = peft_config.task_type
        model_class = PeftMixedModel if mixed else PeftModel if task is None else MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task]
        how = {"autocast_adapter_dtype": autocast_adapter_dtype, "low_cpu_mem_usage": low_cpu_mem_usage}
        return model_class(model, peft_config, adapter_name, **how)
