"""What weighs the experts: the classifier, and its weights as the layers of a model read them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from peft.core.call import fact
from peft.xlora.config import XLoraConfig


class XLoraClassifier(nn.Module):
    """What gives each token its weights: hidden states [batch, tokens, hidden] to [batch, tokens, layers, experts].

    `layers` is a stack of linear layers with ReLU and dropout between them.
    """

    def __init__(self, config: XLoraConfig, n_classes: int, n_layers: int):
        super().__init__()
        self.config, self.n_classes, self.n_layers = config, n_classes, n_layers
        outputs = n_classes * (n_layers if config.layerwise_scalings else 1)
        widths = [config.hidden_size or 0, *[config.xlora_size] * (config.xlora_depth - 1), outputs]
        dropout = [nn.Dropout(config.xlora_dropout_p)] if config.xlora_dropout_p else []
        stack: list[nn.Module] = []
        for before, after in pairwise(widths):
            stack += [nn.ReLU(), *dropout] if stack else []
            stack.append(nn.Linear(before, after))
        self.layers = nn.Sequential(*stack)

    @property
    def override_scaling_pass_value(self) -> float:
        """The weight of every expert in the first pass."""
        return self.config.scaling_pass_value

    def forward(self, hidden: Tensor) -> Tensor:
        first: Any = self.layers[0]
        logits = self.layers(hidden.to(first.weight.dtype))
        logits = logits.unflatten(-1, (-1, self.n_classes)).expand(-1, -1, self.n_layers, -1)
        return (logits / self.config.softmax_temperature).softmax(-1) if self.config.enable_softmax else logits


def choose(scalings: Tensor, top_k: int | None, softmax: bool) -> Tensor:
    """The weights of the `top_k` largest along the last dimension, others zero; their softmax if `softmax`."""
    chosen = scalings.topk(top_k or scalings.shape[-1], dim=-1)
    values = chosen.values.softmax(-1) if softmax else chosen.values
    return torch.zeros_like(scalings).scatter(-1, chosen.indices, values)


#: what a call knows: expert -> its weights, [batch, tokens, layers]; a number for all in the first pass
WEIGHTS = "xlora_weights"


def weights_at(layer: int, rows: torch.Size) -> dict[str, Tensor] | float:
    """Expert -> its weights in one layer for an input of this shape, features aside: [*rows, 1]; or a number for all.

    Raises:
        ValueError: the input does not count tokens as the model's own does.
    """
    weights = fact(WEIGHTS)
    if isinstance(weights, float):
        return weights
    return {name: _of_input(shares[:, :, layer, None], rows) for name, shares in weights.items()}


def _of_input(weights: Tensor, rows: torch.Size) -> Tensor:
    batch, tokens, _ = weights.shape
    if rows[:2] == (batch, tokens):
        return weights.view(batch, tokens, *[1] * (len(rows) - 1))
    if rows == (batch * tokens,):  # models that flatten batch and sequence
        return weights.flatten(0, 1)
    if len(rows) == 2 and rows[0] == batch and rows[1] < tokens:  # the last ones, as an output layer may see
        return weights[:, tokens - rows[1] :]
    raise ValueError(
        f"X-LoRA has weights for {batch} samples of {tokens} tokens, and a layer sees an input of shape"
        f" {tuple(rows)} without its features. Leave that layer out of the experts' target_modules."
    )
