"""Training of single tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from peft.config import LayerConfig
from peft.core.method import Method
from peft.core.targets import check_target_module_exists
from peft.core.tokens import TrainableTokensLayer
from peft.core.tuner import BaseTuner
from peft.core.tying import input_embedding_name, tied_embedding_modules
from peft.registry import PeftType


@dataclass
class TrainableTokensConfig(LayerConfig, peft_type=PeftType.TRAINABLE_TOKENS):
    """Training of single tokens: rows of an embedding are exchanged for trained ones.

    Modules that share the embedding's weight, such as an output layer, share the rows too.

    Args:
        token_indices: the tokens.
        target_modules: the embedding; None takes that of the model's input.
        init_weights: start with the rows of the embedding, without effect; False starts at random.
    """

    token_indices: list[int] = field(default_factory=list)
    init_weights: bool = True

    stores_embeddings = False

    def check(self) -> None:
        self.token_indices = list(self.token_indices)


class TrainableTokensMethod(Method):
    """Which embedding is meant, and that weights which are tied stay so."""

    def choose_targets(self, config: Any, model_config: dict[str, Any]) -> None:
        config.target_modules = input_embedding_name(self.model)

    def complete_config(self, config: Any, model_config: dict[str, Any]) -> None:
        # Tied weights stay tied, without being asked to.
        tied = tied_embedding_modules(self.model)  # not so if the output layer alone is named
        config.ensure_weight_tying = bool(tied) and check_target_module_exists(config, tied[0]) is not None

    def check_config(self, adapter_name: str, config: TrainableTokensConfig) -> None:
        if not config.token_indices:
            raise ValueError("token_indices is empty: name the tokens to train, by their ids.")

    def layer_settings(self, config: TrainableTokensConfig, key: str) -> dict[str, Any]:
        return {"token_indices": config.token_indices}

    def _group(self, config: Any, key: str) -> tuple[str, ...]:
        tied = tied_embedding_modules(self.model) if config.ensure_weight_tying else []
        return tuple(tied) if key in tied else ()

    def is_for(self, config: Any, key: str, layer: Any) -> bool:
        return layer.group == self._group(config, key)

    def make_layer(
        self, config: TrainableTokensConfig, target: nn.Module, parameter_name: str | None, key: str
    ) -> TrainableTokensLayer:
        return TrainableTokensLayer(target, group=self._group(config, key))

    def tie(self, layer: Any, to: Any, adapter_name: str) -> None:
        if not layer.is_tied:
            bases = (layer.get_base_layer(), to.get_base_layer())
            around = [other for other in self.tuner.adapter_layers() if other.get_base_layer() in bases]
            layer.tie_to(to, apart=len(around) > 2)


class TrainableTokensModel(
    BaseTuner, layer=TrainableTokensLayer, method=TrainableTokensMethod, prefix="trainable_tokens_"
):
    """A model with trained tokens."""
