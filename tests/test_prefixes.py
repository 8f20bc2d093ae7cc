"""Prompts of keys and values on models whose layers differ, on models of one's own, and under checkpointing."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from peft import CartridgeConfig, PeftModel, PrefixTuningConfig, get_peft_model
from tiny_models import VOCABULARY, bert, fill_adapter, gpt2, llama, needs_a_bare_past, t5, tokens

SLIDING, FULL = "sliding_attention", "full_attention"
SMALL = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, sliding_window=16, max_position_embeddings=64,
    vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=8, num_kv_shared_layers=2,
)  # fmt: skip


def gemma4(**fields) -> nn.Module:
    """Wide keys in layer 2 (of 0 to 3); layers 4 and 5 take those of layers before them."""
    if not hasattr(transformers, "Gemma4TextConfig"):
        pytest.skip("this version of transformers has no Gemma 4")
    torch.manual_seed(0)
    layers = [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL]
    config = transformers.Gemma4TextConfig(**SMALL, layer_types=layers, global_head_dim=16, **fields)
    return transformers.Gemma4ForCausalLM(config).eval()


def gemma3n() -> nn.Module:
    torch.manual_seed(0)
    more = dict(laurel_rank=4, altup_num_inputs=2, altup_active_idx=0, activation_sparsity_pattern=None)
    config = transformers.Gemma3nTextConfig(**SMALL, layer_types=[SLIDING, FULL] * 3, **more)
    return transformers.Gemma3nForCausalLM(config).eval()


def qwen2_vl() -> nn.Module:
    torch.manual_seed(0)
    text = {name: SMALL[name] for name in list(SMALL)[:6]} | {"num_hidden_layers": 2, "max_position_embeddings": 64}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = dict(depth=1, embed_dim=32, hidden_size=32, num_heads=4, mlp_ratio=1)
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=38, video_token_id=39)
    return transformers.Qwen2VLForConditionalGeneration(config).eval()


@needs_a_bare_past()
@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (gemma4, (2, 16)),
        (lambda: gemma4(attention_k_eq_v=True, num_global_key_value_heads=1), (2, 16)),
        (gemma3n, (2, 8)),
    ],
    ids=["gemma4", "gemma4 with fewer heads", "gemma3n"],
)
@pytest.mark.parametrize("method", [PrefixTuningConfig, CartridgeConfig])
def test_each_layer_that_has_keys_of_its_own_gets_a_prefix_of_its_width(build, shape, method, tmp_path):
    model = get_peft_model(build(), method(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
    fill_adapter(model)
    config = model.peft_config["default"]
    assert (config.num_attention_heads, config.token_dim) == (shape[0], shape[0] * shape[1])
    ids = tokens()
    logits = model(input_ids=ids).logits
    logits.pow(2).sum().backward()
    trained = [p for p in model.prompt_encoder.parameters() if p.grad is not None]
    reached = torch.cat([p.grad.view(len(p), 6, -1).abs().sum((0, 2))[None] for p in trained]).sum(0) > 0
    assert reached.tolist() == [True] * 4 + [False] * 2
    one_by_one = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert torch.equal(one_by_one[:, ids.shape[1]], logits[:, -1].argmax(-1))
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(build(), tmp_path)(input_ids=ids).logits, logits)


def test_layers_that_are_wider_than_the_table_in_a_file_go_without():
    fields = dict(num_attention_heads=2, token_dim=16, num_layers=6)
    model = get_peft_model(gemma4(), PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", **fields))
    cache = model.get_prompt(1)
    assert [layer.keys is not None for layer in cache.layers[:4]] == [True, True, False, True]
    assert model(input_ids=tokens()).logits.isfinite().all()


class Own(nn.Module):
    """A model of one's own around a decoder: no `get_input_embeddings`, and no one module is the word embedding."""

    def __init__(self):
        super().__init__()
        self.config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        self.inner = llama()
        self.positions, self.sides = nn.Embedding(64, 32), nn.Embedding(2, 32)

    def forward(self, input_ids, attention_mask=None, past_key_values=None):
        embeds = self.inner.get_input_embeddings()(input_ids) + self.positions(input_ids) + self.sides(input_ids % 2)
        return self.inner(inputs_embeds=embeds, attention_mask=attention_mask, past_key_values=past_key_values).logits


def test_a_model_without_a_getter_for_embeddings_needs_none():
    torch.manual_seed(0)
    model = get_peft_model(Own(), PrefixTuningConfig(num_virtual_tokens=3, task_type="FEATURE_EXTRACTION"))
    model(input_ids=tokens(), attention_mask=torch.ones_like(tokens())).sum().backward()
    assert model.prompt_encoder["default"].embedding.weight.grad.any()


CHECKPOINTED = {
    "llama": ("CAUSAL_LM", llama), "gpt2": ("CAUSAL_LM", gpt2), "qwen2-vl": ("CAUSAL_LM", qwen2_vl),
    "t5": ("SEQ_2_SEQ_LM", t5), "bert": ("SEQ_CLS", bert), "gemma4": ("CAUSAL_LM", gemma4),
}  # fmt: skip


@pytest.mark.skipif(
    not hasattr(GradientCheckpointingLayer, "_can_checkpoint_with_cache"),
    reason="older transformers take the cache from checkpointed layers",
)
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointing_changes_nothing(name):
    task, build = CHECKPOINTED[name]
    inputs = {"input_ids": tokens(), "attention_mask": torch.ones_like(tokens())}
    inputs["labels"] = torch.tensor([0, 1, 1]) if task == "SEQ_CLS" else tokens()
    outcomes = []
    for checkpointed in (False, True):
        torch.manual_seed(2)
        config = PrefixTuningConfig(num_virtual_tokens=3, task_type=task, prefix_projection=True)
        model = get_peft_model(build(), config)
        if checkpointed:  # as Trainer does
            model.gradient_checkpointing_enable()
        before = {key: dict(module.__dict__) for key, module in model.named_modules()}
        loss = model.train()(**inputs).loss
        assert {key: module.__dict__.keys() for key, module in model.named_modules()} == {
            key: attributes.keys() for key, attributes in before.items()
        }
        loss.backward()
        outcomes.append([loss, *(p.grad for p in model.prompt_encoder.parameters())])
    assert all(gradient is not None and gradient.any() for gradient in outcomes[0])
    torch.testing.assert_close(*outcomes)


@needs_a_bare_past()
def test_re_entrant_checkpointing_is_refused():
    model = get_peft_model(llama(), PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant"):
        model(input_ids=tokens())
    model.eval()(input_ids=tokens())
