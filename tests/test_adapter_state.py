"""What calls leave as it was: frozen adapters, disabled ones, trained modules; and what a call that raises leaves."""

from __future__ import annotations

import copy
import sys

import pytest
import torch

import peft
import tiny_models as tiny
from peft import (
    GloraConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft import functional as F


def causal(**fields):
    return LoraConfig(task_type="CAUSAL_LM", **fields)


def two(**fields):
    """A tiny Llama with "red" on q_proj and v_proj (active) and "blue" on v_proj and up_proj, both filled."""
    model = get_peft_model(tiny.llama(), causal(target_modules=["q_proj", "v_proj"], **fields), adapter_name="red")
    model.add_adapter("blue", causal(target_modules=["v_proj", "up_proj"], **fields))
    return tiny.fill_adapter(tiny.fill_adapter(model, "red", 1), "blue", 2).eval()


def logits(model, **kwargs):
    with torch.no_grad():
        return model(input_ids=tiny.tokens(), **kwargs).logits


def trainable(model):
    names = [name.split(".") for name, p in model.named_parameters() if p.requires_grad]
    return {next((part for part in name if part in model.peft_config), "<base>") for name in names}


def tree(model):
    return [(name, id(module)) for name, module in model.named_modules()]


# ------------------------------------------------------------------------------------------ frozen and disabled


@pytest.mark.parametrize("trained", [set(), {"blue"}, {"red", "blue"}])
def test_adding_an_adapter_leaves_the_others_frozen_or_not(trained):
    model = two()
    model.set_requires_grad(["red", "blue"], False)
    model.set_requires_grad(sorted(trained), True)
    model.add_adapter("green", causal(target_modules=["k_proj", "q_proj"]))
    assert trainable(model) == trained


def test_an_adapter_added_while_adapters_are_disabled_is_disabled_too():
    model, base = two(), logits(tiny.llama())
    red = logits(model)
    with model.disable_adapter():
        model.add_adapter("green", causal(target_modules=["k_proj", "q_proj"]))
        assert get_model_status(model).enabled is False and trainable(model) == set()
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), red) and trainable(model) == {"red"}


def test_an_adapter_set_while_adapters_are_disabled_is_the_one_that_is_trained_then():
    model = two(modules_to_save=["lm_head"])
    with model.disable_adapter():
        model.set_adapter("blue")
    assert model.active_adapters == ["blue"] and trainable(model) == {"blue"}


def test_unmerging_while_adapters_are_disabled_lasts():
    model = two()
    red = logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        model.unmerge_adapter()
    assert get_model_status(model).merged_adapters == [] and torch.equal(logits(model), red)


def test_merging_while_adapters_are_disabled_says_what_that_means():
    model = two()
    with model.disable_adapter(), pytest.warns(peft.PeftWarning, match="disabled"):
        model.merge_adapter()
    assert get_model_status(model).merged_adapters == ["red"]


# -------------------------------------------------------------------------------------- modules trained in full


def test_deleting_the_active_adapter_activates_the_next_one_and_its_head():
    model = two(modules_to_save=["lm_head"])
    model.set_adapter("blue")
    blue = logits(model)
    model.set_adapter("red")
    with pytest.warns(peft.PeftWarning, match="'blue' is now"):
        model.delete_adapter("red")
    assert torch.equal(logits(model), blue) and trainable(model) == {"blue"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_head_trained_in_full_has_the_dtype_of_its_base_model(dtype):
    model = get_peft_model(tiny.bert().to(dtype), LoraConfig(task_type="SEQ_CLS")).eval()
    assert {p.dtype for name, p in model.named_parameters() if "modules_to_save" in name} == {dtype}
    assert logits(model).dtype == dtype


def test_a_mixed_batch_reaches_whole_layers_that_are_trained_in_full():
    model = get_peft_model(tiny.llama(), causal(target_modules=["q_proj"], modules_to_save=["layers.1"]), "red")
    model.add_adapter("blue", causal(target_modules=["q_proj"], modules_to_save=["mlp"]))
    tiny.fill_adapter(tiny.fill_adapter(model, "red", 1), "blue", 2).eval()
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, :2] = 0  # a mask with rows of its own
    alone = {"__base__": logits(tiny.llama(), attention_mask=mask, use_cache=False)}
    for name in ("red", "blue"):
        model.set_adapter(name)
        alone[name] = logits(model, attention_mask=mask, use_cache=False)
    names = ["blue", "__base__", "red"]
    mixed = logits(model, attention_mask=mask, use_cache=False, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], alone[name][row], rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- status


def test_status_asks_only_layers_that_have_an_adapter():
    model = two(modules_to_save=["lm_head"])
    model.merge_adapter()
    assert get_model_status(model).merged_adapters == ["red"], "up_proj has no red that could be merged"
    model.unmerge_adapter()
    with pytest.warns(peft.PeftWarning):
        model.delete_adapter("red")
    model.set_adapter("blue")
    assert get_model_status(model).active_adapters == ["blue"], "q_proj has no adapter any more"


# ------------------------------------------------------------------------------------------- calls that raise


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        (dict(trainable_token_indices=[40]), IndexError, "index 40"),
        (dict(trainable_token_indices=[-41]), IndexError, "index -41"),
        (dict(trainable_token_indices=[3, 5, 3]), ValueError, "twice"),
        (dict(trainable_token_indices={"model.norm": [3]}), TypeError, "model.norm"),
        (dict(trainable_token_indices=[3], modules_to_save=["embed_tokens"]), ValueError, "in full"),
        (dict(modules_to_save=["layers"]), TypeError, "ModuleList"),
        (dict(modules_to_save=["self_attn"]), ValueError, "in full by modules_to_save"),
        (dict(layer_replication=[(0, 2), (0, 2)], trainable_token_indices=[40]), IndexError, "index 40"),
    ],
)
@pytest.mark.parametrize("how", ["get_peft_model", "inject_adapter_in_model"])
def test_what_cannot_be_trained_is_said_before_anything_changes(fields, error, words, how):
    plain = tiny.llama()
    before, modules, layers = tiny.state(plain), tree(plain), plain.config.num_hidden_layers
    config = causal(**{"target_modules": ["q_proj"], **fields})
    as_given = repr(config)
    with pytest.raises(error, match=words):
        getattr(peft, how)(**{"model": plain, "peft_config": config})
    assert tree(plain) == modules and plain.config.num_hidden_layers == layers
    tiny.assert_same_state(plain, before)
    assert not hasattr(plain, "peft_config") and repr(config) == as_given


def test_a_load_that_fails_leaves_no_layers_behind(tmp_path):
    fields = dict(target_modules=["k_proj"], modules_to_save=["up_proj"], trainable_token_indices=[3])
    get_peft_model(tiny.llama(intermediate_size=64), causal(**fields)).save_pretrained(tmp_path)
    model = two()
    before, modules, targets = tiny.state(model), tree(model), list(model.targeted_module_names)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_adapter(tmp_path, "green")
    assert tree(model) == modules and model.targeted_module_names == targets
    tiny.assert_same_state(model, before)


@pytest.mark.parametrize("fields", [dict(layer_replication=[(0, 2), (0, 2)]), dict(init_lora_weights="pissa")])
def test_a_failed_from_pretrained_gives_back_layers_and_weights(fields, tmp_path):
    get_peft_model(tiny.llama(intermediate_size=64), causal(target_modules=["up_proj"])).save_pretrained(tmp_path)
    plain = tiny.llama()
    before, modules = tiny.state(plain), tree(plain)
    config = causal(target_modules=["up_proj"], **fields)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(plain, tmp_path, config=config)
    assert tree(plain) == modules and plain.config.num_hidden_layers == 2
    tiny.assert_same_state(plain, before)
    assert not hasattr(plain, "peft_config")


def test_a_second_merge_that_fails_leaves_the_first():
    model = two()
    with torch.no_grad():  # in the first layer, which comes last
        model.base_model.model.model.layers[0].self_attn.v_proj.lora_B["blue"].weight.fill_(float("inf"))
    model.merge_adapter(["red"])
    before = tiny.base_state(model)
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(["blue"], safe_merge=True)
    assert get_model_status(model).merged_adapters == ["red"]
    tiny.assert_base_untouched(model, {name: value for name, value in before.items() if "blue" not in name})


def test_adapters_with_a_head_each_cannot_be_active_together_and_nothing_changes():
    model = tiny.llama()
    for name, target in (("red", "q_proj"), ("blue", "v_proj")):
        peft.inject_adapter_in_model(LoraConfig(target_modules=[target], modules_to_save=["lm_head"]), model, name)
    tiny.fill_adapter(tiny.fill_adapter(model, "red", 1), "blue", 2)
    before, output = tiny.state(model), logits(model)
    with pytest.raises(ValueError, match="Only one adapter"):
        F.set_adapter(model, ["red", "blue"])
    tiny.assert_same_state(model, before)
    assert torch.equal(logits(model), output)


def test_two_soft_prompts_cannot_be_active_together():
    config = dict(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(tiny.llama(), PromptTuningConfig(**config), adapter_name="red")
    model.add_adapter("blue", PromptTuningConfig(**config))
    with pytest.raises(ValueError, match="One soft prompt"):
        model.set_adapter(["red", "blue"])
    model.set_adapter(["blue"])
    assert model.active_adapter == "blue"


# ------------------------------------------------------------------------------------------ repeated layers, warnings


def test_adapters_of_repeated_layers_share_the_stack():
    twice = dict(layer_replication=[(0, 2), (0, 2)])
    model = get_peft_model(tiny.llama(), causal(target_modules=["q_proj"], **twice), adapter_name="red")
    tiny.fill_adapter(model, "red").eval()
    red, stack = logits(model), model.base_model.model.model.layers
    model.add_adapter("blue", causal(target_modules=["v_proj"], **twice))
    assert model.base_model.model.model.layers is stack and len(stack) == 4
    assert torch.equal(logits(model), red)
    with pytest.raises(ValueError, match="all adapters need the same"):
        model.add_adapter("green", causal(target_modules=["v_proj"], layer_replication=[(0, 1)]))
    assert len(model.base_model.model.model.layers) == 4


def test_a_pattern_of_layers_that_fits_nothing_is_warned_of():
    config = causal(target_modules=["q_proj"], layers_to_transform=[0], layers_pattern=["layers", "blocks"])
    with pytest.warns(peft.PeftWarning, match="layers_pattern 'blocks'"):
        get_peft_model(tiny.llama(), config)


# ------------------------------------------------------------------------------------------ many adapters


def calls_of(do):
    """How many functions are called."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        do()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("operation", ["add_adapter", "set_adapter", "forward"])
def test_what_is_done_to_one_adapter_takes_no_longer_with_many_beside_it(operation):
    model = two()
    calls = []
    for count in (3, 40):
        for index in range(len(model.peft_config), count):
            model.add_adapter(f"a{index}", causal(target_modules=["q_proj", "v_proj"]))
        model.set_adapter(f"a{count - 1}")  # its first use
        model.set_adapter("red")
        do = {
            "add_adapter": lambda: model.add_adapter("new", causal(target_modules=["q_proj", "v_proj"])),
            "set_adapter": lambda name=f"a{count - 1}": model.set_adapter(name),
            "forward": lambda: logits(model),
        }[operation]
        calls.append(calls_of(do))
        if operation == "add_adapter":
            model.delete_adapter("new")
    assert calls[1] < 1.3 * calls[0], calls


def filled(model, name):
    """The adapter with values that depend on the names in its file alone."""
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    for key, tensor in tensors.items():
        tensors[key] = 0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(key)))
    set_peft_model_state_dict(model, tensors, adapter_name=name)
    model.set_adapter(name)
    return logits(model.eval())


@pytest.mark.parametrize("order", [("one", "two"), ("two", "one")])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (LoraConfig(r=2, target_modules=["q_proj"]), LoraConfig(r=3, target_parameters=["q_proj.weight"])),
        (HRAConfig(r=2, target_modules=["q_proj"]), LoraConfig(r=2, target_modules="all-linear")),
        (LoraConfig(r=2, target_modules="all-linear", trainable_token_indices=[1, 5]), GloraConfig(r=2)),
        (LoraConfig(r=2, trainable_token_indices=[1, 5]), LoraConfig(r=2, modules_to_save=["embed_tokens"])),
        (LoraConfig(r=2, target_modules=["embed_tokens"]), IA3Config(modules_to_save=["embed_tokens"])),
        (LoraConfig(r=2, target_modules="all-linear"), HRAConfig(target_modules=["v_proj"], modules_to_save=["mlp"])),
        (LoraConfig(target_modules=["up_proj"], modules_to_save=["self_attn"]), LoraConfig(modules_to_save=["o_proj"])),
        (GloraConfig(r=2, config_A_B="none", config_C="none"), LoHaConfig(r=2, target_modules=["q_proj"])),
    ],
)
def test_what_an_adapter_is_does_not_depend_on_another(first, second, order):
    configs, mixed = {"one": first, "two": second}, type(first) is not type(second)
    alone = {}
    for name, config in configs.items():
        model = get_peft_model(tiny.llama(), copy.deepcopy(config), adapter_name=name, mixed=mixed)
        alone[name] = filled(model, name), get_peft_model_state_dict(model, adapter_name=name).keys()
    plain = tiny.llama()
    expected = plain(input_ids=tiny.tokens()).logits
    model = get_peft_model(plain, copy.deepcopy(configs[order[0]]), adapter_name=order[0], mixed=mixed)
    model.add_adapter(order[1], copy.deepcopy(configs[order[1]]))
    for name, (output, names) in alone.items():
        torch.testing.assert_close(filled(model, name), output, atol=1e-4, rtol=1e-4)
        assert get_peft_model_state_dict(model, adapter_name=name).keys() == names
        with model.disable_adapter():
            assert torch.equal(logits(model), expected)
    model.delete_adapter(order[0])
    model.set_adapter(order[1])
    torch.testing.assert_close(logits(model), alone[order[1]][0], atol=1e-4, rtol=1e-4)
    assert torch.equal(model.unload()(input_ids=tiny.tokens()).logits, expected)


def test_modules_of_a_model_may_be_called_as_what_holds_adapters(tmp_path):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.original_module, self.token_adapter = tiny.MLP(), tiny.MLP()

        def forward(self, x):
            return self.original_module(x) + self.token_adapter(x)

    x, plain = torch.randn(3, 16), Model()
    model = get_peft_model(Model(), LoraConfig(target_modules=["token_adapter.lin0", "original_module.lin1"]))
    output = tiny.fill_adapter(model)(x)
    assert not torch.allclose(output, plain(x))
    tensors = get_peft_model_state_dict(model)
    assert {key.split(".")[2] for key in tensors} == {"original_module", "token_adapter"}
    given = get_peft_model_state_dict(model, state_dict=model.state_dict())
    assert given.keys() == tensors.keys()
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(Model(), tmp_path)(x), output)
    assert torch.equal(model.unload()(x), plain(x))
