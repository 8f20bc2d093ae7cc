"""Tied embeddings: what a warning says of them, and what ensure_weight_tying keeps the same."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import peft
import tiny_models as tiny
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.core.tokens import TrainableTokensLayer
from tiny_models import gpt2, llama, t5

IDS = torch.tensor([[1, 5, 9, 3], [2, 7, 4, 8]])


def tied_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def randomised(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def test_one_adapter_serves_both_tied_modules(tmp_path):
    config = peft.LoraConfig(target_modules=["embed_tokens", "q_proj"], r=2, ensure_weight_tying=True)
    model = randomised(peft.get_peft_model(tied_llama(), config))
    embedding, head = model.base_model.model.model.embed_tokens, model.base_model.model.lm_head
    torch.testing.assert_close(head.get_delta_weight("default"), embedding.get_delta_weight("default"))
    assert not [name for name, parameter in model.named_parameters() if "lm_head" in name and parameter.requires_grad]
    expected = model(IDS).logits

    model(IDS, labels=IDS).loss.backward()
    gradient = embedding.lora_embedding_A["default"].grad
    assert gradient.abs().sum(0).count_nonzero() == 32, (
        "the output layer sees every token, so each column has a gradient"
    )

    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tied_llama(), tmp_path)
    torch.testing.assert_close(loaded(IDS).logits, expected)
    assert "base_model.model.lm_head.lora_A.weight" in peft.load_peft_weights(tmp_path)


@pytest.mark.parametrize("target", ["lm_head", "model.embed_tokens"])
def test_the_base_weight_of_tied_modules_is_stored_where_the_embedding_is_named(target, tmp_path):
    config = peft.LoraConfig(target_modules=[target, "q_proj"], r=2, ensure_weight_tying=True)
    model = randomised(peft.get_peft_model(tied_llama(), config))
    model.save_pretrained(tmp_path)
    assert not [key for key in peft.load_peft_weights(tmp_path) if "base_layer" in key]
    loaded = peft.PeftModel.from_pretrained(tied_llama(), tmp_path)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("config", [LoraConfig, peft.LoHaConfig])
def test_the_base_weight_is_stored_without_what_is_merged_into_it(config, target, tmp_path):
    model = randomised(get_peft_model(tied_llama(), config(r=2, target_modules=[target]))).eval()
    expected = model(IDS).logits
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tied_llama(), tmp_path)
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    merged = model(IDS).logits
    model.load_adapter(tmp_path, "b")
    assert torch.equal(model(IDS).logits, merged)


def test_an_adapter_on_one_of_two_tied_modules_warns_and_merging_unties_them():
    with pytest.warns(UserWarning, match="lm_head.*tied"):
        model = peft.get_peft_model(tied_llama(), peft.LoraConfig(target_modules=["embed_tokens"], r=2))
    expected = randomised(model)(IDS).logits
    model.merge_adapter()
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    base = model.base_model.model
    assert base.lm_head.weight is base.model.embed_tokens.base_layer.weight
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged.lm_head.weight, tied_llama().lm_head.weight)


def test_modules_trained_in_full_stay_one_tensor():
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], r=2, ensure_weight_tying=True)
    model = peft.get_peft_model(tied_llama(), config)
    base = model.base_model.model
    assert base.lm_head.modules_to_save["default"].weight is base.model.embed_tokens.modules_to_save["default"].weight
    merged = randomised(model).merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_trained_tokens_count_for_the_tied_output_layer_too():
    model = peft.get_peft_model(
        tied_llama(), peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 5], r=2)
    )
    before = model(IDS).logits
    with torch.no_grad():
        model.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta["default"].add_(1.0)
    after = model(IDS).logits
    changed = (after != before).flatten(0, 1).any(0)
    assert changed[3] and changed[5]
    torch.testing.assert_close(model.merge_and_unload()(IDS).logits, after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    ],
    ids=["adapted", "in full", "tokens"],
)
def test_tied_modules_are_known_as_such_while_one_of_them_has_a_weight_of_its_own(settings):
    keys = []
    for merge in (False, True):
        model = get_peft_model(tied_llama(), LoraConfig(r=2, target_modules=["embed_tokens"]), "a")
        if merge:
            model.merge_adapter()
        model.add_adapter("b", LoraConfig(r=2, **settings))
        keys.append(list(model.state_dict()))
    assert keys[0] == keys[1]


def test_tying_a_model_that_ties_nothing_says_so():
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    adapter = peft.LoraConfig(target_modules=["q_proj"], ensure_weight_tying=True)
    with pytest.warns(peft.PeftWarning, match="ties no weights"):
        peft.get_peft_model(LlamaForCausalLM(config), adapter)
    config.tie_word_embeddings = True
    with pytest.warns(peft.PeftWarning, match="model.embed_tokens, lm_head, which share a weight, are no targets"):
        peft.get_peft_model(LlamaForCausalLM(config), adapter)


def test_merging_adapters_that_are_the_same_keeps_the_weight_one_tensor():
    config = peft.LoraConfig(target_modules=["embed_tokens", "q_proj"], r=2, ensure_weight_tying=True)
    model = randomised(peft.get_peft_model(tied_llama(), config))
    expected = model(IDS).logits
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_an_encoder_decoder_has_one_adapter_on_all_its_embeddings(tmp_path):
    def base():
        return tiny.t5(tie_word_embeddings=True)

    config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["shared"], ensure_weight_tying=True)
    model = tiny.fill_adapter(peft.get_peft_model(base(), config)).eval()
    plain, given = base(), dict(input_ids=IDS, decoder_input_ids=IDS)
    expected = model(**given).logits
    assert not torch.allclose(expected, plain(**given).logits, atol=1e-3)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2, "A and B of `shared`; the other modules have no parameters of their own"

    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path, is_trainable=True).eval()
    torch.testing.assert_close(loaded(**given).logits, expected)
    assert [name for name, parameter in loaded.named_parameters() if parameter.requires_grad] == trained
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**given).logits, expected, rtol=1e-4, atol=1e-4)
    assert merged.lm_head.weight is merged.shared.weight


@tiny.needs_transformers_5("has one embedding in several places of T5")
def test_rows_of_the_embedding_that_a_model_says_it_has_are_those_of_all_it_is_tied_to():
    """It need not be the first of them."""
    base = t5()
    base.get_input_embeddings = lambda: base.encoder.embed_tokens
    rows = {"encoder.embed_tokens": [3]}
    model = get_peft_model(base, LoraConfig(target_modules=["q"], trainable_token_indices=rows))
    layers = {key: m for key, m in model.named_modules() if isinstance(m, TrainableTokensLayer)}
    assert sum("delta" in name for name, _ in model.named_parameters()) == 1 < len(layers)
    status = [layer for layer in model.get_layer_status() if "token" in layer.name]
    assert {f"base_model.{layer.name}" for layer in status} == set(layers)
    before = layers["base_model.model.encoder.embed_tokens.token_adapter"].trainable_tokens_original["default"].clone()
    next(iter(layers.values())).trainable_tokens_delta["default"].data.add_(1.0)
    assert all(torch.equal(layer.trainable_tokens_original["default"], before) for layer in layers.values())


def test_tokens_of_the_output_layer_alone_leave_the_embedding():
    config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices={"lm_head": [3]}, r=2)
    model = peft.get_peft_model(tied_llama(), config)
    assert type(model.base_model.model.model.embed_tokens) is torch.nn.Embedding
    before = model(IDS).logits
    with torch.no_grad():
        model.base_model.model.lm_head.token_adapter.trainable_tokens_delta["default"].add_(1.0)
    changed = (model(IDS).logits != before).flatten(0, 1).any(0)
    assert changed.nonzero().flatten().tolist() == [3]


def test_tokens_of_their_own_on_both_tied_modules_merge_into_weights_of_their_own():
    rows = {"embed_tokens": [0, 2], "lm_head": [3, 4]}
    config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=rows)
    model = randomised(peft.get_peft_model(tied_llama(), config))
    with torch.no_grad():
        want = model(IDS).logits
        model.merge_adapter()
        torch.testing.assert_close(model(IDS).logits, want)
        torch.testing.assert_close(model.merge_and_unload()(IDS).logits, want)


def test_an_output_layer_trained_in_full_has_no_trained_tokens_beside(tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 4], modules_to_save=["lm_head"])
    model = randomised(peft.get_peft_model(tied_llama(), config))
    model.save_pretrained(tmp_path)
    other = peft.get_peft_model(tied_llama(), config)
    other.load_adapter(tmp_path, "other")
    other.set_adapter("other")
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(IDS).logits, model(IDS).logits)


# ---- trained rows of tied modules, beside other adapters on them



def t5_of_one_embedding():
    """As in transformers before 5.0: one module under three names."""
    model = t5()
    model.encoder.embed_tokens = model.decoder.embed_tokens = model.shared
    return model


ROWS = {
    "both named": (gpt2, ["c_attn"], {"wte": [1, 2], "lm_head": [1, 2]}),
    "other rows": (gpt2, ["c_attn"], {"wte": [1, 2], "lm_head": [2, 3]}),
    "LoRA on the head": (gpt2, ["lm_head"], [1, 2]),
    "LoRA on the head, both named": (lambda: llama(tie_word_embeddings=True), ["q_proj"], {"embed_tokens": [1, 2]}),
    "LoRA on T5's head": (t5, ["lm_head", "q"], {"shared": [1, 2]}),
    "T5 of one embedding": (t5_of_one_embedding, ["lm_head", "q"], {"shared": [1, 2]}),
    "its second place": (t5_of_one_embedding, ["q"], {"encoder.embed_tokens": [1, 2]}),
}


several_embeddings = tiny.needs_transformers_5("has one embedding in several places of T5")


def with_rows(name: str, **fields):
    build, targets, rows = ROWS.get(name, (t5, ["shared", "k"], {"embed_tokens": [1, 2]}))
    config = LoraConfig(target_modules=targets, trainable_token_indices=rows, init_lora_weights=False, **fields)
    model = get_peft_model(build(), config).eval()
    torch.manual_seed(3)
    for parameter in (p for n, p in model.named_parameters() if "trainable_tokens" in n):
        parameter.data += torch.randn_like(parameter)
    return model


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    ids = torch.tensor([[3, 1, 2, 7]])
    inputs = {"input_ids": ids, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}
    return model(**inputs).logits


@pytest.mark.parametrize("name", [*ROWS, pytest.param("rows of its places", marks=several_embeddings)])
def test_trained_rows_of_tied_modules_keep_the_laws(name, tmp_path):
    build = ROWS.get(name, (t5,))[0]
    base, model = logits_of(build()), with_rows(name)
    out = logits_of(model)
    for _ in range(2):
        with model.disable_adapter():
            assert torch.equal(logits_of(model), base)
        model.merge_adapter()
        torch.testing.assert_close(logits_of(model), out, rtol=1e-3, atol=1e-3)
        with model.disable_adapter():
            assert torch.equal(logits_of(model), base)
        torch.testing.assert_close(logits_of(model), out, rtol=1e-3, atol=1e-3)
        model.unmerge_adapter()
        assert torch.equal(logits_of(model), out)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(PeftModel.from_pretrained(build(), tmp_path)), out)
    if "T5" not in name or transformers.__version__ >= "5":  # before, T5's output has another scale when it is untied
        torch.testing.assert_close(logits_of(copy.deepcopy(model).merge_and_unload()), out, rtol=1e-3, atol=1e-3)
    assert torch.equal(logits_of(model.unload()), base)


def a_lora(**fields) -> LoraConfig:
    return LoraConfig(**{"target_modules": ["k"], "init_lora_weights": False, **fields})


def the_t5():
    torch.manual_seed(0)
    return t5()


ON_T5 = {
    "LoRA": {"target_modules": ["embed_tokens"]},
    "rows": {"trainable_token_indices": {"embed_tokens": [1, 2]}},
    "in full": {"modules_to_save": ["encoder.embed_tokens"]},
}


@several_embeddings
@pytest.mark.parametrize("what", ON_T5)
def test_an_embedding_and_its_places_have_adapters_in_any_order_or_none(what):
    shared, places = a_lora(target_modules=["shared"]), a_lora(**ON_T5[what])
    for first, second in ((shared, places), (places, shared)):
        model = get_peft_model(the_t5(), copy.deepcopy(first), "first").eval()
        out, names = logits_of(model), [name for name, _ in model.named_modules()]
        with pytest.raises(ValueError, match=r"name the (same module for both|input embedding)"):
            model.add_adapter("second", copy.deepcopy(second))
        assert [name for name, _ in model.named_modules()] == names
        assert torch.equal(logits_of(model), out)
        if first is shared:
            assert vars(model.unload()).keys() == vars(t5()).keys()
            model = get_peft_model(the_t5(), copy.deepcopy(first), "first").eval()
        model.delete_adapter("first")
        if what == "in full" and first is places:
            continue  # the wrapper stays, and could not be the embedding
        base = the_t5()
        torch.manual_seed(1)
        model.add_adapter("second", copy.deepcopy(second))
        torch.manual_seed(1)
        alone = get_peft_model(base, copy.deepcopy(second), "second").eval()
        model.set_adapter("second")
        assert torch.equal(logits_of(model), logits_of(alone))
        mine, other = (get_peft_model_state_dict(m, adapter_name="second") for m in (model, alone))
        assert mine.keys() == other.keys()
        plain = model.unload()
        assert plain.encoder.embed_tokens is not plain.shared
        assert plain.encoder.embed_tokens.weight is plain.shared.weight


def test_rows_of_a_target_are_refused_by_whatever_name():
    base = t5_of_one_embedding()
    with pytest.raises(TypeError, match=r"'shared' is in target_modules and .* \(as 'encoder.embed_tokens'\)"):
        get_peft_model(base, a_lora(target_modules=["shared"], trainable_token_indices={"embed_tokens": [1]}))


@several_embeddings
def test_rows_of_an_embedding_and_lora_on_it_do_without_an_order():
    fields = {"rows": {"trainable_token_indices": [1, 2]}, "lora": {"target_modules": ["shared"]}}
    outs = {}
    for order in (["rows", "lora"], ["lora", "rows"]):
        model = get_peft_model(the_t5(), a_lora(**fields[order[0]]), order[0])
        model.add_adapter(order[1], a_lora(**fields[order[1]]))
        for name, parameter in model.named_parameters():
            if any(f".{adapter}" in name for adapter in order):
                generator = torch.Generator().manual_seed(len(parameter))
                parameter.data = torch.randn(parameter.shape, generator=generator)
        for adapter in order:
            model.set_adapter(adapter)
            outs.setdefault(adapter, []).append(logits_of(model.eval()))
            model.merge_adapter()
            torch.testing.assert_close(logits_of(model), outs[adapter][-1], rtol=1e-3, atol=1e-3)
            model.unmerge_adapter()
    for one, other in outs.values():
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("tying", [False, True])
def test_equal_rows_of_tied_modules_are_one_parameter_and_stay_tied(tying):
    model = with_rows("both named", ensure_weight_tying=tying)
    assert len([n for n, _ in model.named_parameters() if "trainable_tokens" in n]) == 1
    assert [key for key in get_peft_model_state_dict(model) if "tokens" in key] == [
        "base_model.model.transformer.wte.token_adapter.trainable_tokens_delta"
    ]
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.transformer.wte.weight


def test_other_rows_of_tied_modules_cannot_be_kept_tied():
    base = gpt2()
    names = [name for name, _ in base.named_modules()]
    config = LoraConfig(trainable_token_indices={"wte": [1], "lm_head": [2]}, ensure_weight_tying=True)
    with pytest.raises(ValueError, match=r"transformer.wte: \[1\], lm_head: \[2\]"):
        get_peft_model(base, config)
    assert [name for name, _ in base.named_modules()] == names


def test_lora_on_a_head_whose_rows_are_trained_is_stored_under_its_own_name():
    keys = [key for key in get_peft_model_state_dict(with_rows("LoRA on the head")) if "lora" in key]
    assert keys == ["base_model.model.lm_head.lora_A.weight", "base_model.model.lm_head.lora_B.weight"]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"target_modules": ["lm_head"]}, {}),
        ({"target_modules": ["lm_head"]}, {"ensure_weight_tying": True}),
        ({"target_modules": ["lm_head"], "ensure_weight_tying": True}, {"ensure_weight_tying": True}),
        ({"target_modules": ["embed_tokens"], "use_dora": True}, {"ensure_weight_tying": True}),
        ({"trainable_token_indices": [1, 2], "target_modules": ["q_proj"]}, {"ensure_weight_tying": True}),
        ({"trainable_token_indices": [1, 2], "target_modules": ["lm_head"]}, {}),
        ({"target_modules": ["gate_proj", "up_proj"]}, {"modules_to_save": ["mlp"]}),
        ({"modules_to_save": ["up_proj"], "target_modules": ["gate_proj"]}, {"modules_to_save": ["mlp"]}),
    ],
    ids=str,
)
def test_what_an_adapter_trains_in_full_is_the_base_models_whatever_others_are_on_it(first, second, merged, tmp_path):
    ids = torch.arange(2, 12)[None]
    base = llama(tie_word_embeddings=True)(ids).logits
    model = get_peft_model(llama(tie_word_embeddings=True), LoraConfig(r=2, init_lora_weights=False, **first), "a")
    expected = model.eval()(ids).logits
    if merged:
        model.merge_adapter()
    model.add_adapter("b", LoraConfig(r=2, **{"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]} | second))
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-3)
    if merged:
        model.unmerge_adapter()
    model.set_adapter("b")
    torch.testing.assert_close(model(ids).logits, base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5 if parameter.requires_grad else 1)
    trained = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path / "b", adapter_name="b")
    torch.testing.assert_close(loaded(ids).logits, trained)
    model.set_adapter("a")
    torch.testing.assert_close(model(ids).logits, expected)


@pytest.mark.parametrize("first", ["changes", "rows"])
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head", "all-linear"])
@pytest.mark.parametrize("base", [tied_llama, llama])
def test_one_adapter_changes_a_module_of_which_another_trains_rows(base, target, first, tmp_path):
    configs = {
        "changes": LoraConfig(r=2, target_modules=target if target == "all-linear" else ["q_proj", target]),
        "rows": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 5]),
    }
    plain = base()(input_ids=IDS).logits
    model = get_peft_model(base(), configs[first], adapter_name=first)
    second = next(name for name in configs if name != first)
    model.add_adapter(second, configs[second])
    outputs = {}
    for name in configs:
        model.set_adapter(name)
        outputs[name] = randomised(model)(input_ids=IDS).logits
        assert not torch.allclose(outputs[name], plain, atol=1e-3)
    mixed = model(input_ids=IDS, adapter_names=list(configs)).logits
    model.merge_adapter(["changes"])
    model.merge_adapter(["rows"])
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, plain)
    model.save_pretrained(tmp_path)
    for sample, (name, output) in enumerate(outputs.items()):
        torch.testing.assert_close(mixed[sample], output[sample], atol=1e-4, rtol=1e-4)
        loaded = PeftModel.from_pretrained(base(), tmp_path / name, adapter_name=name)
        assert torch.equal(loaded(input_ids=IDS).logits, output)
        alone = get_peft_model(base(), configs[name], adapter_name=name)
        names = [get_peft_model_state_dict(m, adapter_name=name).keys() for m in (model, loaded, alone)]
        assert names[0] == names[1] == names[2]
    model.delete_adapter("changes")
    model.set_adapter("rows")
    torch.testing.assert_close(model(input_ids=IDS).logits, outputs["rows"], atol=1e-5, rtol=1e-5)
    model.unload()
    assert torch.equal(model.get_base_model()(input_ids=IDS).logits, plain)
