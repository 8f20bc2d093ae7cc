"""Intruder dimensions: directions that fine-tuning has added to a weight, and what goes with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peft.core.combine import add_combined, check_combination, combined_config, layers_with
from peft.ops.principal import truncated_svd
from peft.tuners.lora.factors import base_blocks, load, of_svd, product
from peft.tuners.lora.model import LoraModel


def reduce_intruder_dimension(
    peft_model: Any,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], object] | None = print,
) -> None:
    """Adds, and makes active, a LoRA that forgets less of what the base model knew (arXiv:2410.21228).

    An intruder is one of the leading singular vectors of a fine-tuned weight W + s B A that is like none of W's. The
    new adapter is the LoRA of the same rank that is nearest to the change with every intruder's part u sigma v^T of the
    fine-tuned weight shrunk to `mitigation_lambda` of it.

    Args:
        peft_model: a `PeftModel` with a LoRA; only for LoRA.
        old_adapter_name: the LoRA; it stays as it is.
        new_adapter_name: name of the new one.
        top_k: how many of the leading singular vectors to look at.
        threshold_epsilon: the absolute cosine similarity to all vectors of W below which a vector is an intruder.
        mitigation_lambda: what is left of the intruders: 1 leaves them as they are, 0 takes them out. The lower it is,
            the more of the old knowledge comes back, and the more of the new task is lost.
        logging_sink: called with a line for each layer; None for silence.

    Raises:
        ValueError: the model has no LoRA, there is no such adapter or the new name is taken, or adapters are merged.
    """
    tuner = peft_model.base_model
    if not isinstance(tuner, LoraModel):
        raise ValueError(f"Intruder dimensions can be reduced in LoRA models only, not in {type(tuner).__name__}.")
    method = tuner.method(tuner.peft_config.get(old_adapter_name))
    check_combination(method, [old_adapter_name], [1.0], new_adapter_name)
    layers: dict[Any, str] = layers_with(method, [old_adapter_name])
    if any(layer.merged for layer in layers):
        raise ValueError("Adapters are merged, so the base weights are not known; call unmerge_adapter() first.")
    tensors = {}
    for layer, key in layers.items():
        change, found = _without_intruders(layer, old_adapter_name, top_k, threshold_epsilon, mitigation_lambda)
        if logging_sink is not None:
            logging_sink(f"{key}: {found} intruders among the first {top_k} directions")
        rank = load(layer, old_adapter_name)[0].shape[1]
        tensors[layer] = of_svd(layer, *truncated_svd(change / layer.scaling[old_adapter_name], rank), rank)
        if layer.lora_bias[old_adapter_name]:
            tensors[layer]["lora_B.bias"] = layer.lora_B[old_adapter_name].bias
    config = combined_config(method, [old_adapter_name], layers)
    config.init_lora_weights = True
    add_combined(method, new_adapter_name, [old_adapter_name], config, tensors)
    peft_model.set_adapter(new_adapter_name)
    if logging_sink is not None:
        logging_sink(f"Adapter {new_adapter_name!r} is active now.")


@torch.no_grad()
def _without_intruders(layer: Any, name: str, top_k: int, epsilon: float, left: float) -> tuple[Tensor, int]:
    """A layer's change [blocks, out, in] with its intruders shrunk, and how many there were."""
    change = product(layer, name)
    weight = base_blocks(layer).to(change.dtype)
    before = torch.linalg.svd(weight, full_matrices=False).U
    u, s, vh = truncated_svd(weight + change, top_k)
    intruders = (before.mT @ u).abs().amax(dim=1) < epsilon
    return change - u @ ((1 - left) * (s * intruders)[..., None] * vh), int(intruders.sum())
