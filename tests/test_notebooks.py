"""What a notebook shows of a configuration and of a model's adapters."""

from __future__ import annotations

from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny_models import llama


def test_a_configuration_shows_what_is_not_default():
    shown = LoraConfig(r=4, target_modules=["b<i>", "a"])._repr_html_()
    assert "<td>r</td><td>4</td>" in shown and "lora_dropout" not in shown
    assert "[&#x27;a&#x27;, &#x27;b&lt;i&gt;&#x27;]" in shown, "sorted, and never as HTML"


def test_a_model_shows_its_adapters():
    model = get_peft_model(llama(), LoraConfig(r=4))
    model.add_adapter("other", LoraConfig(r=2))
    shown = model._repr_html_()
    trainable, total = model.get_nb_trainable_parameters()
    assert f"PeftModel on LlamaForCausalLM: {trainable:,d} of {total:,d}" in shown
    assert "<td>default</td><td>LORA</td><td>yes</td><td>4</td>" in shown
    assert "<td>other</td><td>LORA</td><td>no</td><td>2</td>" in shown


def test_a_soft_prompt_shows_too():
    model = get_peft_model(llama(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    assert "<td>default</td><td>PROMPT_TUNING</td><td>yes</td><td></td>" in model._repr_html_()
