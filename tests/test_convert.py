"""Adapters of every method turned into LoRA."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from torch import Tensor, nn

import peft
import tiny_models
from peft import LoraConfig, PeftModel, PeftWarning, convert_to_lora, get_peft_model, save_as_lora
from peft.core.merge import difference
from test_conformance import BATCH, BESIDE, MERGEABLE, SUPPORTED, UNMERGEABLE, adapted, build, inputs_of, randomise

over = pytest.mark.parametrize
CONVERTIBLE = [case for case in MERGEABLE if case[1] != "LayerNorm"]


@over("method, kind", CONVERTIBLE)
def test_a_lora_that_keeps_all_energy_is_the_adapter(method, kind, tmp_path):
    model = adapted(method, kind)
    assert model.base_model.supports_lora_conversion()
    save_as_lora(tmp_path, model, 1.0)
    lora = PeftModel.from_pretrained(build(kind), tmp_path).eval()
    x = inputs_of(model)
    torch.testing.assert_close(lora(x), model(x), rtol=1e-3, atol=1e-4)


@over("method", sorted({method for method, kind in CONVERTIBLE if kind == "Linear no bias"}))
def test_no_lora_of_the_rank_comes_nearer(method):
    model = adapted(method, "Linear no bias")
    change = model.base_model.model.target.get_delta_weight("default").detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)
        (_, tensors), errors = (converted := convert_to_lora(model, 2)), converted.errors
    a, b = (tensors[f"base_model.model.target.lora_{factor}.weight"] for factor in "AB")
    assert a.shape == (2, 8) and b.shape == (12, 2) and not a.requires_grad
    lost = torch.linalg.svdvals(change)[2:].norm()
    assert (change - b @ a).norm().item() == pytest.approx(lost.item(), rel=1e-3, abs=1e-5)
    assert errors == {"target": pytest.approx((lost / change.norm()).item(), rel=1e-3, abs=1e-5)}


def test_models_without_adapter_layers_are_refused():
    with pytest.raises(TypeError, match="conversion"):
        convert_to_lora(build("Linear"), 4)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(TypeError, match="conversion"):
        convert_to_lora(get_peft_model(tiny_models.llama(), config), 4)


def test_a_model_without_a_record_of_its_adapters_is_converted_by_its_layers():
    model = adapted("LOKR", "Linear")
    expected = convert_to_lora(model, 1.0)
    base = model.get_base_model()
    del base.peft_config
    config, tensors = convert_to_lora(base, 1.0)
    assert config.to_dict() == expected[0].to_dict()
    assert {f"base_model.model.{key}" for key in tensors} == set(expected[1])
    with pytest.raises(KeyError, match="default"):
        convert_to_lora(base, 2, adapter_name="other")


@over("method, kind", [case for case in SUPPORTED if case[1] == "LayerNorm"])
def test_norms_are_refused(method, kind):
    model = adapted(method, kind)
    assert not model.base_model.supports_lora_conversion()
    with pytest.raises(TypeError, match="LayerNorm"):
        convert_to_lora(model, 1)


@over("method, kind", [case for case in SUPPORTED if case[0] in BESIDE or (case in UNMERGEABLE and case[0] != "BEFT")])
def test_what_is_no_change_of_a_weight_is_refused(method, kind):
    with pytest.raises(TypeError, match="does not support conversion"):
        convert_to_lora(adapted(method, kind), 1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.down(torch.relu(self.up(self.embed(tokens)))))


TOKENS = torch.arange(BATCH * 3).view(BATCH, 3)


def net(config, **kwargs) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(Net(), config, **kwargs)
    randomise(model, kwargs.get("adapter_name", "default"))
    return model.eval()


def reloaded(folder) -> PeftModel:
    torch.manual_seed(0)
    return PeftModel.from_pretrained(Net(), folder).eval()


def test_a_threshold_gives_each_layer_the_rank_that_it_needs(tmp_path):
    model = net(LoraConfig(r=6, target_modules=["up", "down"], rank_pattern={"down": 2}))
    config, _ = convert_to_lora(model, 0.9999)
    assert config.rank_pattern == config.alpha_pattern == {"up": 6, "down": 2}
    with pytest.warns(PeftWarning, match="misses more"):
        smaller = convert_to_lora(model, 0.5)
    assert smaller[0].rank_pattern["up"] < 6 and smaller.errors["up"] <= 0.5**0.5
    save_as_lora(tmp_path, model, 0.9999)
    torch.testing.assert_close(reloaded(tmp_path)(TOKENS), model(TOKENS), rtol=1e-2, atol=1e-2)


def test_rounding_adds_no_ranks():
    """A product of two matrices of rank 2, entry by entry, has rank 4; its other singular values are nearly zero."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(24, 32)), peft.LoHaConfig(target_modules=["0"], r=2))
    randomise(model, "default")
    config, _ = convert_to_lora(model, 1.0)
    assert config.rank_pattern == {"0": 4}


def test_what_is_lost_is_said():
    model = net(LoraConfig(r=6, target_modules=["up", "down"]))
    with pytest.warns(PeftWarning, match=r"2 of 2 modules .*up "):
        errors = convert_to_lora(model, 1).errors
    assert set(errors) == {"up", "down"} and min(errors.values()) > 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert max(convert_to_lora(model, 6).errors.values()) < 1e-5


def test_a_lora_gets_another_rank_without_the_weight_being_decomposed(monkeypatch):
    """What takes seconds a layer in a large model takes milliseconds from the factors."""
    sizes = []
    plain = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda m, **kwargs: (sizes.append(m.shape[-2:]), plain(m, **kwargs))[1])
    model = net(LoraConfig(r=3, target_modules=["up", "down"]))
    assert max(convert_to_lora(model, 3).errors.values()) < 1e-5
    _, tensors = convert_to_lora(model, 5)  # more than there is: the rest is zero
    assert tensors["base_model.model.up.lora_A.weight"].shape == (5, 8)
    assert set(sizes) == {(3, 3)}


def test_a_change_of_nothing_becomes_a_lora_of_nothing():
    torch.manual_seed(0)
    model = get_peft_model(Net(), LoraConfig(target_modules=["up"]))
    converted = convert_to_lora(model, 0.5)
    assert converted[0].rank_pattern == {"up": 1} and converted.errors == {"up": 0}


def test_other_things_that_the_adapter_trains_are_taken_along(tmp_path):
    config = peft.HRAConfig(r=2, target_modules=["up"], modules_to_save=["head"])
    model = net(config)
    nn.init.normal_(model.base_model.model.head.modules_to_save["default"].weight)
    save_as_lora(tmp_path, model, 2)
    torch.testing.assert_close(reloaded(tmp_path)(TOKENS), model(TOKENS), rtol=1e-3, atol=1e-4)


@over("bias", ["all", "hra_only"])
def test_trained_biases_are_taken_along(bias, tmp_path):
    """huggingface/peft refuses adapters with a bias."""
    model = net(peft.HRAConfig(r=2, target_modules=["up"], bias=bias))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and parameter.requires_grad:
            nn.init.normal_(parameter)
    config, _ = convert_to_lora(model, 2)
    assert config.bias == ("all" if bias == "all" else "lora_only")
    save_as_lora(tmp_path, model, 2)
    torch.testing.assert_close(reloaded(tmp_path)(TOKENS), model(TOKENS), rtol=1e-3, atol=1e-4)


def test_changed_biases_become_those_of_the_lora(tmp_path):
    model = net(peft.IA3Config(target_modules=["up", "down"], feedforward_modules=["down"]))
    config, tensors = convert_to_lora(model, 1.0)
    assert config.lora_bias
    assert not tensors["base_model.model.down.lora_B.bias"].any()  # its input is scaled, which leaves the bias alone
    save_as_lora(tmp_path, model, 1.0)
    torch.testing.assert_close(reloaded(tmp_path)(TOKENS), model(TOKENS), rtol=1e-3, atol=1e-4)


def test_only_tensors_of_a_lora_come_out_on_layers_without_bias():
    model = adapted("GLORA", "Linear no bias")
    _, tensors = convert_to_lora(model, rank=8)
    assert all("lora_" in name for name in tensors)
    assert not adapted("BEFT", "Linear no bias").supports_lora_conversion()


def test_changed_biases_beside_an_embedding_are_refused():
    model = net(peft.IA3Config(target_modules=["up", "embed"], feedforward_modules=[]))
    with pytest.raises(ValueError, match=r"lora_bias=True.*'embed'"):
        convert_to_lora(model, 1.0)


def test_half_precision_base_loses_nothing_of_the_change():
    """Read off the bfloat16 weight, a small change would drown in its rounding."""
    torch.manual_seed(0)
    model = get_peft_model(Net().bfloat16(), peft.VeraConfig(r=4, target_modules=["up"]))
    nn.init.normal_(model.base_model.model.up.vera_lambda_b["default"], std=1e-3)
    _, tensors = converted = convert_to_lora(model, 4)
    assert converted.errors["up"] < 1e-5
    a, b = (tensors[f"base_model.model.up.lora_{factor}.weight"] for factor in "AB")
    assert a.dtype == torch.float32
    torch.testing.assert_close(b @ a, difference(model.base_model.model.up, "default"), atol=1e-7, rtol=1e-4)


def test_the_task_and_the_base_model_are_kept(tmp_path):
    """huggingface/peft forgets them."""
    config = peft.HRAConfig(r=2, target_modules=["up"], base_model_name_or_path="some/model")
    save_as_lora(tmp_path, net(config), 2)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == "some/model" and content["peft_type"] == "LORA"
    assert content["r"] == content["lora_alpha"] == 2


def test_one_adapter_of_several_methods(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(Net(), peft.HRAConfig(r=2, target_modules=["up"]), adapter_name="a", mixed=True)
    model.add_adapter("b", peft.VeraConfig(r=4, target_modules=["up", "down"]))
    for name in "ab":
        randomise(model, name)
        save_as_lora(tmp_path / name, model, 1.0, adapter_name=name)
        model.set_adapter(name)
        torch.testing.assert_close(reloaded(tmp_path / name)(TOKENS), model.eval()(TOKENS), rtol=1e-3, atol=1e-4)


def test_an_adapter_inside_of_others_becomes_a_lora_and_no_more():
    kinds = {"a": peft.LoHaConfig(r=2, target_modules=["up"]), "b": LoraConfig(r=2, target_modules=["up"])}
    model = get_peft_model(Net(), kinds["a"], "a", mixed=True)
    model.add_adapter("b", kinds["b"])
    model.add_adapter("c", peft.HRAConfig(r=2, target_modules=["up"]))
    for name in kinds:
        randomise(model, name)
        model.set_adapter(name)
        _, tensors = convert_to_lora(model, 4, adapter_name=name)
        assert sorted(tensors) == [f"base_model.model.up.lora_{factor}.weight" for factor in "AB"]
        layer = next(part for part in model.base_model.adapter_layers() if part.has(name))
        a, b = (tensors[key] for key in sorted(tensors))
        torch.testing.assert_close(b @ a, difference(layer, name), rtol=1e-3, atol=1e-4)


def test_injected_adapters_are_named_as_injected():
    torch.manual_seed(0)
    model = peft.inject_adapter_in_model(peft.HRAConfig(r=2, target_modules=["up"]), Net())
    config, tensors = convert_to_lora(model, 2)
    assert sorted(tensors) == ["up.lora_A.weight", "up.lora_B.weight"] and config.target_modules == {"up"}


def test_compiled_decomposition_and_progress_bar(capsys):
    model = net(LoraConfig(r=6, target_modules=["up", "down"]))
    expected = convert_to_lora(model, 6)
    compiled = convert_to_lora(model, 6, progressbar=True, compile_kwargs={"backend": "eager"})
    assert "Converting" in capsys.readouterr().err
    for key, tensor in expected[1].items():
        torch.testing.assert_close(compiled[1][key], tensor)


FAULTS = [
    (0, ValueError, "at least 1"),
    (-1, ValueError, "at least 1"),
    (100, ValueError, "larger"),
    (0.0, ValueError, "above 0"),
    (1.5, ValueError, "above 0"),
    (True, TypeError, "rank"),
    ("4", TypeError, "rank"),
]


@over("rank, error, words", FAULTS)
def test_ranks_that_make_no_sense(rank, error, words, tmp_path):
    model = net(LoraConfig(target_modules=["up"]))
    with pytest.raises(error, match=words):
        save_as_lora(tmp_path / "new", model, rank)
    assert not (tmp_path / "new").exists()


def test_unknown_adapters_and_merged_ones():
    model = net(LoraConfig(target_modules=["up"]))
    with pytest.raises(KeyError, match="zzz"):
        convert_to_lora(model, 4, adapter_name="zzz")
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        convert_to_lora(model, 4)
