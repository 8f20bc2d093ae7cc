"""Every method under FSDP1 and DeepSpeed's ZeRO: it does what it does in one process.

By default a few; with PEFT_DISTRIBUTED all.
"""

from __future__ import annotations

import importlib.util
import os
from functools import partial

import pytest
from torch import nn

import distributed_runs
import flat_runs
import tiny_models
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.core.wrappers import plain_name

ALL = bool(os.environ.get("PEFT_DISTRIBUTED"))
FEW = [
    ("LN_TUNING", "FSDP1"), ("VBLORA", "FSDP1"), ("LORA DoRA", "FSDP1 flat"), ("P_TUNING", "FSDP1 flat"),
    ("LORA DoRA", "ZeRO-3 first"), ("PEANUT", "ZeRO-3"), ("LN_TUNING", "ZeRO-3"),
]  # fmt: skip
#: methods whose tensors FSDP1 can take apart from the frozen ones only with use_orig_params=True
MIXED = "uniform `requires_grad`"
CELLS = [(method, kind) for kind in flat_runs.KINDS for method in distributed_runs.ALL_METHODS] if ALL else FEW


@pytest.fixture(scope="module")
def pool():
    processes = distributed_runs.Pool(2)
    yield processes
    processes.close()


@pytest.mark.parametrize(("method", "kind"), CELLS, ids=[f"{method} {kind}" for method, kind in CELLS])
def test_it_does_what_it_does_in_one_process(pool, method, kind):
    if "ZeRO" in kind and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    answers = pool.run(partial(flat_runs.observe, method, kind), 120)
    if ALL and all(answer[0] == "raised" for answer in answers):
        refused = answers[0][1]
        if (kind == "FSDP1 flat" and MIXED in refused) or refused.startswith("NotImplementedError"):
            pytest.skip(refused)
    assert [answer[:2] for answer in answers] == [("seen", None)] * 2


@pytest.mark.slow
def test_trainer():
    """transformers' Trainer with a configuration of DeepSpeed (accelerate's FSDP wants a GPU)."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    processes = distributed_runs.Pool(2)  # of their own: accelerate has one state for a process
    try:
        answers = processes.run(flat_runs.with_trainer, 200)
    finally:
        processes.close(kill=True)
    assert [answer[:2] for answer in answers] == [("seen", None)] * 2


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
