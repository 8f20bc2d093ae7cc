"""Context-aware prompt tuning: a prompt of examples, whose embeddings are trained within narrow bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.config import PromptLearningConfig
from peft.core.storage import place_of
from peft.core.storage.sharded import call_whole
from peft.core.storage.shared import part_of, scale_in_forward
from peft.registry import PeftType, TaskType
from peft.tuners.prompts.base import IGNORED, VirtualTokens, embedding_width
from peft.values import NonNegativeFloat

#: An example has four kinds of tokens, counted on from one example to the next: 1 the words before the input, 2 the
#: input, 3 the words before the label, 4 the label. 0 is none of them.
_KINDS = 4


@dataclass
class CPTConfig(PromptLearningConfig, peft_type=PeftType.CPT):
    """Context-aware prompt tuning (arXiv:2410.17222), for `CAUSAL_LM`. The prompt is as long as `cpt_token_ids`.

    Args:
        cpt_token_ids: the tokens of the examples that the prompt starts from.
        cpt_mask: 1 for each of them that attention may see; all if None.
        cpt_tokens_type_mask: the kind of each: in example k (from 0), 4k + 1 for the words before the input, 4k + 2 the
            input, 4k + 3 the words before the label, 4k + 4 the label; 0 for none of them.
        opt_weighted_loss_type: `"decay"` gives earlier labels less weight in the loss.
        opt_loss_decay_factor: weight of a label, as a multiple of that of the one after it.
        opt_projection_epsilon: bound of the change of an input token, as the norm for a width of 2048.
        opt_projection_format_epsilon: the same for the words around it.
        tokenizer_name_or_path: where the ids are from; not used.

    Raises:
        ValueError: another task, lists of different length, or bounds or weights that make no sense.
    """

    cpt_token_ids: list[int] | None = None
    cpt_mask: list[int] | None = None
    cpt_tokens_type_mask: list[int] | None = None
    opt_weighted_loss_type: Literal["none", "decay"] | None = "none"
    opt_loss_decay_factor: NonNegativeFloat = 1.0
    opt_projection_epsilon: NonNegativeFloat = 0.1
    opt_projection_format_epsilon: NonNegativeFloat = 0.1
    tokenizer_name_or_path: str | None = None

    def check(self) -> None:
        if self.task_type != TaskType.CAUSAL_LM:
            raise ValueError(f"{type(self).__name__} only supports task_type = CAUSAL_LM, got {self.task_type}.")
        ids = self.cpt_token_ids = [0] if self.cpt_token_ids is None else list(self.cpt_token_ids)
        self.cpt_mask = [1] * len(ids) if self.cpt_mask is None else list(self.cpt_mask)
        kinds = self.cpt_tokens_type_mask
        self.cpt_tokens_type_mask = [1] * len(ids) if kinds is None else list(kinds)
        lengths = len(ids), len(self.cpt_mask), len(self.cpt_tokens_type_mask)
        if not ids or len({*lengths}) > 1:
            raise ValueError(f"cpt_token_ids, cpt_mask and cpt_tokens_type_mask must be of one length, not {lengths}.")
        self.num_virtual_tokens = len(ids)
        self.num_transformer_submodules = 1


class CPTEmbedding(VirtualTokens):
    """The prompt is embedding + delta (arXiv:2410.17222): `embedding` [tokens, token_dim] are the frozen embeddings of
    the examples, `delta_embedding` of the same shape is trained.

    Before each forward pass the rows of delta are shortened to the norm that their kind of token may have,
    epsilon * sqrt(token_dim / 2048), 0 for labels. What is stored is the sum; a prompt that is loaded is that alone.

    The loss is over labels only, those of the examples as well as those in `labels`. `input_type_mask` [batch, length]
    says of each token of the input what kind it is, as `cpt_tokens_type_mask` does; without, all are labels.

    Raises:
        ValueError: an id that the base model does not have.
    """

    reads_weights = True
    bounds: Tensor

    def __init__(self, config: Any, word_embeddings: Any):
        super().__init__(config, word_embeddings)
        self.config = config
        width = embedding_width(word_embeddings) or config.token_dim
        form, words = config.opt_projection_format_epsilon, config.opt_projection_epsilon
        limits = torch.tensor([(0.0, form, words, form)[kind % _KINDS] for kind in config.cpt_tokens_type_mask])
        self.register_buffer("bounds", limits[:, None] * (width / 2048) ** 0.5, persistent=False)
        self.delta_embedding = nn.Embedding(self.num_virtual_tokens, width)
        nn.init.zeros_(self.delta_embedding.weight)
        self.is_whole = config.inference_mode
        if self.is_whole:
            return
        rows = word_embeddings.weight.shape[0]
        if not 0 <= min(config.cpt_token_ids) <= max(config.cpt_token_ids) < rows:
            raise ValueError(f"cpt_token_ids must be 0 to {rows - 1}, the vocabulary of the base model.")
        ids = torch.tensor(config.cpt_token_ids, device=place_of(word_embeddings)[0])
        with torch.no_grad():
            self.embedding.weight.copy_(call_whole(word_embeddings, ids))

    def requires_grad_(self, requires_grad: bool = True) -> CPTEmbedding:
        super().requires_grad_(requires_grad)
        self.embedding.requires_grad_(False)
        return self

    def forward(self, indices: Tensor) -> Tensor:
        if self.is_whole:
            return super().forward(indices)
        delta = self.delta_embedding.weight
        with torch.no_grad():
            norms = delta.norm(dim=1, keepdim=True)
            # With a little room, so that what has been shortened is not shortened again for its rounding.
            shorter = torch.where(norms > self.bounds * (1 + 1e-6), self.bounds / norms, 1.0)
            scale_in_forward(delta, shorter)
        return super().forward(indices) + F.embedding(indices, torch.where(self.bounds > 0, delta, delta.detach()))

    def load_stored(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_stored(tensors)
        part_of(self.delta_embedding.weight).zero_()

    def mask(self, batch_size: int) -> Tensor:
        return torch.tensor(self.config.cpt_mask).expand(batch_size, -1)

    def labels(self, batch_size: int) -> Tensor:
        return torch.tensor(self.config.cpt_token_ids).expand(batch_size, -1)

    def make_room(self, inputs: dict[str, Any], batch_size: int, seen: int, side: str = "") -> None:
        kinds, labels = inputs.pop("input_type_mask", None), inputs.get("labels")
        if kinds is not None and labels is not None and kinds.shape != labels.shape:
            raise ValueError(f"input_type_mask has the shape {tuple(kinds.shape)}, labels have {tuple(labels.shape)}.")
        super().make_room(inputs, batch_size, seen, side)

    def finish(self, output: Any, labels: Tensor | None, given: dict[str, Any]) -> Any:
        """The output with the loss over labels, weighted as the configuration says."""
        if labels is None:
            return output
        kinds = self._kinds(labels, given)
        labels = labels.masked_fill((kinds == 0) | (kinds % _KINDS != 0), IGNORED)[:, 1:]
        logits = (output[1] if isinstance(output, tuple) else output.logits)[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none", ignore_index=IGNORED)
        counted = labels != IGNORED
        if self.config.opt_weighted_loss_type == "decay":
            losses = losses * self._weights(kinds[:, 1:]).flatten()
        loss = losses.sum() / counted.sum()
        if isinstance(output, tuple):
            return (loss, *output[1:])
        output.loss = loss
        return output

    def _kinds(self, labels: Tensor, given: dict[str, Any]) -> Tensor:
        """The kind of each token of `labels` [batch, length], those of the input counted on from the prompt's."""
        own = torch.tensor(self.config.cpt_tokens_type_mask, device=labels.device)
        after = -(-int(own.max()) // _KINDS) * _KINDS
        kinds = given.get("input_type_mask")
        kinds = torch.full_like(given["labels"], _KINDS) if kinds is None else kinds.to(labels)
        kinds = kinds.where(kinds == 0, kinds + after)
        # With a cache of earlier tokens, the prompt is not among the labels.
        return torch.cat((own.expand(len(labels), -1), kinds), dim=1)[:, -labels.shape[1] :]

    def _weights(self, kinds: Tensor) -> Tensor:
        """decay^(number of labels that come after) for the tokens of each label; [batch, length] as `kinds`."""
        weights = []
        for row in kinds:
            labels = row[(row > 0) & (row % _KINDS == 0)].unique()
            weights.append(self.config.opt_loss_decay_factor ** (labels > row[:, None]).sum(1))
        return torch.stack(weights)
