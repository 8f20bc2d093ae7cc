"""A LoRA on a quantised model, started with what quantising has lost (LoftQ)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn

from peft.checkpoint.files import opened_weights
from peft.core.storage import backend_of
from peft.core.targets import ROOT, target_name
from peft.core.walk import layers_of
from peft.model import PeftModel
from peft.ops.principal import truncated_svd
from peft.tuners.lora.factors import in_two
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.starts import fill_factors


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: PeftModel,
    model_path: str | os.PathLike | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Starts a LoRA on a quantised model with what quantising has lost of the weights (LoftQ, arXiv:2310.08659).

    The weights before quantising are read one at a time.

    Args:
        peft_model: a model quantised with bitsandbytes (or another storage that can be read), with a LoRA.
        model_path: folder or .safetensors file of the model before it was quantised; the model's own, if None.
        adapter_name: the adapter.
        callback: called with the model and a module's name when that has its new factors; False takes them back.

    Raises:
        ValueError: no module with the adapter is quantised, or it is not known where the weights are.
        FileNotFoundError: there is no such file, or a weight is not in it.
    """
    found = layers_of(peft_model, LoraLayer, adapter_name)
    layers = {target_name(path.removeprefix(ROOT), la): la for path, la in found.items() if backend_of(la) is not None}
    if not layers:
        raise ValueError(
            f"Adapter {adapter_name!r} is on no layer that bitsandbytes (or another quantisation) holds; for weights"
            " that are not quantised yet, use init_lora_weights='loftq'."
        )
    base: Any = peft_model.get_base_model()
    source = os.fspath(model_path or getattr(base, "name_or_path", None) or "")
    if not source:
        raise ValueError("model_path is needed: the model does not say where its weights are.")
    if not os.path.exists(source):
        source = snapshot_download(source, allow_patterns=["*.safetensors"], local_files_only=True)
    places, prefix = opened_weights(source), f"{getattr(base, 'base_model_prefix', '')}."
    for name, layer in layers.items():
        wanted = f"{name}.weight"
        key = next((key for key in (wanted, wanted.removeprefix(prefix)) if key in places), None)
        if key is None:
            raise FileNotFoundError(f"{source!r} holds no weight {wanted!r}.")
        original = layer.op.matrix(places[key].get_tensor(key)).float()
        lost = original.to(layer.get_base_weight().device) - layer.op.matrix(layer.get_base_weight()).float()
        before = [factor.clone() for factor in layer.factors(adapter_name)]
        parts = truncated_svd(lost, layer.r[adapter_name])
        fill_factors(layer, adapter_name, *in_two(*parts, layer.scaling[adapter_name]))
        if callback is not None and not callback(peft_model, name):
            fill_factors(layer, adapter_name, *before)
