"""Adapters of several methods on one model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from peft import (
    HRAConfig,
    IA3Config,
    LoraConfig,
    PeftMixedModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from tiny_models import MLP, assert_base_untouched, base_state, fill_adapter, llama, tokens

CONFIGS = {
    "lora": lambda **fields: LoraConfig(r=2, **fields),
    "hra": lambda **fields: HRAConfig(r=4, **fields),
    "vera": lambda **fields: VeraConfig(r=4, **fields),
}
X = torch.randn(6, 16, generator=torch.Generator().manual_seed(3))


def alone(method: str, folder=None) -> torch.Tensor:
    """What the model gives with one adapter of one method, which is saved to `folder` if there is one."""
    model = get_peft_model(MLP(), CONFIGS[method](target_modules=["lin0", "lin1"])).eval()
    fill_adapter(model)
    if folder is not None:
        model.save_pretrained(folder)
    with torch.no_grad():
        return model(X)


@pytest.fixture
def mixed(tmp_path):
    """A model with an adapter of each method, and what each of them gives alone."""
    outputs = {method: alone(method, tmp_path / method) for method in CONFIGS}
    first, *others = CONFIGS
    model = PeftMixedModel.from_pretrained(MLP(), tmp_path / first, first)
    for method in others:
        result = model.load_adapter(tmp_path / method, method)
        assert result.missing_keys == result.unexpected_keys == []
    return model, outputs


def test_each_adapter_acts_as_it_does_alone(mixed):
    model, outputs = mixed
    assert isinstance(model, PeftMixedModel)
    assert model.active_adapters == ["lora"]
    with torch.no_grad():
        for method, output in outputs.items():
            model.set_adapter(method)
            torch.testing.assert_close(model(X), output)
        with model.disable_adapter():
            assert torch.equal(model(X), MLP()(X))


def test_a_second_adapter_of_an_inner_method_is_loaded_too(mixed, tmp_path):
    model, outputs = mixed
    result = model.load_adapter(tmp_path / "lora", "again")
    assert result.missing_keys == result.unexpected_keys == []
    model.set_adapter("again")
    torch.testing.assert_close(model(X), outputs["lora"])


def test_adapters_act_on_top_of_each_other_and_merge(mixed):
    model, outputs = mixed
    before = base_state(model)
    model.set_adapter(list(CONFIGS))
    with torch.no_grad():
        together = model(X)
        assert all(not torch.allclose(together, output) for output in outputs.values())
        model.merge_adapter()
        torch.testing.assert_close(model(X), together)
        model.unmerge_adapter()
        assert torch.equal(model(X), together)
        assert_base_untouched(model, before)
        plain = copy.deepcopy(model).merge_and_unload()
        assert type(plain) is MLP
        torch.testing.assert_close(plain(X), together)


def test_each_row_of_a_batch_uses_the_adapter_it_names(mixed):
    model, outputs = mixed
    names = ["vera", "lora", "__base__", "hra", "lora", "vera"]
    with torch.no_grad():
        got = model(X, adapter_names=names)
        outputs["__base__"] = MLP()(X)
    torch.testing.assert_close(got, torch.stack([outputs[name][row] for row, name in enumerate(names)]))


def test_copies_and_pickles_are_independent(mixed):
    model, outputs = mixed
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in twins:
        twin.set_adapter("hra")
        twin.delete_adapter(["lora", "vera"])
        torch.testing.assert_close(twin(X), outputs["hra"])
    torch.testing.assert_close(model(X), outputs["lora"])


def test_only_the_active_adapter_is_trained():
    model = get_peft_model(MLP(), CONFIGS["lora"](target_modules=["lin0"]), adapter_name="one", mixed=True)
    model.add_adapter("two", CONFIGS["hra"](target_modules=["lin0", "lin1"]))
    model.set_adapter("two")
    model(X).sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {f"base_model.model.{layer}.hra_u.two" for layer in ("lin0", "lin1")}


def test_deleting_adapters_leaves_the_others(mixed):
    model, outputs = mixed
    model.set_adapter("vera")
    model.delete_adapter(["lora", "hra"])
    assert list(model.peft_config) == model.active_adapters == ["vera"]
    assert not [name for name, _ in model.named_parameters() if "lora" in name or "hra" in name]
    torch.testing.assert_close(model(X), outputs["vera"])
    with pytest.raises(ValueError, match="lora"):
        model.delete_adapter("lora")


def test_methods_with_shared_tensors_keep_them_apart_from_other_methods(mixed):
    model, _ = mixed
    model.add_adapter("second", CONFIGS["vera"](target_modules=["lin0"]))
    with pytest.raises(ValueError, match="projection"):
        model.add_adapter("third", VeraConfig(r=4, target_modules=["lin0"], projection_prng_key=9))
    assert list(model.base_model.vera_A) == ["vera", "second"]
    model.delete_adapter("second")
    assert list(model.base_model.vera_A) == ["vera"]


def test_a_call_that_raises_leaves_the_model_as_it_was(mixed):
    model, outputs = mixed
    names = [name for name, _ in model.named_parameters()]
    for call, message in [
        (lambda: model.add_adapter("lora", LoraConfig(target_modules=["lin0"])), "exists"),
        (lambda: model.add_adapter("new", HRAConfig(target_modules=["nope"])), "nope"),
        (lambda: model.set_adapter(["lora", "zzz"]), "zzz"),
        (lambda: model.delete_adapter(["vera", "zzz"]), "zzz"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert [name for name, _ in model.named_parameters()] == names
    torch.testing.assert_close(model(X), outputs["lora"])


def test_a_soft_prompt_cannot_be_mixed():
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="mixed"):
        get_peft_model(llama(), prompt, mixed=True)
    model = get_peft_model(llama(), LoraConfig(), mixed=True)
    with pytest.raises(ValueError, match="mixed"):
        model.add_adapter("prompt", prompt)


def test_heads_and_generation():
    model = get_peft_model(llama(), LoraConfig(modules_to_save=["lm_head"], init_lora_weights=False), mixed=True).eval()
    model.add_adapter("scale", IA3Config(target_modules=["v_proj"], feedforward_modules=[]))
    fill_adapter(model, "scale")
    ids = tokens(2)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(-1)
        lora = model.generate(ids, max_new_tokens=4)
        model.set_adapter("scale")
        scale = model.generate(ids, max_new_tokens=4)
        with model.disable_adapter():
            base = model.generate(ids, max_new_tokens=4)
    assert torch.equal(base, llama().generate(ids, max_new_tokens=4))
    assert not torch.equal(lora, base)
    assert not torch.equal(scale, lora)


def test_saving_is_refused_in_words(mixed, tmp_path):
    model, _ = mixed
    with pytest.raises(NotImplementedError, match="PeftMixedModel"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
