"""The base model's state dict, in and out of a model with adapters."""

from __future__ import annotations

import pytest
import torch

import peft
import tiny_models as tiny

LLAMA = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "trainable_token_indices": [3]}
CONFIGS = {
    "lora": peft.LoraConfig(task_type="CAUSAL_LM", **LLAMA),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "adaption": peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1),
    "shadow": peft.ShadowConfig(task_type="CAUSAL_LM"),
    "attention": peft.LNTuningConfig(task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_out_and_in(kind):
    expected = {key: value.clone() for key, value in tiny.llama().state_dict().items()}
    model = peft.get_peft_model(tiny.llama(), CONFIGS[kind])
    tiny.fill_adapter(model)
    found = peft.get_base_model_state_dict(model)
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    other = tiny.llama(seed=9)
    adapter = {key: value.clone() for key, value in peft.get_peft_model_state_dict(model).items()}
    assert peft.set_base_model_state_dict(model, other.state_dict()) == ([], [])
    ids = tiny.tokens()
    with model.disable_adapter():
        torch.testing.assert_close(model(ids).logits, other(ids).logits)
    after = peft.get_peft_model_state_dict(model)
    assert all(torch.equal(after[key], adapter[key]) for key in adapter)


@pytest.mark.parametrize("inject", [False, True])
def test_two_methods_and_injected_adapters(inject):
    base = tiny.llama()
    config = peft.LoraConfig(target_modules=["q_proj", "embed_tokens"])
    if inject:
        model = peft.inject_adapter_in_model(config, base)
    else:
        model = peft.get_peft_model(base, config, mixed=True)
        model.add_adapter("b", peft.HRAConfig(target_modules=["q_proj"], r=2))
    found, expected = peft.get_base_model_state_dict(model), tiny.llama().state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_what_does_not_fit():
    model = peft.get_peft_model(tiny.llama(), CONFIGS["lora"])
    before = {key: value.clone() for key, value in peft.get_base_model_state_dict(model).items()}
    other = tiny.llama(seed=9).state_dict()
    lacking = {key: value for key, value in other.items() if key != "model.norm.weight"}
    with pytest.raises(RuntimeError, match=r"missing: model\.norm\.weight"):
        peft.set_base_model_state_dict(model, lacking)
    with pytest.raises(RuntimeError, match=r"unexpected: more"):
        peft.set_base_model_state_dict(model, {**other, "more": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"size mismatch for model\.norm\.weight: got \(3,\), the model has \(32,\)"):
        peft.set_base_model_state_dict(model, {**other, "model.norm.weight": torch.zeros(3)}, strict=False)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"unmerge_adapter\(\) first"):
        peft.set_base_model_state_dict(model, other)
    model.unmerge_adapter()
    after = peft.get_base_model_state_dict(model)
    assert all(torch.equal(after[key], before[key]) for key in before)
    found = peft.set_base_model_state_dict(model, {**lacking, "more": torch.zeros(1)}, strict=False)
    assert found.missing_keys == ["model.norm.weight"] and found.unexpected_keys == ["more"]
    after = peft.get_base_model_state_dict(model)
    assert all(torch.equal(after[key], other[key]) for key in lacking)
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])
