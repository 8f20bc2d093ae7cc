"""Adapters through the methods that transformers itself puts on its models, and folders that hold an adapter."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers

import tiny_models as tiny
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

QV = dict(r=4, target_modules=["q_proj", "v_proj"])
not_5_0 = pytest.mark.skipif(
    transformers.__version__.startswith("5.0."),
    reason="transformers 5.0 leaves loaded adapters trainable, and modules_to_save out (with huggingface/peft too)",
)


def output(model):
    """The first result of the model for fixed input."""
    with torch.no_grad():
        return model(input_ids=tiny.tokens()).logits


@pytest.fixture
def model():
    """A plain Llama of transformers with two filled adapters, "red" and then "blue", which is active."""
    model = tiny.llama()
    model.add_adapter(LoraConfig(**QV), adapter_name="red")
    model.add_adapter(LoraConfig(r=2, target_modules=["v_proj", "up_proj"]), adapter_name="blue")
    tiny.fill_adapter(model, "red", seed=1)
    tiny.fill_adapter(model, "blue", seed=2)
    return model.eval()


@pytest.fixture
def saved(tmp_path):
    """Folders of a base model and of a LoRA for it, and what the adapted model says."""
    base = tiny.saved_base(tiny.llama(), tmp_path / "base")
    model = tiny.fill_adapter(get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **QV))).eval()
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", output(model)


def test_add_adapter_puts_a_trainable_lora_into_the_model():
    model, base = tiny.llama(), output(tiny.llama())
    model.add_adapter(LoraConfig(**QV))
    assert type(model).__name__ == "LlamaForCausalLM" and model.active_adapters() == ["default"]
    assert torch.equal(output(model), base)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"model.layers.{layer}.self_attn.{target}.lora_{ab}.default.weight"
        for layer in (0, 1)
        for target in ("q_proj", "v_proj")
        for ab in "AB"
    }
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter(LoraConfig(**QV))


def test_set_disable_and_enable(model):
    assert model.active_adapters() == ["blue"]
    blue, base = output(model), output(tiny.llama())
    model.set_adapter("red")
    red = output(model)
    assert model.active_adapters() == ["red"] and not torch.allclose(red, blue)
    model.disable_adapters()
    assert torch.equal(output(model), base)
    model.enable_adapters()
    assert torch.equal(output(model), red)
    model.set_adapter(["red", "blue"])
    assert model.active_adapters() == ["red", "blue"]
    assert not torch.allclose(output(model), red) and not torch.allclose(output(model), blue)
    with pytest.raises(ValueError, match="green"):
        model.set_adapter("green")


def test_delete_adapter(model):
    model.set_adapter("red")
    red, base = output(model), output(tiny.llama())
    model.delete_adapter("blue")
    assert list(model.peft_config) == ["red"] and torch.equal(output(model), red)
    assert not [name for name, _ in model.named_parameters() if "blue" in name]
    with pytest.raises(ValueError, match="blue"):
        model.delete_adapter("blue")
    model.delete_adapter("red")
    assert not hasattr(model, "peft_config") and torch.equal(output(model), base)
    model.add_adapter(LoraConfig(**QV), adapter_name="red")
    assert model.active_adapters() == ["red"]


def test_the_state_dict_is_that_of_the_adapter_alone(model):
    red = model.get_adapter_state_dict("red")
    assert len(red) == 8 and all("lora_" in key and "red" not in key for key in red)
    assert torch.equal(
        red["model.layers.0.self_attn.q_proj.lora_A.weight"],
        model.model.layers[0].self_attn.q_proj.lora_A["red"].weight,
    )
    assert len(model.get_adapter_state_dict()) == 8  # blue, the active one


def test_a_model_with_an_adapter_saves_the_adapter_which_both_sides_load(tmp_path):
    model = tiny.saved_base(tiny.llama(), tmp_path / "base")
    model.add_adapter(LoraConfig(**QV))
    expected = output(tiny.fill_adapter(model).eval())
    model.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("model*"))

    assert torch.equal(output(PeftModel.from_pretrained(tiny.llama(), tmp_path / "adapter")), expected)
    other = tiny.llama()
    other.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(output(other), expected)


@not_5_0
def test_load_adapter_reads_what_this_package_saved(saved, caplog):
    _, folder, expected = saved
    model = tiny.llama()
    with caplog.at_level(logging.WARNING, logger="transformers"):
        info = model.load_adapter(str(folder), adapter_name="red")
    assert info is None or not (info.missing_keys or info.unexpected_keys)  # None before 5.0
    assert torch.equal(output(model), expected)
    assert not [name for name, p in model.named_parameters() if p.requires_grad and "lora_" in name]
    with pytest.raises(ValueError, match="already exists"):
        model.load_adapter(str(folder), adapter_name="red")


def test_load_adapter_of_a_folder_to_train_on(saved):
    model = tiny.llama().requires_grad_(False)
    model.load_adapter(str(saved[1]), is_trainable=True)
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_load_adapter_from_tensors(saved):
    """As pipelines do it that keep adapters in memory."""
    given = PeftModel.from_pretrained(tiny.llama(), saved[1])
    tensors = {key.removeprefix("base_model.model."): value for key, value in get_peft_model_state_dict(given).items()}
    model = tiny.llama()
    model.load_adapter(adapter_state_dict=tensors, peft_config=LoraConfig(**QV))
    assert torch.equal(output(model), saved[2])


def test_from_pretrained_of_a_folder_that_holds_an_adapter(saved):
    from transformers import AutoModelForCausalLM

    _, folder, expected = saved
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM" and model.active_adapters() == ["default"]
    assert torch.equal(output(model), expected)
    assert torch.equal(output(AutoPeftModelForCausalLM.from_pretrained(folder)), expected)


def test_a_pipeline_takes_a_peft_model(saved):
    from transformers import pipeline

    tokenizer = tiny.byte_tokenizer()
    base = tiny.llama(vocab_size=len(tokenizer))
    model = tiny.fill_adapter(get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **QV))).eval()
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    ids = tokenizer("abc", return_tensors="pt")
    expected = tokenizer.decode(model.generate(**ids, max_new_tokens=5, do_sample=False)[0], skip_special_tokens=True)
    assert generate("abc", max_new_tokens=5, do_sample=False)[0]["generated_text"] == expected


@pytest.mark.skipif(transformers.__version__ < "5", reason="load_adapter has no hotswap there")
def test_hotswapping_puts_new_weights_into_a_loaded_adapter(saved, tmp_path):
    _, folder, expected = saved
    other = tiny.fill_adapter(get_peft_model(tiny.llama(), LoraConfig(task_type="CAUSAL_LM", **QV)), seed=7).eval()
    other.save_pretrained(tmp_path / "other")
    model = tiny.llama()
    model.load_adapter(str(tmp_path / "other"), adapter_name="default")
    assert torch.equal(output(model), output(other))

    model.load_adapter(str(folder), adapter_name="default", hotswap=True)

    assert torch.equal(output(model), expected) and list(model.peft_config) == ["default"]
    assert not [key for key in model.state_dict() if "lora_" in key and "default" not in key]


def test_the_trainer_trains_a_model_with_an_adapter(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = tiny.llama()
    before = tiny.base_state(model)
    model.add_adapter(LoraConfig(**QV))
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=3,
        per_device_train_batch_size=4,
        learning_rate=0.02,
        eval_strategy="epoch",
        save_strategy="epoch",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    data = dict(train_dataset=tiny.Counting(16), eval_dataset=tiny.Counting(8, seed=1))
    trainer = Trainer(model=model, args=arguments, **data)
    untrained = trainer.evaluate()["eval_loss"]
    trainer.train()

    assert trainer.evaluate()["eval_loss"] < untrained
    tiny.assert_base_untouched(model, before)
    last = tmp_path / f"checkpoint-{trainer.state.global_step}"
    assert not list(last.glob("model*"))
    assert torch.equal(output(PeftModel.from_pretrained(tiny.llama(), last)), output(model.eval()))


@not_5_0
@pytest.mark.parametrize(
    "beside",
    [
        {"modules_to_save": ["lm_head"], "trainable_token_indices": [4, 9]},
        {"trainable_token_indices": {"embed_tokens": [4], "lm_head": [2, 3]}},
    ],
)
def test_modules_to_save_and_single_tokens_through_transformers(beside, tmp_path):
    model = tiny.saved_base(tiny.llama(), tmp_path / "base")
    model.add_adapter(LoraConfig(**QV, **beside))
    expected = output(tiny.fill_adapter(model).eval())
    model.save_pretrained(tmp_path / "adapter")
    other = tiny.llama()
    other.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(output(other), expected)
    assert torch.equal(output(PeftModel.from_pretrained(tiny.llama(), tmp_path / "adapter")), expected)
