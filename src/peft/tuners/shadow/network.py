"""The small network beside the model: where the model has its blocks, a mirror of it, and the loss of its own."""

from __future__ import annotations

import inspect
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.core.model_config import MODEL_CONFIG_NAMES, read_model_config
from peft.core.storage import place_of
from peft.core.walk import live_modules
from peft.hub import fetch
from peft.untrusted import read_json

#: a setting of the mirror -> what configurations of base models call it
MIRRORED = {
    "shadow_hidden_size": MODEL_CONFIG_NAMES["token_dim"],
    "shadow_intermediate_size": ("intermediate_size", "ffn_dim", "n_inner"),
    "shadow_num_attention_heads": MODEL_CONFIG_NAMES["num_attention_heads"],
}
#: what a checkpoint of a small network and a projection to the width of a larger one calls itself
_PROJECTED = "causal_lm_with_hidden_projection"


def find_blocks(model: nn.Module) -> tuple[str, nn.Module]:
    """The name of the list of a model's decoder blocks, and the module that holds it.

    Raises:
        ValueError: there is none that has as many as the model's configuration says, or the model reads no tokens.
    """
    kind, depth = type(model).__name__, read_model_config(model, "num_layers")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"SHADOW is for models with one stack of decoder blocks; {kind} is an encoder-decoder.")
    for path, module in live_modules(model) if hasattr(model, "get_input_embeddings") else ():
        for name, child in module._modules.items():
            if isinstance(child, nn.ModuleList) and len(child) == depth and hasattr(module, "config"):
                return f"{path}.{name}" if path else name, module
    raise ValueError(
        f"SHADOW goes beside a stack of decoder blocks that reads tokens: a ModuleList of as many as"
        f" config.num_hidden_layers ({depth}). {kind} has none that can be told."
    )


def width_of(model: Any) -> int:
    """Width of a model's hidden states."""
    return int(read_model_config(model, "token_dim"))


def _set(config: Any, names: tuple[str, ...], value: int) -> None:
    name = next((name for name in names if hasattr(config, name)), None)
    if name is None:
        raise ValueError(f"The model has no {' or '.join(names)} to be mirrored; name a model in shadow_model instead.")
    setattr(config, name, value)


def mirror(backbone: Any, settings: Any) -> nn.Module:
    """A fresh network of the kind of `backbone`, as deep and as wide as `settings` (a `ShadowConfig`) say."""
    config, depth = deepcopy(backbone.config), settings.shadow_num_hidden_layers or 1
    _set(config, MODEL_CONFIG_NAMES["num_layers"], depth)
    for field, names in MIRRORED.items():
        if getattr(settings, field) is not None:
            _set(config, names, getattr(settings, field))
    kinds = getattr(config, "layer_types", None)
    if kinds:
        config.layer_types = [*kinds, *[kinds[-1]] * depth][:depth]
    if getattr(config, "max_window_layers", None) is not None:
        config.max_window_layers = min(config.max_window_layers, depth)
    return type(backbone)(config)


def load_network(name: str) -> tuple[nn.Module, nn.Linear | None]:
    """A pretrained network by its name or folder, and the projection that its checkpoint may hold."""
    from transformers import AutoConfig, AutoModel

    path = fetch(name, "config.json")
    content = {} if path is None else read_json(path)
    if content.get("model_type") != _PROJECTED:
        return AutoModel.from_pretrained(name), None
    from safetensors.torch import load_file

    inner = dict(content["shadow_model_config"])
    network = AutoModel.from_config(AutoConfig.for_model(inner.pop("model_type"), **inner))
    path = fetch(name, "model.safetensors")
    weights = {} if path is None else load_file(path)
    key = "shadow_hidden_projection.weight"
    if key not in weights:
        raise ValueError(f"{name!r} is a network with a projection, but has no {key!r} in model.safetensors.")
    start = "shadow_model."
    network.load_state_dict({k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)})
    out_features, in_features = weights[key].shape
    projection = nn.Linear(in_features, out_features, bias=False)
    projection.weight.data.copy_(weights[key])
    return network, projection


def takes_vectors(network: nn.Module) -> bool:
    """Whether a network can be given token embeddings in place of token ids."""
    return "inputs_embeds" in inspect.signature(type(network).forward).parameters


def pooled(states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The state [batch, width] of the last token of each text, from those of all [batch, length, width]."""
    if attention_mask is None:
        return states[:, -1]
    places = torch.arange(attention_mask.shape[-1], device=attention_mask.device)
    last = (attention_mask.ne(0) * places).argmax(dim=-1)
    return states[torch.arange(len(states), device=states.device), last]


def logits(head: Any, states: Tensor) -> Tensor:
    """What a head makes of states, in its own dtype: that of the model may be in halves."""
    return head(states.to(place_of(head)[1] or states.dtype))


def language_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each next token; labels [batch, length], -100 where none counts."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(logits.device))


def classes_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of classification, or of regression where there is one value; logits [batch, classes]."""
    labels = labels.to(logits.device)
    if logits.shape[-1] == 1:
        return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype).flatten())
    if labels.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    return F.cross_entropy(logits, labels.flatten())
