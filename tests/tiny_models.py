"""Tiny real transformers models, built from their configurations, and tasks that an adapter learns in a few steps.

Nothing is downloaded. Every factory seeds torch first, so two calls give the same weights; keyword arguments
override fields of the model's configuration. Models come in evaluation mode.
"""

from __future__ import annotations

import os
import re
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

#: of all text models here; 0 pads, 1 ends a sequence, 2 begins one
VOCABULARY = 40
PAD, END, BEGIN = 0, 1, 2


def needs_a_bare_past() -> Any:
    """Skips where transformers takes no past without an attention mask, adapted or not: 4.57 with torch before 2.6."""
    import pytest
    import transformers

    old = torch.__version__ < "2.6" and transformers.__version__ < "5"
    return pytest.mark.skipif(old, reason="transformers takes no past without an attention mask here")


def needs_transformers_5(why: str) -> Any:
    """Skips where transformers is older; `why` says what that cannot do."""
    import pytest
    import transformers

    return pytest.mark.skipif(transformers.__version__ < "5", reason=f"before 5.0, transformers {why}")


def _build(config_class: str, model_class: str, seed: int, **fields: object) -> nn.Module:
    import transformers

    torch.manual_seed(seed)
    special = {"pad_token_id": PAD, "eos_token_id": END, "bos_token_id": BEGIN}
    config = getattr(transformers, config_class)(**{**special, **fields})
    return getattr(transformers, model_class)(config).eval()


def llama(model_class: str = "LlamaForCausalLM", seed: int = 0, **fields: object) -> nn.Module:
    """Two layers of width 32; `q_proj`, `k_proj`, ... are Linear without bias; head not tied."""
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    small |= dict(num_key_value_heads=2, max_position_embeddings=64, vocab_size=VOCABULARY, initializer_range=0.2)
    return _build("LlamaConfig", model_class, seed, **{**small, **fields})


def gpt2(model_class: str = "GPT2LMHeadModel", seed: int = 0, **fields: object) -> nn.Module:
    """Two layers of width 32; `c_attn`, `c_proj`, `c_fc` are transposed Conv1D; head tied to the embedding."""
    small = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=VOCABULARY, initializer_range=0.2)
    small |= dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return _build("GPT2Config", model_class, seed, **{**small, **fields})


def opt(seed: int = 0, **fields: object) -> nn.Module:
    """Two layers of width 32; flattens batch and sequence before `fc1`."""
    small = dict(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32)
    small |= dict(max_position_embeddings=64, vocab_size=VOCABULARY, dropout=0.0, init_std=0.2)
    return _build("OPTConfig", "OPTForCausalLM", seed, **{**small, **fields})


def t5(seed: int = 0, **fields: object) -> nn.Module:
    """An encoder-decoder with two and two layers of width 32; `q`, `k`, `v`, `o` are Linear without bias."""
    small = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=VOCABULARY)
    small |= dict(decoder_start_token_id=PAD, dropout_rate=0.0)
    return _build("T5Config", "T5ForConditionalGeneration", seed, **{**small, **fields})


def bert(model_class: str = "BertForSequenceClassification", seed: int = 0, **fields: object) -> nn.Module:
    """Two layers of width 32 with a head by class: `classifier`, `qa_outputs`, or none for BertModel."""
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    small |= dict(max_position_embeddings=64, vocab_size=VOCABULARY, hidden_dropout_prob=0.0)
    small |= dict(attention_probs_dropout_prob=0.0)
    return _build("BertConfig", model_class, seed, **{**small, **fields})


def whisper(seed: int = 0, **fields: object) -> nn.Module:
    """Speech to text: `input_features` [batch, 8 mel bins, 40 frames]."""
    small = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
    small |= dict(encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=20)
    small |= dict(max_target_positions=32, vocab_size=VOCABULARY, decoder_start_token_id=BEGIN)
    small |= dict(suppress_tokens=None, begin_suppress_tokens=None)
    return _build("WhisperConfig", "WhisperForConditionalGeneration", seed, **{**small, **fields})


def vit(seed: int = 0, **fields: object) -> nn.Module:
    """Pictures to 3 classes: `pixel_values` [batch, 1, 8, 8]."""
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=8)
    small |= dict(patch_size=4, num_channels=1, num_labels=3)
    return _build("ViTConfig", "ViTForImageClassification", seed, **{**small, **fields})


class MLP(nn.Module):
    """A model that is no transformer: `lin0` and `lin1` with a ReLU between."""

    def __init__(self, seed: int = 0, width: int = 16, outputs: int = 4):
        super().__init__()
        torch.manual_seed(seed)
        self.lin0 = nn.Linear(width, 24)
        self.act = nn.ReLU()
        self.lin1 = nn.Linear(24, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin1(self.act(self.lin0(x)))


EXPERTS = 3
#: fields of models with a mixture of experts
MIXTURE: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "initializer_range": 0.2, "num_experts_per_tok": 2,
}  # fmt: skip


def mixtral() -> nn.Module:
    return _build("MixtralConfig", "MixtralForCausalLM", 0, **MIXTURE, num_local_experts=EXPERTS)


def qwen3(**fields: object) -> nn.Module:
    """Qwen3-MoE. Its first layer has no experts, and layers of the names that experts have."""
    own = {"num_experts": EXPERTS, "moe_intermediate_size": 12, "head_dim": 8, "mlp_only_layers": [0]}
    return _build("Qwen3MoeConfig", "Qwen3MoeForCausalLM", 0, **MIXTURE, **{**own, **fields})


def qwen2() -> nn.Module:
    """Qwen2-MoE: a shared expert beside the others, with layers of the same names."""
    own = {"num_experts": EXPERTS, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20}
    return _build("Qwen2MoeConfig", "Qwen2MoeForCausalLM", 0, **MIXTURE, **own)


def tokens(batch: int = 3, length: int = 7, seed: int = 0) -> torch.Tensor:
    """Random token ids [batch, length] without special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def saved_base(model: nn.Module, folder: str | os.PathLike) -> nn.Module:
    """Saves `model` as a base model on disk and returns it loaded from there, so that it knows where it came from."""
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


def byte_tokenizer():
    """A tokenizer made in memory: one token per byte (3 to 258), `<pad>` 0, `</s>` 1, `<s>` 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", "<s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = dict(pad_token="<pad>", eos_token="</s>", bos_token="<s>", padding_side="left")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=["input_ids", "attention_mask"], **special
    )


class Counting(Dataset):
    """For causal models: `input_ids` and `labels` [length] that count on by 1 from a random start."""

    def __init__(self, rows: int = 16, length: int = 8, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(3, VOCABULARY - length, (rows, 1), generator=generator)
        self.rows = starts + torch.arange(length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class OneAnswer(Dataset):
    """For encoder-decoder models: random `input_ids` [length], and the same four `labels` whatever was asked."""

    def __init__(self, rows: int = 16, length: int = 6, seed: int = 0):
        self.questions = tokens(rows, length, seed)
        self.answer = torch.tensor([30, 10, 20, END])

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.questions[index], "labels": self.answer}


def fill_adapter(model: nn.Module, adapter: str = "default", seed: int = 1, scale: float = 0.2) -> nn.Module:
    """Gives the adapter's tensors random values, so that it changes the output as a trained one does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if adapter in name.split("."):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def base_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the base model's parameters, under the names they have without adapters, whether wrapped or not.

    Of a model with adapters the result also holds the adapters' own, under their names.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {
        re.sub(r"\.(base_layer|original_module|token_adapter)(?=\.)", "", name): parameter.detach().clone()
        for name, parameter in inner.named_parameters()
    }


def assert_base_untouched(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    """The base below `model` is bit for bit what `base_state` said before."""
    now = base_state(model)
    for name, value in before.items():
        assert now[name].dtype == value.dtype and torch.equal(now[name], value), name


def state(model: nn.Module) -> dict[str, tuple[torch.Tensor, bool, torch.dtype]]:
    """Everything that a failed call must leave alone: names, values, dtypes and `requires_grad` of all parameters."""
    return {name: (p.detach().clone(), p.requires_grad, p.dtype) for name, p in model.named_parameters()}


def assert_same_state(model: nn.Module, before: dict[str, tuple[torch.Tensor, bool, torch.dtype]]) -> None:
    now = state(model)
    assert list(now) == list(before)
    for name, (value, requires_grad, dtype) in before.items():
        assert torch.equal(now[name][0], value), name
        assert now[name][1:] == (requires_grad, dtype), name
