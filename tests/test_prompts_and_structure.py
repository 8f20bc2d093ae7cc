"""Methods that are told more than the input, or act beside the weights: trained, saved, generating, refused."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

import peft
from peft import (
    AdaptionPromptConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PolyConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    get_peft_model,
)
from peft.core.call import calling
from tiny_models import (
    assert_base_untouched,
    assert_same_state,
    base_state,
    bert,
    fill_adapter,
    gpt2,
    llama,
    needs_a_bare_past,
    state,
    t5,
    tokens,
)

torch.set_num_threads(1)
GREEDY = dict(do_sample=False, eos_token_id=None)
EXAMPLES = dict(cpt_token_ids=[5, 9, 6, 11, 5, 12, 6, 13], cpt_tokens_type_mask=[1, 2, 3, 4, 5, 6, 7, 8])
TASKS = torch.tensor([0, 2, 1])

CONFIGS = {
    "p-tuning mlp": lambda **k: PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=24, **k),
    "p-tuning lstm": lambda **k: PromptEncoderConfig(
        num_virtual_tokens=4, encoder_reparameterization_type="LSTM", encoder_hidden_size=12, **k
    ),
    "prefix": lambda **k: PrefixTuningConfig(num_virtual_tokens=4, **k),
    "prefix projected": lambda **k: PrefixTuningConfig(
        num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=24, **k
    ),
    "multitask": lambda **k: MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=3, num_ranks=2, **k),
    "cpt": lambda **k: CPTConfig(**EXAMPLES, opt_projection_epsilon=30.0, opt_projection_format_epsilon=30.0, **k),
    "adaption prompt": lambda **k: AdaptionPromptConfig(adapter_len=4, adapter_layers=2, **k),
    "poly": lambda **k: PolyConfig(r=4, n_tasks=3, n_skills=3, target_modules=["q_proj", "v_proj", "down_proj"], **k),
}
PROMPTS = [name for name in CONFIGS if name not in ("adaption prompt", "poly")]
#: what a configuration of the encoder-decoder does not take
CAUSAL_ONLY = ("cpt", "adaption prompt", "poly")


def adapted(name: str, base=llama, task: str = "CAUSAL_LM", adapter: str = "default", **fields) -> PeftModel:
    torch.manual_seed(7)
    return get_peft_model(base(), CONFIGS[name](task_type=task, **fields), adapter_name=adapter)


def told(name: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the method wants to know beside the input."""
    return {"task_ids": TASKS[: len(ids)]} if name in ("multitask", "poly") else {}


def inputs_of(name: str, rows: int = 3) -> dict[str, torch.Tensor]:
    ids = tokens(rows)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **told(name, ids)}


def train(model, name: str, steps: int, lr: float, **batch) -> tuple[float, float]:
    """First and last loss."""
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return losses[0], losses[-1]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_learns_and_is_loaded_again(name, tmp_path):
    """Always the same word, which the frozen base does not say."""
    model, inputs = adapted(name), inputs_of(name)
    before = base_state(model)
    labels = torch.full_like(inputs["input_ids"], 17)
    first, last = train(model, name, steps=40, lr=0.05, **inputs, labels=labels)
    assert last < 0.6 * first
    assert_base_untouched(
        model, {key: value for key, value in before.items() if "poly" not in key and "adaption" not in key}
    )
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.allclose(loaded(**inputs).logits, expected, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    saved, resaved = peft.load_peft_weights(tmp_path), peft.load_peft_weights(again)
    assert saved.keys() == resaved.keys()
    assert all(torch.allclose(resaved[key], value, atol=1e-6) for key, value in saved.items())
    with loaded.disable_adapter():
        plain = {key: value for key, value in inputs.items() if key != "task_ids" or name == "poly"}
        assert torch.equal(loaded(**plain).logits, llama()(**{**inputs, "task_ids": None}).logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_generation_goes_step_by_step(name):
    model, inputs = fill_adapter(adapted(name), scale=0.5).eval(), inputs_of(name)
    ids, rest = inputs["input_ids"], told(name, inputs["input_ids"])
    with torch.no_grad():
        for _ in range(4):
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **rest}
            ids = torch.cat((ids, model(**given).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, **GREEDY), ids)
    beams = model.generate(**inputs, max_new_tokens=4, num_beams=2, **GREEDY)
    for row in range(3):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        assert torch.equal(model.generate(**one, max_new_tokens=4, num_beams=2, **GREEDY)[0], beams[row])


@pytest.mark.parametrize("name", CONFIGS)
def test_several_adapters_copies_and_pickles(name):
    model, inputs = fill_adapter(adapted(name)).eval(), inputs_of(name)
    expected = model(**inputs).logits
    torch.manual_seed(8)
    model.add_adapter("other", CONFIGS[name](task_type="CAUSAL_LM"))
    fill_adapter(model, "other", seed=5, scale=0.6)
    assert torch.equal(model(**inputs).logits, expected)
    model.set_adapter("other")
    other = model(**inputs).logits
    assert not torch.allclose(other, expected, atol=1e-3)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(**inputs).logits, other)
        twin.set_adapter("default")
        assert torch.equal(twin(**inputs).logits, expected)
    model.delete_adapter("default")
    assert list(model.peft_config) == ["other"]
    assert torch.equal(model(**inputs).logits, other)


@pytest.mark.parametrize("name", [name for name in PROMPTS if name not in CAUSAL_ONLY])
def test_encoder_decoders(name, tmp_path):
    model = fill_adapter(adapted(name, t5, "SEQ_2_SEQ_LM"), scale=0.5).eval()
    inputs = inputs_of(name)
    ids = torch.zeros(3, 1, dtype=torch.long)
    with torch.no_grad():
        for _ in range(4):
            ids = torch.cat((ids, model(**inputs, decoder_input_ids=ids).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, **GREEDY), ids)
    assert model(**inputs, labels=tokens(3, 5)).loss.requires_grad
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(t5(), tmp_path).eval()
    assert torch.equal(loaded.generate(**inputs, max_new_tokens=4, **GREEDY), ids)


# ---- P-tuning


def test_what_is_stored_has_no_dropout_in_it():
    fields = dict(encoder_dropout=0.9, encoder_reparameterization_type="LSTM")
    config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **fields)
    model = get_peft_model(llama(), config).train()
    stored = [peft.get_peft_model_state_dict(model)["prompt_embeddings"] for _ in range(2)]
    assert torch.equal(*stored) and model.prompt_encoder["default"].training


# ---- prefix tuning


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_prefix_in_the_caches_of_generate(cache):
    model, inputs = fill_adapter(adapted("prefix"), scale=0.5).eval(), inputs_of("prefix")
    expected = model.generate(**inputs, max_new_tokens=5, use_cache=False, **GREEDY)
    found = model.generate(**inputs, max_new_tokens=5, cache_implementation=cache, **GREEDY)
    assert torch.equal(found, expected)


@needs_a_bare_past()
def test_prefix_is_what_attention_has_of_tokens_before():
    """The cache of real tokens as prefix gives what those tokens in the input give."""
    base, ids, words = llama(), tokens(2), tokens(1, 4, seed=3)
    cache = base(words, use_cache=True).past_key_values
    model = adapted("prefix").eval()
    rows = torch.stack([torch.stack((layer.keys[0], layer.values[0])) for layer in cache.layers])
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(rows.permute(3, 0, 1, 2, 4).flatten(1))
    together = base(torch.cat((words.expand(2, -1), ids), dim=1)).logits[:, 4:]
    assert torch.allclose(model(ids).logits, together, atol=1e-4)


def test_prefix_of_heads_that_are_wider_than_the_model():
    def wide():
        import transformers

        torch.manual_seed(0)
        small = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=16)
        config = transformers.Qwen3Config(**small, num_key_value_heads=2, vocab_size=40, pad_token_id=0)
        return transformers.Qwen3ForCausalLM(config).eval()

    model = fill_adapter(adapted("prefix", wide), scale=0.5).eval()
    config = model.peft_config["default"]
    assert (config.token_dim, config.num_attention_heads, config.num_layers) == (32, 2, 2)
    inputs = inputs_of("prefix")
    assert model.generate(**inputs, max_new_tokens=3, **GREEDY).shape == (3, 10)
    assert model(**inputs).logits.shape == (3, 7, 40)


@needs_a_bare_past()
def test_prefix_in_half_precision_is_trained_in_float32():
    model = adapted("prefix", lambda: llama().to(torch.bfloat16))
    output = model(tokens())
    assert output.logits.dtype == torch.bfloat16
    assert model.prompt_encoder["default"].embedding.weight.dtype == torch.float32


# ---- multitask prompt tuning


@pytest.fixture
def source(tmp_path):
    torch.manual_seed(2)
    tensors = {
        "prompt_embeddings": torch.randn(4, 32),
        "prefix_task_cols": torch.randn(5, 4, 2),
        "prefix_task_rows": torch.randn(5, 2, 32),
    }
    torch.save(tensors, tmp_path / "source.bin")
    return str(tmp_path / "source.bin"), tensors


@pytest.mark.parametrize("start", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_prompts_that_start_from_source_tasks(start, source):
    path, tensors = source
    fields = dict(prompt_tuning_init=start, prompt_tuning_init_state_dict_path=path, prompt_tuning_init_task=3)
    encoder = adapted("multitask", **fields).prompt_encoder["default"]
    assert torch.equal(encoder.embedding.weight, tensors["prompt_embeddings"])
    for name in ("prefix_task_cols", "prefix_task_rows"):
        found, given = getattr(encoder, name), tensors[name]
        if start == "ONLY_SOURCE_SHARED":
            assert found.abs().max() < 0.2
        else:
            one = given.mean(0) if start == "AVERAGE_SOURCE_TASKS" else given[3]
            assert torch.equal(found, one.expand_as(found)) and len(found) == 3


# ---- context-aware prompt tuning


def test_examples_stay_near_their_words():
    config = CPTConfig(task_type="CAUSAL_LM", **EXAMPLES, opt_projection_epsilon=0.8, opt_projection_format_epsilon=0.4)
    model = get_peft_model(llama(), config)
    words = model.word_embeddings(torch.tensor(EXAMPLES["cpt_token_ids"]))
    train(model, "cpt", steps=15, lr=0.5, **inputs_of("cpt"), labels=tokens())
    moved = (model.get_prompt(1)[0] - words).norm(dim=1) / (32 / 2048) ** 0.5
    assert torch.allclose(moved, torch.tensor([0.4, 0.8, 0.4, 0.0] * 2), atol=1e-4)


def test_a_trained_prompt_is_replaced_by_one_of_a_file(tmp_path):
    model, inputs = adapted("cpt"), inputs_of("cpt")
    train(model, "cpt", steps=3, lr=0.5, **inputs, labels=tokens())
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert list(loaded.state_dict()) == list(model.state_dict())
    model.load_adapter(tmp_path, "default")
    torch.testing.assert_close(model(**inputs).logits, expected)


def test_loss_is_over_the_labels_of_examples_and_input():
    config = CPTConfig(task_type="CAUSAL_LM", **EXAMPLES, opt_weighted_loss_type="decay", opt_loss_decay_factor=0.5)
    model, ids = get_peft_model(llama(), config).eval(), tokens()
    kinds = torch.tensor([1, 2, 2, 3, 4, 4, 0]).expand_as(ids)
    output = model(ids, labels=ids, input_type_mask=kinds)
    # In [examples; input], labels are 3 and 7 of the examples and, after 8 tokens, 4 and 5 of the input.
    places, weights = torch.tensor([3, 7, 12, 13]), torch.tensor([0.25, 0.5, 1.0, 1.0])
    every = torch.cat((torch.tensor(EXAMPLES["cpt_token_ids"]).expand(3, -1), ids), dim=1)
    losses = cross_entropy(output.logits[:, places - 1].transpose(1, 2), every[:, places], reduction="none")
    assert torch.allclose(output.loss, (losses * weights).mean(), atol=1e-5)
    assert torch.equal(model(ids, labels=ids, input_type_mask=kinds, return_dict=False)[0], output.loss)


# ---- adaption prompt


@pytest.mark.parametrize("model_type", ["Mistral", "Qwen2", "Qwen3", "GPT2"])
def test_adaption_prompt_starts_without_effect_on_every_family(model_type):
    import transformers

    small = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, vocab_size=40)
    if model_type == "GPT2":
        base = gpt2()
    else:
        torch.manual_seed(0)
        config = getattr(transformers, f"{model_type}Config")(**small, num_key_value_heads=2, pad_token_id=0)
        base = getattr(transformers, f"{model_type}ForCausalLM")(config).eval()
    ids = tokens()
    expected = base(ids).logits
    model = get_peft_model(base, AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=2))
    assert torch.equal(model(ids).logits, expected)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 4
    with torch.no_grad():
        trained[1].fill_(2.0)  # the gate of the lower of the two layers
    assert not torch.allclose(model.eval()(ids).logits, expected, atol=1e-3)
    with pytest.raises(NotImplementedError, match="merged"):
        model.merge_and_unload()
    plain = model.unload()
    assert torch.equal(plain(ids).logits, expected) and list(plain.state_dict()) == list(base.state_dict())


@pytest.mark.parametrize("change", ["add", "delete"])
@pytest.mark.parametrize("name", ["adaption_prompt", "shadow", "lora"])
def test_another_adapter_added_or_deleted_leaves_what_is_trained_of_the_active_one(name, change, tmp_path):
    configs = {
        "adaption_prompt": AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=2),
        "shadow": peft.ShadowConfig(task_type="CAUSAL_LM", r=2),
        "lora": peft.LoraConfig(task_type="CAUSAL_LM", r=2),
    }
    model, ids = get_peft_model(llama(), configs[name], "a"), tokens()
    expected = llama()(ids).logits
    model.save_pretrained(tmp_path, selected_adapters=["a"])
    model.load_adapter(tmp_path / "a", "b")
    model.set_adapter("b")
    before = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    with model.disable_adapter():
        if change == "add":
            model.add_adapter("c", configs[name])
            fill_adapter(model)
        else:
            model.delete_adapter("a")
        assert torch.equal(model.eval()(ids).logits, expected)
    assert [key for key, parameter in model.named_parameters() if parameter.requires_grad] == before != []


# ---- Poly


def test_each_task_has_a_model_of_its_own():
    model, ids = fill_adapter(adapted("poly", n_splits=2)).eval(), tokens()
    together = model(ids, task_ids=TASKS).logits
    for row, task in enumerate(TASKS):
        assert torch.allclose(model(ids[row : row + 1], task_ids=task[None]).logits[0], together[row], atol=1e-5)
    assert not torch.allclose(model(ids, task_ids=TASKS.flip(0)).logits[0], together[0], atol=1e-3)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    x = torch.randn(1, 5, layer.in_features)
    with torch.no_grad():
        shares = layer.poly_router["default"].module_logits[2].sigmoid().view(2, 3)
        shares = shares / shares.sum(1, keepdim=True)
        a = torch.cat([sum(shares[q, s] * layer.poly_lora_A["default"][q, s] for s in range(3)) for q in range(2)])
        b = [sum(shares[q, s] * layer.poly_lora_B["default"][q, s] for s in range(3)) for q in range(2)]
        expected = layer.base_layer(x) + x @ a @ torch.cat(b, dim=1) / 4
        with calling(task_ids=torch.tensor([2])):
            assert torch.allclose(layer(x), expected, atol=1e-5)


def test_poly_with_gradient_checkpointing():
    grads = []
    for checkpointed in (False, True):
        model, ids = adapted("poly", init_weights=False), tokens()
        fill_adapter(model)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model.train()
        torch.manual_seed(0)
        model(ids, labels=ids, task_ids=TASKS).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*grads, strict=True))


def test_poly_cannot_be_merged_or_mixed():
    model, ids = adapted("poly").eval(), tokens()
    before = state(model)
    with pytest.raises(NotImplementedError, match="task"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="task_ids"):
        model(ids, task_ids=TASKS, adapter_names=["default", "__base__", "default"])
    assert_same_state(model, before)


# ---- refused before anything is changed


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: PromptEncoderConfig(encoder_reparameterization_type="GRU"), "MLP"),
        (lambda: PromptEncoderConfig(encoder_hidden_size=0), "encoder_hidden_size"),
        (lambda: PromptEncoderConfig(encoder_dropout=1.5), "encoder_dropout"),
        (lambda: PrefixTuningConfig(num_virtual_tokens=0), "num_virtual_tokens"),
        (lambda: PrefixTuningConfig(init_weights="ones"), "init_weights"),
        (lambda: MultitaskPromptTuningConfig(num_tasks=0), "num_tasks"),
        (lambda: MultitaskPromptTuningConfig(prompt_tuning_init="SAMPLE_VOCAB"), "AVERAGE_SOURCE_TASKS"),
        (lambda: MultitaskPromptTuningConfig(prompt_tuning_init="EXACT_SOURCE_TASK"), "state_dict_path"),
        (lambda: CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[]), "length"),
        (lambda: CPTConfig(task_type="CAUSAL_LM", opt_weighted_loss_type="linear"), "decay"),
        (lambda: CPTConfig(task_type="SEQ_CLS"), "CAUSAL_LM"),
        (lambda: AdaptionPromptConfig(adapter_len=0), "adapter_len"),
        (lambda: PolyConfig(n_skills=0), "n_skills"),
        (lambda: PolyConfig(poly_type="mono"), "poly_type"),
    ],
)
def test_configurations_that_make_no_sense(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    "base, config, words",
    [
        (llama, lambda: CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[40]), "0 to 39"),
        (llama, lambda: CONFIGS["adaption prompt"](target_modules="nowhere"), "layers"),
        (llama, lambda: AdaptionPromptConfig(adapter_len=2), "adapter_layers"),
        (llama, lambda: AdaptionPromptConfig(adapter_len=2, adapter_layers=9), "layers"),
        (t5, lambda: CONFIGS["adaption prompt"](), "model type"),
        (llama, lambda: CONFIGS["poly"](n_splits=3), "n_splits"),
    ],
)
def test_settings_that_do_not_fit_the_model(base, config, words):
    model = base()
    before = state(model)
    with pytest.raises(ValueError, match=words):
        get_peft_model(model, config())
    assert_same_state(model, before)


def test_prefix_needs_a_model_with_a_cache():
    import transformers

    torch.manual_seed(0)
    small = dict(dim=32, hidden_dim=32, n_layers=2, n_heads=4, vocab_size=40, max_position_embeddings=32)
    model = transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(**small))
    with pytest.raises(ValueError, match="past_key_values"):
        get_peft_model(model, PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))


@pytest.mark.parametrize("name", ["multitask", "poly"])
@pytest.mark.parametrize("task_ids", [None, torch.tensor([0]), torch.tensor([0, 1, 3]), torch.tensor([-1, 0, 0])])
def test_tasks_that_there_are_not(name, task_ids):
    model = adapted(name).eval()
    given = {} if task_ids is None else {"task_ids": task_ids}
    if name == "poly" and task_ids is not None and len(task_ids) == 1:
        given = {"task_ids": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match="task_ids"):
        model(tokens(), **given)


def test_a_source_that_does_not_fit(source):
    path, _ = source
    for fields, words in (
        (dict(prompt_tuning_init_task=5), "5 tasks"),
        (dict(num_virtual_tokens=3), "num_virtual_tokens"),
        (dict(prompt_tuning_init_state_dict_path="nowhere.bin"), "no file"),
    ):
        given = dict(num_virtual_tokens=4, num_tasks=3, num_ranks=2, prompt_tuning_init="EXACT_SOURCE_TASK")
        given |= dict(prompt_tuning_init_state_dict_path=path) | fields
        with pytest.raises(ValueError, match=words):
            get_peft_model(llama(), MultitaskPromptTuningConfig(task_type="CAUSAL_LM", **given))


@pytest.mark.skipif(transformers.__version__ < "5", reason="BERT's classifier passes no cache on there")
def test_a_classifier_with_a_prefix_learns():
    model = adapted("prefix", lambda: bert(num_labels=3), "SEQ_CLS")
    first, last = train(model, "prefix", steps=25, lr=0.05, **inputs_of("prefix"), labels=torch.tensor([0, 1, 2]))
    assert last < 0.3 * first


def test_an_mlp_says_that_it_has_no_number_of_layers():
    with pytest.warns(peft.PeftWarning, match="LSTM"):
        PromptEncoderConfig(encoder_num_layers=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PromptEncoderConfig(encoder_reparameterization_type="LSTM", encoder_num_layers=3)
