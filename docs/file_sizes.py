"""How large the file of an adapter is, by method: what docs/methods/README.md says of it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import transformers

import peft
from peft.checkpoint.minimal import leave_out
from peft.checkpoint.state import locations_of
from peft.registry import METHODS

#: the shape of SmolLM2-135M
SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "use_cache": False,
}  # fmt: skip
#: where the defaults do not divide these widths
SETTINGS: dict[str, dict[str, Any]] = {"VBLORA": {"vector_length": 192}, "C3A": {"block_size": 192}}


def sizes(method: str, settings: dict[str, Any]) -> tuple[int, int, int] | None:
    """Trained values, and the bytes of the default file and of the smallest one; None where they need more to go by.

    Nothing is computed: the model has no memory. What the smallest file does without is tried on a small model.
    """
    prompt = METHODS[method].prompt
    small = {**SHAPE, "vocab_size": 64, "num_hidden_layers": 2}
    whole = {**SHAPE, "vocab_size": 64, "intermediate_size": 64} if prompt else SHAPE  # prompts depend on neither
    settings = {**SETTINGS.get(method, {}), **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _adapted(method, settings, small, "cpu")
        if model is None:
            return None
        tensors = peft.get_peft_model_state_dict(model)
        content: dict[str, Any] = {} if prompt else leave_out(model, "default", tensors, {})[1]
        model = _adapted(method, settings, whole, "cpu" if prompt else "meta")
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        default = _bytes(model)
        model.peft_config["default"].left_out = content.get("left_out")
        return trained, default, _bytes(model) if prompt else _bytes_once(model)


def _adapted(method: str, settings: dict[str, Any], shape: dict[str, Any], device: str) -> Any:
    with torch.device(device):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
        try:
            return peft.get_peft_model(model, METHODS[method].config_class(task_type="CAUSAL_LM", **settings))
        except (ValueError, TypeError):
            return None


def _bytes(model: Any) -> int:
    tensors = peft.get_peft_model_state_dict(model).values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _bytes_once(model: Any) -> int:
    tensors = peft.get_peft_model_state_dict(model)
    slots = locations_of(model, "default")
    once = {(id(slot.owner), slot.attribute): tensors.pop(key) for key, slot in slots.items()}
    return sum(tensor.numel() * tensor.element_size() for tensor in (*once.values(), *tensors.values()))


def table(names: dict[str, str], settings: dict[str, dict[str, Any]]) -> list[str]:
    """A table of all methods.

    Args:
        names: method -> how it is called in the table.
        settings: method -> what its configuration needs.
    """
    lines = ["| method | trained values | default file | smallest file |", "|---|---|---|---|"]
    for method, name in names.items():
        found = sizes(method, settings.get(method, {}))
        if found is not None:
            trained, default, smallest = found
            lines.append(f"| {name} | {trained:,} | {default / 1e6:,.2f} MB | {smallest / 1e6:,.2f} MB |")
    return lines
