"""Adapters beside others, on models whose modules share weights, are read, or get what all samples share."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import transformers
from torch import nn

import tiny_models as tiny
from peft import (
    AdaLoraConfig,
    DeloraConfig,
    GloraConfig,
    HRAConfig,
    IA3Config,
    LilyConfig,
    LNTuningConfig,
    LoraConfig,
    PeanutConfig,
    PsoftConfig,
    SupertuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.core.layer import AdapterLayer
from peft.functional import delete_adapter

IDS = torch.arange(3, 15).reshape(2, 6)


def logits(model, **more):
    with torch.no_grad():
        return model(IDS, **more).logits


def fill(model, adapter):
    """Values for an adapter that depend on its names in files alone; returns them."""
    generator = torch.Generator().manual_seed(0)
    tensors = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    tensors = {key: 0.2 * torch.randn(tensors[key].shape, generator=generator) for key in sorted(tensors)}
    set_peft_model_state_dict(model, tensors, adapter_name=adapter)
    return tensors


def trained(model):
    return sorted(tuple(p.shape) for p in model.parameters() if p.requires_grad)


# ---- what an adapter is beside others is what it is alone


def rows(**which):
    return lambda: LoraConfig(r=2, target_modules=["c_attn"], trainable_token_indices=which)


ON_TIED = {
    "rows of both": rows(wte=[3, 5]),
    "rows of the head": rows(lm_head=[7, 8]),
    "other rows of each": rows(wte=[10], lm_head=[11, 12]),
    "tokens": lambda: TrainableTokensConfig(token_indices=[13]),
    "tokens of the head": lambda: TrainableTokensConfig(token_indices=[14], target_modules=["lm_head"]),
    "head": lambda: LoraConfig(r=2, target_modules=["lm_head"]),
    "tied": lambda: LoraConfig(r=2, target_modules=["lm_head"], ensure_weight_tying=True),
    "head in full": lambda: LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("first, second", list(itertools.permutations(ON_TIED, 2)))
def test_two_adapters_on_tied_embeddings(first, second):
    base, alone = logits(tiny.gpt2(n_layer=1)), {}
    for name, kind in (("one", first), ("two", second)):
        model = get_peft_model(tiny.gpt2(n_layer=1), ON_TIED[kind](), name, mixed=True).eval()
        tensors = fill(model, name)
        alone[name] = (logits(model), set(tensors), trained(model))
    model = get_peft_model(tiny.gpt2(n_layer=1), ON_TIED[first](), "one", mixed=True).eval()
    model.add_adapter("two", ON_TIED[second]())
    model.eval()
    for name in alone:
        assert set(fill(model, name)) == alone[name][1]
    for name, (output, _, learnt) in alone.items():
        model.set_adapter(name)
        own = logits(model)
        torch.testing.assert_close(own, output)
        assert trained(model) == learnt
        model.merge_adapter()
        torch.testing.assert_close(logits(model), output, atol=1e-4, rtol=1e-4)
        with model.disable_adapter():
            assert logits(model).equal(base)
        model.unmerge_adapter()
        assert logits(model).equal(own)
        torch.testing.assert_close(logits(copy.deepcopy(model).merge_and_unload()), output, atol=1e-4, rtol=1e-4)
        assert logits(copy.deepcopy(model).unload()).equal(base)
        mixed = logits(model, adapter_names=["one", "two"])
        torch.testing.assert_close(mixed[0], alone["one"][0][0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(mixed[1], alone["two"][0][1], atol=1e-4, rtol=1e-4)
    model.delete_adapter("one")
    torch.testing.assert_close(logits(model), alone["two"][0])


def test_modules_in_full_leave_other_adapters_on_them_trained():
    model = get_peft_model(tiny.llama(), LoraConfig(target_modules=["lm_head", "q_proj"]))
    before = trained(model)
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert trained(model) == before


def test_what_does_not_act_of_the_adapter_that_takes_over_is_said():
    model = get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"]), "one").eval()
    model.add_adapter("two", LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    fill(model, "two")
    with pytest.warns(UserWarning, match=r"'two' is now, but not its lm_head, until set_adapter\('two'\)"):
        model.delete_adapter("one")
    model.set_adapter("two")
    alone = get_peft_model(tiny.llama(), copy.deepcopy(model.peft_config["two"]), "two").eval()
    fill(alone, "two")
    assert logits(model).equal(logits(alone)) and trained(model) == trained(alone)


def test_each_ia3_says_for_itself_whether_it_scales_the_input():
    targets = ["c_proj", "c_fc"]
    model = get_peft_model(tiny.gpt2(), IA3Config(target_modules=targets, feedforward_modules=[]), "out").eval()
    model.add_adapter("in", IA3Config(target_modules=targets, feedforward_modules=["c_fc"]))
    alone = get_peft_model(tiny.gpt2(), IA3Config(target_modules=targets, feedforward_modules=["c_fc"]), "in").eval()
    assert {k: v.shape for k, v in fill(model, "in").items()} == {k: v.shape for k, v in fill(alone, "in").items()}
    model.set_adapter("in")
    assert logits(model).equal(logits(alone))
    with pytest.raises(ValueError, match="others the output"):
        model.add_weighted_adapter(["in", "out"], [1.0, 1.0], "sum")


def test_combining_in_a_mixed_model_goes_by_the_method_of_the_adapters():
    model = get_peft_model(tiny.gpt2(), IA3Config(target_modules=["c_fc"], feedforward_modules=[]), "ia3", mixed=True)
    model.add_adapter("one", LoraConfig(target_modules=["c_attn"], r=2))
    model.add_adapter("hra", HRAConfig(target_modules=["c_proj"], r=2))
    model.add_weighted_adapter(["one"], [1.0], "sum", combination_type="linear")
    assert model.peft_config["sum"].r == 2
    with pytest.raises(ValueError, match="one method can be combined, not of IA3, LORA"):
        model.add_weighted_adapter(["one", "ia3"], [1.0, 1.0], "other")
    with pytest.raises(NotImplementedError, match="HRA cannot be combined"):
        model.add_weighted_adapter(["hra"], [1.0], "other")


def test_merging_keeps_what_one_of_two_tied_modules_has_beside():
    config = LoraConfig(target_modules=["lm_head"], ensure_weight_tying=True, target_parameters=["lm_head.weight"], r=2)
    model = get_peft_model(tiny.gpt2(n_layer=1), config).eval()
    fill(model, "default")
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, atol=1e-4, rtol=1e-4)


def test_dora_on_tied_modules_keeps_the_lengths_of_each():
    model = get_peft_model(tiny.gpt2(), LoraConfig(target_modules=["wte", "lm_head"], use_dora=True, r=2)).eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    expected = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


def test_merged_rows_of_an_embedding_whose_output_layer_has_a_bias():
    config = LoraConfig(target_modules=["query"], trainable_token_indices=[3], r=2)
    model = get_peft_model(tiny.bert("BertForMaskedLM"), config).eval()
    fill(model, "default")
    expected = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    assert logits(model).equal(expected)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, atol=1e-4, rtol=1e-4)


def test_adapters_of_another_method_in_the_record_of_a_model_are_none_of_this_ones():
    model = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), tiny.llama(), "one")
    model = inject_adapter_in_model(VeraConfig(target_modules=["v_proj"], r=2), model, "two")
    model = inject_adapter_in_model(AdaLoraConfig(target_modules=["k_proj"], total_step=5), model, "three")
    assert list(model.peft_config) == ["one", "two", "three"]


@pytest.mark.parametrize("injected", [False, True])
def test_merged_rows_of_tied_modules_go_with_lora_on_them(injected):
    def config():
        return LoraConfig(target_modules=["lm_head", "c_attn"], r=2, trainable_token_indices=[3])

    base = logits(tiny.gpt2())
    if injected:
        model = inject_adapter_in_model(config(), tiny.gpt2(), "default").eval()
    else:
        model = get_peft_model(tiny.gpt2(), config()).eval()
    fill(model, "default")
    for part in reversed([module for module in model.modules() if isinstance(module, AdapterLayer)]):
        part.merge()
    delete_adapter(model, "default")
    assert logits(model).equal(base)


# ---- base weights and factors in floats of 8 bits, which are cast when a module is called


class CastWhenCalled(nn.Linear):
    """As under diffusers' layerwise casting: kept in 8 bits, in bfloat16 while it is called."""

    def __call__(self, *args, **kwargs):
        self.to(torch.bfloat16)
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self.to(torch.float8_e4m3fn)


@pytest.mark.parametrize("kind", [GloraConfig, PsoftConfig, LNTuningConfig, DeloraConfig, SupertuningConfig, HRAConfig])
def test_methods_that_read_a_base_weight_of_8_bits(kind):
    torch.manual_seed(0)
    base = nn.Sequential(CastWhenCalled(16, 16).to(torch.float8_e4m3fn))
    x = torch.randn(3, 16).bfloat16()
    expected = base(x)
    model = get_peft_model(base, kind(target_modules=["0"], **({"r": 4} if kind in (HRAConfig, PsoftConfig) else {})))
    output = model(x)
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("kind", [LilyConfig, PeanutConfig])
def test_factors_of_8_bits(kind):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 16).bfloat16())
    model, x = get_peft_model(base, kind(target_modules=["0"], r=4, init_weights=False)), torch.randn(3, 16).bfloat16()
    expected = model(x)
    for module in model.base_model.model[0].modules():
        if isinstance(module, nn.Linear) and module is not model.base_model.model[0].base_layer:
            module.to(torch.float8_e4m3fn)
    torch.testing.assert_close(model(x), expected, atol=0.5, rtol=0.5)


# ---- modules that are read


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


def test_an_inactive_layer_around_another_hides_nothing_from_who_reads_the_weight():
    torch.manual_seed(0)
    x, base = torch.randn(2, 3, 8), Attends()
    model = get_peft_model(base, LoraConfig(target_modules=["attention"], init_lora_weights=False), mixed=True).eval()
    expected = model(x)
    model.add_adapter("other", HRAConfig(target_modules=["out_proj"], r=2, init_weights=False))
    torch.testing.assert_close(model.eval()(x), expected)


@tiny.needs_transformers_5("calls that layer")
def test_what_can_be_no_weight_is_refused_where_that_is_read():
    small = transformers.MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, vocab_size=20)
    base = transformers.MambaForCausalLM(small).eval()
    model = get_peft_model(base, LilyConfig(target_modules=["dt_proj"])).eval()
    with pytest.raises(NotImplementedError, match="reads its weight and does not call"):
        model(IDS)


# ---- what all samples of a mixed batch share


class Positions(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.tokens, self.linear, self.name = nn.Embedding(20, 8), nn.Linear(8, 8), name
        self.add_module(name, nn.Embedding(20, 8))

    def forward(self, ids):
        return self.linear(self.tokens(ids) + self.get_submodule(self.name)(torch.arange(ids.shape[1])))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("length", [1, 2, 6])
def test_positions_without_samples_get_each_adapter_in_turn(length, dora):
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["wpe", "linear"], init_lora_weights=False, use_dora=dora)
    model = get_peft_model(Positions("wpe"), config, "one").eval()
    model.add_adapter("two", copy.deepcopy(config))
    ids = IDS[:, :length]
    mixed = model(ids, adapter_names=["two", "one"])
    for row, name in enumerate(["two", "one"]):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], model(ids)[row])


def test_an_embedding_whose_input_has_no_samples_is_refused_in_a_mixed_batch():
    config = LoraConfig(target_modules=["table"], init_lora_weights=False)
    model = get_peft_model(Positions("table"), config, "one").eval()
    assert model(IDS, adapter_names=["one", "one"]).equal(model(IDS))
    with pytest.raises(ValueError, match="no row for each sample"):
        model(IDS, adapter_names=["one", "__base__"])


def test_an_embedding_that_is_given_a_shape():
    torch.manual_seed(0)
    size = dict(
        d_model=16, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16
    )
    config = transformers.PegasusConfig(encoder_layers=1, decoder_layers=1, vocab_size=20, **size)
    base = transformers.PegasusForConditionalGeneration(config).eval()
    model = get_peft_model(base, LoraConfig(target_modules=["embed_positions"], init_lora_weights=False)).eval()

    def run(**more):
        with torch.no_grad():
            return model(input_ids=IDS, decoder_input_ids=IDS, **more).logits

    expected = run()
    model.merge_adapter()
    torch.testing.assert_close(run(), expected)
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="no row for each sample"):
        run(adapter_names=["default", "__base__"])


# ---- hooks


@pytest.mark.parametrize("how", ["unload", "merge_and_unload"])
@pytest.mark.parametrize("when", [("before",), ("after",), ("before", "after")])
@pytest.mark.parametrize("kind", ["target_modules", "modules_to_save", "trainable_token_indices"])
def test_hooks_stay_with_the_module_that_is_left(kind, when, how):
    model, seen, handles = tiny.llama(), [], []

    def hook(place):
        embedding, name = model.get_input_embeddings(), place
        handles.append(embedding.register_forward_hook(lambda *_: seen.append(name)))
        handles.append(embedding.register_forward_pre_hook(lambda *_: seen.append(name), with_kwargs=True))
        handles.append(embedding.register_full_backward_hook(lambda *_: seen.append(name)))
        noted = lambda module, *_: seen.append((name, module))
        handles.append(embedding._register_load_state_dict_pre_hook(noted, with_module=True))
        model.enable_input_require_grads()

    if "before" in when:
        hook("before")
    settings = {"target_modules": ["q_proj"]}
    settings[kind] = (
        [1] if kind == "trainable_token_indices" else ["q_proj", "embed_tokens"][kind == "modules_to_save" :]
    )
    adapted = get_peft_model(model, LoraConfig(**settings))
    if "after" in when:
        hook("after")
    model = getattr(adapted, how)().requires_grad_(False)
    copy.deepcopy(copy.deepcopy(model))
    seen.clear()
    model(IDS).logits.sum().backward()  # which needs the hook of `enable_input_require_grads`
    assert [seen.count(place) for place in when] == [3] * len(when)
    model.load_state_dict(model.state_dict())
    assert [entry[1] for entry in seen if type(entry) is tuple] == [model.get_input_embeddings()] * len(when)
    for handle in handles:
        handle.remove()
    seen.clear()
    model(IDS)
    assert seen == []
