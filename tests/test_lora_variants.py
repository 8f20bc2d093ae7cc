"""What is special about each variant of LoRA; what all of them share is in test_conformance.py."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import peft
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import DoraCaching, MontecloraTrainerMixin, create_arrow_model
from tiny_models import gpt2, llama, needs_a_bare_past, t5


class Mlp(nn.Module):
    def __init__(self, bias: bool = True):
        super().__init__()
        self.up = nn.Linear(8, 12, bias=bias)
        self.down = nn.Linear(12, 8, bias=bias)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def mlp(**settings) -> Mlp:
    torch.manual_seed(0)
    return Mlp(**settings).eval()


def lora(model: nn.Module | None = None, *, effect: bool = True, **settings) -> PeftModel:
    """A model with an adapter on both layers; with `effect`, B is not zero."""
    config = LoraConfig(**{"r": 4, "target_modules": ["up", "down"], **settings})
    model = get_peft_model(mlp() if model is None else model, config).eval()
    if effect:
        give_effect(model, "default", 1)
    return model


def give_effect(model: nn.Module, adapter: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"lora_B.{adapter}." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))


# ---- DoRA


def test_dora_is_the_formula_of_the_paper():
    model = lora(use_dora=True)
    layer = model.base_model.model.up
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight.mul_(1.5)
    direction = layer.base_layer.weight + layer.scaling["default"] * (
        layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    )
    weight = layer.lora_magnitude_vector["default"].weight[:, None] * direction / direction.norm(dim=1, keepdim=True)
    expected = nn.functional.linear(X, weight, layer.base_layer.bias)
    torch.testing.assert_close(layer(X), expected)


def test_dora_takes_the_lengths_in_the_denominator_as_constants():
    model = lora(use_dora=True)
    layer = model.base_model.model.up
    a, b = (factor["default"].weight for factor in (layer.lora_A, layer.lora_B))
    m = layer.lora_magnitude_vector["default"].weight
    layer(X).square().sum().backward()
    found = [tensor.grad.clone() for tensor in (a, b, m)]
    direction = layer.base_layer.weight + layer.scaling["default"] * b @ a
    weight = m[:, None] * direction / direction.norm(dim=1, keepdim=True).detach()
    loss = nn.functional.linear(X, weight, layer.base_layer.bias).square().sum()
    for gradient, expected in zip(found, torch.autograd.grad(loss, (a, b, m)), strict=True):
        torch.testing.assert_close(gradient, expected)


def test_dora_with_dropout_scales_what_the_adapter_sees():
    model = lora(use_dora=True, lora_dropout=0.5)
    layer = model.base_model.model.up
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight.mul_(2)
    expected = layer(X)
    layer.train()
    torch.manual_seed(0)
    mean = torch.stack([layer(X) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, expected, rtol=0.1, atol=0.15)


def test_dora_on_a_convolution_with_groups():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, groups=2)
    x = torch.randn(2, 4, 5, 5)
    expected = conv(x)
    model = get_peft_model(nn.Sequential(conv), LoraConfig(r=4, target_modules=["0"], use_dora=True))
    torch.testing.assert_close(model(x), expected)
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight.mul_(3)
    bias = conv.bias[:, None, None]
    torch.testing.assert_close(model(x), 3 * (expected - bias) + bias)
    give_effect(model, "default", 1)
    model(x).sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dora_factors_are_kept_and_follow_the_weights(dtype):
    model = lora(mlp().to(dtype), use_dora=True)
    x = X.to(dtype)
    with torch.no_grad(), DoraCaching():
        first = model(x)
        assert torch.equal(model(x), first)
        model.base_model.model.up.lora_B["default"].weight.mul_(2)
        assert not torch.equal(model(x), first)
        model.base_model.model.up.lora_B["default"].weight.div_(2)
        torch.testing.assert_close(model(x), first)


def test_what_is_kept_of_the_weights_does_not_outlive_training():
    """Writing through `.data`, as some optimizers do, leaves no trace on the parameter."""
    mixed = lora()
    mixed.add_adapter("other", LoraConfig(r=4, target_modules=["up", "down"]))
    names = ["default", "other", "default", "other", "default"]
    for model, options in ((lora(use_dora=True), {}), (mixed, {"adapter_names": names})):
        with torch.no_grad(), DoraCaching():
            before = model.eval()(X, **options)
            model.train()
            model.base_model.model.up.lora_B["default"].weight.data.mul_(3)
            assert not torch.allclose(model.eval()(X, **options), before)


def test_dora_with_pissa_starts_as_the_base_model():
    model = lora(effect=False, use_dora=True, init_lora_weights="pissa")
    torch.testing.assert_close(model(X), mlp()(X), rtol=1e-4, atol=1e-5)


# ---- KaSA


def test_kasa_gives_up_the_least_singular_values():
    model = lora(effect=False, kasa_config=peft.KasaConfig())
    for name in ("up", "down"):
        before = torch.linalg.svdvals(getattr(mlp(), name).weight)
        after = torch.linalg.svdvals(getattr(model.base_model.model, name).base_layer.weight)
        torch.testing.assert_close(after[:4], before[:4])
        assert after[4:].max() < 1e-5


def test_kasa_penalties():
    model = lora(kasa_config=peft.KasaConfig(beta=2.0, gamma=0.0))
    diagonals = [p for name, p in model.named_parameters() if "lora_diag" in name]
    torch.testing.assert_close(model.base_model.kasa_loss(), sum(2 * d.square().sum() for d in diagonals))
    assert model._get_kasa_loss() == model.kasa_loss()  # what code for huggingface/peft calls
    orthogonal = lora(kasa_config=peft.KasaConfig(beta=0.0, gamma=1.0))
    with torch.no_grad():
        for name, parameter in orthogonal.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(torch.eye(max(parameter.shape))[: parameter.shape[0], : parameter.shape[1]])
    assert orthogonal.base_model.kasa_loss() < 1e-6
    assert lora().base_model.kasa_loss() == 0


def test_kasa_changes_the_base_for_all_adapters_or_none():
    model = lora(kasa_config=peft.KasaConfig())
    with pytest.raises(ValueError, match="KaSA"):
        model.add_adapter("plain", LoraConfig(target_modules=["up"]))
    assert list(model.peft_config) == ["default"]


def test_kasa_is_loaded_onto_the_original_base(tmp_path):
    model = lora(kasa_config=peft.KasaConfig())
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(mlp(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        torch.testing.assert_close(loaded(X), model(X), rtol=1e-4, atol=1e-5)


# ---- BD-LoRA


def test_bdlora_is_a_plain_lora_with_blocks_on_the_diagonal():
    setting = {"nblocks": 2, "target_modules_bd_a": ["down"], "target_modules_bd_b": ["up"]}
    model = lora(use_bdlora=setting)
    up, down = model.base_model.model.up, model.base_model.model.down
    assert up.lora_B["default"].weight.shape == (12, 2)
    assert down.lora_A["default"].weight.shape == (4, 6)
    whole = torch.block_diag(*up.lora_B["default"].weight.chunk(2))
    torch.testing.assert_close(up.get_delta_weight("default"), 2 * whole @ up.lora_A["default"].weight)
    whole = torch.block_diag(*down.lora_A["default"].weight.chunk(2))
    torch.testing.assert_close(down.get_delta_weight("default"), 2 * down.lora_B["default"].weight @ whole)


def test_bdlora_names_the_module_that_is_in_neither_list():
    base = mlp()
    with pytest.raises(ValueError, match=r"'down'.*match_strict"):
        lora(base, use_bdlora=peft.BdLoraConfig(target_modules_bd_a=["up"], nblocks=2))
    with pytest.raises(ValueError, match="nblocks=3"):
        lora(base, use_bdlora=peft.BdLoraConfig(target_modules_bd_b=["up"], nblocks=3, match_strict=False))
    assert not hasattr(base, "peft_config")


def test_bdlora_on_gpt2_s_transposed_layers():
    model = gpt2()
    setting = {"nblocks": 2, "target_modules_bd_b": ["c_fc"], "match_strict": False}
    targets = ["c_fc", "c_attn"]
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, use_bdlora=setting, task_type="CAUSAL_LM"))
    block = model.base_model.model.transformer.h[0]
    assert block.mlp.c_fc.lora_B["default"].weight.shape == (128, 2)
    assert block.attn.c_attn.lora_B["default"].weight.shape == (96, 4)


# ---- VeLoRA


def test_velora_has_lora_s_gradients_but_for_a():
    plain, compressed = lora(), lora(velora_config=peft.VeloraConfig(num_groups=2))
    compressed.load_state_dict(plain.state_dict(), strict=False)
    gradients = []
    for model in (plain, compressed):
        x = X.clone().requires_grad_()
        model.train()(x).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"x": x.grad})
    for name, expected in gradients[0].items():
        same = torch.allclose(gradients[1][name], expected, atol=1e-5)
        assert same == ("lora_A" not in name), name


def test_velora_s_gradient_of_a_is_exact_where_all_groups_lie_along_one_line():
    x = torch.outer(torch.randn(6), torch.tensor([1.0, 2.0, 1.0, 2.0, -1.0, -2.0, 3.0, 6.0]))
    gradients = []
    for setting in (None, peft.VeloraConfig(num_groups=4)):
        layer = lora(velora_config=setting).base_model.model.up.train()
        layer(x).square().sum().backward()
        gradients.append(layer.lora_A["default"].weight.grad)
    torch.testing.assert_close(*gradients)


def test_velora_on_a_single_sample_without_a_batch():
    model = lora(velora_config=peft.VeloraConfig(num_groups=4)).train()
    torch.testing.assert_close(model(X[0]), model(X[:1])[0])
    model(X[0]).sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


def test_velora_finds_its_direction_once_or_in_every_batch():
    for init_type, changes in (("batch_average", True), ("batch_average_once", False), ("random", False)):
        layer = lora(velora_config=peft.VeloraConfig(num_groups=2, init_type=init_type)).base_model.model.up.train()
        layer(X)
        first = layer.lora_velora_embed["default"].clone()
        assert first.norm() == pytest.approx(1)
        layer(X + 3)
        assert torch.equal(first, layer.lora_velora_embed["default"]) != changes


# ---- MonteCLoRA


def test_monteclora_is_random_in_training_alone():
    model = lora(monteclora_config=peft.MontecloraConfig(sample_scaler=0.1))
    plain = lora()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "sampler" not in k})
    torch.testing.assert_close(model(X), plain(X))
    model.train()
    first = model(X)
    assert not torch.allclose(model(X), first)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin.eval()(X), plain(X))


def test_monteclora_s_loss_reaches_its_parameters():
    model = lora(monteclora_config=peft.MontecloraConfig(kl_loss_weight=1.0, use_entropy=True)).train()
    model(X)
    model.base_model.monteclora_loss().backward()
    sampler = [p for name, p in model.named_parameters() if "sampler" in name]
    assert len(sampler) == 4
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in sampler)
    assert model.eval().base_model.monteclora_loss() == 0


def test_monteclora_s_loss_is_least_at_the_priors():
    from peft.tuners.lora.variants.monteclora import Perturbation

    setting = peft.MontecloraConfig(kl_loss_weight=1.0, dirichlet_prior=1.0)
    perturbation = Perturbation(4, setting)
    with torch.no_grad():
        perturbation.std_prior.zero_()
        perturbation.expert_weights_prior.zero_()
    assert perturbation.penalty().item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        perturbation.std_prior.add_(0.5)
        perturbation.expert_weights_prior.add_(0.5)
    assert perturbation.penalty().item() > 0.1


def test_monteclora_in_the_trainer(tmp_path):
    class MontecloraTrainer(MontecloraTrainerMixin, Trainer):
        pass

    def loss_of(trainer_class) -> float:
        torch.manual_seed(0)
        config = LoraConfig(
            target_modules=["q_proj"],
            task_type="CAUSAL_LM",
            monteclora_config=peft.MontecloraConfig(kl_loss_weight=1.0, sample_scaler=0.0),
        )
        model = get_peft_model(llama(), config)
        data = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 4
        arguments = TrainingArguments(tmp_path, max_steps=1, report_to=[], use_cpu=True, learning_rate=0.0)
        return trainer_class(model, arguments, train_dataset=data).train().training_loss

    assert loss_of(MontecloraTrainer) > loss_of(Trainer) + 0.1


# ---- QA-LoRA


class GroupQuantised(nn.Module):
    """A linear layer that holds its weight packed, as GPTQ's do."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 8, 12
        self.register_buffer("qweight", torch.randint(-4, 4, (12, 8), dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(12, 2, dtype=torch.int32))
        self.register_buffer("bias", torch.zeros(12))

    @property
    def weight(self):
        return self.qweight

    def forward(self, x):
        return x @ self.qweight.to(x.dtype).T / 4


def test_qalora_on_a_group_quantised_layer():
    base = nn.Sequential(GroupQuantised())
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0"], use_qalora=True, qalora_group_size=4))
    give_effect(model, "default", 1)
    layer = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.shape == (4, 2)
    pooled = 2 * X.view(5, 2, 4).mean(-1)
    expected = layer.base_layer(X) + pooled @ a.T @ b.T * layer.scaling["default"]
    torch.testing.assert_close(model(X), expected)
    with pytest.raises(ValueError, match="qalora_group_size=3"):
        get_peft_model(
            nn.Sequential(GroupQuantised()),
            LoraConfig(target_modules=["0"], use_qalora=True, qalora_group_size=3),
        )


def test_qalora_on_other_layers_is_plain_and_says_so():
    with pytest.warns(peft.PeftWarning, match="plain LoRA"):
        model = lora(use_qalora=True)
    assert torch.equal(model(X), lora()(X))
    others = nn.Sequential(nn.Conv1d(8, 8, 3), nn.MultiheadAttention(8, 2), nn.Embedding(4, 8))
    with pytest.warns(peft.PeftWarning, match="plain LoRA"):
        model = get_peft_model(others, LoraConfig(target_modules=["0", "1", "2"], use_qalora=True))
    assert sum("lora_" in name for name, _ in model.named_parameters()) == 8


# ---- aLoRA

CALL = [5, 6]
#: the call at position 2, at none, at positions 0 and 3 (of which the last counts)
PROMPTS = torch.tensor([[1, 2, 5, 6, 3, 4], [1, 2, 6, 5, 3, 4], [5, 6, 1, 5, 6, 2]])


def alora(**settings) -> PeftModel:
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=CALL, **settings
    )
    model = get_peft_model(llama(), config).eval()
    give_effect(model, "default", 1)
    return model


def test_alora_acts_from_the_last_call_on():
    model = alora()
    with torch.no_grad():
        logits = model(PROMPTS).logits
        with model.disable_adapter():
            base = model(PROMPTS).logits
    changed = ~torch.isclose(logits, base, atol=1e-6).all(-1)
    assert changed.tolist() == [[False] * 2 + [True] * 4, [False] * 6, [False] * 3 + [True] * 3]


@needs_a_bare_past()
def test_alora_with_a_cache_computes_what_it_does_without():
    model = alora()
    with torch.no_grad():
        whole = model(PROMPTS).logits
        start = model(PROMPTS[:, :4], use_cache=True)
        rest = model(PROMPTS[:, 4:], past_key_values=start.past_key_values).logits
    torch.testing.assert_close(rest[:2], whole[:2, 4:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_alora_generates_as_step_by_step_without_a_cache(beams):
    model = alora()
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        cached = model.generate(PROMPTS, **options)
        for row, prompt in enumerate(PROMPTS):
            alone = model.generate(prompt[None], use_cache=False, **options)
            assert torch.equal(alone[0], cached[row])


def test_alora_reuses_the_base_model_s_cache_of_what_comes_before():
    model = alora()
    prompt = torch.tensor([[1, 2, 3, 4, 5, 6, 7]])
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        with model.disable_adapter():
            cache = model(prompt[:, :4], use_cache=True).past_key_values
        reused = model.generate(prompt, past_key_values=cache, **options)
        assert torch.equal(reused, model.generate(prompt, **options))


def test_alora_in_a_mixed_batch():
    model = alora()
    model.add_adapter("plain", LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    give_effect(model, "plain", 2)
    names = ["default", "plain", "__base__"]
    with torch.no_grad():
        mixed = model(PROMPTS, adapter_names=names).logits
        for row, name in enumerate(names):
            with model.disable_adapter() if name == "__base__" else torch.no_grad():
                if name != "__base__":
                    model.set_adapter(name)
                alone = model(PROMPTS).logits[row]
            torch.testing.assert_close(mixed[row], alone, rtol=1e-4, atol=1e-5)


def test_alora_trains_where_it_acts_and_nowhere_else():
    model = alora().train()
    weights = [p for p in model.parameters() if p.requires_grad]
    loss = model(PROMPTS[1:2], labels=PROMPTS[1:2]).loss
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in weights)
    model(PROMPTS[:1], labels=PROMPTS[:1]).loss.backward()
    assert all(p.grad.any() for p in weights)


@pytest.mark.parametrize("reentrant", [False, True])
def test_alora_under_gradient_checkpointing_keeps_forward_passes_apart(reentrant):
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = alora().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        losses = [model(ids, labels=ids).loss for ids in (PROMPTS[:1], PROMPTS[2:])]  # calls at other positions
        sum(losses).backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    torch.testing.assert_close(gradients(True), gradients(False))


def test_alora_does_not_work_on_two_sequences():
    with pytest.raises(ValueError, match="encoder-decoder"):
        get_peft_model(t5(), LoraConfig(target_modules=["q"], alora_invocation_tokens=CALL))


def test_alora_is_not_active_where_there_are_no_tokens():
    model = lora(alora_invocation_tokens=CALL)
    with pytest.warns(peft.PeftWarning, match="input_ids"):
        changed = model(X)
    assert torch.equal(changed, model.unload()(X))


def test_alora_cannot_be_merged_and_leaves_nothing_on_the_base_model():
    model = alora()
    with pytest.raises(NotImplementedError, match="aLoRA"):
        model.merge_and_unload()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(twin(PROMPTS).logits, model(PROMPTS).logits)
    base = model.unload()
    assert not base._forward_pre_hooks and not base._forward_hooks
    with pytest.warns(peft.PeftWarning, match="input_ids"), torch.no_grad():
        twin(inputs_embeds=torch.randn(1, 4, base.config.hidden_size))


# ---- Arrow


@pytest.fixture
def experts(tmp_path):
    paths = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = lora()
        give_effect(model, "default", seed)
        model.save_pretrained(tmp_path / str(seed))
        paths.append(str(tmp_path / str(seed)))
    return paths


def test_arrow_with_one_expert_is_that_expert(experts):
    model = create_arrow_model(mlp(), experts[:1], peft.ArrowConfig(top_k=1))
    torch.testing.assert_close(model.eval()(X), PeftModel.from_pretrained(mlp(), experts[0])(X))
    assert model.active_adapter == "arrow_router"


def test_arrow_sends_a_token_to_the_expert_that_changes_it_most(experts):
    model = create_arrow_model(mlp(), experts, peft.ArrowConfig(top_k=1)).eval()
    layer = model.base_model.model.up
    for i in range(3):
        change = layer.get_delta_weight(f"task_{i}")
        direction = torch.linalg.svd(change).Vh[:1] * 10
        torch.testing.assert_close(layer(direction), layer.base_layer(direction) + direction @ change.T)


def test_arrow_finds_directions_without_chance(experts):
    first, second = (create_arrow_model(mlp(), experts, peft.ArrowConfig(top_k=2)).eval() for _ in range(2))
    state = torch.get_rng_state()
    assert torch.equal(first(X), second(X)) and torch.equal(torch.get_rng_state(), state)
    layer = first.base_model.model.up
    variant = layer.lora_variant["arrow_router"]
    for name in ("task_0", "task_1"):
        a, b = layer.factors(name)
        exact = torch.linalg.svd(b @ a).Vh[0]
        torch.testing.assert_close((variant._direction(a, b) @ exact).abs(), torch.tensor(1.0))


def test_arrow_takes_in_experts_that_come_later(experts):
    model = create_arrow_model(mlp(), experts[:2], peft.ArrowConfig(rng_seed=0)).eval()
    model(X)
    model.load_adapter(experts[2], adapter_name="task_2")
    all_at_once = create_arrow_model(mlp(), experts, peft.ArrowConfig(rng_seed=0)).eval()
    torch.testing.assert_close(model(X), all_at_once(X), rtol=1e-3, atol=1e-4)


def test_arrow_s_general_knowledge_is_taken_out_of_copies(experts):
    setting = peft.ArrowConfig(top_k=1, use_gks=True)
    model = create_arrow_model(mlp(), experts[:1], setting, general_adapter_paths=experts[1:]).eval()
    layer = model.base_model.model.up
    a = layer.lora_A["task_0"].weight - (layer.lora_A["gks_0"].weight + layer.lora_A["gks_1"].weight) / 2
    b = layer.lora_B["task_0"].weight - (layer.lora_B["gks_0"].weight + layer.lora_B["gks_1"].weight) / 2
    torch.testing.assert_close(layer(X), layer.base_layer(X) + 2 * X @ (b @ a).T)
    saved = peft.load_peft_weights(experts[0])
    assert torch.equal(layer.lora_A["task_0"].weight, saved["base_model.model.up.lora_A.weight"])


def test_arrow_refuses_experts_that_do_not_fit(experts, tmp_path):
    lora(r=2).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="same rank"):
        create_arrow_model(mlp(), [experts[0], str(tmp_path / "other")], peft.ArrowConfig())
    with pytest.raises(ValueError, match="at least one"):
        create_arrow_model(mlp(), [], peft.ArrowConfig())
    with pytest.raises(ValueError, match="general_adapter_paths"):
        create_arrow_model(mlp(), experts, peft.ArrowConfig(use_gks=True))
    model = create_arrow_model(mlp(), experts, peft.ArrowConfig())
    with pytest.raises(NotImplementedError, match="Arrow"):
        model.merge_adapter()


# ---- together


@pytest.mark.parametrize(
    "variant",
    [
        {"kasa_config": {}},
        {"velora_config": {"num_groups": 2}},
        {"monteclora_config": {}},
        {"use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["up", "down"]}},
    ],
    ids=lambda variant: next(iter(variant)),
)
def test_a_bias_beside_the_factors_acts_and_is_trained(variant):
    model = lora(lora_bias=True, **variant)
    biases = [p for name, p in model.named_parameters() if name.endswith("lora_B.default.bias")]
    with torch.no_grad():
        for bias in biases:
            bias.normal_()
    before = model(X)
    model.train()(X).sum().backward()
    assert len(biases) == 2 and all(bias.grad.any() for bias in biases)
    model.eval().merge_adapter()
    torch.testing.assert_close(model(X), before)


def test_one_variant_at_a_time():
    with pytest.raises(ValueError, match=r"use_dora.*kasa_config"):
        lora(use_dora=True, kasa_config=peft.KasaConfig())


@pytest.mark.parametrize("setting", ["velora_config", "kasa_config", "use_bdlora", "arrow_config", "monteclora_config"])
def test_settings_of_a_wrong_type_are_refused(setting):
    with pytest.raises(TypeError, match=setting):
        LoraConfig(**{setting: 3})
