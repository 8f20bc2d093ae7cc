"""X-LoRA: saved LoRA adapters, mixed anew for each token."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import peft
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from tiny_models import assert_base_untouched, base_state, fill_adapter, gpt2, llama, opt, t5, tokens

torch.set_num_threads(1)
IDS = tokens(3, 6)
TARGETS = ["q_proj", "v_proj", "down_proj"]


def plain(make=llama, **fields):
    return make(use_cache=False, **fields)


@pytest.fixture
def experts(tmp_path):
    """Makes saved LoRA adapters with an effect: name -> folder."""

    def make(base=llama, **settings) -> dict[str, str]:
        places = {}
        for seed, (name, r) in enumerate({"math": 2, "law": 4}.items()):
            config = LoraConfig(**{"r": r, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **settings})
            places[name] = str(tmp_path / "experts" / name)
            fill_adapter(get_peft_model(base(), config), seed=seed, scale=0.3).save_pretrained(places[name])
        return places

    return make


def mixture(adapters: dict[str, str], base=llama, **settings) -> PeftModel:
    torch.manual_seed(3)
    return get_peft_model(plain(base), XLoraConfig(task_type="CAUSAL_LM", adapters=adapters, **settings)).eval()


def classifier_of(model: PeftModel) -> torch.nn.Sequential:
    return model.base_model.internal_xlora_classifier.layers


def always(model: PeftModel, *logits: float) -> PeftModel:
    """The classifier gives these for every token."""
    last = classifier_of(model)[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor(logits * (len(last.bias) // len(logits))))
    return model


def loras(adapters: dict[str, str], base=llama) -> PeftModel:
    model = PeftModel.from_pretrained(plain(base), adapters["math"], adapter_name="math")
    model.load_adapter(adapters["law"], "law")
    return model


@pytest.mark.parametrize(
    "base, targets",
    [
        (llama, TARGETS),
        (llama, ["embed_tokens", "q_proj"]),
        (llama, ["lm_head", "k_proj"]),
        (opt, ["q_proj", "fc1"]),
        (gpt2, ["c_attn", "c_fc"]),
    ],
    ids=["linear", "embedding", "output layer", "flattened", "transposed"],
)
def test_all_tokens_for_one_expert_is_that_expert_alone(experts, base, targets):
    adapters = experts(base, target_modules=targets)
    alone = loras(adapters, base)
    for index, name in enumerate(adapters):
        model = always(mixture(adapters, base), *(1e3 * (i == index) for i in range(2)))
        alone.set_adapter(name)
        torch.testing.assert_close(model(IDS).logits, alone(IDS).logits, rtol=1e-4, atol=1e-4)


def test_even_weights_are_the_mean_of_the_changes(experts):
    adapters = experts()
    together = loras(adapters)
    together.base_model.set_adapter(["math", "law"])
    for layer in together.base_model.adapter_layers():
        layer.scale_layer(0.5)
    for settings in ({}, {"layerwise_scalings": True}, {"xlora_depth": 3, "xlora_size": 5}):
        model = always(mixture(adapters, **settings), 0.0, 0.0)
        torch.testing.assert_close(model(IDS).logits, together(IDS).logits)


def test_settings_of_the_weights(experts):
    adapters = experts()
    expected = always(mixture(adapters), 2.0, 0.0)(IDS).logits
    share = torch.tensor([2.0, 0.0]).softmax(0).tolist()

    def logits(*given, **settings):
        return always(mixture(adapters, **settings), *given)(IDS).logits

    torch.testing.assert_close(logits(1.0, 0.0, softmax_temperature=0.5), expected)
    raw = dict(enable_softmax=False)
    torch.testing.assert_close(logits(*share, **raw), expected)
    torch.testing.assert_close(logits(*(s / 3 for s in share), global_scaling_weight=3.0, **raw), expected)
    torch.testing.assert_close(logits(0.5, 0.2, top_k_lora=1, **raw), logits(0.5, 0.0, **raw))
    chosen = logits(0.5, 0.2, top_k_lora=1, enable_softmax_topk=True, **raw)
    torch.testing.assert_close(chosen, logits(1.0, 0.0, **raw))
    changed = mixture(adapters)
    changed.base_model.set_topk_lora(1)
    changed.base_model.set_global_scaling_weight(2.0)
    torch.testing.assert_close(always(changed, 2.0, 0.0)(IDS).logits, logits(2 * share[0], 0.0, **raw))
    assert changed.base_model.get_global_scaling_weight() == changed.peft_config["default"].global_scaling_weight == 2.0
    with pytest.raises(ValueError, match="from 1 to 2"):
        changed.base_model.set_topk_lora(3)


def test_the_first_pass_gives_every_expert_the_same_weight(experts):
    adapters = experts()
    model = mixture(adapters)
    seen = {}
    for value in (0.0, None):
        model.base_model.set_scaling_pass_value(value)
        model(IDS)
        seen[value] = model.base_model.get_latest_scalings()
    assert model.peft_config["default"].scaling_pass_value == 0.5
    assert model.base_model.internal_xlora_classifier.override_scaling_pass_value == 0.5
    half = loras(adapters)
    half.base_model.set_adapter(["math", "law"])
    for layer in half.base_model.adapter_layers():
        layer.scale_layer(0.5)
    for value, first in ((0.0, plain()), (None, half)):
        hidden = first(IDS, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(seen[value][:, :, 0], classifier_of(model)(hidden).softmax(-1))


def test_each_layer_has_weights_of_its_own(experts):
    model = mixture(experts(), layerwise_scalings=True)
    model(IDS)
    scalings = model.base_model.get_latest_scalings()
    assert scalings.shape == (3, 6, 6, 2)  # three projections in two blocks
    assert not torch.allclose(scalings[:, :, 0], scalings[:, :, 1])
    one = mixture(experts())
    one(IDS)
    scalings = one.base_model.get_latest_scalings()
    assert torch.equal(scalings[:, :, 0], scalings[:, :, 5])


@pytest.mark.parametrize("trains_experts", [False, True])
def test_a_mixture_learns_is_saved_and_loaded(experts, tmp_path, trains_experts):
    adapters = experts()
    target = loras(adapters)
    labels = torch.where(torch.arange(6) < 3, target(IDS).logits.argmax(-1), plain()(IDS).logits.argmax(-1))
    model = mixture(adapters, xlora_depth=2, xlora_size=16, use_trainable_adapters=trains_experts)
    before = base_state(plain())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    in_classifier = {name for name in trained if "internal_xlora_classifier" in name}
    assert len(in_classifier) == 4 and (trained > in_classifier) == trains_experts
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    model.train()
    losses = []
    for _ in range(15):
        loss = model(input_ids=IDS, labels=labels).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    assert_base_untouched(model, before)
    model.eval().save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir() if path.is_dir()} == set(adapters)
    loaded = PeftModel.from_pretrained(plain(), tmp_path / "saved")
    assert type(loaded) is peft.PeftModelForCausalLM and list(loaded.peft_config) == ["default", "math", "law"]
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
    assert not any(p.requires_grad for p in loaded.parameters())
    again = PeftModel.from_pretrained(plain(), tmp_path / "saved", is_trainable=True)
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trained
    expert = PeftModel.from_pretrained(plain(), tmp_path / "saved" / "law")
    same = torch.allclose(expert(IDS).logits, PeftModel.from_pretrained(plain(), adapters["law"])(IDS).logits)
    assert same != trains_experts


def test_experts_are_found_elsewhere_when_told_so(experts, tmp_path):
    adapters = experts()
    model = mixture(adapters)
    model.save_pretrained(tmp_path / "all", selected_adapters=["default"])
    with pytest.raises(ValueError, match=r"'math' was not found.*adapters="):  # a file names no place to load from
        PeftModel.from_pretrained(plain(), tmp_path / "all")
    model = PeftModel.from_pretrained(plain(), tmp_path / "all", adapters=adapters)
    swapped = {"math": adapters["law"], "law": adapters["math"]}
    other = PeftModel.from_pretrained(plain(), tmp_path / "all", adapters=swapped)
    assert other.base_model.model.model.layers[0].self_attn.q_proj.r == {"math": 4, "law": 2}
    assert not torch.allclose(other(IDS).logits, model(IDS).logits)


def test_a_mixture_of_another_name_keeps_its_experts_with_it(experts, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(plain(), XLoraConfig(task_type="CAUSAL_LM", adapters=experts()), adapter_name="mix").eval()
    model.save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved" / "mix").iterdir() if path.is_dir()} == {"math", "law"}
    loaded = PeftModel.from_pretrained(plain(), tmp_path / "saved", subfolder="mix")
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)


def test_disabled_unloaded_and_deleted_it_is_the_base_model(experts):
    base, model = plain()(IDS).logits, mixture(experts())
    changed = model(IDS).logits
    assert not torch.allclose(changed, base, atol=1e-2)
    trained = [p.requires_grad for p in model.parameters()]
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, base)
        model.generate(IDS, max_new_tokens=2, use_cache=True)
    assert torch.equal(model(IDS).logits, changed)
    assert [p.requires_grad for p in model.parameters()] == trained
    assert torch.equal(copy.deepcopy(model).unload()(IDS).logits, base)
    model.delete_adapter("default")
    assert torch.equal(model(IDS).logits, base) and not model.peft_config


def test_copies_and_pickles(experts):
    model = mixture(experts())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IDS).logits, model(IDS).logits)
        always(twin, 5.0, 0.0)
        assert not torch.allclose(twin(IDS).logits, model(IDS).logits)


def test_generation_weighs_all_tokens_in_each_step(experts):
    model = mixture(experts())
    greedy = dict(do_sample=False, eos_token_id=None, max_new_tokens=4)
    ids = IDS
    for _ in range(4):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    model.base_model.enable_scalings_logging()
    assert torch.equal(model.generate(IDS, **greedy), ids)
    model.base_model.disable_scalings_logging()
    model(IDS)
    log = model.base_model.get_scalings_log()
    assert [entry.shape for entry in log] == [(3, length, 6, 2) for length in (6, 7, 8, 9)]
    places, entries = model.base_model.get_bucketed_scalings_log()[8]
    assert places == [2] and torch.equal(entries[0], log[2])
    model.base_model.clear_scalings_log()
    assert model.base_model.get_scalings_log() == [] and len(log) == 4
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(IDS, use_cache=True)


def test_gradient_checkpointing_changes_no_gradient(experts):
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = mixture(experts(), use_trainable_adapters=True)
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        # Two passes before one backward pass: the layers of each are run again with its own weights.
        sum(model(input_ids=ids, labels=ids).loss for ids in (IDS, IDS.flip(1))).backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for one, other in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(one, other)


def test_half_precision_trains_the_classifier_in_float32(experts):
    adapters = experts()
    model = get_peft_model(plain().bfloat16(), XLoraConfig(task_type="CAUSAL_LM", adapters=adapters))
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert classifier_of(model)[-1].weight.grad.abs().sum() > 0


def test_what_a_mixture_cannot_do_says_so(experts):
    adapters = experts()
    model = mixture(adapters)
    before = model(IDS).logits
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="mixed batch"):
        model(IDS, adapter_names=["math", "law", "math"])
    with pytest.raises(ValueError, match="Only the mixture 'default' can be active"):
        model.set_adapter("math")
    with pytest.raises(ValueError, match="is an expert of 'default'"):
        model.delete_adapter("law")
    with pytest.raises(ValueError, match="cannot be a second"):
        model.add_adapter("other", XLoraConfig(task_type="CAUSAL_LM", adapters=adapters))
    with pytest.raises(NotImplementedError, match="combine them before"):
        model.add_weighted_adapter(["math", "law"], [1.0, 1.0], "sum")
    assert not model.base_model.supports_lora_conversion()
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"top_k_lora": 0}, "top_k_lora must be a positive"),
        ({"top_k_lora": 3}, "more than there are adapters"),
        ({"xlora_depth": 0}, "xlora_depth must be a positive"),
        ({"xlora_size": -1}, "xlora_size must be a positive"),
        ({"hidden_size": 0}, "hidden_size must be a positive"),
        ({"xlora_dropout_p": 1.0}, "xlora_dropout_p must be"),
        ({"softmax_temperature": 0.0}, "softmax_temperature must be positive"),
    ],
)
def test_settings_that_make_no_sense(settings, words):
    with pytest.raises(ValueError, match=words):
        XLoraConfig(adapters={"a": "x", "b": "y"}, **settings)


@pytest.mark.parametrize(
    "base, settings, words",
    [
        (llama, {}, "use_cache"),
        (lambda: plain(t5), {}, "needs a decoder"),
        (lambda: torch.nn.Linear(2, 2), {}, "needs a decoder"),
        (plain, {"hidden_size": 31}, "hidden_size=31, but that of the model is 32"),
        (plain, {"adapters": {}}, "adapters is empty"),
        (plain, {"adapters": {"a.b": "x"}}, "cannot name an adapter"),
        (plain, {"adapters": {"default": "x"}}, "is that of the mixture"),
    ],
)
def test_models_and_settings_that_do_not_go_together(experts, base, settings, words):
    model = base()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        get_peft_model(model, XLoraConfig(**{"adapters": experts(), **settings}))
    assert list(model.state_dict()) == list(before) and all(p.requires_grad for p in model.parameters())


def test_experts_that_cannot_be_had_leave_the_model_as_it_was(experts, tmp_path):
    adapters = experts()
    prompt = get_peft_model(plain(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    prompt.save_pretrained(tmp_path / "prompt")
    dora = get_peft_model(plain(), LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True))
    dora.save_pretrained(tmp_path / "bias")
    wide = get_peft_model(plain(hidden_size=64), LoraConfig(r=2, target_modules=["q_proj"]))
    wide.save_pretrained(tmp_path / "wide")
    for place, error, words in (
        ("missing", ValueError, "Adapter 'law' was not found"),
        ("prompt", ValueError, "mixes LoRA adapters"),
        ("bias", ValueError, "has lora_bias"),
        ("wide", RuntimeError, "size mismatch"),
    ):
        model = plain()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        config = XLoraConfig(task_type="CAUSAL_LM", adapters={**adapters, "law": str(tmp_path / place)})
        with pytest.raises(error, match=words):
            get_peft_model(model, config)
        assert list(model.state_dict()) == list(state) and all(p.requires_grad for p in model.parameters())


def test_a_mixture_that_cannot_be_made_leaves_no_experts_behind(experts):
    model = plain()
    config = XLoraConfig(task_type="CAUSAL_LM", adapters=experts(), xlora_depth=2, xlora_size=10**15)  # no such memory
    before = list(model.state_dict())
    with pytest.raises((RuntimeError, MemoryError)):
        get_peft_model(model, config)
    assert list(model.state_dict()) == before and not hasattr(model, "peft_config")
    assert all(p.requires_grad for p in model.parameters())


def test_old_paths():
    from peft.tuners.xlora import XLoraClassifier, XLoraModel
    from peft.tuners.xlora.config import XLoraConfig as by_old_path
    from peft.tuners.xlora.layer import XLoraLinearLayer

    assert by_old_path is XLoraConfig and XLoraModel is peft.XLoraModel
    assert issubclass(XLoraLinearLayer, peft.tuners.lora.LoraLayer) and XLoraClassifier.__name__ == "XLoraClassifier"
