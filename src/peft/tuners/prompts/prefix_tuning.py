"""Prefix tuning: keys and values of virtual tokens, for every attention layer of the base model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from peft.config import PromptLearningConfig
from peft.registry import PeftType
from peft.tuners.prompts.cache import CachedTokens
from peft.values import PositiveInt


@dataclass
class PrefixTuningConfig(PromptLearningConfig, peft_type=PeftType.PREFIX_TUNING):
    """Prefix tuning (arXiv:2101.00190).

    `token_dim` and `num_attention_heads` are those of the keys: fewer than the queries' in grouped-query attention.

    Args:
        init_weights: None starts at random; `"zero"` starts with keys and values of zero.
        encoder_hidden_size: hidden width of the projection; `token_dim` if None.
        prefix_projection: make the prefix from narrow vectors by a network of two layers while it is trained.
    """

    init_weights: Literal["zero"] | None = None
    encoder_hidden_size: PositiveInt | None = None
    prefix_projection: bool = False


class PrefixEncoder(CachedTokens):
    """The prompt is a cache of keys and values that attention reads before those of the tokens (arXiv:2101.00190):

        K_l = [P_l; X W_K], V_l = [Q_l; X W_V] in every layer l.

    `embedding` [num_virtual_tokens, layers * 2 * token_dim] holds P_1, Q_1, P_2, Q_2, ... of each virtual token. With
    the projection it is Linear(Tanh(Linear(`embedding`))), with `embedding` [num_virtual_tokens, token_dim]; what is
    stored, and loaded, is always the table. An encoder-decoder has the prefix in its decoder's self-attention.
    """

    def __init__(self, config: Any, word_embeddings: nn.Module | None = None):
        super().__init__(config, word_embeddings)
        width, tokens = config.num_layers * 2 * config.token_dim, config.num_virtual_tokens
        self.prefix_projection: bool = config.prefix_projection and not config.inference_mode
        self.embedding = nn.Embedding(tokens, config.token_dim if self.prefix_projection else width)
        if self.prefix_projection:
            hidden = config.encoder_hidden_size
            self.transform = nn.Sequential(nn.Linear(config.token_dim, hidden), nn.Tanh(), nn.Linear(hidden, width))
        if config.init_weights == "zero":
            last: Any = self.transform[-1] if self.prefix_projection else self.embedding
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def forward(self, indices: Tensor) -> Tensor:
        """Keys and values [..., layers * 2 * token_dim] of the virtual tokens with these indices."""
        vectors = super().forward(indices)
        return self.transform(vectors) if self.prefix_projection else vectors

    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        if self.prefix_projection:
            raise ValueError("A prefix that a projection makes (prefix_projection) cannot be given its values.")
        super().load_prompt_embeddings(prompt_embeddings)
