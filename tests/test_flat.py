"""Names and values of adapters in models whose modules others have put something around, or taken apart."""

from __future__ import annotations

import pytest
from torch import nn

import tiny_models
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.core.wrappers import plain_name


class Around(nn.Module):
    """What FSDP puts around a module, as far as names go."""

    def __init__(self, module: nn.Module, name: str):
        super().__init__()
        self._modules[name] = module
        self.__dict__["inside"] = name

    def __getattr__(self, name):
        modules = self.__dict__["_modules"]
        return modules[name] if name in modules else getattr(modules[self.__dict__["inside"]], name)

    def state_dict(self, *args, **kwargs):
        raise AssertionError("a call of all processes")


def put_around(model: nn.Module, name: str) -> None:
    """Puts something around each module that has parameters of its own, and around the blocks."""
    for module in [*model.modules()]:
        for child, inside in module._modules.items():
            if isinstance(inside, (nn.Linear, nn.Embedding)) or type(inside).__name__ == "LlamaDecoderLayer":
                module._modules[child] = Around(inside, name)


@pytest.mark.parametrize("name", ["_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_dora": True},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
    ],
    ids=str,
)
def test_names_are_plain_wherever_something_stands_around_a_module(name, settings):
    config = LoraConfig(**{"target_modules": ["q_proj"], **settings})
    model = get_peft_model(tiny_models.llama(attention_bias=True), config)
    plain = get_peft_model_state_dict(tiny_models.fill_adapter(model), save_embedding_layers=False)
    whole = model.state_dict()
    put_around(model, name)
    assert any(name in path for path, _ in model.named_modules())
    found = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert found.keys() == plain.keys()
    given = get_peft_model_state_dict(model, {plain_name(key): value for key, value in whole.items()})
    assert given.keys() >= plain.keys()
    result = set_peft_model_state_dict(model, {key: value + 1 for key, value in plain.items()})
    assert not result.missing_keys and not result.unexpected_keys


@pytest.mark.parametrize("change", [dict.clear, lambda state: state.update({k: v[:0] for k, v in state.items()})])
def test_a_state_dict_that_lacks_something_is_an_error(change, tmp_path):
    model = get_peft_model(tiny_models.llama(), LoraConfig(target_modules=["q_proj"]))
    state = dict(model.state_dict())
    change(state)
    with pytest.raises((KeyError, ValueError), match="state_dict has"):
        model.save_pretrained(tmp_path, state_dict=state)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    model.save_pretrained(tmp_path, state_dict=state, is_main_process=False)  # asks nobody, writes nothing
