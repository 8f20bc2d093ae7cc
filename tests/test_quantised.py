"""Base models whose weights are quantised; what every method does with such layers is in test_conformance.py."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import peft
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from quantised_layers import FURTHER, QUANTISED, READ_ONLY, held_bytes, torchao
from tiny_models import fill_adapter, llama, saved_base, tokens

ALL = {**QUANTISED, **FURTHER}
# Some packages hold weights in blocks of 64.
X = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
over_kinds = pytest.mark.parametrize("kind", QUANTISED)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def plain() -> Mlp:
    torch.manual_seed(0)
    return Mlp().eval().requires_grad_(False)


def quantised(kind: str) -> Mlp:
    model = plain()
    model.up, model.down = ALL[kind](model.up), ALL[kind](model.down)
    return model


def adapted(model: nn.Module, **settings) -> PeftModel:
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 4, "target_modules": ["up", "down"], **settings})
    return fill_adapter(get_peft_model(model, config)).eval()


@pytest.mark.parametrize("kind", FURTHER)
def test_further_settings_merge_to_the_nearest_and_come_back_bit_for_bit(kind):
    model = adapted(quantised(kind))
    layers = [model.base_model.model.up, model.base_model.model.down]
    before = [held_bytes(layer.base_layer) for layer in layers]
    wanted = [layer.get_base_weight() + layer.get_delta_weight("default") for layer in layers]
    model.merge_adapter()
    for layer, weight in zip(layers, wanted, strict=True):
        step = 0.25 * weight.abs().max()  # the coarsest have 8 steps
        assert (layer.get_base_weight() - weight).abs().max() < step
        assert (layer.get_base_weight() - weight).norm() < 0.5 * layer.get_delta_weight("default").norm()
    model.unmerge_adapter()
    for layer, tensors in zip(layers, before, strict=True):
        assert all(torch.equal(*pair) for pair in zip(held_bytes(layer.base_layer), tensors, strict=True))


@over_kinds
def test_an_adapter_does_not_know_what_it_was_trained_on(kind, tmp_path):
    model = adapted(quantised(kind))
    model.save_pretrained(tmp_path)
    whole = PeftModel.from_pretrained(plain(), tmp_path)
    assert (whole(X) - model(X)).norm() < 0.3 * whole(X).norm()
    back = PeftModel.from_pretrained(quantised(kind), tmp_path, low_cpu_mem_usage=True)
    with torch.no_grad():  # bitsandbytes rounds otherwise where no gradient is wanted
        torch.testing.assert_close(back(X), model(X))


@over_kinds
def test_all_linear_finds_quantised_layers(kind):
    model = get_peft_model(quantised(kind), LoraConfig(r=2, target_modules="all-linear"))
    assert model.targeted_module_names == ["up", "down"]
    assert len(peft.get_layer_status(model)) == 2


@over_kinds
def test_dora_on_a_quantised_layer(kind):
    model = adapted(quantised(kind), use_dora=True)
    layer = model.base_model.model.up
    weight = layer.get_base_weight() + 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    m = layer.lora_magnitude_vector["default"].weight
    expected = X @ (m[:, None] * weight / weight.norm(dim=1, keepdim=True)).T + plain().up.bias
    torch.testing.assert_close(layer(X), expected, rtol=5e-2, atol=5e-2)


@over_kinds
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_take_from_the_weight(kind, start):
    """What is left of the weight is quantised anew, so that the sum is as near to it as a quantisation step."""
    before = quantised(kind)(X)
    model = get_peft_model(quantised(kind), LoraConfig(r=4, target_modules=["up"], init_lora_weights=start)).eval()
    assert (model(X) - before).norm() < 0.15 * before.norm()


class Packed(nn.Module):
    """A layer that can be called but not written, as GPTQ's."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", (linear.weight * 64).round().to(torch.int32))
        self.register_buffer("scales", torch.full((1,), 1 / 64))
        self.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        out = x @ (self.qweight.float() * self.scales).T
        return out if self.bias is None else out + self.bias


def test_a_layer_that_is_called_and_no_more():
    base = plain()
    weight = (base.up.weight * 64).round() / 64
    base.up = Packed(base.up)
    model = adapted(base, target_modules=["up"])
    layer = model.base_model.model.up
    torch.testing.assert_close(layer.get_base_weight(), weight)
    changed = weight + layer.get_delta_weight("default")
    torch.testing.assert_close(layer(X), nn.functional.linear(X, changed, plain().up.bias))
    expected = model(X)
    with pytest.raises(NotImplementedError, match="Packed"):
        model.merge_adapter()
    with pytest.raises(NotImplementedError, match="merged"):
        model.merge_and_unload()
    assert torch.equal(model(X), expected)
    with pytest.raises(NotImplementedError, match="Packed"):
        get_peft_model(model.unload(), LoraConfig(target_modules=["up"], init_lora_weights="pissa"))


over_read_only = pytest.mark.parametrize("kind", READ_ONLY)
CLASSES = {
    "gptq": "GPTQLoraLinear", "awq": "AwqLoraLinear", "inc": "IncLoraLinear", "aqlm": "AqlmLoraLinear",
    "eetq": "EetqLoraLinear",
}  # fmt: skip


def read_only(kind: str) -> nn.Sequential:
    """A plain layer, so that gradients go through the one that comes next: a packed one."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 16), READ_ONLY[kind](nn.Linear(16, 24))).requires_grad_(False).eval()


@over_read_only
def test_other_packages_layers_are_read_by_calling_them(kind):
    base = read_only(kind)
    before = base(X)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    first, layer = model.base_model.model
    assert type(layer).__name__ == CLASSES[kind.split()[0]]
    close = dict(rtol=2e-3, atol=2e-3)  # some of them compute in half precision
    weight, bias = layer.get_base_weight().float(), layer.get_base_bias().float()
    with model.disable_adapter():
        torch.testing.assert_close(model(X), before)
        torch.testing.assert_close(nn.functional.linear(base[0](X), weight, bias), before.float(), **close)
    changed = weight + 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(model(X).float(), nn.functional.linear(first(X), changed, bias), **close)
    with pytest.raises(NotImplementedError, match="nothing can be merged"):
        model.merge_adapter()
    torch.testing.assert_close(layer.get_base_weight().float(), weight)  # what the forward passes left does not matter


@over_read_only
@pytest.mark.parametrize("method", ["lora", "dora", "oft"])
def test_training_on_other_packages_layers(kind, method, tmp_path):
    config = {
        "lora": lambda: LoraConfig(r=4, target_modules=["0", "1"], use_rslora=True),
        "dora": lambda: LoraConfig(r=4, target_modules=["0", "1"], use_dora=True),
        "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=["0", "1"]),
    }[method]()
    torch.manual_seed(1)
    model = get_peft_model(read_only(kind), config).train()
    target = torch.randn(6, 24)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(X).float(), target)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(read_only(kind), tmp_path)
    torch.testing.assert_close(loaded(X), model(X))


class Scaled(Tensor):
    """A weight as Transformer Engine has it: 8-bit numbers and a scale in a tensor that says it is float32."""

    @staticmethod
    def __new__(cls, data: Tensor, scale: float) -> Scaled:
        return Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)

    def __init__(self, data: Tensor, scale: float):
        self.data8, self.scale = data, scale

    def dequantize(self) -> Tensor:
        return self.data8.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func is torch.ops.aten.detach.default, f"{func} on packed numbers"
        return cls(args[0].data8, args[0].scale)


class TransformerEngineLinear(nn.Module):
    """Its `Linear`, of which PyPI has no build for a CPU: an empty tensor stands for no bias."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(Scaled((linear.weight * 64).to(torch.float8_e4m3fn), 1 / 64), requires_grad=False)
        self.bias = Tensor()

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.dequantize().T


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_weights_as_transformer_engine_holds_them(method, monkeypatch):
    package = ModuleType("transformer_engine.pytorch")
    package.Linear = TransformerEngineLinear
    monkeypatch.setitem(sys.modules, package.__name__, package)
    base = plain()
    base.up = TransformerEngineLinear(base.up)
    weight = base.up.weight.dequantize()
    config = {
        "lora": LoraConfig(r=4, target_modules=["up"]),
        "ia3": peft.IA3Config(target_modules=["up"], feedforward_modules=[]),
    }[method]
    model = fill_adapter(get_peft_model(base, config)).eval()
    layer = model.base_model.model.up
    assert type(layer).__name__ == {"lora": "TeLinear", "ia3": "IA3Layer"}[method]
    assert torch.equal(layer.get_base_weight(), weight) and layer.get_base_bias() is None
    torch.testing.assert_close(layer(X), X @ (weight + layer.get_delta_weight("default")).T)
    with pytest.raises(NotImplementedError, match="nothing can be merged"):
        model.merge_adapter()


class Strange(nn.Module):
    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 16, 24
        self.register_buffer("weight", torch.zeros(24, 16, dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.float().T


def test_an_unknown_kind_is_refused_by_name():
    base = plain()
    base.up = Strange()
    with pytest.raises((TypeError, ValueError), match="Strange"):
        get_peft_model(base, peft.IA3Config(target_modules=["up"], feedforward_modules=[]))
    assert isinstance(base.up, Strange)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_that_transformers_has_quantised(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain = saved_base(llama(hidden_size=64, intermediate_size=128), tmp_path)
    setting = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=setting, device_map="cpu")
    base = peft.prepare_model_for_kbit_training(base)
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert base.model.norm.weight.dtype == torch.float32
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")).train()
    model(tokens(), labels=tokens()).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    fill_adapter(model).eval()
    with torch.no_grad():
        expected = model(tokens()).logits
        with model.disable_adapter():
            rounding = (model(tokens()).logits - plain(tokens()).logits).norm()
        model.merge_adapter()  # rounds two of the seven weights of a layer once more
        limit = rounding if bits == 4 else 0.05 * expected.norm()
        assert 0 < (model(tokens()).logits - expected).norm() < limit
        model.unmerge_adapter()
        torch.testing.assert_close(model(tokens()).logits, expected)


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("kind", ["Int8DynamicActivationInt8WeightConfig", "Int8DynamicActivationIntxWeightConfig"])
def test_gradients_get_through_layers_that_quantise_their_input(kind, bias):
    config = LoraConfig(target_modules=["up"], init_lora_weights=False, bias=bias)

    def gradients(model: nn.Module) -> list[Tensor]:
        model(X).sum().backward()
        return [p.grad for name, p in model.named_parameters() if "lora_" in name]

    torch.manual_seed(0)
    base = nn.Sequential()
    base.up, base.down = nn.Linear(64, 32), torchao(nn.Linear(32, 16), kind)
    with pytest.warns(peft.PeftWarning, match="'down', quantise their input"):
        base = get_peft_model(base, config).unload()
    with warnings.catch_warnings():
        warnings.simplefilter("error", peft.PeftWarning)
        model = fill_adapter(get_peft_model(peft.prepare_model_for_kbit_training(base), config))
    found = gradients(model)
    model.zero_grad()
    model.base_model.model.down.weight = nn.Parameter(model.base_model.model.down.weight.dequantize())
    for gradient, expected in zip(found, gradients(model), strict=True):
        torch.testing.assert_close(gradient, expected)


def test_a_frozen_adapter_beside_trained_biases_of_a_quantised_layer():
    """bitsandbytes gives out views, which must not be written to while gradients are wanted of the bias."""
    model = get_peft_model(quantised("bnb 4bit"), LoraConfig(target_modules=["up"], bias="all"))
    fill_adapter(model)
    x = X.view(2, 3, 64)
    expected = model(x)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and "lora_" not in name)
    found = model(x)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert all(parameter.grad.any() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("trains_in_eval", [False, True])
@pytest.mark.parametrize("how", ["wrapped", "injected", "prompt"])
def test_training_goes_on_after_an_evaluation(how, trains_in_eval):
    """bitsandbytes packs weights for processors with bf16 instructions in evaluation: no gradient goes through that."""
    bnb = pytest.importorskip("bitsandbytes")

    def packed(layer: nn.Linear) -> nn.Module:
        made = bnb.nn.Linear4bit(*layer.weight.shape[::-1], bias=layer.bias is not None, compute_dtype=torch.float32)
        made.load_state_dict(layer.state_dict())
        return made.to("cpu").requires_grad_(False)

    base = llama(hidden_size=64, intermediate_size=64)
    for parent in list(base.model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, nn.Linear):
                setattr(parent, name, packed(module))
    if how == "prompt":
        model = get_peft_model(base, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    else:  # layers between the adapted ones are packed too
        config = LoraConfig(target_modules=["q_proj"])
        model = get_peft_model(base, config) if how == "wrapped" else inject_adapter_in_model(config, base)
        fill_adapter(model)
    gradients = []
    for _ in range(2):
        model.train(not trains_in_eval).zero_grad()
        model(tokens()).logits.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad])
        with torch.no_grad():
            model.eval()(tokens())
    assert all(gradient.any() for gradient in gradients[0])
    for first, second in zip(*gradients, strict=True):
        assert (second - first).norm() < 0.05 * first.norm()  # packing rounds scales


def test_the_qlora_example(capsys):
    pytest.importorskip("bitsandbytes")
    path = Path(__file__).parents[1] / "examples" / "qlora_cpu.py"
    spec = importlib.util.spec_from_file_location("qlora_cpu", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    before, after = example.main()
    assert after < 0.75 * before
    assert "full precision" in capsys.readouterr().out


def test_old_import_paths_of_quantised_layers():
    from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt

    for kind, name in (("bnb 4bit", Linear4bit), ("bnb 8bit", Linear8bitLt)):
        assert isinstance(adapted(quantised(kind)).base_model.model.up, name)
        assert not isinstance(adapted(plain()).base_model.model.up, name)
