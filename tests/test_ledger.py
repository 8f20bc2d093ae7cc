"""Nothing of a base weight is lost: layers around each other, moves while merged, interrupts, tied weights."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import random

import pytest
import torch
from torch import nn

import peft
import test_conformance as conformance
from failures import fails
from peft import (
    AdaptionPromptConfig,
    LoraConfig,
    PromptTuningConfig,
    get_peft_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.core.walk import base_parameters, parts_of
from peft.lora_tools.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from tiny_models import gpt2, llama
from tiny_models import tokens as token_ids


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.lin(x)))


MIXED = {
    "lora": LoraConfig(r=2, target_modules=["lin"]),
    "dora": LoraConfig(r=2, target_modules=["lin"], use_dora=True),
    "hra": peft.HRAConfig(r=2, target_modules=["lin"]),
    "ia3": peft.IA3Config(target_modules=["lin"], feedforward_modules=[]),
    "oft": peft.OFTConfig(oft_block_size=4, target_modules=["lin"]),
    "ln": peft.LNTuningConfig(target_modules=["lin"]),
    "lokr": peft.LoKrConfig(r=2, target_modules=["lin"]),
}


def randomise(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def mixed(first: str, second: str) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(Net(), MIXED[first], "first", mixed=True)
    model.add_adapter("second", MIXED[second])
    model.set_adapter(["first", "second"])
    return randomise(model)


def nested() -> nn.Module:
    """A parameter and its module."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["lin"], target_parameters=["lin.weight"])
    return randomise(get_peft_model(Net(), config))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in base_parameters(model.get_base_model())}


def same(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = dict(base_parameters(model.get_base_model()))
    return now.keys() == before.keys() and all(torch.equal(now[name], value) for name, value in before.items())


@pytest.mark.parametrize("pair", [*itertools.permutations(MIXED, 2), None], ids=str)
def test_methods_on_one_module_are_merged_disabled_and_taken_out(pair):
    model, x = nested() if pair is None else mixed(*pair), torch.randn(4, 8)
    before, expected = weights(model), model(x)
    model.base_model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert same(model, before)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    model.base_model.unmerge_adapter()
    assert same(model, before) and torch.equal(model(x), expected)


@pytest.mark.parametrize("pair", [("lora", "hra"), ("hra", "dora"), ("ia3", "lokr")], ids=str)
def test_merged_one_after_the_other_in_any_order_is_merged_at_once(pair):
    model, x = mixed(*pair), torch.randn(4, 8)
    before, expected = weights(model), model(x)
    for order in (("first", "second"), ("second", "first")):
        for name in order:
            model.base_model.merge_adapter([name])
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        model.base_model.unmerge_adapter()
        assert same(model, before)
    model.base_model.merge_adapter()
    model.base_model.delete_adapter("first")
    model.base_model.unmerge_adapter()
    assert same(model, before)


def test_doras_merged_in_two_calls_are_those_merged_in_one():
    config, x = LoraConfig(r=2, target_modules=["lin", "out"], use_dora=True), torch.randn(4, 8)
    model = get_peft_model(Net(), config, "a")
    model.add_adapter("b", config)
    model.base_model.set_adapter(["a", "b"])
    expected = randomise(model)(x)
    model.merge_adapter(["a"])
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    model.merge_adapter(["b"])
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("own", [False, True])
def test_a_model_that_changes_its_dtype_while_merged(own):
    model = randomise(get_peft_model(Net(), LoraConfig(r=2, target_modules=["lin"])))
    if own:  # modules that share the weight keep the original
        model.base_model.model.out.weight = model.base_model.model.lin.base_layer.weight
    before = weights(model)
    model.merge_adapter()
    model.to(torch.float64)
    model.unmerge_adapter()
    for name, value in base_parameters(model.get_base_model()):
        assert value.dtype == torch.float64 and torch.equal(value, before[name].double())


def test_trained_tokens_of_tied_modules():
    model = gpt2()
    config = peft.TrainableTokensConfig(token_indices=[1, 3, 5])
    model = randomise(get_peft_model(model, config))
    before, ids = weights(model), token_ids()
    expected = model(ids).logits
    model.merge_adapter()
    with model.disable_adapter():
        pass
    torch.testing.assert_close(model(ids).logits, expected)
    model.unmerge_adapter()
    assert same(model, before)
    base = model.unload()
    assert base.lm_head.weight is base.transformer.wte.weight


@pytest.mark.parametrize("operation", ["merge", "unmerge", "disable", "enable"])
def test_an_interrupt_at_any_line_loses_no_base_weight(operation):
    calls = {
        "merge": lambda m: m.base_model.merge_adapter(),
        "unmerge": lambda m: m.base_model.unmerge_adapter(),
        "disable": lambda m: m.base_model.disable_adapter_layers(),
        "enable": lambda m: m.base_model.enable_adapter_layers(),
    }
    chosen = random.Random(0)
    n = 1
    while True:
        model = mixed("lora", "hra")
        before, x = weights(model), torch.randn(2, 8)
        expected = model(x)
        if operation != "merge":
            model.base_model.merge_adapter()
        if operation == "enable":
            model.base_model.disable_adapter_layers()
        if not fails(lambda model=model: calls[operation](model), n, KeyboardInterrupt):
            break
        model.base_model.enable_adapter_layers()
        if model.base_model.merge_memory():
            model.base_model.unmerge_adapter()
        assert same(model, before), f"lost at line {n}"
        torch.testing.assert_close(model(x), expected)
        n += chosen.randint(5, 40)
    assert n > 20


def test_an_interrupted_deletion_of_a_merged_adapter_on_layers_around_each_other():
    torch.manual_seed(0)
    config = peft.HRAConfig(r=2, target_modules=["lin"], target_parameters=["lin.weight"])
    start = randomise(get_peft_model(Net(), config, "a"))
    start.add_adapter("b", config)
    start.merge_adapter()
    x, n = torch.randn(2, 8), 1
    expected = start(x)
    while True:
        model = copy.deepcopy(start)
        if not fails(lambda model=model: model.delete_adapter("a"), n, KeyboardInterrupt):
            break
        if "a" in model.peft_config:
            torch.testing.assert_close(model(x), expected)
        n += 3
    assert n > 20


def state_of(model):
    return (
        list(model.peft_config),
        model.active_adapters,
        sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad),
        sorted(model.state_dict()),
    )


@pytest.mark.parametrize("operation", ["set", "delete"])
@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, modules_to_save=["lm_head"]),
        AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=2),
    ],
    ids=["soft prompt", "adaption prompt"],
)
def test_an_interrupt_leaves_prompts_as_before_or_as_after(config, operation):
    call = {"set": lambda m: m.set_adapter("b"), "delete": lambda m: m.delete_adapter("a")}[operation]
    start = get_peft_model(llama(), copy.deepcopy(config), "a")
    start.add_adapter("b", copy.deepcopy(config))
    randomise(start)
    assert not any(name.endswith(".b") or ".b." in name for name in state_of(start)[2]), "trained before it is active"
    with torch.no_grad():
        after, ids = copy.deepcopy(start), token_ids()
        call(after)
        outcomes = [(state_of(model), model(ids).logits) for model in (start, after)]
        for n in range(1, 2000, 7):
            model = copy.deepcopy(start)
            if not fails(lambda model=model: call(model), n, KeyboardInterrupt):
                break
            found = state_of(model), model(ids).logits
            assert any(found[0] == state and torch.equal(found[1], out) for state, out in outcomes), f"line {n}"
    assert n > 20


def whole_state(model: nn.Module) -> tuple:
    """What may be seen of a model: states, settings, configurations, modes, and all values."""
    settings = [(name, {k: str(v) for k, v in part.settings.items()}) for name, part in parts_of(model)]
    modes = [module.training for module in model.modules()]
    configs = {name: str(config) for name, config in model.peft_config.items()}
    return state_of(model), settings, modes, configs, {k: v.tolist() for k, v in model.state_dict().items()}


LOADED = {
    "lora": LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["score"], trainable_token_indices=[1], bias="lora_only"
    ),
    "layers share": peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=4, target_modules=["q_proj"]),
    "made anew": peft.FrodConfig(target_modules=["q_proj"]),
    "soft prompt": PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2),
    "adaption prompt": AdaptionPromptConfig(task_type="SEQ_CLS", adapter_len=2, adapter_layers=2),
}


@pytest.mark.parametrize(
    ("way", "kind"),
    [*itertools.product(["load", "load to train"], LOADED), ("values", "lora"), ("hot swap", "lora"), ("compiled", "")],
)
def test_an_interrupt_leaves_what_is_replaced_as_before_or_as_after(way, kind, tmp_path):
    config = LOADED.get(kind) or LoraConfig(r=2, target_modules=["q_proj"])

    def made(**fields):
        base = llama("LlamaForSequenceClassification", attention_bias=True)
        return randomise(get_peft_model(base, dataclasses.replace(config, **fields)))

    other = made(r=4, lora_alpha=3) if way in ("hot swap", "compiled") else made()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5 if parameter.requires_grad else 1)
    other.save_pretrained(tmp_path)
    start = made().train()
    if way == "compiled":  # scales are tensors, and the new factors are padded
        prepare_model_for_compiled_hotswap(start, target_rank=8)

    def call(model):
        if way.startswith("load"):
            model.load_adapter(tmp_path, "default", is_trainable=way == "load to train")
        elif way == "values":
            set_peft_model_state_dict(model, load_peft_weights(tmp_path))
        else:
            hotswap_adapter(model, tmp_path, "default")

    after = copy.deepcopy(start)
    call(after)
    outcomes, n, chosen = [whole_state(start), whole_state(after)], 1, random.Random(0)
    assert outcomes[0] != outcomes[1]
    while True:
        model = copy.deepcopy(start)
        if not fails(lambda model=model: call(model), n, KeyboardInterrupt):
            break
        assert whole_state(model) in outcomes, f"half done at line {n}"
        n += chosen.randint(5, 1500)
    assert n > 1000


@pytest.mark.parametrize("kind", ["layers", "soft prompt"])
def test_an_interrupt_on_the_way_into_disable_adapter_or_out_of_it_leaves_all_as_before(kind):
    if kind == "layers":
        model = mixed("lora", "hra")
    else:
        model = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    before, n = state_of(model), 0

    def look():
        with model.disable_adapter(), model.disable_adapter():
            pass

    def is_off():
        return model._prompt_disabled if kind == "soft prompt" else model.base_model.disabled

    while fails(look, n := n + 2, KeyboardInterrupt):
        assert state_of(model) == before and not is_off(), f"line {n}"
    assert n > 20 and state_of(model) == before and not is_off()


def test_a_head_is_that_of_the_adapter_that_is_active_after_a_deletion():
    model = llama("LlamaForSequenceClassification")
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["score"])
    model = get_peft_model(model, config, "a")
    model.add_adapter("b", config)
    randomise(model)
    ids = token_ids()
    expected = model(ids).logits
    model.set_adapter("b")
    model.delete_adapter("b")
    torch.testing.assert_close(model(ids).logits, expected)
    assert all(p.requires_grad for name, p in model.named_parameters() if "modules_to_save.a" in name)


def filled(model: nn.Module) -> nn.Module:
    for seed, name in enumerate(model.peft_config):
        conformance.randomise(model, name, seed)
    return model


def around(first: str, second: str | None, where: str) -> nn.Module:
    """Adapters on one weight, by its module and as a parameter."""
    on_parameter = {"target_modules": [], "target_parameters": ["target.weight"]}
    kind = "Parameter" if where == "one parameter" else "Linear"
    if second is None:
        config = conformance.config_for(first, kind, target_parameters=["target.weight"])
        return filled(get_peft_model(conformance.build(kind), config, "a"))
    settings = {"module first": ({}, on_parameter), "parameter first": (on_parameter, {})}.get(where, ({}, {}))
    configs = [conformance.config_for(m, kind, **more) for m, more in zip((first, second), settings, strict=True)]
    model = get_peft_model(conformance.build(kind), configs[0], "a", mixed=True)
    model.add_adapter("b", configs[1])
    model.set_adapter(["a", "b"])
    return filled(model)


#: what does more than add to a weight, or reads the weight that it is added to
BY_ORDER = ["HRA", "IA3", "OSF", "DELORA", "PEANUT"]
PLACES = ["module first", "parameter first", "one parameter"]


@pytest.mark.parametrize(
    "first, second, where",
    [
        *((m, None, "both") for m in BY_ORDER),
        *(
            (*pair, where)
            for pair in itertools.permutations(BY_ORDER, 2)
            for where in ("module first", "parameter first", "one parameter")
        ),
    ],
)
def test_layers_around_each_other_act_in_the_order_in_which_they_are_merged(first, second, where):
    model = around(first, second, where).eval()
    x = conformance.inputs_of(model)
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-3, atol=1e-4)
