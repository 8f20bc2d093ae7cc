"""What other packages do to this one: classes derived from its own, and names that they replace."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import peft.peft_model  # an old path, for the names that are replaced there
import pytest
import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

import peft
from peft import LoraConfig, PeftModel, get_peft_model
from peft.config import PeftConfigMixin
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Linear, LoraLayer, ParamWrapper
from tiny_models import llama, tokens

# ---- configurations with more to them, as ms-swift has one


@dataclass
class DtypeConfig(LoraConfig):
    """A LoRA's configuration with a dtype, which is in a file of its own."""

    lora_dtype: str | None = None

    def save_pretrained(self, save_directory, **kwargs):
        fields = asdict(self)
        dtype = fields.pop("lora_dtype")
        LoraConfig(**fields).save_pretrained(save_directory, **kwargs)
        with open(f"{save_directory}/more.json", "w") as file:
            json.dump(dtype, file)

    @classmethod
    def from_pretrained(cls, place, subfolder=None, **kwargs):
        found = READ(PeftConfigMixin, place, subfolder, **kwargs)
        with open(f"{place}/more.json") as file:
            return cls(**found.to_dict(), lora_dtype=json.load(file))


READ = PeftConfigMixin.from_pretrained.__func__


def adapted(**fields):
    return get_peft_model(llama(), DtypeConfig(task_type="CAUSAL_LM", lora_dtype="float16", **fields))


def test_a_configuration_saves_and_reads_itself(tmp_path, monkeypatch):
    model = adapted(init_lora_weights=False)
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "lora_dtype" not in content and content["inference_mode"] and content["r"] == 8
    plain = PeftModel.from_pretrained(llama(), tmp_path)
    assert type(plain.peft_config["default"]) is LoraConfig
    monkeypatch.setattr(PeftConfigMixin, "from_pretrained", DtypeConfig.from_pretrained)
    read = PeftModel.from_pretrained(llama(), tmp_path)
    read.load_adapter(tmp_path, "b")
    for name in ("default", "b"):
        assert type(read.peft_config[name]) is DtypeConfig and read.peft_config[name].lora_dtype == "float16"
    assert torch.equal(read(tokens()).logits, model(tokens()).logits)


def test_what_to_dict_says_is_saved(tmp_path):
    @dataclass
    class Noted(LoraConfig):
        def to_dict(self):
            return {**super().to_dict(), "note": "a note"}

    get_peft_model(llama(), Noted()).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["note"] == "a note"


def test_a_replaced_constructor_gets_the_configuration_and_makes_the_adapter(monkeypatch):
    before, seen = LoraModel.__init__, []

    def make(self, model, config, *args, **kwargs):
        before(self, model, config, *args, **kwargs)
        seen.append((dict(config), self.active_adapters))
        for layer in self.adapter_layers():
            layer.move("default", dtype=torch.float16)

    monkeypatch.setattr(LoraModel, "__init__", make)
    model = adapted()
    assert seen == [({"default": model.peft_config["default"]}, ["default"])]
    assert {parameter.dtype for name, parameter in model.named_parameters() if "lora_" in name} == {torch.float16}


def test_a_replaced_cast_knows_the_adapter(monkeypatch):
    seen = []
    monkeypatch.setattr(
        LoraModel, "_cast_adapter_dtype", lambda self, name, autocast=True: seen.append(name in self.peft_config)
    )
    adapted().add_adapter("b", LoraConfig())
    assert seen == [True, True]


# ---- names that are replaced


def test_a_function_replaced_under_its_old_path_is_called_by_those_who_have_imported_it(monkeypatch, tmp_path):
    from safetensors.torch import load_file

    model = get_peft_model(llama(), LoraConfig())
    one = {"base_model.model.x": torch.ones(1)}
    monkeypatch.setattr(peft.peft_model, "get_peft_model_state_dict", lambda *args, **kwargs: one)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == one.keys()
    monkeypatch.undo()
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 8


@pytest.mark.parametrize("kind", [LoraLayer, Linear])
def test_a_replaced_update_layer_makes_the_adapters(monkeypatch, kind):
    before = kind.update_layer

    def update_layer(self, adapter_name, r, lora_alpha, config, **kwargs):
        before(self, adapter_name, 3, lora_alpha, config, **kwargs)

    monkeypatch.setattr(kind, "update_layer", update_layer)
    model = get_peft_model(llama(), LoraConfig())
    assert {layer.r["default"] for layer in model.base_model.adapter_layers()} == {3}


class Around(nn.Module):
    """A kind of module that is not known."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x)


def test_who_replaces_create_and_replace_decides_on_modules_that_are_not_known(monkeypatch):
    with pytest.raises(ValueError, match="Around"):
        get_peft_model(nn.Sequential(Around()), LoraConfig(target_modules=["0"]))
    before = LoraModel._create_and_replace

    def create(self, peft_config, adapter_name, target, target_name, parent, current_key=None, **kwargs):
        if isinstance(target, Around):
            target, target_name, parent = target.inner, "inner", target
        before(self, peft_config, adapter_name, target, target_name, parent, current_key=current_key, **kwargs)

    monkeypatch.setattr(LoraModel, "_create_and_replace", create)
    net = nn.Sequential(Around())
    model = get_peft_model(net, LoraConfig(target_modules=["0"], init_lora_weights=False))
    assert isinstance(net[0].inner, LoraLayer)
    model.base_model.unload()
    assert isinstance(net[0].inner, nn.Linear) and not isinstance(net[0].inner, LoraLayer)


def test_who_replaces_the_check_of_names_leaves_modules_out(monkeypatch):
    before = BaseTuner._check_target_module_exists
    check = staticmethod(lambda config, key: False if key.endswith("1.self_attn.q_proj") else before(config, key))
    monkeypatch.setattr(BaseTuner, "_check_target_module_exists", check)
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    assert model.base_model.targeted_module_names == ["model.layers.0.self_attn.q_proj"]


def test_the_constructor_of_a_parameters_wrapper_is_called_as_those_who_replace_it_expect(monkeypatch):
    before, seen = ParamWrapper.__init__, []

    def make(self, base_layer, adapter_name, parameter_name, config, *args, **kwargs):
        seen.append(parameter_name)
        before(self, base_layer, adapter_name, parameter_name, config, *args, **kwargs)

    monkeypatch.setattr(ParamWrapper, "__init__", make)
    get_peft_model(llama(), LoraConfig(target_parameters=["0.mlp.up_proj.weight"]))
    assert seen == ["weight"]


# ---- what they need not replace here


@pytest.mark.parametrize("name", ["LoraConfig", "HRAConfig", "VeraConfig", "BOFTConfig"])
def test_a_linear_layer_inside_of_one_that_clips_gets_the_adapter(name, tmp_path):
    gemma4 = pytest.importorskip("transformers.models.gemma4.modeling_gemma4")

    def net():
        torch.manual_seed(0)
        clipped = gemma4.Gemma4ClippableLinear(SimpleNamespace(use_clipped_linears=True), 8, 8)
        clipped.input_max.fill_(0.5)
        return nn.ModuleDict({"q_proj": clipped})

    def run(model):
        return model.get_base_model()["q_proj"](x)

    x, settings = torch.randn(3, 8), {"r": 4} if name != "BOFTConfig" else {"boft_block_size": 4}
    config = getattr(peft, name)(target_modules=["q_proj", "linear"], **settings)
    model = get_peft_model(net(), config)
    assert model.base_model.targeted_module_names == ["q_proj.linear"]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(net(), tmp_path)), run(model))
    assert not torch.allclose(run(model), net()["q_proj"](x))


def test_what_goes_to_the_adapter_of_an_expert_is_dropped():
    import transformers

    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    config = transformers.MixtralConfig(**small, num_key_value_heads=2, num_local_experts=4)
    base = transformers.MixtralForCausalLM(config)
    if not any(name.endswith("experts.down_proj") for name, _ in base.named_parameters()):
        pytest.skip("experts are modules of their own here")
    settings = dict(target_parameters=["experts.down_proj"], init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(lora_dropout=0.5, **settings))
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        model.eval()
        whole = model(ids).logits
        assert torch.equal(model(ids).logits, whole)
        model.train()
        runs = torch.stack([model(ids).logits for _ in range(300)])
    assert not torch.allclose(runs[0], runs[1])
    assert (runs.mean(0) - whole).norm() < 0.2 * (runs[0] - whole).norm()


# ---- methods of old


def test_methods_of_old_do_what_they_did():
    model = get_peft_model(llama(), LoraConfig(init_lora_weights=False, use_dora=True))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 3, 32)
    assert layer._cast_input_dtype(x, torch.float64).dtype == torch.float64
    mixed = layer._mixed_batch_forward(x, adapter_names=["default", "__base__"])
    torch.testing.assert_close(mixed[1], layer.base_layer(x[1]))
    torch.testing.assert_close(mixed[0], layer(x[0]))
    with pytest.raises(ValueError, match="length 1"):
        layer._check_forward_args(x, adapter_names=["default"])
    layer._move_adapter_to_device_of_base_layer("default", torch.device("meta"))
    assert layer.lora_A["default"].weight.is_meta
    other = model.base_model.model.model.layers[1].self_attn.q_proj
    magnitude, lengths = other.lora_magnitude_vector["default"], other.lora_magnitude_vector["default"].weight.clone()
    a, b = other.lora_A["default"].weight, other.lora_B["default"].weight
    nn.init.zeros_(magnitude.weight)
    magnitude.update_layer(base_layer=other.base_layer, lora_A=a, lora_B=b, scaling=other.scaling["default"])
    torch.testing.assert_close(magnitude.weight, lengths)


def test_a_parameter_is_that_of_an_adapter_for_a_while():
    settings = dict(target_parameters=["0.mlp.up_proj.weight"], init_lora_weights=False)
    model = get_peft_model(llama(), LoraConfig(**settings))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    base, x = layer.get_base_layer(), torch.randn(3, 32)
    before, want = dict(base.named_parameters()), layer(x)
    with layer._activate_lora(["default"]):
        torch.testing.assert_close(base(x), want)
    assert dict(base.named_parameters()).keys() == before.keys() and base.weight is before["weight"]
    assert not torch.allclose(base(x), want)
