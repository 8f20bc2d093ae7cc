"""Getting a base model ready for training: frozen, in the right dtypes, with gradient checkpointing."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import nn

from peft.core.model_config import embeddings_of
from peft.core.storage.gradients import let_gradients_through
from peft.errors import warn

_HALF_PRECISION = (torch.float16, torch.bfloat16)


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Prepares a quantised transformers model for adapters to be trained on it.

    Freezes all parameters; raises those in float16 or bfloat16, such as norms and the head, to float32 (unless a
    backend other than bitsandbytes holds the weights: its kernels expect the dtype they have); switches gradient
    checkpointing on and lets gradients flow through the frozen embeddings, and through layers that quantise their input
    (torchao's dynamic activations), as if they did not. A model that is not quantised is frozen and raised to float32,
    no more.

    Args:
        model: the model, changed in place.
        use_gradient_checkpointing: False leaves gradient checkpointing alone.
        gradient_checkpointing_kwargs: for `torch.utils.checkpoint.checkpoint`; `{"use_reentrant": False}` is advised.
        auto_clear_cache: whether CUDA's cache of free memory is emptied after the casts.

    Returns:
        `model`.
    """
    bitsandbytes = any(getattr(model, name, False) for name in ("is_loaded_in_8bit", "is_loaded_in_4bit"))
    method = getattr(model, "quantization_method", None) or ("hqq" if getattr(model, "hqq_quantized", False) else None)
    method = getattr(method, "value", method)
    quantized = bitsandbytes or method is not None

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if method in (None, "bitsandbytes"):
        for parameter in model.parameters():
            if parameter.dtype in _HALF_PRECISION and type(parameter).__name__ != "Params4bit":
                parameter.data = parameter.data.to(torch.float32)
        if auto_clear_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()

    let_gradients_through(model.named_modules())
    if quantized and use_gradient_checkpointing:
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant", True):
            let_gradients_through_inputs(model)
        # transformers 5 renamed the method; the old name warns there.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(*([] if gradient_checkpointing_kwargs is None else [gradient_checkpointing_kwargs]))
    elif gradient_checkpointing_kwargs:
        why = "use_gradient_checkpointing is False."
        if not quantized:
            why = f"{type(model).__name__} is not quantised, so its gradient checkpointing is left as it is."
        warn(f"gradient_checkpointing_kwargs have no effect: {why}")
    return model


def let_gradients_through_inputs(model: Any) -> None:
    """Makes the embeddings' output require gradients, which re-entrant checkpointing of frozen layers needs."""
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    elif (embedding := embeddings_of(model)) is not None:
        embedding.register_forward_hook(_require_grad)


def _require_grad(module: nn.Module, args: Any, output: torch.Tensor) -> None:
    output.requires_grad_(True)


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts a model for mixed-precision training: trainable parameters to float32, frozen ones to `dtype`.

    Saves memory over a base model in float32 while the optimizer still steps in full precision.

    Args:
        model: the model, changed in place.
        dtype: torch.float16 or torch.bfloat16, as in the autocast it is trained with.

    Raises:
        ValueError: another dtype.
    """
    if dtype not in _HALF_PRECISION:
        raise ValueError(f"dtype must be torch.float16 or torch.bfloat16, got {dtype!r}.")
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


@lru_cache(maxsize=1)
def _asa_callback() -> type:
    from transformers import TrainerCallback

    class AdamssAsaCallback(TrainerCallback):
        """Lets the `Trainer` of transformers drop subspaces of AdaMSS adapters, as their configuration says."""

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            tuner: Any = getattr(kwargs.get("model"), "base_model", kwargs.get("model"))
            if hasattr(tuner, "update_and_allocate"):
                tuner.update_and_allocate(state.global_step)
            return super().on_optimizer_step(args, state, control, **kwargs)

    return AdamssAsaCallback


def __getattr__(name: str) -> Any:
    if name == "AdamssAsaCallback":  # its base class is one of transformers, which is not there for all
        return _asa_callback()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
