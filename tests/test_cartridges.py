"""Cartridges: tokens that stay as they are, starts from texts and caches, composition, training what was loaded."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import peft
import tiny_models as tiny


def cartridge(tokens: int = 4, base=None, **settings) -> peft.PeftModel:
    config = peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens, **settings)
    return peft.get_peft_model(base or tiny.llama(), config).eval()


def encoder_of(model):
    return model.prompt_encoder["default"]


def step(model) -> None:
    ids = tiny.tokens()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("frozen", [0, 1, 3])
def test_the_first_tokens_stay_as_they_start(frozen):
    model = cartridge(num_frozen_tokens=frozen)
    before = encoder_of(model).weight.detach().clone()
    for _ in range(2):
        step(model)
        model.set_adapter("default")
    after = encoder_of(model).weight.detach()
    changed = (after != before).any(dim=1)
    assert changed.tolist() == [False] * frozen + [True] * (4 - frozen)


def test_it_starts_as_the_reference_does_from_the_same_seed():
    torch.manual_seed(5)
    model = cartridge(num_frozen_tokens=1)
    base = tiny.llama()
    torch.manual_seed(5)
    expected = torch.randn(1, 64), torch.randn(3, 64)
    torch.manual_seed(5)
    model = cartridge(base=base, num_frozen_tokens=1)
    assert encoder_of(model).weight.shape == (4, 2 * 2 * 16)
    torch.testing.assert_close(encoder_of(model).weight.detach(), torch.cat(expected))


@tiny.needs_a_bare_past()
@pytest.mark.parametrize(
    "config",
    [
        peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_what_was_loaded_can_be_trained(config, tmp_path):
    model = peft.get_peft_model(tiny.llama(), config).eval()
    step(model)
    model.save_pretrained(tmp_path)
    ids = tiny.tokens()
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True).eval()
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    before = loaded(ids).logits.detach()
    step(loaded)
    assert not torch.allclose(loaded(ids).logits, before)
    frozen = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    frozen.load_adapter(tmp_path, "more", is_trainable=True)
    frozen.set_adapter("more")
    step(frozen)


def test_a_projection_is_not_in_the_file(tmp_path):
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True)
    model = peft.get_peft_model(tiny.llama(), config)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"prompt learning adapter.*trainable"):
        peft.PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True)
    with pytest.raises(ValueError, match="prefix_projection"):
        peft.initialize_kv_prefix_from_past_key_values(model, past_key_values=[])


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize("chat", [False, True])
def test_a_text_in_the_prompt_is_a_text_before_the_input(build, chat):
    """The model continues as if the text had been read."""
    base, tokenizer = build(vocab_size=300), tiny.byte_tokenizer()
    text = "a long text that is not short"
    read = tokenizer(text, return_tensors="pt")["input_ids"][:, :6]
    ids = tiny.tokens(batch=1)
    expected = base(torch.cat((read, ids), dim=1)).logits[:, 6:]
    model = cartridge(6, base=base)
    table = peft.initialize_kv_prefix_from_text(model, tokenizer, text=text, use_chat_template=chat)
    torch.testing.assert_close(encoder_of(model).weight.detach(), table)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    again = cartridge(6, base=build(vocab_size=300))
    cache = build(vocab_size=300)(read, use_cache=True).past_key_values
    peft.initialize_kv_prefix_from_past_key_values(again, past_key_values=cache)
    torch.testing.assert_close(encoder_of(again).weight, encoder_of(model).weight)
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    torch.testing.assert_close(peft.prompt_embeddings_from_past_key_values(pairs, num_virtual_tokens=6), table)


def keys(batch: int = 1, heads: int = 2, tokens: int = 5, width: int = 8) -> torch.Tensor:
    return torch.randn(batch, heads, tokens, width)


@pytest.mark.parametrize(
    "cache, message",
    [
        ([], "The cache is empty"),
        ([(keys(2), keys(2))], "Keys and values of one text"),
        ([(keys(), keys(heads=1))], "as many heads"),
        ([(keys(tokens=3), keys())], "4 tokens is asked for, but the cache holds 3"),
    ],
)
def test_caches_that_are_none(cache, message):
    with pytest.raises(ValueError, match=message):
        peft.prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=4)
    with pytest.raises(TypeError, match="must be a cache of transformers"):
        peft.prompt_embeddings_from_past_key_values(3, num_virtual_tokens=4)


def test_a_cache_that_has_forgotten_its_beginning():
    import transformers

    base = tiny._build("MistralConfig", "MistralForCausalLM", 0, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=40, sliding_window=4)  # fmt: skip
    cache = transformers.DynamicCache(config=base.config)
    base(tiny.tokens(batch=1, length=9), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="seen 9 tokens and holds the last 3"):
        peft.prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=2)


def test_starts_that_do_not_fit():
    model, tokenizer = cartridge(6, base=tiny.llama(vocab_size=300)), tiny.byte_tokenizer()
    before = encoder_of(model).weight.detach().clone()
    with pytest.raises(ValueError, match="6 tokens is asked for, but the text has 2"):
        peft.initialize_kv_prefix_from_text(model, tokenizer, text="ab", use_chat_template=False)
    with pytest.raises(ValueError, match="the text has 3"):
        peft.initialize_kv_prefix_from_text(model, tokenizer, text="abcdefghij", use_chat_template=False, max_length=3)
    with pytest.raises(ValueError, match=r"The prompt has the shape \(6, 64\), got \(5, 64\)"):
        peft.initialize_kv_prefix_from_text(model, tokenizer, text="abcdefghij", num_virtual_tokens=5)
    with pytest.raises(ValueError, match="'other' not found"):
        peft.initialize_kv_prefix_from_text(model, tokenizer, text="abcdefghij", adapter_name="other")
    assert torch.equal(encoder_of(model).weight, before)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match="must be a CARTRIDGE or PREFIX_TUNING"):
        peft.initialize_kv_prefix_from_text(
            peft.get_peft_model(tiny.llama(vocab_size=300), config), tokenizer, text="abcdefghij"
        )


@tiny.needs_a_bare_past()
@pytest.mark.parametrize("safe", [True, False])
def test_composition(tmp_path, safe):
    models = [cartridge(3, num_frozen_tokens=2), cartridge(4)]
    for name, model in zip("ab", models, strict=True):
        torch.nn.init.normal_(encoder_of(model).trainable_embedding)
        model.save_pretrained(tmp_path / name)
    places = [tmp_path / "a", tmp_path / "b"]
    peft.compose_cartridge_adapters(places, output_path=tmp_path / "c", safe_serialization=safe)
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "c")
    config = loaded.peft_config["default"]
    assert (config.num_virtual_tokens, config.num_frozen_tokens) == (7, 2)
    expected = torch.cat([load_file(place / "adapter_model.safetensors")["prompt_embeddings"] for place in places])
    torch.testing.assert_close(encoder_of(loaded).weight, expected)
    loaded(tiny.tokens())


def test_what_cannot_be_composed(tmp_path):
    cartridge(3).save_pretrained(tmp_path / "a")
    cartridge(3, base=tiny.llama(num_hidden_layers=1)).save_pretrained(tmp_path / "b")
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft.get_peft_model(tiny.llama(), prefix).save_pretrained(tmp_path / "c")
    for others, message in ((["a"], "At least 2"), (["a", "b"], "num_layers is 2"), (["a", "c"], "is no CARTRIDGE")):
        with pytest.raises(ValueError, match=message):
            peft.compose_cartridge_adapters([tmp_path / one for one in others], output_path=tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_more_frozen_than_there_are():
    with pytest.raises(ValueError, match="num_frozen_tokens=3 must be at most num_virtual_tokens=2"):
        peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, num_frozen_tokens=3)


@tiny.needs_a_bare_past()
def test_models_that_want_another_cache(monkeypatch):
    seen = []

    def swapped(layers):
        seen.append([tuple(layer.shape) for layer in layers])
        return tuple((layer[1], layer[0]) for layer in layers)

    model, ids = cartridge(4), tiny.tokens(batch=2)
    before = model(ids).logits
    monkeypatch.setitem(peft.TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING, "llama", swapped)
    assert not torch.allclose(model(ids).logits, before)
    assert seen == [[(2, 2, 2, 4, 8)] * 2]
    layers = tuple(torch.arange(2 * 3 * 2 * 4 * 5.0).view(2, 3, 2, 4, 5) + 1000 * index for index in range(2))
    pairs = peft.bloom_model_postprocess_past_key_value(layers)
    assert [tuple(one.shape) for one in pairs[0]] == [(6, 5, 4), (6, 4, 5)]
    torch.testing.assert_close(pairs[1][0][4], layers[0][1, 2, 0].T)
    torch.testing.assert_close(pairs[0][1][1], layers[1][0, 0, 1])
