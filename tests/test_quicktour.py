"""The quick tour, step by step, as a new user goes through it."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

import tiny_models as tiny
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForSeq2SeqLM,
    PromptTuningConfig,
    TaskType,
    get_peft_config,
    get_peft_model,
)

pytest_plugins = ["hub_server"]


def sizes(folder):
    """The files below a folder, with their sizes in bytes."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def train(model, dataset, steps=20, lr=0.05):
    """A few steps of full-batch training; returns the losses."""
    batch = {key: torch.stack([row[key] for row in dataset]) for key in dataset[0]}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


# ---------------------------------------------------------------------------------------------- configure and wrap


def test_mt0_large_has_2_359_296_trainable_parameters(capsys):
    from transformers import MT5Config, MT5ForConditionalGeneration

    config = MT5Config(
        d_model=1024, num_layers=24, num_decoder_layers=24, d_ff=2816, num_heads=16, d_kv=64, vocab_size=250112,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    with torch.device("meta"):
        model = MT5ForConditionalGeneration(config)
        # The head has weights of its own; newer transformers tie it whatever the configuration says.
        model.lm_head.weight = torch.nn.Parameter(torch.empty(250112, 1024))

    peft_config = LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1
    )
    model = get_peft_model(model, peft_config)
    model.print_trainable_parameters()

    assert isinstance(model, PeftModelForSeq2SeqLM)
    assert model.get_nb_trainable_parameters() == (2_359_296, 1_231_940_608)
    printed = "trainable params: 2,359,296 || all params: 1,231,940,608 || trainable%: 0.1915"
    assert capsys.readouterr().out.strip() == printed


def test_a_configuration_is_data():
    config = get_peft_config({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"]})
    assert isinstance(config, LoraConfig) and (config.r, config.target_modules) == (4, {"q_proj"})


# ------------------------------------------------------------------------------------------------------------ save


def test_the_adapter_of_opt_350m_takes_6_3_megabytes(tmp_path):
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        hidden_size=1024, num_hidden_layers=24, ffn_dim=4096, num_attention_heads=16, vocab_size=50272,
        word_embed_proj_dim=512, do_layer_norm_before=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = OPTForCausalLM(config)
    # Values play no part here: memory that nobody writes to costs nothing.
    model = model.half().to_empty(device="cpu")
    base_bytes = sum(p.numel() * p.element_size() for p in model.parameters())

    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules=["q_proj", "v_proj"]))
    model.save_pretrained(tmp_path)

    files = sizes(tmp_path)
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert round(files["adapter_model.safetensors"] / 1e6, 1) == 6.3
    assert 650e6 < base_bytes < 750e6


def test_saving_writes_a_configuration_weights_and_a_model_card(tmp_path):
    model = get_peft_model(tiny.llama(), LoraConfig(task_type="CAUSAL_LM", r=4))
    model.save_pretrained(tmp_path)
    assert set(sizes(tmp_path)) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}

    from safetensors import safe_open

    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        layer = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight"
        expected = {layer.format(i, m, ab) for i in (0, 1) for m in ("q_proj", "v_proj") for ab in "AB"}
        assert set(file.keys()) == expected
        assert file.get_slice(layer.format(0, "q_proj", "A")).get_shape() == [4, 32]

    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["peft_type"], written["task_type"], written["r"]) == ("LORA", "CAUSAL_LM", 4)
    assert written["target_modules"] == ["q_proj", "v_proj"] and written["inference_mode"] is True
    read = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(read, LoraConfig) and read.target_modules == {"q_proj", "v_proj"}
    assert "library_name: peft" in (tmp_path / "README.md").read_text()


# ------------------------------------------------------------------------------------------------- load and generate


def test_a_saved_causal_model_generates_the_same_tokens(tmp_path):
    base = tiny.saved_base(tiny.llama(), tmp_path / "base")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj", "up_proj"]))
    losses = train(model, tiny.Counting())
    assert losses[-1] < losses[0] / 2
    question = tiny.tokens()
    expected = model.generate(input_ids=question, max_new_tokens=8, do_sample=False)
    with model.disable_adapter():
        assert not torch.equal(model.generate(input_ids=question, max_new_tokens=8, do_sample=False), expected)
    model.save_pretrained(tmp_path / "adapter")

    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")

    assert type(loaded) is PeftModelForCausalLM and not loaded.training
    assert torch.equal(loaded.generate(input_ids=question, max_new_tokens=8, do_sample=False), expected)
    assert all(not p.requires_grad for p in loaded.parameters())
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=question).logits, model(input_ids=question).logits)


def test_a_saved_encoder_decoder_generates_the_same_tokens(tmp_path):
    base = tiny.saved_base(tiny.t5(), tmp_path / "base")
    model = get_peft_model(base, LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v", "wi", "wo"]))
    losses = train(model, tiny.OneAnswer(), steps=40)
    assert losses[-1] < losses[0] / 2
    question = tiny.tokens(4, 6, seed=5)
    expected = model.generate(input_ids=question, max_new_tokens=6)
    model.save_pretrained(tmp_path / "adapter")

    loaded = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")

    assert type(loaded) is PeftModelForSeq2SeqLM
    assert torch.equal(loaded.generate(input_ids=question, max_new_tokens=6), expected)


def test_a_saved_classifier_brings_its_head(tmp_path):
    tiny.saved_base(tiny.bert(num_labels=3), tmp_path / "base")
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = tiny.fill_adapter(get_peft_model(base, LoraConfig(task_type="SEQ_CLS"))).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tiny.tokens()).logits, model(input_ids=tiny.tokens()).logits)


def test_whisper_has_no_task_class_and_needs_none(tmp_path):
    base = tiny.saved_base(tiny.whisper(), tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    assert type(model) is PeftModel
    tiny.fill_adapter(model, scale=0.5).eval()
    sound = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0))
    expected = model.generate(input_features=sound, max_new_tokens=8)
    model.save_pretrained(tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["auto_mapping"]["base_model_class"] == "WhisperForConditionalGeneration"

    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter")

    assert type(loaded) is PeftModel and type(loaded.get_base_model()).__name__ == "WhisperForConditionalGeneration"
    assert torch.equal(loaded.generate(input_features=sound, max_new_tokens=8), expected)
    with model.disable_adapter():
        assert not torch.equal(model.generate(input_features=sound, max_new_tokens=8), expected)


def test_a_model_pushed_to_the_hub_is_loaded_by_its_name(hub, tmp_path):
    base = tiny.saved_base(tiny.llama(), tmp_path / "base")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"]))
    tiny.fill_adapter(model).eval()
    expected = model.generate(input_ids=tiny.tokens(), max_new_tokens=8, do_sample=False)

    model.push_to_hub("tester/counting-lora")

    pushed = set(hub.repos["tester/counting-lora"].files())
    assert pushed == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    loaded = AutoPeftModelForCausalLM.from_pretrained("tester/counting-lora")
    assert torch.equal(loaded.generate(input_ids=tiny.tokens(), max_new_tokens=8, do_sample=False), expected)


def test_loading_in_two_steps(tmp_path):
    model = tiny.fill_adapter(get_peft_model(tiny.llama(), LoraConfig(task_type="CAUSAL_LM"))).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tiny.tokens()).logits, model(input_ids=tiny.tokens()).logits)


def test_an_adapter_of_another_task_is_refused_by_name(tmp_path):
    base = tiny.saved_base(tiny.llama(), tmp_path / "base")
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="PeftModelForCausalLM"):
        AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")


def test_a_tokenizer_beside_the_adapter_resizes_the_embeddings(tmp_path):
    """New tokens are added, their embeddings trained; loading grows the base model's embeddings again."""
    tokenizer = tiny.byte_tokenizer()
    base = tiny.saved_base(tiny.llama(vocab_size=len(tokenizer)), tmp_path / "base")
    tokenizer.add_tokens(["<think>", "</think>"])
    base.resize_token_embeddings(len(tokenizer))
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    model = tiny.fill_adapter(get_peft_model(base, config)).eval()
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")

    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")

    ids = tokenizer("so <think> it </think>", return_tensors="pt")["input_ids"]
    assert loaded.get_input_embeddings().weight.shape[0] == len(tokenizer) and int(ids.max()) == len(tokenizer) - 1
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


# ----------------------------------------------------------------------------------------------------- soft prompts


@pytest.mark.parametrize(
    ("build", "task", "dataset", "auto"),
    [
        (tiny.llama, "CAUSAL_LM", tiny.Counting(), AutoPeftModelForCausalLM),
        (tiny.t5, "SEQ_2_SEQ_LM", tiny.OneAnswer(), AutoPeftModelForSeq2SeqLM),
    ],
    ids=["causal", "seq2seq"],
)
def test_a_soft_prompt_takes_the_same_two_steps(build, task, dataset, auto, tmp_path, capsys):
    base = tiny.saved_base(build(), tmp_path / "base")
    before = tiny.base_state(base)
    config = PromptTuningConfig(task_type=task, num_virtual_tokens=8)
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    assert f"trainable params: {8 * 32 * (2 if task == 'SEQ_2_SEQ_LM' else 1)} " in capsys.readouterr().out

    losses = train(model, dataset, steps=20, lr=0.3)
    assert losses[-1] < losses[0] * 0.8
    tiny.assert_base_untouched(model, before)

    question = tiny.tokens(length=5)
    expected = model.generate(input_ids=question, max_new_tokens=6)
    model.save_pretrained(tmp_path / "prompt")
    assert set(sizes(tmp_path / "prompt")) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}

    loaded = auto.from_pretrained(tmp_path / "prompt")
    assert torch.equal(loaded.generate(input_ids=question, max_new_tokens=6), expected)


def test_a_soft_prompt_can_start_from_words(tmp_path):
    tokenizer = tiny.byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    base = tiny.llama(vocab_size=len(tokenizer))
    config = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=9, prompt_tuning_init="TEXT", prompt_tuning_init_text="count on",
        tokenizer_name_or_path=str(tmp_path),
    )  # fmt: skip
    model = get_peft_model(base, config)
    words = tokenizer("count on")["input_ids"]
    prompt = model.prompt_encoder["default"].embedding.weight
    expected = base.get_input_embeddings().weight[(words + words)[:9]]  # repeated until the prompt is full
    assert torch.equal(prompt, expected)


# -------------------------------------------------------------------------------------------------------- no surprises


def test_the_tour_is_quiet(tmp_path):
    """Nobody who does what the tour says is warned of anything by this library."""
    base = tiny.saved_base(tiny.llama(), tmp_path / "base")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.1))
        train(model, tiny.Counting(), steps=1)
        model.save_pretrained(tmp_path / "adapter")
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").generate(input_ids=tiny.tokens())
    assert [str(warning.message) for warning in heard if "peft" in warning.filename.split("/")] == []
