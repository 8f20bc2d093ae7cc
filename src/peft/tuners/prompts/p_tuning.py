"""P-tuning: virtual tokens that a small network makes while they are trained."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from peft.config import PromptLearningConfig
from peft.core.undo import replaced
from peft.errors import warn
from peft.registry import PeftType
from peft.tuners.prompts.base import VirtualTokens
from peft.values import Fraction, PositiveInt


class PromptEncoderReparameterizationType(str, Enum):
    """The network that makes the virtual tokens: MLP, one for each token on its own, or LSTM, one along the prompt."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptEncoderConfig(PromptLearningConfig, peft_type=PeftType.P_TUNING):
    """P-tuning (arXiv:2103.10385).

    Args:
        encoder_reparameterization_type: one of [`PromptEncoderReparameterizationType`].
        encoder_hidden_size: hidden width of the network; the width of the base model's embeddings if None.
        encoder_num_layers: layers of the LSTM; the MLP always has three.
        encoder_dropout: probability of dropout between the layers of the LSTM.
    """

    encoder_reparameterization_type: str | PromptEncoderReparameterizationType = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: PositiveInt | None = None
    encoder_num_layers: PositiveInt = 2
    encoder_dropout: Fraction = 0.0

    def check(self) -> None:
        if self.encoder_reparameterization_type == "MLP" and self.encoder_num_layers != 2:
            warn("encoder_num_layers has no effect: it is for the LSTM; the network is an MLP.")


class PromptEncoder(VirtualTokens):
    """The prompt is f(embedding): `embedding` [tokens, token_dim] is trained together with the network f, which is

    - MLP: Linear - ReLU - Linear - ReLU - Linear, for each token on its own, or
    - LSTM: a bidirectional LSTM along the prompt, then Linear - ReLU - Linear

    (arXiv:2103.10385). Only f(embedding) is stored; a prompt that is loaded is the table alone.
    """

    def __init__(self, config: Any, word_embeddings: nn.Module | None = None):
        super().__init__(config, word_embeddings)
        self.is_table: bool = config.inference_mode
        self.lstm_head: nn.LSTM | None = None
        if self.is_table:
            return
        width, hidden = config.token_dim, config.encoder_hidden_size
        if config.encoder_reparameterization_type == "LSTM":
            layers, dropout = config.encoder_num_layers, config.encoder_dropout
            self.lstm_head = nn.LSTM(width, hidden, layers, dropout=dropout, bidirectional=True, batch_first=True)
            sizes = [2 * hidden, 2 * hidden, width]
        else:
            sizes = [width, hidden, hidden, width]
        linears = [nn.Linear(before, after) for before, after in pairwise(sizes)]
        self.mlp_head = nn.Sequential(*[part for linear in linears for part in (linear, nn.ReLU())][:-1])

    @classmethod
    def shapes(cls, config: Any, model: nn.Module, word_embeddings: nn.Module) -> dict[str, Any]:
        found = super().shapes(config, model, word_embeddings)
        return {**found, "encoder_hidden_size": config.encoder_hidden_size or found["token_dim"]}

    def forward(self, indices: Tensor) -> Tensor:
        vectors = super().forward(indices)
        if self.is_table:
            return vectors
        return self.mlp_head(vectors if self.lstm_head is None else self.lstm_head(vectors)[0])

    def rows_to_save(self) -> Tensor:
        # What is stored has no dropout in it.
        with nullcontext() if self.lstm_head is None else replaced(self.lstm_head, "training", False):
            return super().rows_to_save()
