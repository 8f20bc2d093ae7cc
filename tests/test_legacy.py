"""What other packages take of this one under names of old: that it is there, and that it does what it did."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from peft.utils import other, transpose
from torch import nn

import peft
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from peft.errors import PeftWarning
from peft.tuners import tuners_utils
from tiny_models import llama

sys.path.insert(0, str(Path(__file__).parent / "tools"))
import scan_packages

NAMES = json.loads(scan_packages.DATA.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_what_published_packages_use_is_here_or_left_out_on_purpose(name):
    if name.endswith("get_model_conversion_mapping") and transformers.__version__ < "5":
        pytest.skip("transformers has no such table yet")
    assert scan_packages.is_here(name) or scan_packages.left_out(name)


def test_a_name_that_is_nowhere_is_noticed():
    assert not scan_packages.is_here("peft.tuners.lora.layer.nothing")
    assert not scan_packages.is_here("peft.nothing.LoraLayer")
    assert scan_packages.left_out("peft.BoneConfigs") is None


def test_the_scan_sees_imports_attributes_strings_and_guards():
    source = """
import peft.tuners.lora.bnb as bnb
def f():
    from peft import LoraModel as M, LoraConfig
    M._create_and_replace = M._create_new_module
    bnb.Linear4bit
    try:
        from peft.utils import transpose
    except ImportError:
        pass
    try:
        from peft.utils import prune
    except ValueError:
        from peft.utils import ties
    return find_spec("peft.tuners.lora.layer"), "peft is a library"
"""
    assert scan_packages.uses_in(source) == {
        *(("peft.tuners.lora.bnb", False), ("peft.tuners.lora.bnb.Linear4bit", False)),
        *(("peft.LoraModel", False), ("peft.LoraConfig", False), ("peft.LoraModel._create_new_module", False)),
        *(("peft.utils.transpose", True), ("peft.utils.prune", False), ("peft.utils.ties", False)),
        ("peft.tuners.lora.layer", False),
    }


# ---- what they do


@pytest.fixture
def layer():
    model = get_peft_model(llama(), LoraConfig(init_lora_weights=False))
    model.add_adapter("b", LoraConfig(init_lora_weights=False))
    return model.base_model.model.model.layers[0].self_attn.q_proj


def test_adapters_to_merge(layer):
    check = tuners_utils.check_adapters_to_merge
    assert check(layer) == ["default"]
    assert check(layer, ["b", "default"]) == ["b", "default"]
    assert check(layer, "b") == ["b"]
    layer.merge()
    with pytest.warns(PeftWarning, match="default is merged already"):
        assert check(layer) == []
    with pytest.warns(PeftWarning):
        assert check(layer, ["b", "default"]) == ["b"]


def test_all_linear_is_resolved_without_the_head():
    resolve = tuners_utils._maybe_include_all_linear_layers
    model = llama("LlamaForSequenceClassification")
    config = LoraConfig(target_modules="All-Linear", task_type="SEQ_CLS")
    found = resolve(config, model)
    assert found is config
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name in names if name.rpartition(".")[2] in found.target_modules} == names - {"score"}
    assert "lm_head" not in resolve(LoraConfig(target_modules="all-linear"), llama()).target_modules
    for other_config in (LoraConfig(target_modules=["q_proj"]), PromptTuningConfig(num_virtual_tokens=2)):
        before = other_config.to_dict()
        assert resolve(other_config, model).to_dict() == before


def test_an_excluded_module_is_no_match():
    found = tuners_utils.check_target_module_exists(LoraConfig(target_modules=["q"], exclude_modules=["q"]), "a.q")
    assert not found and not tuners_utils._ExcludedModule()


def test_transposing():
    weight = nn.Parameter(torch.randn(2, 3))
    assert transpose(weight, False) is weight
    assert isinstance(transpose(weight, True), nn.Parameter)
    assert torch.equal(transpose(weight.data, True), weight.data.T)


def test_offloaded_layers_are_there_for_a_while(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    weight = model.base_model.model[0].base_layer.weight.detach().clone()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    layer = model.base_model.model[0]
    assert layer.base_layer.weight.is_meta
    with tuners_utils.onload_layer(layer):
        assert torch.equal(layer.base_layer.weight, weight)
        assert not layer.lora_A["default"].weight.is_meta
    assert layer.base_layer.weight.is_meta and layer.lora_A["default"].weight.is_meta


def test_a_name_that_is_replaced_where_it_once_was_is_that_of_all_its_paths_until_the_replacement_goes():
    before = transpose
    for replaced in (pytest.MonkeyPatch.context, lambda: mock.patch("peft.utils.other.transpose", len)):
        with replaced() as patch:
            if isinstance(patch, pytest.MonkeyPatch):
                patch.setattr("peft.utils.other.transpose", len)
            assert peft.utils.transpose is peft.tuners.tuners_utils.transpose is len
            with mock.patch("peft.utils.transpose", max):
                assert other.transpose is max
            assert other.transpose is len
        assert peft.utils.transpose is other.transpose is before
    with pytest.raises(AttributeError):
        del other.transpose


@pytest.mark.parametrize("path", ["peft.utils", "peft.mapping", "peft.tuners.tuners_utils"])
def test_all_names_of_an_old_path_can_be_imported_at_once(path):
    names: dict[str, object] = {}
    exec(f"from {path} import *", names)
    assert {"peft.utils": "PeftType", "peft.mapping": "get_peft_model"}.get(path, "BaseTunerLayer") in names


def test_a_name_of_nothing_here_can_be_put_on_an_old_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peft.tuners.oft.layer.of_somebody", 1, raising=False)
        patch.setattr("peft.utils.other.of_somebody", 2, raising=False)
        assert (peft.tuners.oft.layer.of_somebody, other.of_somebody) == (1, 2)
    assert not hasattr(peft.tuners.oft.layer, "of_somebody") and not hasattr(other, "of_somebody")


def test_buffers_by_name_are_a_dictionary():
    one, two = torch.ones(2), torch.zeros(2)
    held = peft.tuners.lora.layer.BufferDict({"one": one})
    held.update({"two": two}), held.update([("three", two)])
    assert list(held.keys()) == list(held) == ["one", "two", "three"]
    assert held.pop("three") is held.get("two") is dict(held.items())["two"] is two and held.get("three") is None
    assert not held.state_dict() and {name for name, _ in held.named_buffers()} == {"one", "two"}
    held.clear()
    assert not list(held.values())
