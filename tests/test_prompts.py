"""Soft prompts: where they go in each task's inputs, generation, several adapters, disabling, files, errors."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import cross_entropy

import peft
from peft import PeftModel, PromptEmbedding, PromptTuningConfig, TaskType, get_peft_model
from peft.core.model_config import cache_name
from peft.registry import METHODS
from peft.tuners.prompts.base import VirtualTokens
from tiny_models import (
    PAD,
    Counting,
    assert_base_untouched,
    assert_same_state,
    base_state,
    bert,
    byte_tokenizer,
    fill_adapter,
    gpt2,
    llama,
    opt,
    state,
    t5,
    tokens,
)

VIRTUAL = 3
GREEDY = dict(do_sample=False, eos_token_id=None)

MODELS = {
    "llama": (TaskType.CAUSAL_LM, llama),
    "gpt2": (TaskType.CAUSAL_LM, gpt2),
    "opt": (TaskType.CAUSAL_LM, opt),
    "t5": (TaskType.SEQ_2_SEQ_LM, t5),
    "bert classifier": (TaskType.SEQ_CLS, lambda: bert(num_labels=3)),
    "llama classifier": (TaskType.SEQ_CLS, lambda: llama("LlamaForSequenceClassification", num_labels=3)),
    "bert tagger": (TaskType.TOKEN_CLS, lambda: bert("BertForTokenClassification", num_labels=3)),
    "bert reader": (TaskType.QUESTION_ANS, lambda: bert("BertForQuestionAnswering")),
    "bert": (TaskType.FEATURE_EXTRACTION, lambda: bert("BertModel")),
}
CAUSAL = [name for name, (task, _) in MODELS.items() if task == TaskType.CAUSAL_LM]


def prompted(name: str, adapter: str = "default", virtual: int = VIRTUAL, **fields):
    task, build = MODELS[name]
    torch.manual_seed(5)
    config = PromptTuningConfig(task_type=task, num_virtual_tokens=virtual, **fields)
    return get_peft_model(build(), config, adapter_name=adapter).eval()


def batch(name: str, rows: int = 3) -> dict[str, torch.Tensor]:
    """Inputs with padding in the second row: on the left for decoders, else on the right."""
    mask = torch.ones(rows, 7, dtype=torch.long)
    mask[1, slice(0, 2) if name in (*CAUSAL, "llama classifier") else slice(-2, None)] = 0
    inputs = {"input_ids": tokens(rows).masked_fill(mask == 0, PAD), "attention_mask": mask}
    return {**inputs, "decoder_input_ids": tokens(rows, 4, seed=9)} if name == "t5" else inputs


def main_output(output) -> torch.Tensor:
    return next(output[key] for key in ("logits", "start_logits", "last_hidden_state") if key in output)


def by_hand(model, inputs):
    """The same, with the prompt put before the embeddings here, on the base model alone."""
    base, rows = model.get_base_model(), model.prompt_encoder[model.active_adapter].embedding.weight[:VIRTUAL]
    vectors = model.get_base_model().get_input_embeddings()(inputs["input_ids"])
    vectors = torch.cat([rows.expand(len(vectors), -1, -1), vectors], dim=1)
    mask = torch.cat([torch.ones(len(vectors), VIRTUAL), inputs["attention_mask"]], dim=1)
    rest = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
    return base(inputs_embeds=vectors, attention_mask=mask, **rest)


# ---- the forward pass


@pytest.mark.parametrize("name", MODELS)
def test_prompt_goes_before_the_embeddings(name):
    model, inputs = prompted(name), batch(name)
    assert type(model) is peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[MODELS[name][0]]
    expected = main_output(by_hand(model, inputs))
    assert torch.equal(main_output(model(**inputs)), expected)
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    assert torch.equal(main_output(model(ids, mask, **inputs)), expected), "by position"
    vectors = model.word_embeddings(ids)
    assert torch.equal(main_output(model(inputs_embeds=vectors, attention_mask=mask, **inputs)), expected), "by vectors"


def test_classifier_that_judges_by_the_last_token():
    model, inputs = prompted("llama classifier"), batch("bert")
    together = model(**inputs).logits
    shorter = {key: value[1:2, :5] for key, value in inputs.items()}  # the second text without its padding
    assert torch.allclose(model(**shorter).logits[0], together[1], atol=1e-5)


def test_losses_leave_the_virtual_tokens_out():
    labels = {
        "llama": dict(labels=tokens()),
        "bert tagger": dict(labels=torch.randint(0, 3, (3, 7))),
        "bert classifier": dict(labels=torch.tensor([2, 0, 1])),
        "t5": dict(labels=tokens(3, 4, seed=9)),
        "bert reader": dict(start_positions=torch.tensor([1, 2, 6]), end_positions=torch.tensor([3, 2, 6])),
    }
    for name, given in labels.items():
        inputs = batch(name)
        if name == "t5":
            del inputs["decoder_input_ids"]
        output = prompted(name)(**inputs, **given)
        if name == "bert reader":
            parts = [(output.start_logits, given["start_positions"]), (output.end_logits, given["end_positions"])]
            expected = sum(cross_entropy(logits, at + VIRTUAL) for logits, at in parts) / 2
        elif name == "llama":
            expected = cross_entropy(output.logits[:, VIRTUAL:-1].flatten(0, 1), given["labels"][:, 1:].flatten())
        else:
            logits = output.logits[:, VIRTUAL:] if name == "bert tagger" else output.logits
            expected = cross_entropy(logits.reshape(-1, logits.shape[-1]), given["labels"].flatten())
        if name == "llama":  # token 0 of the text is predicted from the last virtual token
            first = cross_entropy(output.logits[:, VIRTUAL - 1], given["labels"][:, 0])
            expected = (expected * 6 + first) / 7
        assert torch.allclose(output.loss, expected, atol=1e-5), name


@pytest.mark.parametrize("name", MODELS)
def test_only_prompt_and_head_are_trained(name):
    model = prompted(name)
    before = base_state(model)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    heads = {key.split(".")[1] for key in trained if not key.startswith("prompt_encoder.default.embedding.weight")}
    assert heads == {
        "bert classifier": {"classifier"},
        "llama classifier": {"score"},
        "bert tagger": {"classifier"},
    }.get(name, {"qa_outputs"} if name == "bert reader" else set())
    main_output(model(**batch(name))).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    assert all(p.grad is None for key, p in model.named_parameters() if key not in trained)
    torch.optim.SGD(trained.values(), lr=0.1).step()
    assert_base_untouched(
        model, {key: value for key, value in before.items() if key in dict(MODELS[name][1]().named_parameters())}
    )


def test_a_prompt_learns():
    model = prompted("llama", virtual=8)
    data = Counting()
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.1)
    losses = []
    for _ in range(25):
        loss = model(input_ids=data.rows, labels=data.rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]


def test_other_inputs_by_token():
    model, inputs = prompted("bert classifier"), batch("bert classifier")
    plain = model(**inputs).logits
    types = torch.ones_like(inputs["input_ids"])
    assert torch.equal(model(**inputs, token_type_ids=0 * types).logits, plain)
    assert not torch.allclose(model(**inputs, token_type_ids=types).logits, plain)
    model, inputs = prompted("gpt2"), batch("gpt2")
    plain = model(**inputs).logits
    assert torch.equal(model(**inputs, position_ids=torch.arange(7).expand(3, -1)).logits, plain)
    later = model(**inputs, position_ids=torch.arange(5, 12).expand(3, -1)).logits
    assert later.shape == plain.shape and not torch.allclose(later, plain)


def test_half_precision_base():
    model = get_peft_model(llama().bfloat16(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert model.prompt_encoder.default.embedding.weight.dtype == torch.float32
    model(tokens()).logits.float().sum().backward()
    assert model.prompt_encoder.default.embedding.weight.grad.abs().sum() > 0


def test_embeddings_narrower_than_the_model():
    model = get_peft_model(opt(word_embed_proj_dim=8), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert model.prompt_encoder.default.embedding.weight.shape == (2, 8)
    assert model(tokens()).logits.shape[1] == 2 + 7


def test_model_that_is_not_from_transformers():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.score = nn.Embedding(40, 6), nn.Linear(6, 2)

        def forward(self, input_ids=None, inputs_embeds=None):
            return self.score((self.words(input_ids) if inputs_embeds is None else inputs_embeds).mean(1))

    model = get_peft_model(Mean(), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4))
    ids = tokens()
    vectors = torch.cat(
        [model.prompt_encoder.default.embedding.weight.expand(3, -1, -1), model.base_model.words(ids)], 1
    )
    assert torch.equal(model(ids), model.base_model(inputs_embeds=vectors))


def test_shapes_of_a_model_made_of_several():
    base = llama()
    text = base.config
    base.config = copy.copy(text)
    base.config.text_config = text
    base.config.num_hidden_layers = 77
    config = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).active_peft_config
    shapes = (config.token_dim, config.num_layers, config.num_attention_heads, config.num_transformer_submodules)
    assert shapes == (32, 2, 4, 1)


# ---- where a prompt starts


def test_starts(tmp_path):
    rows = prompted("llama", prompt_tuning_init="SAMPLE_VOCAB").prompt_encoder.default.embedding.weight
    vocabulary = llama().get_input_embeddings().weight
    assert all((vocabulary == row).all(1).any() for row in rows)

    byte_tokenizer().save_pretrained(tmp_path)
    fields = dict(prompt_tuning_init="TEXT", prompt_tuning_init_text="ab", tokenizer_name_or_path=str(tmp_path))
    base = llama(vocab_size=300)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, **fields)
    ids = byte_tokenizer()("ab")["input_ids"]
    model = get_peft_model(base, config)
    expected = base.get_input_embeddings()(torch.tensor((ids * 5)[:5]))
    assert torch.equal(model.prompt_encoder.default.embedding.weight, expected)


# ---- generation


def step_by_step(model, inputs, new: int, decoder: bool = False) -> torch.Tensor:
    """Greedy continuation by whole forward passes."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    grown = torch.zeros(len(ids), 1, dtype=torch.long) if decoder else ids
    for _ in range(new):
        given = dict(input_ids=ids, decoder_input_ids=grown) if decoder else dict(input_ids=grown)
        grown = torch.cat([grown, model(attention_mask=mask, **given).logits[:, -1:].argmax(-1)], dim=1)
        mask = mask if decoder else torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return grown


WAYS = {
    "default": {},
    "without cache": dict(use_cache=False),
    "static cache": dict(cache_implementation="static"),
    "in pieces": dict(prefill_chunk_size=2),
    "to a length": dict(max_length=12, max_new_tokens=None),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CAUSAL)
def test_generate_is_step_by_step(name, way):
    if way == "in pieces" and transformers.__version__.startswith("5.0."):
        pytest.skip("transformers 5.0 generates from no prompt in pieces, adapted or not")
    model, inputs = prompted(name), batch(name)
    before = dict(model.base_model.__dict__)
    result = model.generate(**inputs, **{"max_new_tokens": 5, **GREEDY, **WAYS[way]})
    assert torch.equal(result, step_by_step(model, inputs, 5))
    assert not torch.equal(result, model.base_model.generate(**inputs, max_new_tokens=5, **GREEDY))
    assert not [key for key in model.base_model.__dict__ if key not in before and "prepare" in key]


def test_generate_goes_on_from_a_cache():
    model, inputs = prompted("llama"), batch("llama")
    expected = model.generate(**inputs, max_new_tokens=6, **GREEDY)
    for whole in (True, False):
        first = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True, **GREEDY)
        assert torch.equal(first.sequences, expected[:, :10])
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 3, dtype=torch.long)], dim=1)
        given = first.sequences if whole else first.sequences[:, -1:]
        rest = model.generate(
            given, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=3, **GREEDY
        )
        assert torch.equal(rest, expected if whole else expected[:, 9:])


def test_forward_goes_on_from_a_cache():
    model, inputs = prompted("gpt2"), batch("gpt2")
    whole = model(**inputs).logits
    first = model(input_ids=inputs["input_ids"][:, :5], attention_mask=inputs["attention_mask"][:, :5], use_cache=True)
    rest = model(**{**inputs, "input_ids": inputs["input_ids"][:, 5:]}, past_key_values=first.past_key_values)
    assert torch.allclose(rest.logits, whole[:, -2:], atol=1e-5)


def test_generate_from_vectors_beams_and_nothing():
    model, inputs = prompted("llama"), batch("llama")
    expected = model.generate(**inputs, max_new_tokens=4, **GREEDY)
    vectors = dict(inputs_embeds=model.word_embeddings(inputs["input_ids"]), attention_mask=inputs["attention_mask"])
    assert torch.equal(model.generate(**vectors, max_new_tokens=4, **GREEDY), expected[:, 7:])
    beams = [
        model.generate(**inputs, max_new_tokens=4, num_beams=2, use_cache=cache, **GREEDY) for cache in (True, False)
    ]
    assert torch.equal(*beams)
    start = dict(input_ids=torch.tensor([[2]]), attention_mask=torch.ones(1, 1, dtype=torch.long))
    assert torch.equal(model.generate(max_new_tokens=4, **GREEDY), step_by_step(model, start, 4))
    with pytest.warns(peft.PeftWarning, match="position_ids"):
        model.generate(**inputs, position_ids=torch.zeros(3, 7, dtype=torch.long), max_new_tokens=1, **GREEDY)


def test_generate_encoder_decoder():
    model, inputs = prompted("t5"), batch("t5")
    del inputs["decoder_input_ids"]
    expected = step_by_step(model, inputs, 5, decoder=True)
    assert torch.equal(model.generate(**inputs, max_new_tokens=5, **GREEDY), expected)
    ids = inputs.pop("input_ids")
    assert torch.equal(model.generate(ids, **inputs, max_new_tokens=5, **GREEDY), expected), "by position"
    assert model.generate(ids, **inputs, max_new_tokens=5, num_beams=2, **GREEDY).shape == (3, 6)
    made = model.base_model.get_encoder()(ids)
    with pytest.warns(peft.PeftWarning, match="encoder_outputs"):
        result = model.generate(ids, **inputs, encoder_outputs=made, max_new_tokens=5, **GREEDY)
    assert torch.equal(result, expected)


# ---- several adapters, states, files


def test_several_prompts():
    model, alone = prompted("llama", adapter="a"), prompted("llama", adapter="a")
    inputs = batch("llama")
    model.add_adapter("b", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    assert model.active_adapter == "a" and torch.equal(model(**inputs).logits, alone(**inputs).logits)
    model.set_adapter("b")
    assert model(**inputs).logits.shape[1] == 5 + 7
    assert [p.requires_grad for p in model.prompt_encoder.parameters()] == [False, True]
    assert {name: len(index) for name, index in model.prompt_tokens.items()} == {"a": 3, "b": 5}
    model.delete_adapter("b")
    assert list(model.peft_config) == list(model.prompt_encoder) == ["a"]
    assert torch.equal(model(**inputs).logits, alone(**inputs).logits)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_disable(name):
    model, inputs = prompted(name), batch(name)
    base = main_output(MODELS[name][1]()(**inputs))
    adapted = main_output(fill_adapter(model)(**inputs))
    with model.disable_adapter():
        assert torch.equal(main_output(model(**inputs)), base)
        with model.disable_adapter():
            pass
        assert torch.equal(main_output(model(**inputs)), base), "still disabled after an inner context"
    assert torch.equal(main_output(model(**inputs)), adapted)


def test_disable_while_generating():
    model, inputs = prompted("llama"), batch("llama")
    expected = llama().generate(**inputs, max_new_tokens=5, **GREEDY)
    with model.disable_adapter():
        assert torch.equal(model.generate(**inputs, max_new_tokens=5, **GREEDY), expected)


@pytest.mark.parametrize("name", MODELS)
def test_save_and_load(name, tmp_path):
    model, inputs = prompted(name), batch(name)
    fill_adapter(model).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MODELS[name][1](), tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(main_output(loaded.eval()(**inputs)), main_output(model(**inputs)))
    assert not any(p.requires_grad for p in loaded.parameters())
    saved = peft.load_peft_weights(str(tmp_path))
    rows = VIRTUAL * (2 if name == "t5" else 1)
    assert saved["prompt_embeddings"].shape == (rows, 32)
    assert torch.equal(saved["prompt_embeddings"], model.get_prompt_embedding_to_save("default"))
    heads = loaded.active_peft_config.modules_to_save
    assert heads == {"SEQ_CLS": ["classifier", "score"], "TOKEN_CLS": ["classifier", "score"]}.get(
        MODELS[name][0].value, ["qa_outputs"] if name == "bert reader" else None
    )


# ---- errors, before anything changes


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(prompt_tuning_init="NOTHING"), "SAMPLE_VOCAB"),
        (dict(num_virtual_tokens=0), "positive"),
        (dict(prompt_tuning_init="TEXT", prompt_tuning_init_text="a"), "tokenizer_name_or_path"),
        (dict(prompt_tuning_init="TEXT", tokenizer_name_or_path="a"), "prompt_tuning_init_text"),
        (dict(tokenizer_kwargs={"a": 1}), "tokenizer_kwargs"),
    ],
)
def test_configurations_that_cannot_work(fields, words):
    with pytest.raises(ValueError, match=words):
        PromptTuningConfig(**{"num_virtual_tokens": 2, **fields})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(task_type=None), "task_type"),
        (dict(num_virtual_tokens=None), "num_virtual_tokens"),
        (dict(token_dim=48), "32 wide"),
        (dict(prompt_tuning_init="TEXT", prompt_tuning_init_text="a", tokenizer_name_or_path="/no/such"), "no/such"),
    ],
)
def test_a_failed_add_leaves_everything_as_it_was(fields, words):
    config = PromptTuningConfig(**{"task_type": "CAUSAL_LM", "num_virtual_tokens": 2, **fields})
    base, fields_before = llama(), copy.deepcopy(config.__dict__)
    before = state(base)
    with pytest.raises((ValueError, OSError), match=words):
        get_peft_model(base, config)
    assert_same_state(base, before)
    assert config.__dict__ == fields_before

    if config.task_type is None:  # a model of a task has one
        return
    model = prompted("llama")
    before = state(model)
    with pytest.raises((ValueError, OSError), match=words):
        model.add_adapter("second", config)
    assert_same_state(model, before)
    assert config.__dict__ == fields_before and list(model.peft_config) == ["default"]
    assert model.active_adapter == "default"


def test_a_model_without_words():
    with pytest.raises(ValueError, match="word embeddings"):
        get_peft_model(nn.Linear(2, 2), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))


def test_inputs_without_a_place_for_a_prompt():
    model, inputs = prompted("llama"), batch("llama")
    with pytest.raises(ValueError, match="input_ids"):
        model(attention_mask=inputs["attention_mask"])
    with pytest.raises(ValueError, match=r"attention_mask.*\(3, 1, 7, 7\)"):
        model(inputs["input_ids"], attention_mask=torch.ones(3, 1, 7, 7))
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="adapter_names"):
            call(**inputs, adapter_names=["default"] * 3)


# ---- what later methods may do, on small made-up ones


@pytest.fixture
def method(monkeypatch):
    """Lets a class of virtual tokens stand in for prompt tuning's."""

    def use(encoder_class):
        monkeypatch.setattr(METHODS["PROMPT_TUNING"], "model_class", encoder_class)

    return use


def test_method_that_prompts_the_decoder_too(method):
    class Both(PromptEmbedding):
        prompts_decoder = True

    method(Both)
    model, inputs = prompted("t5"), batch("t5")
    given = inputs.pop("decoder_input_ids")
    rows = model.prompt_encoder.default.embedding.weight
    base = model.base_model
    vectors = torch.cat([rows[:VIRTUAL].expand(3, -1, -1), base.shared(inputs["input_ids"])], dim=1)
    decoder = torch.cat([rows[VIRTUAL:].expand(3, -1, -1), base.shared(given)], dim=1)
    mask = torch.cat([torch.ones(3, VIRTUAL), inputs["attention_mask"]], dim=1)
    expected = base(inputs_embeds=vectors, attention_mask=mask, decoder_inputs_embeds=decoder).logits
    assert torch.equal(model(**inputs, decoder_input_ids=given).logits, expected)

    labels = tokens(3, 4, seed=9)
    output = model(**inputs, labels=labels)
    assert torch.allclose(output.loss, cross_entropy(output.logits[:, VIRTUAL:].flatten(0, 1), labels.flatten()))
    expected = step_by_step(model, inputs, 4, decoder=True)
    for way in ({}, dict(use_cache=False), dict(cache_implementation="static")):
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, **GREEDY, **way), expected)


def test_method_that_tells_tasks_apart(method):
    class PerTask(PromptEmbedding):
        def prompt(self, batch_size, task_ids=None, **options):
            return super().prompt(batch_size) * (1 + task_ids[:, None, None])

    method(PerTask)
    model, inputs, tasks = prompted("llama"), batch("llama"), torch.tensor([0, 3, 1])
    together = model(**inputs, task_ids=tasks).logits
    beams = model.generate(**inputs, task_ids=tasks, max_new_tokens=3, num_beams=2, **GREEDY)
    for row, task in enumerate(tasks):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        alone = model(**one, task_ids=task[None]).logits
        assert torch.allclose(together[row], alone[0], atol=1e-5)
        result = model.generate(**one, task_ids=task[None], max_new_tokens=3, num_beams=2, **GREEDY)
        assert torch.equal(result[0], beams[row])


def test_method_with_its_own_mask_labels_and_loss(method):
    class Hidden(PromptEmbedding):
        def mask(self, batch_size):
            return torch.zeros(batch_size, self.num_virtual_tokens, dtype=torch.long)

        def labels(self, batch_size):
            return torch.full((batch_size, self.num_virtual_tokens), 7)

        def finish(self, output, labels, given):
            assert torch.equal(given["labels"], labels[:, self.num_virtual_tokens :])
            output.loss = labels.sum()
            return output

    method(Hidden)
    model, inputs = prompted("opt"), batch("opt")
    output = model(**inputs, labels=inputs["input_ids"])
    # OPT counts positions by the mask, so a prompt that nobody sees changes nothing.
    plain = opt()(**inputs).logits
    assert torch.allclose(output.logits[0, VIRTUAL:], plain[0], atol=1e-5)
    assert output.loss == inputs["input_ids"].sum() + 7 * VIRTUAL * 3


def test_method_that_is_keys_and_values(method):
    class KeysAndValues(VirtualTokens):
        adds_tokens = False

        @classmethod
        def shapes(cls, config, model, word_embeddings):
            return {
                **super().shapes(config, model, word_embeddings),
                "token_dim": 2 * 2 * model.config.num_key_value_heads * 8,
            }

        def prompt(self, batch_size, task_ids=None, **options):
            from transformers import DynamicCache

            cache = DynamicCache()
            rows = super().prompt(batch_size).unflatten(-1, (2, 2, -1, 8)).permute(2, 3, 0, 4, 1, 5)
            for layer, (keys, values) in enumerate(rows):
                cache.update(keys, values, layer)
            return cache

        def insert(self, inputs, prompt, embed, side=""):
            inputs[cache_name(llama())] = prompt

    method(KeysAndValues)
    model, inputs = prompted("llama"), batch("llama")
    output = model(**inputs, labels=inputs["input_ids"])
    assert output.logits.shape[1] == 7 and output.loss.requires_grad
    assert not torch.allclose(output.logits, llama()(**inputs).logits)
    # Positions leave the padding out, as in the base model's own generate: a padded text goes on as it does alone.
    unpadded, alone = [0, 2], {key: value[1:2, 2:] for key, value in inputs.items()}
    expected = step_by_step(model, inputs, 5)[unpadded]
    continued = step_by_step(model, alone, 5)[0]
    for use_cache in (True, False):
        result = model.generate(**inputs, max_new_tokens=5, use_cache=use_cache, **GREEDY)
        assert torch.equal(result[unpadded], expected) and torch.equal(result[1, 2:], continued)


# ---- get_peft_model


def test_get_peft_model_fills_in_the_base_model(tmp_path):
    base = llama()
    base.name_or_path = "some/model"
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = get_peft_model(base, config, revision="v2")
    assert model.peft_config["default"] is config
    assert (config.base_model_name_or_path, config.revision) == ("some/model", "v2")
    assert config.num_transformer_submodules == 1 and config.token_dim == 32

    other = llama()
    other.name_or_path = "other/model"
    with pytest.warns(peft.PeftWarning) as warned:
        get_peft_model(other, config, revision="v3")
    assert "some/model" in str(warned[0].message) and "v2" in str(warned[1].message)
    with pytest.raises(TypeError, match="PeftConfig"):
        get_peft_model(base, {"peft_type": "PROMPT_TUNING"})
