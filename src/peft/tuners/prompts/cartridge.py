"""Cartridges: keys and values that stand for a long text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft.config import PromptLearningConfig
from peft.registry import PeftType
from peft.tuners.prompts.cache import CachedTokens
from peft.values import NonNegativeInt


@dataclass
class CartridgeConfig(PromptLearningConfig, peft_type=PeftType.CARTRIDGE):
    """Cartridges (arXiv:2506.06266): a cache of keys and values is trained, to stand for a text that is too long.

    `token_dim` and `num_attention_heads` are those of the keys. It starts at random; `initialize_kv_prefix_from_text`
    starts it as what the model makes of the first tokens of a text. `compose_cartridge_adapters` puts several one after
    the other.

    Args:
        num_frozen_tokens: how many of the first virtual tokens stay as they start: attention leans on the first.

    Raises:
        ValueError: there are more of them than virtual tokens.
    """

    num_frozen_tokens: NonNegativeInt = 1

    def check(self) -> None:
        frozen, count = self.num_frozen_tokens, self.num_virtual_tokens
        if count is not None and frozen > count:
            raise ValueError(f"num_frozen_tokens={frozen} must be at most num_virtual_tokens={count}.")


class CartridgeEncoder(CachedTokens):
    """The prompt is a cache of keys and values (arXiv:2506.06266).

    `frozen_embedding` [num_frozen_tokens, layers * 2 * token_dim] (None where there are none) and
    `trainable_embedding`, with as many rows as are left, are one table in files.
    """

    frozen_embedding: nn.Parameter | None

    reads_weights = True

    def __init__(self, config: Any, word_embeddings: nn.Module | None = None):
        super().__init__(config, word_embeddings)
        width, frozen = config.num_layers * 2 * config.token_dim, config.num_frozen_tokens
        self.num_frozen_tokens: int = frozen
        self.num_trainable_tokens: int = config.num_virtual_tokens - frozen
        start = nn.Parameter(torch.randn(frozen, width), requires_grad=False) if frozen else None
        self.register_parameter("frozen_embedding", start)
        self.trainable_embedding = nn.Parameter(torch.randn(self.num_trainable_tokens, width))

    @property
    def weight(self) -> Tensor:
        """The table [num_virtual_tokens, layers * 2 * token_dim]."""
        if self.frozen_embedding is None:
            return self.trainable_embedding
        return torch.cat((self.frozen_embedding, self.trainable_embedding))

    @property
    def indices(self) -> Tensor:
        return torch.arange(self.num_virtual_tokens, device=self.trainable_embedding.device)

    def forward(self, indices: Tensor) -> Tensor:
        """Keys and values [..., layers * 2 * token_dim] of the virtual tokens with these indices."""
        return self.weight[indices]

    def requires_grad_(self, requires_grad: bool = True) -> CartridgeEncoder:
        """Lets the prompt be trained, but for the tokens that stay as they are."""
        self.trainable_embedding.requires_grad_(requires_grad)
        return self

    def stored_tensors(self) -> dict[str, Tensor]:
        return {"prompt_embeddings": self.weight.detach()}

    def load_stored(self, tensors: Mapping[str, Tensor]) -> None:
        table = tensors["prompt_embeddings"]
        if self.frozen_embedding is not None:
            self.frozen_embedding.copy_(table[: self.num_frozen_tokens])
        self.trainable_embedding.copy_(table[self.num_frozen_tokens :])
