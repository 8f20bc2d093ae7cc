"""LoRA out of fine-tuned models, and LoRA files of other programs."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import peft
from peft import LoraConfig, PeftModel, extract_lora, get_peft_model
from peft.checkpoint.files import write_adapter
from peft.cli import main
from peft.lora_tools.formats import format_of, module_names, read_lora_file, write_lora_file
from tiny_models import fill_adapter, llama, saved_base, tokens


class Unet(nn.Module):
    """Modules with the kinds of names that pipelines have."""

    def __init__(self):
        super().__init__()
        self.down_blocks = nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(8, 12), "conv": nn.Conv2d(4, 6, 3)})])
        self.mid_block = nn.Linear(12, 8)

    def forward(self, x):
        return self.mid_block(self.down_blocks[0]["to_q"](x))


def unet() -> Unet:
    torch.manual_seed(0)
    return Unet().eval()


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def adapted(**settings) -> PeftModel:
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["to_q", "conv", "mid_block"], **settings})
    return fill_adapter(get_peft_model(unet(), config)).eval()


def from_file(path, folder, **options) -> PeftModel:
    config, tensors = read_lora_file(path, **options)
    write_adapter(folder, config.to_json_dict(), tensors)
    return PeftModel.from_pretrained(unet(), folder)


SETTINGS = [
    {},
    {"use_rslora": True, "rank_pattern": {"mid_block": 2}, "alpha_pattern": {"to_q": 3}},
    {"use_dora": True},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_a_file_of_another_program_holds_the_same_adapter(format, settings, tmp_path):
    model = adapted(**settings)
    path = tmp_path / "lora.safetensors"
    write_lora_file(path, model.peft_config["default"], peft.get_peft_model_state_dict(model), format, "unet")
    assert format_of(load_file(path)) == format
    names = [name for name, _ in unet().named_modules()]
    loaded = from_file(path, tmp_path / "adapter", names=names)
    torch.testing.assert_close(loaded(X), model(X))
    mine, theirs = peft.get_peft_model_state_dict(model), peft.get_peft_model_state_dict(loaded)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_the_names_in_kohya_s_files(tmp_path):
    model = adapted(target_modules=["to_q"])
    path = tmp_path / "lora.safetensors"
    write_lora_file(path, model.peft_config["default"], peft.get_peft_model_state_dict(model), "kohya", "unet")
    tensors = load_file(path)
    place = "lora_unet_down_blocks_0_to_q"
    assert {key: list(value.shape) for key, value in tensors.items()} == {
        f"{place}.lora_down.weight": [4, 8],
        f"{place}.lora_up.weight": [12, 4],
        f"{place}.alpha": [],
    }
    assert tensors[f"{place}.alpha"] == 6


def test_the_names_in_diffusers_files(tmp_path):
    model = adapted(target_modules=["to_q"])
    path = tmp_path / "lora.safetensors"
    state = peft.get_peft_model_state_dict(model)
    write_lora_file(path, model.peft_config["default"], state, "diffusers", "transformer")
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {f"transformer.down_blocks.0.to_q.lora_{factor}.weight" for factor in "AB"}
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    assert settings["transformer.r"] == 4 and settings["transformer.lora_alpha"] == 6


def test_older_files_of_diffusers_and_files_of_several_parts(tmp_path):
    a, b = torch.randn(2, 12), torch.randn(8, 2)
    old = {"unet.mid_block.lora.down.weight": a, "unet.mid_block.lora.up.weight": b}
    text = {f"text_encoder.layer.lora_{leaf}.weight": value.clone() for leaf, value in (("A", a), ("B", b))}
    path = tmp_path / "lora.safetensors"
    save_file({**old, **text}, path)
    with pytest.raises(ValueError, match="text_encoder, unet"):
        read_lora_file(path)
    with pytest.raises(ValueError, match="nothing for 'vae'"):
        read_lora_file(path, part="vae")
    loaded = from_file(path, tmp_path / "adapter", part="unet")
    torch.testing.assert_close(loaded.base_model.model.mid_block.get_delta_weight("default"), b @ a)


@pytest.mark.parametrize(
    "keys, message",
    [
        (["what.ever"], "neither"),
        (["lora_unet_nowhere.lora_down.weight", "lora_unet_nowhere.lora_up.weight"], "no module 'nowhere'"),
        (["lora_unet_mid_block.lora_down.weight"], r"no lora_B\.weight"),
        (["lora_unet_mid_block.lora_down.weight", "lora_unet_mid_block.lora_mid.weight"], "no part of a LoRA"),
        (["unet.mid_block.lora_A.weight", "unet.mid_block.hada_w1_a"], "no part of a LoRA"),
    ],
)
def test_files_that_cannot_be_read(keys, message, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file({key: torch.ones(2, 2) for key in keys}, path)
    with pytest.raises(ValueError, match=message):
        read_lora_file(path, names=["mid_block"])


def test_what_other_programs_have_no_place_for(tmp_path):
    path = tmp_path / "lora.safetensors"
    model = adapted(target_modules=["to_q"], modules_to_save=["mid_block"])
    for format in ("kohya", "diffusers"):
        with pytest.raises(ValueError, match="no place"):
            write_lora_file(path, model.peft_config["default"], peft.get_peft_model_state_dict(model), format)
    with pytest.raises(ValueError, match="hold LoRA"):
        write_lora_file(path, peft.IA3Config(), {}, "kohya")
    assert not path.exists()


def test_convert_on_the_command_line(tmp_path, capsys):
    model = adapted()
    model.save_pretrained(tmp_path / "adapter")
    save_file({name: value.contiguous() for name, value in unet().state_dict().items()}, tmp_path / "base.safetensors")
    assert module_names(tmp_path) == ["down_blocks.0.conv", "down_blocks.0.to_q", "mid_block"]
    file = tmp_path / "files" / "kohya.safetensors"
    assert main(["convert", str(tmp_path / "adapter"), "--to", "kohya", "--output", str(file)]) == 0
    back = tmp_path / "back"
    assert main(["convert", str(file), "--model", str(tmp_path), "--output", str(back)]) == 0
    torch.testing.assert_close(PeftModel.from_pretrained(unet(), back)(X), model(X))
    capsys.readouterr()
    assert main(["convert", str(file), "--output", str(tmp_path / "other")]) == 1
    assert "names of the base model's modules are needed" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


# ---- extraction


def test_a_merged_lora_is_extracted_whole():
    model = adapted()
    tuned = copy.deepcopy(model).merge_and_unload()
    config, tensors = found = extract_lora(unet(), tuned, 4, target_modules=["to_q", "conv", "mid_block"])
    assert max(found.errors.values()) < 1e-3
    extracted = get_peft_model(unet(), config)
    assert not peft.set_peft_model_state_dict(extracted, tensors).unexpected_keys
    torch.testing.assert_close(extracted.eval()(X), model(X), rtol=1e-3, atol=1e-4)


def test_a_share_of_the_change_gives_each_layer_a_rank():
    model = adapted(rank_pattern={"mid_block": 2, "conv": 1})
    tuned = model.merge_and_unload()
    config, _ = extract_lora(unet(), tuned, 0.9999, target_modules=["to_q", "conv", "mid_block"])
    assert config.rank_pattern == {"down_blocks.0.to_q": 4, "down_blocks.0.conv": 1, "mid_block": 2}


@pytest.mark.parametrize("rank", [3, 1.0])
def test_convolutions_with_groups_are_extracted_with_a_rank_that_suits_them(rank):
    def conv() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(6, 6, 1, groups=3))

    base, tuned, x = conv(), conv(), torch.randn(2, 6, 4, 4)
    with torch.no_grad():
        tuned[0].weight.view(3, 2, 2).add_(torch.randn(3, 2, 1) @ torch.randn(3, 1, 2))
    config, tensors = extract_lora(base, tuned, rank, target_modules=["0"])
    model = get_peft_model(conv(), config)
    peft.set_peft_model_state_dict(model, tensors)
    torch.testing.assert_close(model.eval()(x), tuned(x))
    with pytest.raises(ValueError, match="groups"):
        extract_lora(base, tuned, 4, target_modules=["0"])


def test_extraction_says_what_it_leaves_out_or_takes_it_whole():
    base, tuned = unet(), unet()
    with torch.no_grad():
        tuned.mid_block.weight.add_(1)
        tuned.mid_block.bias.add_(1)
    with pytest.warns(peft.PeftWarning, match=r"mid_block\.bias"):
        extract_lora(base, tuned, 1)
    config, tensors = extract_lora(base, tuned, 1, target_modules=["to_q"], modules_to_save=["mid_block"])
    model = get_peft_model(unet(), config)
    peft.set_peft_model_state_dict(model, tensors)
    torch.testing.assert_close(model.eval()(X), tuned(X))


def test_models_that_do_not_go_together():
    other = unet()
    other.mid_block = nn.Linear(12, 9)
    with pytest.raises(ValueError, match="mid_block"):
        extract_lora(unet(), other, 2)
    with pytest.raises(ValueError, match="larger than"):
        extract_lora(unet(), unet(), 20)
    with pytest.raises(ValueError, match="at least 1"):
        extract_lora(unet(), unet(), 0)


def test_extract_on_the_command_line(tmp_path, capsys):
    base = saved_base(llama(), tmp_path / "base")
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    tuned = fill_adapter(model).merge_and_unload().eval()
    tuned.save_pretrained(tmp_path / "tuned")
    arguments = [str(tmp_path / "base"), str(tmp_path / "tuned"), "--rank", "3", "--output", str(tmp_path / "lora")]
    assert main(["extract", *arguments, "--task-type", "CAUSAL_LM"]) == 0
    assert "Lost of the change" in capsys.readouterr().out
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora")
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens()).logits, tuned(tokens()).logits, rtol=1e-3, atol=1e-3)


# ---- LoftQ on a model that is quantised already


def test_loftq_weights_on_a_quantised_model(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    base = saved_base(llama(hidden_size=64, intermediate_size=128), tmp_path)

    def quantised() -> nn.Module:
        model = copy.deepcopy(base)
        for layer in model.model.layers:
            plain = layer.self_attn.q_proj
            packed = bnb.nn.Linear4bit(plain.in_features, plain.out_features, bias=False, quant_type="nf4")
            packed.weight = bnb.nn.Params4bit(plain.weight.data.clone(), requires_grad=False, quant_type="nf4")
            layer.self_attn.q_proj = packed.to("cpu")
        return model

    with torch.no_grad():
        expected = base(tokens()).logits
        model = get_peft_model(quantised(), LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"])).eval()
        before = (model(tokens()).logits - expected).norm()
        peft.replace_lora_weights_loftq(model, tmp_path)
        after = (model(tokens()).logits - expected).norm()
        assert after < before
        kept = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.clone()
        with torch.no_grad():
            model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.mul_(2)
        peft.replace_lora_weights_loftq(model, tmp_path, callback=lambda model, name: "layers.0" not in name)
        assert torch.equal(
            model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight, 2 * kept
        )
    with pytest.raises(ValueError, match="bitsandbytes"):
        peft.replace_lora_weights_loftq(get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])), tmp_path)
