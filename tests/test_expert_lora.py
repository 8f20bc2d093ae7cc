"""LoRA on the fused experts of mixture models: what it computes, and that it never adds the change to the weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft import LoraConfig, get_peft_model
from tiny_models import VOCABULARY, _build

pytest.importorskip("transformers", minversion="5.0")

EXPERTS, HIDDEN, WIDTH = 4, 16, 24
SMALL = dict(hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8)
SMALL |= dict(vocab_size=VOCABULARY, initializer_range=0.2, num_experts_per_tok=2)
IDS = torch.arange(3, 18).view(3, 5)


#: of models that name things as Mixtral does
OWN = dict(intermediate_size=WIDTH, num_local_experts=EXPERTS)


def mixtral(**fields):
    return _build("MixtralConfig", "MixtralForCausalLM", 0, **{**SMALL, **OWN, **fields})


def qwen3(**fields):
    own = dict(intermediate_size=20, moe_intermediate_size=WIDTH, num_experts=EXPERTS)
    return _build("Qwen3MoeConfig", "Qwen3MoeForCausalLM", 0, **{**SMALL, **own, **fields})


def gpt_oss(**fields):
    """Experts that are held transposed, with biases."""
    model = _build("GptOssConfig", "GptOssForCausalLM", 0, **{**SMALL, **OWN, **fields})
    with torch.no_grad():  # its own start leaves some of them as they were found
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def llama4(**fields):
    """Each expert sees all tokens, those of one expert after those of the other."""
    own = dict(intermediate_size=WIDTH, intermediate_size_mlp=20, num_local_experts=EXPERTS)
    own |= dict(interleave_moe_layer_step=1)
    model = _build("Llama4TextConfig", "Llama4ForCausalLM", 0, **{**SMALL, **own, **fields})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


MODELS = {"mixtral": mixtral, "qwen3": qwen3, "gpt_oss": gpt_oss, "llama4": llama4}
#: ways in which transformers runs experts
WAYS = [(name, way) for name in ("mixtral", "qwen3", "gpt_oss") for way in ("eager", "batched_mm", "grouped_mm")]
WAYS += [("llama4", "eager")]


def adapted(name, way="eager", adapters=("default",), dtype=torch.float32, **fields):
    """The model with adapters on both parameters of its experts, each of values and a rank of its own."""
    base = MODELS[name](**fields).to(dtype)
    if way != "eager" or name != "llama4":
        base.set_experts_implementation(way)
    model = base
    for number, adapter in enumerate(adapters):
        config = LoraConfig(r=3 + number, lora_alpha=5, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
        if number:
            model.add_adapter(adapter, config)
        else:
            model = get_peft_model(base, config, adapter)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def expert_layers(model):
    return [module for module in model.modules() if hasattr(module, "get_delta_weight")]


def dense(model):
    """A function like `model`, of the base model with changed weights."""
    base = copy.deepcopy(model).unload()

    def run(ids):
        changed = {}
        for key, module in model.get_base_model().named_modules():
            if hasattr(module, "get_delta_weight"):
                owner = key.replace(".base_layer", "")
                change = sum(module.get_delta_weight(adapter) for adapter in module.active_adapters)
                changed[f"{owner}.{module.parameter_name}"] = module.get_base_weight() + change
        return torch.func.functional_call(base, changed, (ids,))

    return run


def gradients(model, run):
    model.zero_grad()
    logits = run(IDS).logits
    torch.log_softmax(logits.float(), -1)[..., 3].sum().backward()
    return logits.detach(), {key: p.grad for key, p in model.named_parameters() if p.requires_grad}


def assert_same_as_dense(model, tolerance=1e-4):
    got, got_gradients = gradients(model, model)
    want, want_gradients = gradients(model, dense(model))
    assert (got - want).norm() < tolerance * want.norm()
    assert set(got_gradients) == set(want_gradients)
    assert got_gradients
    for key, gradient in got_gradients.items():
        assert (gradient - want_gradients[key]).norm() < tolerance * want_gradients[key].norm(), key


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_output_and_gradients_are_those_of_the_changed_weights(name, way):
    assert_same_as_dense(adapted(name, way))


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_in_half_precision_as_well(name, way):
    # In one layer, since rounding may send a token of the next one to another expert.
    assert_same_as_dense(adapted(name, way, dtype=torch.bfloat16, num_hidden_layers=1), tolerance=0.03)


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_several_adapters_act_together(name, way):
    model = adapted(name, way, adapters=("one", "two"))
    model.base_model.set_adapter(["one", "two"])
    assert_same_as_dense(model)


class Largest(TorchDispatchMode):
    """Notes the most entries of a tensor that an operation makes in memory of its own."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    self.entries = max(self.entries, tensor.numel())
        return result


@pytest.mark.parametrize(("name", "way"), [(name, way) for name, way in WAYS if way != "batched_mm"])
def test_no_tensor_of_the_size_of_the_experts_is_made(name, way):
    # (The batched way copies an expert for each token, with adapters or without.)
    wide = dict(hidden_size=128, intermediate_size=160, moe_intermediate_size=160)
    model = adapted(name, way, **wide)
    experts = min(layer.get_base_weight().numel() for layer in expert_layers(model))
    with Largest() as largest:
        gradients(model, model)
    assert 0 < largest.entries < experts / 2
    with Largest() as largest:
        gradients(model, dense(model))
    assert largest.entries >= experts


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(name, reentrant):
    model = adapted(name).train()
    want = gradients(model, model)
    model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
    model.enable_input_require_grads()
    got = gradients(model, model)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_each_row_of_a_mixed_batch_is_that_of_its_adapter_alone(name, way):
    model = adapted(name, way, adapters=("one", "two")).eval()
    alone = {}
    with torch.no_grad():
        for adapter in ("one", "two"):
            model.set_adapter(adapter)
            alone[adapter] = model(IDS).logits
        model.set_adapter("one")
        with model.disable_adapter():
            alone["__base__"] = model(IDS).logits
        names = ["two", "__base__", "one"]
        mixed = model(IDS, adapter_names=names).logits
    for row, adapter in enumerate(names):
        torch.testing.assert_close(mixed[row], alone[adapter][row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_merged_and_unmerged(name):
    model = adapted(name)
    before = [layer.get_base_weight().clone() for layer in expert_layers(model)]
    with torch.no_grad():
        want = model(IDS).logits
        model.merge_adapter()
        torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
    assert all(map(torch.equal, before, (layer.get_base_weight() for layer in expert_layers(model))))


def test_rows_that_are_sorted_by_expert_are_not_guessed_to_be_of_some_sample():
    small = dict(num_key_value_heads=2, kv_channels=8, hidden_size=16, intermediate_size=24, num_hidden_layers=1)
    base = _build("JetMoeConfig", "JetMoeForCausalLM", 0, **small, vocab_size=VOCABULARY, num_local_experts=EXPERTS)
    config = LoraConfig(target_parameters=["mlp.input_linear.weight"])
    model = get_peft_model(base, config, "one")
    model.add_adapter("two", config)
    model.eval()
    with pytest.raises(ValueError, match="no row for each sample"):
        model(IDS, adapter_names=["one", "two", "one"])
    torch.testing.assert_close(model(IDS, adapter_names=["one"] * 3).logits, model(IDS).logits)


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, HIDDEN)

    def forward(self, x):
        return self.w2(torch.relu(self.w1(x)))


class Mixture(nn.Module):
    """Experts that are modules by themselves; each gets the tokens that are sent to it, as transformers 4 had it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.gate = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, EXPERTS)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def forward(self, x):
        flat = self.inner(x).view(-1, HIDDEN)
        weights, chosen = self.gate(flat).softmax(-1).topk(2)
        result = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            result.index_add_(0, token, expert(flat[token]) * weights[token, place, None])
        return result.view(x.shape)


def test_experts_that_get_some_tokens_only_take_no_mixed_batch():
    model = get_peft_model(Mixture(), LoraConfig(target_modules=["w1", "w2"]), "experts")
    model.add_adapter("rest", LoraConfig(target_modules=["inner", "gate"], init_lora_weights=False))
    model.eval()
    x = torch.randn(3, 4, HIDDEN)
    with pytest.raises(ValueError, match="no row for each sample"):
        model(x, adapter_names=["experts", "rest", "__base__"])
    torch.testing.assert_close(model(x, adapter_names=["experts"] * 3), model(x))
    mixed = model(x, adapter_names=["rest", "__base__", "rest"])
    with model.disable_adapter():
        torch.testing.assert_close(mixed[1], model(x)[1])
    model.set_adapter("rest")
    torch.testing.assert_close(mixed[::2], model(x)[::2])


class DenseMixture(Mixture):
    """The same with all tokens for each expert."""

    def forward(self, x):
        weights = self.gate(self.inner(x)).softmax(-1)
        return sum(expert(x) * weights[..., number, None] for number, expert in enumerate(self.experts))


def test_experts_that_get_whole_samples_take_a_mixed_batch():
    model = get_peft_model(DenseMixture(), LoraConfig(target_modules=["w1"], init_lora_weights=False)).eval()
    x = torch.randn(2, 4, HIDDEN)
    mixed = model(x, adapter_names=["default", "__base__"])
    torch.testing.assert_close(mixed[0], model(x)[0])
    with model.disable_adapter():
        torch.testing.assert_close(mixed[1], model(x)[1])
