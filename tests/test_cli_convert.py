"""`peft convert`: files of other programs there and back, the layouts of experts, and what cannot be told."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft import LoraConfig, PeftModel, get_peft_model
from peft.cli import main
from tiny_models import byte_tokenizer, fill_adapter, llama, mixtral, needs_transformers_5, qwen2, qwen3, tokens

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def words(*arguments: object) -> list[str]:
    return [str(argument) for argument in arguments]


def saved(folder: Path, base: torch.nn.Module, **settings) -> tuple[Path, PeftModel]:
    """A base model and a filled adapter for it on disk."""
    base.save_pretrained(folder / "base")
    base.config._name_or_path = base.name_or_path = str(folder / "base")
    torch.manual_seed(1)
    model = fill_adapter(get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))).eval()
    model.save_pretrained(folder / "adapter")
    return folder / "adapter", model


def outputs(base: torch.nn.Module, adapter: Path) -> torch.Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(base, adapter).eval()(tokens()).logits


SETTINGS = {
    "plain": dict(r=4, lora_alpha=6, target_modules=ALL),
    "rslora": dict(r=4, lora_alpha=6, target_modules=ALL, use_rslora=True),
    "patterns": dict(
        r=4, lora_alpha=6, target_modules=ALL, rank_pattern={"k_proj": 2}, alpha_pattern={"o_proj": 3, "k_proj": 5}
    ),
    "embedding": dict(r=4, lora_alpha=6, target_modules=["embed_tokens", "q_proj"]),
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("form", ["gguf", "mlx"])
def test_what_comes_back_is_what_went_out(tmp_path, form, settings):
    if form == "gguf":
        pytest.importorskip("gguf")
    adapter, model = saved(tmp_path, llama(tie_word_embeddings=False), **SETTINGS[settings])
    out = tmp_path / ("out.gguf" if form == "gguf" else "out")
    assert main(words("convert", adapter, "--to", form, "--output", out)) == 0
    assert main(words("convert", out, "--model", tmp_path / "base", "--output", tmp_path / "back")) == 0
    before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter, tmp_path / "back"))
    before = {name: tensor for name, tensor in before.items() if "base_layer" not in name}  # embeddings, saved along
    assert before.keys() == after.keys()
    if settings in ("plain", "embedding"):
        assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        expected = model(tokens()).logits
    base = type(model.get_base_model()).from_pretrained(tmp_path / "base")
    torch.testing.assert_close(outputs(base, tmp_path / "back"), expected)


def test_rows_of_query_and_key_are_in_the_order_that_llama_cpp_reads(tmp_path):
    """As transformers' own reader of GGUF turns them back, with keys shared by heads."""
    gguf = pytest.importorskip("gguf")
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    adapter, model = saved(tmp_path, llama(), **SETTINGS["plain"])
    assert main(words("convert", adapter, "--to", "gguf", "--output", tmp_path / "out.gguf")) == 0
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert reader.fields["general.architecture"].contents() == "llama"
    assert reader.fields["adapter.lora.alpha"].contents() == 6
    turn = LlamaTensorProcessor(model.config.to_dict())
    found = {entry.name: entry.data for entry in reader.tensors}
    layer = model.base_model.model.model.layers[1]
    places = {"attn_q": layer.self_attn.q_proj, "attn_k": layer.self_attn.k_proj, "ffn_up": layer.mlp.up_proj}
    for name, own in places.items():
        assert torch.equal(torch.tensor(found[f"blk.1.{name}.weight.lora_a"]), own.lora_A["default"].weight)
        rows = found[f"blk.1.{name}.weight.lora_b"]
        turned = turn.process(rows, f"blk.1.{name}.weight").weights
        assert torch.equal(torch.tensor(turned), own.lora_B["default"].weight)
        assert (turned == rows).all() == (name == "ffn_up")


MIXTURES = {"mixtral": mixtral, "qwen2": qwen2, "qwen3": qwen3}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_go_from_one_layout_to_the_other_and_back(tmp_path, kind, rslora):
    pytest.importorskip("transformers.core_model_loading")
    make = MIXTURES[kind]
    adapter, model = saved(
        tmp_path, make(), r=2, lora_alpha=6, use_rslora=rslora, target_modules=["v_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )  # fmt: skip
    with torch.no_grad():
        expected = model(tokens()).logits
    layouts = [adapter]
    for to in ("per-expert", "fused", "per-expert"):
        layouts.append(tmp_path / str(len(layouts)))
        assert main(words("convert", layouts[-2], "--to", to, "--output", layouts[-1])) == 0
        torch.testing.assert_close(outputs(make(), layouts[-1]), expected)
    single, again = (load_file(layouts[number] / "adapter_model.safetensors") for number in (1, 3))
    assert any(".experts.0." in name for name in single)
    assert single.keys() == again.keys() and all(torch.equal(single[name], again[name]) for name in single)


A = torch.ones(2, 4)
#: name -> tensors of a file, what is said about it
UNCLEAR = {
    "two programs": (
        {"lora_unet_x.lora_down.weight": A, "unet.x.lora_A.weight": A},
        "is no part of a LoRA of kohya, as 1 of 2 names",
    ),
    "no program": ({"x.weight": A}, "no name is of a layout that is known here, as 'x.weight'"),
    "ours": ({"base_model.model.x.lora_A.weight": A}, "a saved adapter, whose folder with adapter_config.json"),
    "mlx": ({"model.layers.0.x.lora_a": A}, "mlx-lm, whose folder is to be named"),
    "two parts": ({f"{part}.x.lora_{s}.weight": A for part in ("unet", "te") for s in "AB"}, "say which"),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_a_layout_that_is_not_clear_is_named_and_nothing_is_written(tmp_path, capsys, name):
    tensors, message = UNCLEAR[name]
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / "file.safetensors")
    assert main(words("convert", tmp_path / "file.safetensors", "--output", tmp_path / "out")) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


#: what an adapter has -> form, the word for it in the error
REFUSED = [
    (dict(target_modules=["q_proj"], use_dora=True), "gguf", "DoRA"),
    (dict(target_modules=["q_proj"], lora_bias=True), "mlx", "a bias of B"),
    (dict(target_modules=["q_proj"], modules_to_save=["lm_head"]), "gguf", "modules trained in full"),
    (dict(target_modules=["q_proj"]), "fused", "has no experts"),
    (dict(target_modules=["q_proj"], init_lora_weights="pissa"), "gguf", "has changed the base weights"),
]


@pytest.mark.parametrize(("settings", "form", "message"), REFUSED)
def test_what_a_form_has_no_place_for_is_refused(tmp_path, capsys, settings, form, message):
    adapter, _ = saved(tmp_path, llama(), r=2, **settings)
    out = tmp_path / ("out.gguf" if form == "gguf" else "out")
    assert main(words("convert", adapter, "--to", form, "--output", out)) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("form", ["gguf", "mlx"])
def test_a_base_model_of_other_shapes_is_refused(tmp_path, capsys, form):
    adapter, _ = saved(tmp_path, llama(), r=2, target_modules=["q_proj", "down_proj"])
    llama(intermediate_size=64).save_pretrained(tmp_path / "other")
    out = tmp_path / ("out.gguf" if form == "gguf" else "out")
    assert main(words("convert", adapter, "--to", form, "--model", tmp_path / "other", "--output", out)) == 1
    said = capsys.readouterr().err
    assert "down_proj" in said and "q_proj" not in said
    assert not out.exists()


def test_an_mlx_folder_has_the_settings_that_mlx_needs(tmp_path):
    adapter, model = saved(tmp_path, llama(), r=4, lora_alpha=6, target_modules=["q_proj"], layers_to_transform=[1])
    assert main(words("convert", adapter, "--to", "mlx", "--output", tmp_path / "out")) == 0
    content = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert content["num_layers"] == 1 and content["fine_tune_type"] == "lora"
    assert content["lora_parameters"] == {"rank": 4, "scale": 1.5, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    tensors = load_file(tmp_path / "out" / "adapters.safetensors")
    own = model.base_model.model.model.layers[1].self_attn.q_proj
    assert torch.equal(tensors["model.layers.1.self_attn.q_proj.lora_a"], own.lora_A["default"].weight.T)


@pytest.mark.parametrize(
    ("settings", "line", "rank"),
    [
        (dict(r=8, rank_pattern={"v_proj": 2}), ("--rank", 4), 4),
        (dict(r=8, rank_pattern={"v_proj": 2}), ("--energy", 1.0), None),
        (dict(r=8, use_dora=True), ("--rank", 16), 16),
        (dict(r=8, use_rslora=True, layers_to_transform=[0]), ("--energy", 0.6), None),
    ],
)
def test_resize_keeps_what_the_rank_has_room_for(tmp_path, capsys, settings, line, rank):
    base = llama()
    adapter, model = saved(tmp_path, base, target_modules=["q_proj", "v_proj"], **settings)
    assert main(words("resize", adapter, *line, "--output", tmp_path / "out")) == 0
    assert "Lost of the change: " in capsys.readouterr().out
    config, before = LoraConfig.from_pretrained(tmp_path / "out"), base.from_pretrained(tmp_path / "base")
    after = PeftModel.from_pretrained(before, tmp_path / "out").base_model.model
    for layer, own in zip(after.model.layers, model.base_model.model.model.layers, strict=True):
        for name in ("q_proj", "v_proj"):
            there = getattr(own.self_attn, name)
            if not hasattr(there, "get_delta_weight"):
                continue
            found = getattr(layer.self_attn, name).get_delta_weight("default")
            made = there.get_base_layer().weight
            changed = type(there).__name__ and _merged_weight(there) - made
            largest = torch.linalg.svdvals(changed)
            kept = 32 if rank is None else rank
            lost = (found - changed).square().sum()
            if rank is not None:
                torch.testing.assert_close(lost, largest[kept:].square().sum(), atol=1e-4, rtol=1e-3)
            else:
                assert lost <= (1 - line[1]) * largest.square().sum() + 1e-4
    assert rank is None or config.r == rank


def _merged_weight(layer) -> torch.Tensor:
    layer.merge()
    weight = layer.get_base_layer().weight.detach().clone()
    layer.unmerge()
    return weight


#: kind of model, settings of the adapter
SHARDS = [
    (llama, dict(modules_to_save=["lm_head"])), (llama, dict(use_dora=True)), (llama, {}),
    (partial(llama, tie_word_embeddings=True), dict(target_modules=["q_proj", "lm_head"])),
    (mixtral, dict(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])),
]  # fmt: skip


@needs_transformers_5("does not save what lies on a disk")
@pytest.mark.parametrize(("make", "settings"), SHARDS, ids=["saved", "dora", "plain", "tied", "experts"])
def test_a_merge_by_shard_is_the_merge_in_memory(tmp_path, make, settings):
    adapter, model = saved(tmp_path, make(), r=4, **{"target_modules": ["q_proj", "down_proj"], **settings})
    base = model.get_base_model().from_pretrained(tmp_path / "base")
    base.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    (tmp_path / "base" / "model.safetensors").unlink(missing_ok=True)
    byte_tokenizer().save_pretrained(tmp_path / "base")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 3
    adapters = [adapter] if settings else [adapter, adapter, "--weights", 0.5, 2]
    for place in ("memory", "shards"):
        more = ["--by-shard"] if place == "shards" else []
        assert main(words("merge", *adapters, "--output", tmp_path / place, *more)) == 0
    one, other = (base.from_pretrained(tmp_path / place).state_dict() for place in ("memory", "shards"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], tensor) for name, tensor in base.state_dict().items())
    configs = [json.loads((tmp_path / place / "config.json").read_text()) for place in ("memory", "shards")]
    assert configs[0] == configs[1]
