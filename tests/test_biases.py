"""Trained biases (`bias` in a configuration) are an adapter's: the base model's own are kept beside them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import peft
from peft import LoraConfig, PeftModel, get_peft_model
from peft.core.part import Part
from peft.core.tuner import BaseTuner
from peft.registry import method_of

CONFIGS = {
    "lora": lambda **more: LoraConfig(r=2, target_modules=["query", "value"], **more),
    "lora bias": lambda **more: LoraConfig(r=2, target_modules=["query"], lora_bias=True, **more),
    "dora": lambda **more: LoraConfig(r=2, target_modules=["query"], use_dora=True, **more),
    "ia3": lambda **more: peft.IA3Config(target_modules=["query"], feedforward_modules=[], **more),
    "oft": lambda **more: peft.OFTConfig(oft_block_size=4, target_modules=["query"], **more),
    "hra": lambda **more: peft.HRAConfig(r=2, target_modules=["query"], **more),
    "beft": lambda **more: peft.BeftConfig(target_modules=["query"], **more),
    "ln": lambda **more: peft.LNTuningConfig(target_modules=["LayerNorm"], **more),
}
NORM = "bert.encoder.layer.0.output.LayerNorm.bias"
X = torch.tensor([[1, 5, 9, 30], [2, 2, 7, 0]])


def bert() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=16, **sizes)).eval()


def trained(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def biases(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(X).logits


@pytest.mark.parametrize(("method", "only"), [*((method, "all") for method in CONFIGS), ("lora", "own"), ("ln", "own")])
def test_biases_act_and_go_with_their_adapter(method, only, tmp_path):
    config = CONFIGS[method]()
    prefix = method_of(config.peft_type).prefix.split("_")[0]
    model = trained(get_peft_model(bert(), CONFIGS[method](bias="all" if only == "all" else f"{prefix}_only")))
    base, acting, names = logits(bert()), logits(model), biases(model)
    assert names

    def is_the_base():
        with model.disable_adapter():
            return torch.equal(logits(model), base) and not biases(model)

    assert is_the_base() and torch.equal(logits(model), acting) and biases(model) == names
    assert torch.equal(logits(copy.deepcopy(model)), acting)
    assert torch.equal(peft.get_base_model_state_dict(model)[NORM], bert().state_dict()[NORM])
    model.merge_adapter()
    torch.testing.assert_close(logits(model), acting, atol=1e-5, rtol=1e-4)
    assert is_the_base()
    torch.testing.assert_close(logits(model), acting, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), acting)
    torch.testing.assert_close(
        logits(copy.deepcopy(model).merge_and_unload()), acting, atol=1e-5, rtol=1e-4
    )
    with model.disable_adapter():  # what is saved are the adapter's, in effect or not
        model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bert(), tmp_path)
    torch.testing.assert_close(logits(loaded), acting)
    assert not biases(loaded)
    model.add_adapter("other", CONFIGS[method]())
    assert biases(model) == names
    model.set_adapter("other")
    plain = get_peft_model(bert(), CONFIGS[method]())
    assert not biases(model) & names or method == "lora bias"
    assert is_the_base()
    if method not in ("oft", "hra"):  # others start as the base model
        torch.testing.assert_close(logits(model), logits(plain))
    model.set_adapter("default")
    assert torch.equal(logits(model), acting) and biases(model) == names
    copied = copy.deepcopy(model)
    copied.delete_adapter("default")
    with copied.disable_adapter():
        assert torch.equal(logits(copied), base)
    plain = model.unload()
    assert torch.equal(logits(plain), base)
    assert [name for name, _ in plain.named_modules()] == [name for name, _ in bert().named_modules()]


def test_biases_move_with_the_model_and_stay_the_same_parameters():
    model = trained(get_peft_model(bert(), CONFIGS["lora"](bias="all")))
    optimised = [p for p in model.parameters() if p.requires_grad]
    expected = logits(model)
    with model.disable_adapter():
        model.double()
        base = logits(model)
    assert [id(p) for p in model.parameters() if p.requires_grad] == [id(p) for p in optimised]
    torch.testing.assert_close(logits(model).float(), expected)
    torch.testing.assert_close(base.float(), logits(bert()))
    assert model.unload().classifier.bias.dtype == torch.float64


def test_biases_of_an_adapter_that_cannot_be_added_leave_no_trace(monkeypatch):
    model = bert()

    def fail(*args, **kwargs):
        raise ValueError("too late")

    monkeypatch.setattr(BaseTuner, "set_adapter", fail)
    with pytest.raises(ValueError, match="too late"):
        get_peft_model(model, CONFIGS["lora"](bias="all"))
    assert [name for name, _ in model.named_modules()] == [name for name, _ in bert().named_modules()]
    assert all(p.requires_grad for p in model.parameters())


def test_biases_do_not_mix_in_a_batch():
    model = trained(get_peft_model(bert(), CONFIGS["lora"](bias="all")))
    model.add_adapter("other", CONFIGS["lora"]())
    with pytest.raises(ValueError, match="default trains biases"):
        model(X, adapter_names=["default", "other"])
    with pytest.raises(ValueError, match="default trains biases"):
        model(X, adapter_names=["other", "other"])
    assert torch.equal(model(X, adapter_names=["default"] * 2).logits, logits(model))


def test_biases_of_injected_adapters():
    model = peft.inject_adapter_in_model(CONFIGS["lora"](bias="all"), bert())
    acting = logits(trained(model))
    for module in model.modules():
        if isinstance(module, Part):
            module.enable_adapters(False)
    assert torch.equal(logits(model), logits(bert()))
    for module in model.modules():
        if isinstance(module, Part):
            module.enable_adapters(True)
    assert torch.equal(logits(model), acting)


@pytest.mark.parametrize("bias", ["all", "ia3_only"])
def test_biases_saved_while_merged_are_those_of_the_adapter(bias, tmp_path):
    """IA3 scales a bias with the output, so the one in the module is another while it is merged."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    config = peft.IA3Config(target_modules=["0", "1"], feedforward_modules=[], bias=bias)
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(parameter.requires_grad * torch.randn(parameter.shape))
    x = torch.randn(2, 4)
    expected = model(x)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(base, tmp_path)(x), expected)
