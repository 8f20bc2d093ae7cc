"""The life of adapters on a model: add, activate, freeze, delete, disable, merge, mix in a batch, inspect."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peft
import tiny_models as tiny
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    TaskType,
    get_layer_status,
    get_model_status,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.helpers import rescale_adapter_scale, update_forward_signature, update_generate_signature, update_signature

VIT_QUERY = r".*\.(q_proj|query)"  # as later and earlier versions of transformers call it
RED = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
BLUE = dict(r=2, lora_alpha=8, target_modules=["v_proj", "up_proj"])


def causal(**fields):
    return LoraConfig(task_type="CAUSAL_LM", **fields)


@pytest.fixture
def model():
    """A tiny Llama in evaluation mode with two filled adapters, "red" (active) and "blue"."""
    model = get_peft_model(tiny.llama(), causal(**RED), adapter_name="red")
    model.add_adapter("blue", causal(**BLUE))
    tiny.fill_adapter(model, "red", seed=1)
    tiny.fill_adapter(model, "blue", seed=2)
    return model.eval()


def logits(model, ids=None, **kwargs):
    with torch.no_grad():
        return model(input_ids=tiny.tokens() if ids is None else ids, **kwargs).logits


def outputs_of(model, names, ids=None):
    """Logits of each adapter alone, by name; of the base model under "__base__"."""
    before, found = model.active_adapter, {}
    for name in names:
        model.set_adapter(name)
        found[name] = logits(model, ids)
    model.set_adapter(before)
    with model.disable_adapter():
        found["__base__"] = logits(model, ids)
    return found


def trainable(model):
    """Which adapters have trainable parameters; `<base>` stands for everything that is no adapter's."""
    names = [name.split(".") for name, p in model.named_parameters() if p.requires_grad]
    return {next((part for part in name if part in model.peft_config), "<base>") for name in names}


# --------------------------------------------------------------------------------------------------- wrapping


@pytest.mark.parametrize(
    ("task", "base", "wrapped_in"),
    [
        ("CAUSAL_LM", tiny.llama, "PeftModelForCausalLM"),
        ("SEQ_2_SEQ_LM", tiny.t5, "PeftModelForSeq2SeqLM"),
        ("SEQ_CLS", tiny.bert, "PeftModelForSequenceClassification"),
        ("TOKEN_CLS", lambda: tiny.bert("BertForTokenClassification"), "PeftModelForTokenClassification"),
        ("QUESTION_ANS", lambda: tiny.bert("BertForQuestionAnswering"), "PeftModelForQuestionAnswering"),
        ("FEATURE_EXTRACTION", lambda: tiny.bert("BertModel"), "PeftModelForFeatureExtraction"),
        (None, tiny.vit, "PeftModel"),
    ],
)
def test_the_task_decides_the_class_and_a_fresh_lora_changes_nothing(task, base, wrapped_in):
    plain = base()
    given = dict(pixel_values=torch.randn(2, 1, 8, 8)) if task is None else dict(input_ids=tiny.tokens())
    if task == "SEQ_2_SEQ_LM":
        given["decoder_input_ids"] = tiny.tokens(length=4)
    targets = VIT_QUERY if task is None else None
    with torch.no_grad():
        expected = plain(**given)[0]

        wrapped = get_peft_model(plain, LoraConfig(task_type=task, target_modules=targets)).eval()

        assert torch.equal(wrapped(**given)[0], expected)
    assert type(wrapped) is getattr(peft, wrapped_in) and isinstance(wrapped, PeftModel)
    assert trainable(wrapped) == {"default"}


def test_classification_heads_are_trained_and_saved_with_the_adapter():
    for model_class, task, head in [
        ("BertForSequenceClassification", "SEQ_CLS", "classifier"),
        ("BertForTokenClassification", "TOKEN_CLS", "classifier"),
        ("BertForQuestionAnswering", "QUESTION_ANS", "qa_outputs"),
    ]:
        model = get_peft_model(tiny.bert(model_class), LoraConfig(task_type=task))
        parameters = dict(model.named_parameters())
        assert parameters[f"base_model.model.{head}.modules_to_save.default.weight"].requires_grad
        assert not parameters[f"base_model.model.{head}.original_module.weight"].requires_grad
        assert f"base_model.model.{head}.weight" in peft.get_peft_model_state_dict(model)


def test_the_heads_of_question_answering_and_token_classification_give_losses():
    token = get_peft_model(tiny.bert("BertForTokenClassification"), LoraConfig(task_type="TOKEN_CLS"))
    token(input_ids=tiny.tokens(), labels=torch.ones(3, 7, dtype=torch.long)).loss.backward()
    question = get_peft_model(tiny.bert("BertForQuestionAnswering"), LoraConfig(task_type="QUESTION_ANS"))
    edges = dict(start_positions=torch.tensor([0, 1, 2]), end_positions=torch.tensor([3, 4, 5]))
    question(input_ids=tiny.tokens(), **edges).loss.backward()
    for model in (token, question):
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_live_names_are_those_that_inference_engines_read():
    model = get_peft_model(tiny.llama(), causal(**RED, modules_to_save=["lm_head"]), adapter_name="red")
    names = {name for name, _ in model.named_parameters()}
    layer, head = "base_model.model.model.layers.0.self_attn.q_proj", "base_model.model.lm_head"
    assert {f"{layer}.base_layer.weight", f"{layer}.lora_A.red.weight", f"{layer}.lora_B.red.weight"} <= names
    assert {f"{head}.original_module.weight", f"{head}.modules_to_save.red.weight"} <= names


def test_attributes_and_the_base_model_are_reached_through_the_wrapper(model):
    assert model.config.model_type == "llama" and model.prefix == "lora_"
    assert type(model.get_base_model()).__name__ == "LlamaForCausalLM"
    assert model.active_peft_config is model.peft_config["red"]
    assert model.get_input_embeddings().weight.shape == (tiny.VOCABULARY, 32)
    with pytest.raises(AttributeError, match="no_such_thing"):
        model.no_such_thing  # noqa: B018


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("tracked", [False, True])
def test_what_is_traced_with_one_batch_runs_with_others(rows, tracked):
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"], init_lora_weights=False))
    with torch.set_grad_enabled(tracked):
        traced = torch.jit.trace(model.eval(), (torch.randn(rows, 8),))
    for other in (torch.randn(1, 8), torch.randn(3, 8), torch.randn(40, 8)):
        torch.testing.assert_close(traced(other), model(other))


def test_counting_parameters(model, capsys):
    by_hand = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    assert model.get_nb_trainable_parameters() == (by_hand, everything) == (896, everything)
    model.print_trainable_parameters()
    printed = capsys.readouterr().out.strip()
    assert printed == f"trainable params: 896 || all params: {everything:,} || trainable%: {100 * 896 / everything:.4f}"


def test_a_copy_and_a_pickle_are_independent_and_equal(model):
    expected = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), expected)
        tiny.fill_adapter(twin, "red", seed=9)
        assert not torch.allclose(logits(twin), expected)
    assert torch.equal(logits(model), expected)


def test_dropout_is_for_training_only():
    model = get_peft_model(tiny.llama(), causal(lora_dropout=0.5, init_lora_weights=False))
    assert not logits(model.train()).equal(logits(model))
    assert logits(model.eval()).equal(logits(model))


def test_moving_to_another_dtype_moves_the_adapter_too(model):
    expected = logits(model).double()
    model.to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------- several adapters, one active


def test_an_added_adapter_waits_until_it_is_set(model):
    assert model.active_adapters == ["red"] and trainable(model) == {"red"}
    alone = get_peft_model(tiny.llama(), causal(**RED), adapter_name="red").eval()
    assert torch.equal(logits(model), logits(tiny.fill_adapter(alone, "red", seed=1)))


def test_an_adapter_of_a_model_without_memory_has_none_and_draws_no_values():
    base = tiny.llama().to("meta")
    state = torch.get_rng_state()
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"]))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_setting_an_adapter_changes_the_output_and_what_is_trained(model):
    red = logits(model)
    model.set_adapter("blue")
    assert model.active_adapter == "blue" and model.active_adapters == ["blue"] and trainable(model) == {"blue"}
    assert not torch.allclose(logits(model), red)
    model.set_adapter("red")
    assert torch.equal(logits(model), red) and trainable(model) == {"red"}


def test_setting_an_adapter_for_inference_freezes_it(model):
    model.set_adapter("blue", inference_mode=True)
    assert model.active_adapters == ["blue"] and trainable(model) == set()


def test_a_list_of_adapters_acts_as_their_sum():
    mlp, x = tiny.MLP(), torch.randn(5, 16)
    base = mlp(x)
    model = get_peft_model(mlp, LoraConfig(target_modules=["lin1"], r=2), adapter_name="one")
    model.add_adapter("two", LoraConfig(target_modules=["lin1"], r=3))
    change = {}
    for seed, name in enumerate(["one", "two"]):
        tiny.fill_adapter(model, name, seed)
        model.set_adapter(name)
        change[name] = model(x) - base

    model.set_adapter(["one", "two"])

    assert model.active_adapters == ["one", "two"] and trainable(model) == {"one", "two"}
    torch.testing.assert_close(model(x), base + change["one"] + change["two"])


def test_the_tuner_takes_a_list_too(model):
    model.base_model.set_adapter(["red", "blue"])
    assert model.active_adapters == ["red", "blue"] and trainable(model) == {"red", "blue"}


def test_set_requires_grad_does_not_touch_what_is_active(model):
    model.set_requires_grad("blue")
    assert trainable(model) == {"red", "blue"} and model.active_adapters == ["red"]
    model.set_requires_grad(["red", "blue"], requires_grad=False)
    assert trainable(model) == set() and model.active_adapters == ["red"]
    model.set_requires_grad("blue")
    model.set_adapter("red")  # after which the active adapters alone are trained
    assert trainable(model) == {"red"}


def test_deleting_leaves_no_trace_and_the_others_as_they_were(model):
    expected = outputs_of(model, ["red"])["red"]
    model.delete_adapter("blue")
    assert list(model.peft_config) == ["red"]
    assert not [name for name, _ in model.named_parameters() if "blue" in name]
    assert torch.equal(logits(model), expected)
    model.add_adapter("blue", causal(**BLUE))  # the name is free again
    assert set(model.peft_config) == {"red", "blue"}


@pytest.mark.filterwarnings("ignore:.*is now deleted")
def test_deleting_the_active_adapter_activates_the_next(model):
    expected = outputs_of(model, ["blue"])["blue"]
    model.delete_adapter("red")
    assert model.active_adapters == ["blue"] and model.active_adapter == "blue"
    assert torch.equal(logits(model), expected)


@pytest.mark.filterwarnings("ignore:.*is now deleted")
def test_a_model_without_its_last_adapter_is_the_base_model(model):
    base = logits(tiny.llama())
    model.delete_adapter("blue")
    model.delete_adapter("red")
    assert model.peft_config == {} and torch.equal(logits(model), base)
    model.add_adapter("green", causal(**RED))
    model.set_adapter("green")
    assert trainable(model) == {"green"}


def test_the_name_of_an_adapter_that_exists_is_refused(model):
    before = tiny.state(model)
    with pytest.raises(ValueError, match="red"):
        model.add_adapter("red", causal(r=3, target_modules=["o_proj"]))
    tiny.assert_same_state(model, before)
    assert model.peft_config["red"].r == 4 and set(model.peft_config) == {"red", "blue"}


# -------------------------------------------------------------------------------------------------- disabling


def test_disable_is_the_base_model_and_comes_back(model):
    base, red = logits(tiny.llama()), logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), red)


def test_disable_contexts_nest(model):
    base, red = logits(tiny.llama()), logits(model)
    with model.disable_adapter():
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), red)


def test_disable_ends_when_the_body_raises(model):
    red = logits(model)
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError("of the body")
    assert torch.equal(logits(model), red)


@pytest.mark.parametrize("frozen", [["red"], ["red", "blue"], []])
def test_disable_neither_freezes_nor_unfreezes(model, frozen):
    model.set_requires_grad(["red", "blue"])
    if frozen:
        model.set_requires_grad(frozen, requires_grad=False)
    before = tiny.state(model)
    with model.disable_adapter():
        logits(model)
    tiny.assert_same_state(model, before)


def test_disable_covers_modules_to_save():
    plain = tiny.bert()
    expected = plain(input_ids=tiny.tokens()).logits
    model = tiny.fill_adapter(get_peft_model(plain, LoraConfig(task_type="SEQ_CLS"))).eval()
    assert not torch.allclose(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert not torch.allclose(logits(model), expected)


def test_disable_takes_a_soft_prompt_away():
    base = logits(tiny.llama())
    prompt = get_peft_model(tiny.llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    assert logits(prompt).shape[1] == base.shape[1] + 4
    with prompt.disable_adapter():
        with prompt.disable_adapter():
            pass
        assert torch.equal(logits(prompt), base)
    assert logits(prompt).shape[1] == base.shape[1] + 4


def test_the_tuner_disables_and_enables_for_good(model):
    base, red = logits(tiny.llama()), logits(model)
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model), base)
    with model.disable_adapter():
        pass
    assert torch.equal(logits(model), base), "a context restores what it found"
    model.base_model.enable_adapter_layers()
    assert torch.equal(logits(model), red)


def test_disable_shows_the_base_even_while_merged(model):
    base, red = logits(tiny.llama()), logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    torch.testing.assert_close(logits(model), red)


# ---------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2, tiny.opt])
def test_unmerging_restores_the_base_bit_for_bit(build, dtype):
    plain = build().to(dtype)
    before = tiny.base_state(plain)
    config = {"target_modules": "all-linear", "fan_in_fan_out": build is tiny.gpt2}
    model = get_peft_model(plain, causal(**config), adapter_name="red").eval()
    model.add_adapter("blue", causal(r=2, **config))
    tiny.fill_adapter(tiny.fill_adapter(model, "red", 1), "blue", 2)
    model.base_model.set_adapter(["red", "blue"])
    expected = logits(model)

    model.merge_adapter()
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    torch.testing.assert_close(logits(model), expected, rtol=tolerance, atol=tolerance)
    merged = tiny.base_state(model)
    assert any(not torch.equal(merged[name], value) for name, value in before.items())

    model.unmerge_adapter()
    tiny.assert_base_untouched(model, before)
    assert torch.equal(logits(model), expected)


def test_many_rounds_of_merging_do_not_drift():
    plain = tiny.llama().to(torch.bfloat16)
    before = tiny.base_state(plain)
    model = tiny.fill_adapter(get_peft_model(plain, causal(**RED)), scale=2.0)
    for _ in range(5):
        model.merge_adapter()
        model.unmerge_adapter()
    tiny.assert_base_untouched(model, before)


def test_a_merged_weight_is_visible_in_base_layer(model):
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    change = layer.lora_B["red"].weight @ layer.lora_A["red"].weight * layer.scaling["red"]
    expected = layer.base_layer.weight + change
    model.merge_adapter()
    torch.testing.assert_close(layer.base_layer.weight, expected)
    assert layer.merged and layer.merged_adapters == ["red"]
    model.unmerge_adapter()
    assert not layer.merged and layer.merged_adapters == []


def test_merging_named_adapters_only(model):
    attention = model.base_model.model.model.layers[0].self_attn
    q_before, v_before = attention.q_proj.base_layer.weight.clone(), attention.v_proj.base_layer.weight.clone()
    model.merge_adapter(adapter_names=["blue"])
    assert torch.equal(attention.q_proj.base_layer.weight, q_before), "blue has no q_proj"
    change = attention.v_proj.get_delta_weight("blue")
    torch.testing.assert_close(attention.v_proj.base_layer.weight, v_before + change)
    assert attention.v_proj.merged_adapters == ["blue"] and attention.q_proj.merged_adapters == []
    model.unmerge_adapter()
    assert torch.equal(attention.v_proj.base_layer.weight, v_before)


def test_a_name_to_merge_that_does_not_exist_is_warned_of(model):
    with pytest.warns(UserWarning, match="green"):
        model.merge_adapter(adapter_names=["blue", "green"])
    assert get_model_status(model).merged_adapters in (["blue"], "irregular")


def test_merging_twice_or_unmerging_nothing_warns_and_changes_nothing(model):
    with pytest.warns(UserWarning, match=r"(?i)merged"):
        model.unmerge_adapter()
    model.merge_adapter()
    before = tiny.state(model)
    with pytest.warns(UserWarning, match=r"(?i)merged"):
        model.merge_adapter()
    tiny.assert_same_state(model, before)


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
def test_merge_and_unload_gives_back_the_plain_class(build):
    plain = build()
    names = [name for name, _ in plain.named_parameters()]
    config = causal(target_modules="all-linear", fan_in_fan_out=build is tiny.gpt2)
    model = tiny.fill_adapter(get_peft_model(plain, config)).eval()
    expected = logits(model)

    merged = model.merge_and_unload()

    assert type(merged) is type(build()) and [name for name, _ in merged.named_parameters()] == names
    assert not any(isinstance(module, type(model.base_model)) for module in merged.modules())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


def test_merge_and_unload_keeps_the_trained_head():
    model = tiny.fill_adapter(get_peft_model(tiny.bert(), LoraConfig(task_type="SEQ_CLS"))).eval()
    expected = logits(model)
    merged = model.merge_and_unload()
    assert type(merged.classifier) is torch.nn.Linear
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "config"),
    [(tiny.llama, causal(**RED)), (tiny.bert, LoraConfig(task_type="SEQ_CLS"))],
    ids=["layers", "layers and a head"],
)
def test_unload_gives_back_the_base_model_bit_for_bit(build, config):
    before = tiny.base_state(build())
    unloaded = tiny.fill_adapter(get_peft_model(build(), config)).unload()
    assert [name for name, _ in unloaded.named_parameters()] == list(before)
    tiny.assert_base_untouched(unloaded, before)


def test_safe_merge_refuses_broken_weights_and_leaves_the_model_alone(model):
    with torch.no_grad():  # in the last layer, so that others come before it
        model.base_model.model.model.layers[1].self_attn.v_proj.lora_A["red"].weight[0, 0] = float("inf")
    before = tiny.state(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"(?i)nan"):
            merge(safe_merge=True)
        tiny.assert_same_state(model, before)
        assert get_model_status(model).merged_adapters == []


# ---------------------------------------------------------------------------------- several adapters in a batch


@pytest.mark.parametrize(
    ("build", "targets"),
    [
        (tiny.llama, ["q_proj", "down_proj"]),
        (tiny.llama, ["embed_tokens", "lm_head"]),
        (tiny.gpt2, ["c_attn", "c_fc"]),
        (tiny.opt, ["q_proj", "v_proj"]),
        (tiny.opt, ["fc1", "fc2"]),  # OPT flattens batch and sequence before these
    ],
    ids=["llama", "llama-embedding", "gpt2", "opt-attention", "opt-fc1"],
)
@pytest.mark.filterwarnings("ignore:.*tie")
def test_each_row_of_a_batch_uses_the_adapter_it_names(build, targets):
    config = {"target_modules": targets, "fan_in_fan_out": build is tiny.gpt2}
    model = get_peft_model(build(), causal(r=4, **config), adapter_name="red")
    model.add_adapter("blue", causal(r=2, **config))
    tiny.fill_adapter(tiny.fill_adapter(model.eval(), "red", 1), "blue", 2)
    names = ["blue", "__base__", "red", "red", "__base__", "blue"]
    ids = tiny.tokens(len(names))
    alone = outputs_of(model, ["red", "blue"], ids)

    mixed = logits(model, ids, adapter_names=names)

    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], alone[name][row], rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model, ids), alone["red"]), "later calls use the active adapter again"


def _replace(model, layer):
    layer.lora_A["blue"] = copy.deepcopy(layer.lora_A["blue"]).requires_grad_(False)
    layer.lora_A["blue"].weight.mul_(2)


@pytest.mark.parametrize(
    "change",
    [
        lambda model, layer: layer.lora_B["red"].weight.mul_(3),
        lambda model, layer: layer.set_scale("blue", 5.0),
        lambda model, layer: layer.lora_A["red"].register_forward_hook(lambda module, inputs, output: output * 4),
        _replace,
        lambda model, layer: model.delete_adapter("green"),
        lambda model, layer: model.to(torch.float64),
    ],
    ids=["in place", "scale", "hook", "another module", "deleted", "dtype"],
)
@torch.no_grad()
def test_batches_of_several_adapters_see_what_has_changed(change):
    model = get_peft_model(tiny.llama(), causal(r=4), adapter_name="red")
    for seed, name in enumerate(["blue", "green"], 1):
        model.add_adapter(name, causal(r=2 + seed))
        tiny.fill_adapter(model, name, seed, scale=0.5)
    tiny.fill_adapter(model.eval(), "red", 3, scale=0.5)
    ids = tiny.tokens(3)
    for names in (["red", "green", "blue"], ["blue", "red", "blue"]):  # a part of the first
        logits(model, ids, adapter_names=names)

    change(model, model.base_model.model.model.layers[0].self_attn.v_proj)

    for names in (["blue", "red", "blue"], ["red", "__base__", "blue"]):
        mixed, alone = logits(model, ids, adapter_names=names), outputs_of(model, ["red", "blue"], ids)
        for row, name in enumerate(names):
            torch.testing.assert_close(mixed[row], alone[name][row], rtol=1e-4, atol=1e-5)


def test_rows_mix_trained_heads_too():
    model = get_peft_model(tiny.bert(), LoraConfig(task_type="SEQ_CLS"), adapter_name="red")
    model.add_adapter("blue", LoraConfig(task_type="SEQ_CLS"))
    tiny.fill_adapter(tiny.fill_adapter(model.eval(), "red", 1), "blue", 2)
    names = ["blue", "__base__", "red"]
    alone = outputs_of(model, ["red", "blue"])
    mixed = logits(model, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], alone[name][row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("build", [tiny.llama, tiny.opt, tiny.t5])
def test_each_row_generates_with_the_adapter_it_names(build, beams):
    task, targets = {
        tiny.llama: ("CAUSAL_LM", ["q_proj", "v_proj"]),
        tiny.opt: ("CAUSAL_LM", ["q_proj", "v_proj", "fc1"]),
        tiny.t5: ("SEQ_2_SEQ_LM", ["q", "v", "wo"]),
    }[build]
    model = get_peft_model(build(), LoraConfig(task_type=task, target_modules=targets), adapter_name="red")
    model.add_adapter("blue", LoraConfig(task_type=task, r=2, target_modules=targets))
    tiny.fill_adapter(tiny.fill_adapter(model.eval(), "red", 1, scale=0.5), "blue", 2, scale=0.5)
    names = ["blue", "__base__", "red", "blue"]
    ids = tiny.tokens(len(names))
    how = dict(max_new_tokens=5, min_new_tokens=5, num_beams=beams, do_sample=False)

    mixed = model.generate(input_ids=ids, adapter_names=names, **how)

    alone = {}
    for name in ("red", "blue"):
        model.set_adapter(name)
        alone[name] = model.generate(input_ids=ids, **how)
    with model.disable_adapter():
        alone["__base__"] = model.generate(input_ids=ids, **how)
    assert len({tuple(rows.flatten().tolist()) for rows in alone.values()}) == 3, "the adapters must differ to tell"
    for row, name in enumerate(names):
        assert mixed[row].tolist() == alone[name][row].tolist()


# --------------------------------------------------------------------------------------------------- what is there


def test_layer_status_says_what_each_layer_has(model):
    by_name = {status.name: status for status in get_layer_status(model)}
    assert len(by_name) == 6
    both = by_name["model.model.layers.1.self_attn.v_proj"]
    assert both.module_type == "lora.Linear" and both.enabled is True
    assert both.active_adapters == ["red"] and both.available_adapters == ["blue", "red"]
    assert both.requires_grad == {"red": True, "blue": False} and both.merged_adapters == []
    assert both.devices == {"red": ["cpu"], "blue": ["cpu"]}
    assert by_name["model.model.layers.0.mlp.up_proj"].available_adapters == ["blue"]
    assert model.get_layer_status() == get_layer_status(model)


def test_model_status_sums_up(model):
    status = get_model_status(model)
    assert (status.base_model_type, status.adapter_model_type) == ("LlamaForCausalLM", "LoraModel")
    assert status.peft_types == {"red": "LORA", "blue": "LORA"}
    assert (status.trainable_params, status.total_params) == model.get_nb_trainable_parameters()
    assert status.num_adapter_layers == 6 and status.enabled is True
    assert status.active_adapters == ["red"] and status.available_adapters == ["blue", "red"]
    assert status.requires_grad == {"red": True, "blue": False}
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


def test_status_calls_a_model_irregular_when_its_layers_disagree(model):
    layers = model.base_model.model.model.layers
    layers[0].self_attn.q_proj.enable_adapters(False)
    layers[1].self_attn.v_proj.merge()
    layers[0].self_attn.v_proj.lora_A["red"].weight.requires_grad = False
    status = get_model_status(model)
    assert status.enabled == "irregular" and status.merged_adapters == "irregular"
    assert status.requires_grad["red"] == "irregular"


def test_status_works_without_a_wrapper_and_refuses_a_plain_model():
    mlp = inject_adapter_in_model(LoraConfig(target_modules=["lin0"]), tiny.MLP())
    assert [status.name for status in get_layer_status(mlp)] == ["lin0"]
    assert get_model_status(mlp).adapter_model_type == "None"
    for ask in (get_layer_status, get_model_status):
        with pytest.raises(ValueError, match=r"(?i)adapter"):
            ask(tiny.MLP())


# --------------------------------------------------------------------------------------------- dtype, device, memory


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_adapters_of_half_precision_models_are_kept_in_fp32_unless_told_otherwise(dtype, autocast, tmp_path):
    expected = torch.float32 if autocast else dtype

    def adapter_dtypes(model):
        return {p.dtype for name, p in model.named_parameters() if "lora_" in name}

    model = get_peft_model(tiny.llama().to(dtype), causal(**RED), autocast_adapter_dtype=autocast)
    assert adapter_dtypes(model) == {expected}
    assert logits(model).dtype == dtype
    model.add_adapter("blue", causal(**BLUE), autocast_adapter_dtype=autocast)
    assert adapter_dtypes(model) == {expected}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama().to(dtype), tmp_path, autocast_adapter_dtype=autocast)
    assert adapter_dtypes(loaded) == {expected}


def test_low_cpu_mem_usage_makes_meta_tensors_that_loading_replaces(model, tmp_path):
    fresh = get_peft_model(tiny.llama(), causal(**RED), low_cpu_mem_usage=True)
    assert {p.device.type for name, p in fresh.named_parameters() if "lora_" in name} == {"meta"}

    model.save_pretrained(tmp_path)
    expected = outputs_of(model, ["red", "blue"])
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "red", adapter_name="red", low_cpu_mem_usage=True)
    loaded.load_adapter(tmp_path / "blue", adapter_name="blue", low_cpu_mem_usage=True)
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    found = outputs_of(loaded.eval(), ["red", "blue"])
    for name in expected:
        assert torch.equal(found[name], expected[name])


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_tensors_that_a_file_lacks_are_named_and_start_afresh(low_cpu_mem_usage, tmp_path):
    get_peft_model(tiny.llama(), causal(**RED)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if "layers.1" not in key}, path)
    with pytest.warns(UserWarning, match="layers.1.self_attn.v_proj.lora_A"):
        loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    start = loaded.base_model.model.model.layers[1].self_attn.v_proj
    assert 0 < start.lora_A["default"].weight.abs().max() < 1 and not start.lora_B["default"].weight.any()
    assert torch.equal(logits(loaded), logits(tiny.llama()))


def test_torch_device_says_where_the_file_is_read_to(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "red", torch_device="cpu").eval()
    assert torch.equal(logits(loaded), logits(model))


def test_ephemeral_offload_is_a_setting_of_this_process_only(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "red", ephemeral_gpu_offload=True).eval()
    assert loaded.peft_config["default"].runtime_config.ephemeral_gpu_offload
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    assert "ephemeral" not in (tmp_path / "again" / "adapter_config.json").read_text()


def test_loaded_adapters_are_frozen_unless_asked(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "red", adapter_name="red")
    assert trainable(loaded) == set() and not loaded.training
    loaded.load_adapter(tmp_path / "blue", adapter_name="blue", is_trainable=True)
    assert loaded.active_adapters == ["red"]
    loaded.set_adapter("blue")
    assert trainable(loaded) == {"blue"}

    to_train = PeftModel.from_pretrained(tiny.llama(), tmp_path / "red", is_trainable=True)
    assert trainable(to_train) == {"default"} and not to_train.peft_config["default"].inference_mode


# -------------------------------------------------------------------------------------------------------- helpers


def test_rescale_adapter_scale_is_for_the_context_only(model):
    base, red = logits(tiny.llama()), logits(model)
    with rescale_adapter_scale(model, 0.0):
        torch.testing.assert_close(logits(model), base)
    assert torch.equal(logits(model), red)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with pytest.raises(KeyError), rescale_adapter_scale(model, 0.5):
        assert layer.scaling["red"] == 1.0
        raise KeyError("of the body")
    assert layer.scaling["red"] == 2.0
    with pytest.raises(TypeError), rescale_adapter_scale(model, "much"):
        pass


def test_signatures_of_the_base_model_can_be_taken_over():
    vision, untouched = (get_peft_model(tiny.vit(), LoraConfig(target_modules=VIT_QUERY)) for _ in range(2))
    update_forward_signature(vision)
    assert "pixel_values" in inspect.signature(vision.forward).parameters
    assert "pixel_values" not in inspect.signature(untouched.forward).parameters, "one model, not its class"
    assert vision(pixel_values=torch.randn(2, 1, 8, 8)).logits.shape == (2, 3)

    text = get_peft_model(tiny.t5(), LoraConfig(task_type="SEQ_2_SEQ_LM"))
    update_generate_signature(text)
    assert "generation_config" in inspect.signature(text.generate).parameters
    assert text.generate(input_ids=tiny.tokens(), max_new_tokens=2).shape[0] == 3

    both = get_peft_model(tiny.whisper(), LoraConfig(target_modules=["q_proj"]))
    update_signature(both, method="all")
    assert "input_features" in inspect.signature(both.forward).parameters
    assert "input_features" in inspect.signature(both.generate).parameters
    with pytest.raises(ValueError, match="sideways"):
        update_signature(both, method="sideways")


# ------------------------------------------------------------------------------------- nothing is silently ignored


@pytest.mark.parametrize(
    ("fields", "entry"),
    [
        (dict(target_modules=["q_proj", "w_proj"]), "w_proj"),
        (dict(target_modules=["q_proj"], exclude_modules=["nowhere"]), "nowhere"),
        (dict(target_modules=["q_proj"], rank_pattern={"k_proj": 2}), "k_proj"),
        (dict(target_modules=["q_proj"], alpha_pattern={"nothing": 2}), "nothing"),
        (dict(target_modules=["q_proj"], modules_to_save=["lm_head", "tail"]), "tail"),
        (dict(target_modules=["q_proj"], layers_to_transform=[0, 7]), "7"),
    ],
)
def test_an_entry_that_matches_nothing_is_named_in_a_warning(fields, entry):
    with pytest.warns(UserWarning, match=rf"\b{entry}\b"):
        get_peft_model(tiny.llama(), causal(**fields))


def test_a_full_match_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error", category=getattr(peft, "PeftWarning", UserWarning))
        get_peft_model(tiny.llama(), causal(target_modules=["q_proj", "up_proj"], rank_pattern={"q_proj": 2}))


@pytest.mark.parametrize(
    ("targets", "near"), [(["q_prj"], "q_proj"), (["self_atn.v_proj"], "v_proj"), (["layers.0.mlp.up_poj"], "up_proj")]
)
def test_a_target_that_matches_nothing_suggests_the_nearest_name(targets, near):
    with pytest.raises(ValueError) as caught:
        get_peft_model(tiny.llama(), causal(target_modules=targets))
    message = str(caught.value)
    assert targets[0] in message and "Did you mean" in message and near in message


def test_a_wrong_adapter_name_suggests_the_nearest_one(model):
    for call in (
        lambda: model.set_adapter("rde"),
        lambda: model.delete_adapter("rde"),
        lambda: model.set_requires_grad("rde"),
    ):
        with pytest.raises(ValueError, match="rde") as caught:
            call()
        assert "red" in str(caught.value)


# ----------------------------------------------------------------------------- a call that raises changes nothing


def half_wrong_target(model):
    """`q_proj` could be adapted, the LayerNorm-like `norm` could not."""
    model.add_adapter("green", causal(target_modules=["q_proj", "norm"]))


def wrong_rank_of_a_later_layer(model):
    model.add_adapter("green", causal(target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": -1}))


FAILING = {
    "add: no module matches": lambda model: model.add_adapter("green", causal(target_modules=["nope"])),
    "add: one module is of no supported kind": half_wrong_target,
    "add: a bad rank in a pattern": wrong_rank_of_a_later_layer,
    "add: name taken": lambda model: model.add_adapter("blue", causal(target_modules=["o_proj"])),
    "add: another method": lambda model: model.add_adapter("green", IA3Config(task_type="CAUSAL_LM")),
    "add: no configuration": lambda model: model.add_adapter("green", {"r": 4}),
    "set: unknown": lambda model: model.set_adapter("green"),
    "set: one of a list unknown": lambda model: model.base_model.set_adapter(["blue", "green"]),
    "delete: unknown": lambda model: model.delete_adapter("green"),
    "set_requires_grad: unknown": lambda model: model.set_requires_grad(["blue", "green"]),
    "forward: unknown name in a batch": lambda model: logits(model, adapter_names=["red", "green", "blue"]),
    "forward: too few names": lambda model: logits(model, adapter_names=["red"]),
    "load: no such folder": lambda model: model.load_adapter("no-such-folder/at-all", adapter_name="green"),
}


@pytest.mark.parametrize("call", FAILING.values(), ids=FAILING.keys())
def test_a_call_that_raises_leaves_the_model_as_it_was(model, call):
    before, configs, output = tiny.state(model), dict(model.peft_config), logits(model)
    modules = [(name, type(module)) for name, module in model.named_modules()]

    with pytest.raises((ValueError, TypeError, KeyError, RuntimeError, OSError)):
        call(model)

    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    tiny.assert_same_state(model, before)
    assert model.peft_config == configs and model.active_adapters == ["red"]
    assert torch.equal(logits(model), output)


def test_a_failed_load_leaves_the_model_as_it_was(model, tmp_path):
    wider = get_peft_model(tiny.llama(intermediate_size=64), causal(target_modules=["q_proj", "up_proj"]))
    wider.save_pretrained(tmp_path)
    before, modules = tiny.state(model), [name for name, _ in model.named_modules()]
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_adapter(tmp_path, adapter_name="green")
    assert [name for name, _ in model.named_modules()] == modules
    tiny.assert_same_state(model, before)
    assert set(model.peft_config) == {"red", "blue"}


@pytest.mark.parametrize("fields", [dict(target_modules=["nope"]), dict(target_modules=["q_proj", "norm"])])
def test_a_failed_get_peft_model_leaves_the_base_as_it_was(fields):
    plain = tiny.llama()
    before, modules = tiny.state(plain), [(name, type(module)) for name, module in plain.named_modules()]
    with pytest.raises(ValueError):
        get_peft_model(plain, causal(**fields))
    assert [(name, type(module)) for name, module in plain.named_modules()] == modules
    tiny.assert_same_state(plain, before)
    assert not hasattr(plain, "peft_config")


def test_a_failed_from_pretrained_leaves_the_base_as_it_was(tmp_path):
    get_peft_model(tiny.llama(intermediate_size=64), causal(target_modules=["up_proj"])).save_pretrained(tmp_path)
    plain = tiny.llama()
    before, modules = tiny.state(plain), [(name, type(module)) for name, module in plain.named_modules()]
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(plain, tmp_path)
    assert [(name, type(module)) for name, module in plain.named_modules()] == modules
    tiny.assert_same_state(plain, before)
    assert not hasattr(plain, "peft_config")


def test_arguments_that_saving_and_loading_do_not_know_are_warned_of(model, tmp_path):
    with pytest.warns(peft.errors.PeftWarning, match="save_pretrained does not know the argument 'safe_serialisation'"):
        model.save_pretrained(tmp_path, safe_serialisation=False)
    with pytest.warns(peft.errors.PeftWarning, match="does not know the argument 'sub_folder'"):
        PeftModel.from_pretrained(tiny.llama(), tmp_path / "red", sub_folder="blue")


@pytest.mark.parametrize(
    ("content", "message"),
    [("[]", "holds a list, not a mapping"), ("{", "not valid JSON"), ('{"r": 8}', "names no method")],
)
def test_a_configuration_that_is_none_is_refused(model, tmp_path, content, message):
    model.save_pretrained(tmp_path)
    (tmp_path / "red" / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(tiny.llama(), tmp_path / "red")


def test_a_conversion_that_fails_for_one_adapter_writes_none(model, tmp_path):
    model.save_pretrained(tmp_path / "before")
    with pytest.raises(ValueError, match="initialisations that change the base weights"):
        model.save_pretrained(tmp_path / "new", path_initial_model_for_weight_conversion=tmp_path / "before" / "red")
    prompt = get_peft_model(tiny.llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="is a soft prompt"):
        prompt.save_pretrained(tmp_path / "new", path_initial_model_for_weight_conversion=tmp_path / "before" / "red")
    assert not (tmp_path / "new").exists()


def test_a_str_of_targets_is_explained_where_it_matches_nothing():
    with pytest.raises(ValueError, match=r"regular expression for the whole name; a list, \['q_proj'\], matches"):
        get_peft_model(tiny.llama(), causal(target_modules="q_proj"))


def test_task_types_are_checked_before_the_model_is_touched():
    with pytest.raises(ValueError, match="SEQ_CLS"):
        LoraConfig(task_type="SEQ_CLASS")
    assert LoraConfig(task_type=TaskType.SEQ_CLS).task_type == "SEQ_CLS"
