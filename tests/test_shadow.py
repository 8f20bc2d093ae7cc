"""SHADOW: a small network beside the model, and what becomes of it in generation, files, and by itself."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import peft
import tiny_models as tiny


def adapted(base=None, name: str = "default", seed: int = 1, **settings) -> peft.PeftModel:
    config = {"task_type": "CAUSAL_LM", "r": 3, "shadow_alpha": 0.5, **settings}
    model = peft.get_peft_model(base or tiny.llama(), peft.ShadowConfig(**config), adapter_name=name)
    return randomise(model, name, seed).eval()


def randomise(model, name: str = "default", seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def by_definition(model, ids: torch.Tensor, name: str = "default") -> torch.Tensor:
    """The formula, block by block, on a Llama."""
    tuner = model.base_model
    lm = tuner.model
    config = model.peft_config[name]
    vectors = lm.model.embed_tokens(ids)
    small = tuner.shadow_backbone[name]
    given = {"inputs_embeds": vectors} if isinstance(small.embed_tokens, nn.Identity) else {"input_ids": ids}
    s = tuner.shadow_projection[name](small(**given).last_hidden_state)
    positions = torch.arange(ids.shape[1])[None]
    rotary = lm.model.rotary_emb(vectors, positions)
    length = ids.shape[1]
    mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
    h = vectors
    for layer in lm.model.layers:
        h = h + config.shadow_alpha * layer.shadow_up[name](layer.shadow_down[name](h - s))
        h = layer.base_layer(h, attention_mask=mask, position_embeddings=rotary, position_ids=positions)
        gate = torch.sigmoid(layer.shadow_update_gate[name](h))
        s = (1 - gate) * s + gate * layer.shadow_update_transform[name](h)
    return lm.lm_head(lm.model.norm(h))


@pytest.mark.parametrize(
    "settings", [{}, {"share_embeddings": False}, {"shadow_hidden_size": 16, "shadow_num_hidden_layers": 2}]
)
def test_it_computes_the_formula(settings):
    model, ids = adapted(**settings), tiny.tokens()
    assert not torch.allclose(model(ids).logits, tiny.llama()(ids).logits, atol=1e-3)
    torch.testing.assert_close(model(ids).logits, by_definition(model, ids), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, model(ids).logits)


def test_start_disabled_and_unloaded_are_the_base_model():
    ids, expected = tiny.tokens(), tiny.llama()(tiny.tokens()).logits
    fresh = peft.get_peft_model(tiny.llama(), peft.ShadowConfig(task_type="CAUSAL_LM")).eval()
    assert torch.equal(fresh(ids).logits, expected)
    model = adapted()
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, expected)
    assert not hasattr(model.base_model.model.model.layers[0], "weight"), "a block has none"
    with pytest.raises(NotImplementedError, match="unload_shadow"):
        model.merge_and_unload()
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        model.merge_adapter()
    assert not model.base_model.supports_lora_conversion()
    base = model.unload()
    assert torch.equal(base(ids).logits, expected)
    assert not base._forward_hooks and not base._forward_pre_hooks
    assert not any(type(module).__module__.startswith("peft") for module in base.modules())


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2, tiny.opt])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_is_that_without(build, beams):
    model = adapted(build(), shadow_num_hidden_layers=1)
    prompt = tiny.tokens(batch=2, length=5)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": beams, "do_sample": False}
    found = [model.generate(input_ids=prompt, use_cache=cached, **options) for cached in (True, False)]
    assert torch.equal(*found)
    with model.disable_adapter():
        plain = model.generate(input_ids=prompt, **options)
    assert torch.equal(plain, build().generate(input_ids=prompt, **options))


@tiny.needs_a_bare_past()
def test_steps_with_the_cache_of_the_user():
    model, ids = adapted(), tiny.tokens(batch=2, length=8)
    expected = model(ids).logits
    first = model(ids[:, :5], use_cache=True)
    rest = model(ids[:, 5:], past_key_values=first.past_key_values, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(torch.cat((first.logits, rest), 1), expected, rtol=1e-4, atol=1e-4)
    cache = transformers.DynamicCache()
    first = model(ids[:, :5], past_key_values=cache)
    rest = model(ids[:, 5:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat((first.logits, rest), 1), expected, rtol=1e-4, atol=1e-4)


def test_padding_on_the_left_changes_nothing():
    model, ids = adapted(), tiny.tokens(batch=1, length=6)
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), ids), 1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(found, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_the_loss_has_the_networks_own(weight):
    model, ids = adapted(auxiliary_loss_weight=weight), tiny.tokens()
    tuner = model.base_model
    vectors = tuner.model.model.embed_tokens(ids)
    logits = tuner.model.lm_head(tuner.shadow_backbone["default"](inputs_embeds=vectors).last_hidden_state)
    own = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    plain = nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    output = model(input_ids=ids, labels=ids)
    torch.testing.assert_close(output.loss, plain + weight * own)
    torch.testing.assert_close(output.shadow_loss, own.detach())
    torch.testing.assert_close(model.base_model.last_shadow_loss, own.detach())
    output.loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert all("shadow_" in name for name in trained)
    last = "layers.1.shadow_update"  # nothing comes after it
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad and last not in name}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_trains(dtype):
    ids, reached, losses = tiny.tokens(), [], []
    for base in (tiny.llama(), tiny.llama().to(dtype)):
        model = adapted(base).train()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        reached.append({key for key, parameter in model.named_parameters() if parameter.grad is not None})
    assert reached[0] == reached[1] and losses[1] == pytest.approx(losses[0], rel=0.1)
    assert model(input_ids=ids).logits.dtype == dtype and model.base_model.last_shadow_loss is None


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2, tiny.opt])
def test_the_network_alone_of_a_model_in_half_precision(build):
    ids, losses = tiny.tokens(), []
    for base in (build(), build().bfloat16()):
        torch.manual_seed(0)
        model = adapted(base)
        assert model.generate(input_ids=ids, max_new_tokens=2, do_sample=False, eos_token_id=None).shape[1] == 9
        losses.append(model.base_model.unload_shadow()(input_ids=ids, labels=ids).loss.item())
        assert losses[-1] == pytest.approx(model(input_ids=ids, labels=ids).shadow_loss.item(), rel=1e-3)
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_lowers_the_loss(checkpointing):
    model, ids = adapted(shadow_dropout=0.0).train(), tiny.tokens()
    if checkpointing:
        peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("shadow_" in name)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", ["default", "other"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load(tmp_path, name, low_cpu_mem_usage):
    model, ids = adapted(shadow_hidden_size=16), tiny.tokens()
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert {
        "base_model.model.model.layers.1.shadow_up.default.weight",
        "base_model.shadow_backbone.default.layers.0.self_attn.q_proj.weight",
        "base_model.shadow_projection.default.weight",
    } < keys
    loaded = peft.PeftModel.from_pretrained(
        tiny.llama(), tmp_path, adapter_name=name, low_cpu_mem_usage=low_cpu_mem_usage
    )
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    mine = peft.get_peft_model_state_dict(model)
    theirs = peft.get_peft_model_state_dict(loaded, adapter_name=name)
    assert list(mine) == list(theirs) and set(mine) == keys
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_several_adapters_one_at_a_time():
    model, ids = adapted(), tiny.tokens()
    first = model(ids).logits
    model.add_adapter("b", peft.ShadowConfig(task_type="CAUSAL_LM", r=2, shadow_hidden_size=16))
    assert torch.equal(model(ids).logits, first)
    model.set_adapter("b")
    randomise(model, seed=4)
    second = model(ids).logits
    assert not torch.allclose(first, second)
    assert all(".b." in name for name, p in model.named_parameters() if p.requires_grad)
    model.set_adapter("default")
    torch.testing.assert_close(model(ids).logits, first)
    assert all(".default." in name for name, p in model.named_parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="One SHADOW adapter at a time"):
        model.base_model.set_adapter(["default", "b"])
    with pytest.raises(ValueError, match="cannot differ from sample to sample"):
        model(ids, adapter_names=["b"] * len(ids))
    model.delete_adapter("default")
    assert not any(".default" in name for name in model.state_dict())
    torch.testing.assert_close(model(ids).logits, second)


def test_copies_are_models_of_their_own():
    model, ids = adapted(), tiny.tokens()
    expected = model(ids).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(ids).logits, expected)
        with torch.no_grad():
            for parameter in other.base_model.shadow_backbone.parameters():
                parameter.zero_()
        assert not torch.allclose(other(ids).logits, expected, atol=1e-4)
        torch.testing.assert_close(model(ids).logits, expected)


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
def test_the_network_alone(build, tmp_path):
    model, ids = adapted(build()), tiny.tokens()
    tuner = model.base_model
    small, head = tuner.shadow_backbone["default"], model.get_output_embeddings()
    vectors = model.get_input_embeddings()(ids)
    expected = head(small(inputs_embeds=vectors).last_hidden_state)
    for copied in (False, True):
        alone = tuner.unload_shadow(copy=copied).eval()
        assert (alone.get_input_embeddings() is model.get_input_embeddings()) != copied
        assert any(weight is alone.get_input_embeddings().weight for weight in alone.backbone.parameters())
        torch.testing.assert_close(alone(ids).logits, expected)
        torch.testing.assert_close(alone(input_ids=ids, labels=ids).loss, model(input_ids=ids, labels=ids).shadow_loss)
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        found = [alone.generate(input_ids=ids, use_cache=cached, **options) for cached in (True, False)]
        assert torch.equal(*found)
        torch.testing.assert_close(model(ids).logits, model(ids).logits)
        alone.save_pretrained(tmp_path / str(copied))
        again = adapted(build(), seed=7).base_model.unload_shadow(copy=True).eval()
        missing = again.load_state_dict(load_file(tmp_path / f"{copied}/model.safetensors"), strict=False).missing_keys
        assert not [key for key in missing if "head" not in key]
        torch.testing.assert_close(again(ids).logits, expected)
    with torch.no_grad():
        alone.backbone.get_input_embeddings().weight.zero_()
    torch.testing.assert_close(head(small(inputs_embeds=vectors).last_hidden_state), expected)


def test_classification(tmp_path):
    base = lambda: tiny.llama("LlamaForSequenceClassification", num_labels=3, pad_token_id=0)
    model = adapted(base(), task_type="SEQ_CLS", auxiliary_loss_weight=0.5)
    ids, labels = tiny.tokens(batch=3), torch.tensor([0, 2, 1])
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    tuner = model.base_model
    states = tuner.shadow_backbone["default"](inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask)
    last = states.last_hidden_state[[0, 1, 2], [6, 4, 6]]
    own = nn.functional.cross_entropy(tuner.shadow_head["default"](last), labels)
    output = model(input_ids=ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(output.shadow_loss, own.detach())
    assert tuner.shadow_head["default"].weight.requires_grad
    alone = tuner.unload_shadow(copy=True).eval()
    assert not alone.can_generate()
    torch.testing.assert_close(alone(input_ids=ids, attention_mask=mask, labels=labels).loss, own)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(loaded(input_ids=ids, attention_mask=mask).logits, output.logits)
    torch.testing.assert_close(loaded.base_model.shadow_head["default"].weight, tuner.shadow_head["default"].weight)


def test_a_pretrained_network(tmp_path):
    small = tiny.llama("LlamaModel", seed=3, hidden_size=16, num_hidden_layers=1)
    small.save_pretrained(tmp_path)
    model, ids = adapted(shadow_model=str(tmp_path)), tiny.tokens()
    torch.testing.assert_close(model(ids).logits, by_definition(model, ids), rtol=1e-4, atol=1e-4)
    own = model.base_model.shadow_backbone["default"]
    assert not own.embed_tokens.weight.requires_grad and own.norm.weight.requires_grad
    torch.testing.assert_close(own.embed_tokens.weight, small.embed_tokens.weight)


def test_a_pretrained_network_with_a_projection(tmp_path):
    import json

    small = tiny.llama("LlamaModel", seed=3, hidden_size=16, num_hidden_layers=1)
    projection = torch.randn(32, 16)
    tensors = {f"shadow_model.{key}": value for key, value in small.state_dict().items()}
    save_file({**tensors, "shadow_hidden_projection.weight": projection}, tmp_path / "model.safetensors")
    inner = json.loads(small.config.to_json_string(use_diff=False))
    content = {"model_type": "causal_lm_with_hidden_projection", "shadow_model_config": inner}
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = peft.ShadowConfig(task_type="CAUSAL_LM", shadow_model=str(tmp_path))
    tuner = peft.get_peft_model(tiny.llama(), config).base_model
    torch.testing.assert_close(tuner.shadow_projection["default"].weight, projection)
    torch.testing.assert_close(tuner.shadow_backbone["default"].norm.weight, small.norm.weight)
    with pytest.raises(ValueError, match="goes from 16 to 32; it has to go from 16 to 24"):
        peft.get_peft_model(tiny.llama(hidden_size=24), config)


def test_models_that_it_does_not_fit():
    for model in (tiny.t5(), nn.Sequential(nn.Linear(4, 4))):
        with pytest.raises(ValueError, match="SHADOW"):
            peft.get_peft_model(model, peft.ShadowConfig())
        assert all(parameter.requires_grad for parameter in model.parameters())
    model = tiny.llama()
    with pytest.raises(ValueError, match=r"is a Linear, which is not supported by .*SHADOW"):
        peft.get_peft_model(model, peft.ShadowConfig(target_modules=["q_proj"]))
    assert not model._forward_pre_hooks


def test_some_blocks():
    model = adapted(target_modules=["layers.1"])
    layers = model.base_model.model.model.layers
    assert not hasattr(layers[0], "base_layer") and hasattr(layers[1], "base_layer")
    assert not torch.allclose(model(tiny.tokens()).logits, tiny.llama()(tiny.tokens()).logits)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"r": 0}, "r must be a positive integer"),
        ({"shadow_dropout": 1.0}, "shadow_dropout must be at least 0"),
        ({"shadow_model": "some/model", "shadow_hidden_size": 8}, "leave out shadow_hidden_size"),
        ({"target_parameters": ["x"]}, "target_parameters has no meaning"),
    ],
)
def test_settings_that_mean_nothing(settings, message):
    with pytest.raises(ValueError, match=message):
        peft.ShadowConfig(**settings)
