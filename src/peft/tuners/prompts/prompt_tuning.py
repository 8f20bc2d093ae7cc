"""Prompt tuning: the embeddings of a few virtual tokens in front of the input are all that is trained."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from peft.config import PromptLearningConfig
from peft.core.storage import place_of
from peft.core.storage.sharded import agree, call_whole
from peft.registry import PeftType
from peft.tuners.prompts.base import VirtualTokens
from peft.untrusted import check_allowed


class PromptTuningInit(str, Enum):
    """How a soft prompt starts: TEXT, from the embeddings of a text; SAMPLE_VOCAB, of random tokens; RANDOM, normal."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(PromptLearningConfig, peft_type=PeftType.PROMPT_TUNING):
    """Prompt tuning (arXiv:2104.08691).

    Args:
        prompt_tuning_init: how the prompt starts, one of [`PromptTuningInit`].
        prompt_tuning_init_text: the text for TEXT; repeated or cut to the length of the prompt.
        tokenizer_name_or_path: the tokenizer for that text.
        tokenizer_kwargs: further arguments for loading it.

    Raises:
        ValueError: TEXT without a text or tokenizer, or `tokenizer_kwargs` without TEXT.
    """

    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict | None = None

    def check(self) -> None:
        start: Any = self.prompt_tuning_init
        from_text = start == "TEXT"
        for name in ("prompt_tuning_init_text", "tokenizer_name_or_path"):
            if from_text and not getattr(self, name):
                raise ValueError(f"prompt_tuning_init='TEXT' needs {name}; got {getattr(self, name)!r}.")
        if self.tokenizer_kwargs and not from_text:
            raise ValueError(f"tokenizer_kwargs has no effect without prompt_tuning_init='TEXT'; got {start.value!r}.")


class PromptEmbedding(VirtualTokens):
    """The prompt is a table `embedding` [num_virtual_tokens * num_transformer_submodules, token_dim] of its own:
    input = [embedding; E(tokens)], where E are the base model's frozen word embeddings (arXiv:2104.08691).
    """

    def __init__(self, config: Any, word_embeddings: nn.Module):
        super().__init__(config, word_embeddings)
        if not config.inference_mode and config.prompt_tuning_init in ("TEXT", "SAMPLE_VOCAB"):
            with torch.no_grad():
                self.embedding.weight.copy_(call_whole(word_embeddings, self._start_tokens(config, word_embeddings)))

    def _start_tokens(self, config: Any, word_embeddings: Any) -> Tensor:
        """Ids of the tokens that the prompt starts from."""
        count, device = self.embedding.num_embeddings, place_of(word_embeddings)[0]
        if config.prompt_tuning_init == "SAMPLE_VOCAB":
            ids = torch.randint(0, word_embeddings.num_embeddings, (count,)).to(device)
            agree([ids], word_embeddings)
            return ids
        from transformers import AutoTokenizer

        for name in ("tokenizer_name_or_path", "tokenizer_kwargs"):
            check_allowed(config, name)
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **(config.tokenizer_kwargs or {}))
        ids = torch.tensor(tokenizer(config.prompt_tuning_init_text)["input_ids"], device=device)
        if not len(ids):
            raise ValueError(f"prompt_tuning_init_text={config.prompt_tuning_init_text!r} has no tokens to start from.")
        return ids.repeat(-(-count // len(ids)))[:count]
