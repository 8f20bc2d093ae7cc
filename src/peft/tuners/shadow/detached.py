"""The shadow network as a model of its own."""

from __future__ import annotations

from copy import copy
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from peft.core.model_config import cache_in, cache_name
from peft.tuners.shadow import network


class _Detached:
    """head(projection(backbone(x))): a language model or a classifier of the shadow network alone.

    Args:
        backbone: the network, a model of transformers.
        projection: from its width to that which the head takes; none if None.
        head: what makes logits of a state; without, the states are what comes out.
        is_classification: whether there is one outcome for a text, rather than one for each token.
        input_embeddings: those of another model, where the network has none of its own.
    """

    main_input_name = "input_ids"
    base_model_prefix = "backbone"
    named_parameters: Any  # of transformers' class, see below
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(
        self,
        backbone: Any,
        projection: nn.Module | None = None,
        head: nn.Module | None = None,
        is_classification: bool = False,
        input_embeddings: nn.Module | None = None,
    ):
        from transformers import GenerationConfig

        begin: Any = super().__init__  # of transformers' class, see below
        begin(backbone.config)
        if input_embeddings is not None:
            backbone = copy(backbone)  # which stays without, and shares all else
            backbone._modules = dict(backbone._modules)
            backbone.set_input_embeddings(input_embeddings)
        self.backbone = backbone
        self.shadow_hidden_projection = nn.Identity() if projection is None else projection
        self.head = head
        shared = getattr(head, "weight", None)
        names = [name for name, parameter in self.named_parameters(remove_duplicate=False) if parameter is shared]
        if len(names) > 1:  # saved once
            self._tied_weights_keys = {names[-1]: names[0]}
        self.is_classification = is_classification
        self.generation_config = GenerationConfig.from_model_config(backbone.config)

    def can_generate(self) -> bool:
        return getattr(self, "head", None) is not None and not self.is_classification

    def get_output_embeddings(self) -> Any:
        return None if self.is_classification else self.head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutput

        kwargs["return_dict"] = True
        output = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        states = self.shadow_hidden_projection(output.last_hidden_state)
        if self.head is None:
            return states
        if self.is_classification:
            logits = network.logits(self.head, network.pooled(states, attention_mask))
            loss = None if labels is None else network.classes_loss(logits, labels)
            return SequenceClassifierOutput(loss=loss, logits=logits)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = network.logits(self.head, states[:, kept])
        loss = None if labels is None else network.language_loss(logits, labels)
        cache: Any = {cache_name(self.backbone): cache_in(output)}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **cache)


@lru_cache(maxsize=1)
def _detached_class() -> type:
    from transformers import GenerationMixin, PreTrainedModel

    own = {"__module__": __name__, "__doc__": _Detached.__doc__}
    return type("DetachedShadowModel", (_Detached, PreTrainedModel, GenerationMixin), own)


def __getattr__(name: str) -> Any:
    if name == "DetachedShadowModel":  # its base class is one of transformers, which is not there for all
        return _detached_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
