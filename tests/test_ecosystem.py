"""What transformers, accelerate, diffusers, trl, sentence-transformers and lm_eval ask of this package.

`data/ecosystem.json` lists what their wheels import, call and read; names of methods that are not there yet are skipped
until they are.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pickle
import pkgutil
import subprocess
import sys
from importlib.machinery import PathFinder
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import pytest
import torch
from packaging.version import Version

import peft
from peft import LoraConfig, compat, get_peft_model
from peft.core.layer import AdapterLayer
from peft.registry import METHODS
from tiny_models import llama, tokens

LISTS = json.loads((Path(__file__).parent / "data" / "ecosystem.json").read_text(encoding="utf-8"))


def there(name: str) -> bool:
    return LISTS["needs"].get(name, "LORA") in METHODS


def resolve(path: str) -> object:
    """`package.module.attribute`, or `package.module.Class.attribute`."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        return getattr(resolve(module), name)


# ---- names and signatures

IMPORTS = [
    pytest.param(module, name, id=f"{module}:{name}", marks=[] if there(name) else pytest.mark.skip("not there yet"))
    for module, names in LISTS["imports"].items()
    for name in names
]


@pytest.mark.parametrize(("module", "name"), IMPORTS)
def test_what_they_import_is_there(module, name):
    namespace: dict[str, object] = {}
    exec(f"from {module} import {name}", namespace)
    assert namespace[name] is not None


@pytest.mark.parametrize(("function", "keywords"), LISTS["keywords"].items())
def test_what_they_call_takes_their_keywords(function, keywords):
    parameters = inspect.signature(resolve(function)).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    assert open_ended or set(keywords) <= set(parameters)


def test_an_adapter_loads_with_all_the_keywords_they_pass(tmp_path):
    get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "outer" / "inner")
    keywords = dict(subfolder="inner", revision=None, token=None, local_files_only=True)
    other = dict(trust_remote_code=False, torch_dtype=torch.float32)
    config = peft.PeftConfig.from_pretrained(tmp_path / "outer", **keywords, trust_remote_code=False)
    assert config.peft_type == peft.PeftType.LORA
    model = peft.PeftModel.from_pretrained(llama(), tmp_path / "outer", is_trainable=True, **keywords, **other)
    assert model.active_peft_config.inference_mode is False


@pytest.fixture(scope="module")
def objects():
    """One object of each kind whose attributes they read."""
    config = LoraConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"], trainable_token_indices=[1, 2])
    model = get_peft_model(llama(), config)
    parameter = LoraConfig(target_modules=[], target_parameters=["mlp.gate_proj.weight"])
    plain = get_peft_model(llama("LlamaModel"), parameter)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    return {
        "PeftModel": get_peft_model(llama(), LoraConfig()),
        "PeftModelFor*": model,
        "PeftMixedModel": get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM"), mixed=True),
        "PeftConfig": config,
        "LoraConfig": config,
        "BaseTuner": model.base_model,
        "LoraModel": model.base_model,
        "BaseTunerLayer": layer,
        "LoraLayer": layer,
        "lora.Linear": layer,
        "ParamWrapper": plain.base_model.model.layers[0].mlp.gate_proj,
        "AuxiliaryTrainingWrapper": model.base_model.model.lm_head,
        "ModulesToSaveWrapper": model.base_model.model.lm_head,
        "TrainableTokensWrapper": model.base_model.model.model.embed_tokens,
    }


@pytest.mark.parametrize("kind", LISTS["attributes"])
def test_objects_have_the_attributes_they_read(objects, kind):
    missing = [name for name in LISTS["attributes"][kind] if not hasattr(objects[kind], name)]
    assert not missing


def test_the_version_is_one_they_accept():
    # transformers wants 0.20, and 0.21 for tensor parallelism; diffusers 0.17; trl 0.13; unsloth_zoo reads two integers
    assert version("peft") == peft.__version__
    assert Version("0.21.2") <= Version(peft.__version__) < Version("1")
    major, minor = peft.__version__.split(".")[:2]
    assert (int(major), int(minor)) >= (0, 19)


def test_a_merged_weight_is_read_under_the_name_of_the_base_weight():
    # trl and ms-swift send the weights to an inference engine so.
    model = get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    want = {name: value.clone() for name, value in llama().named_parameters()}
    ids = tokens()
    with torch.no_grad():
        logits = model(ids).logits
        model.merge_adapter()
        merged = {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): value.clone()
            for name, value in model.named_parameters()
            if model.prefix not in name and "original_module" not in name
        }
        model.unmerge_adapter()
    engine = llama()
    engine.load_state_dict(merged)
    assert merged.keys() == want.keys()
    torch.testing.assert_close(engine(ids).logits, logits)
    assert all(torch.equal(value, want[name]) for name, value in base_parameters(model).items())


def base_parameters(model):
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value
        for name, value in model.named_parameters()
        if model.prefix not in name
    }


# ---- old import paths


@pytest.mark.parametrize("path", compat.OLD_PATHS)
def test_every_row_of_the_table_resolves(path):
    module = importlib.import_module(path)
    for name, home in compat.OLD_PATHS[path].items():
        place, _, attribute = home.partition(":")
        attribute, _, key = attribute.partition("[")
        find = pytest.importorskip if place.startswith("transformers.") else importlib.import_module
        found = getattr(find(place), attribute)
        value = getattr(module, name)
        assert value is (found[key.removesuffix("]")] if key else found)
    assert set(compat.OLD_PATHS[path]) <= set(dir(module))


@pytest.mark.parametrize("path", compat.OLD_PATHS)
def test_no_row_hides_a_file(path):
    parent, _, _ = path.rpartition(".")
    assert PathFinder.find_spec(path, importlib.import_module(parent).__path__) is None


@pytest.mark.parametrize("path", compat.METHOD_PATHS)
def test_one_file_methods_answer_under_the_paths_of_a_folder(path):
    method = compat.METHOD_PATHS[path]
    name = next(row.config_name for row in METHODS.values() if row.module == method)
    module = importlib.import_module(path)
    assert getattr(module, name) is getattr(importlib.import_module(method), name)
    assert name in dir(module)
    # It is still an ordinary file, with source text and no other modules.
    assert inspect.getsource(getattr(importlib.import_module(method), name)).startswith("@dataclass")
    assert list(pkgutil.iter_modules(getattr(importlib.import_module(method), "__path__", ()))) == []


def test_all_ways_to_import_an_old_path():
    code = """
import peft.utils.other as other
import peft.tuners.hra.layer as layer
import peft.tuners.tuners_utils
from peft.utils import save_and_load, ModulesToSaveWrapper
from peft.utils.save_and_load import get_peft_model_state_dict
from peft.utils import *
assert other.ModulesToSaveWrapper is ModulesToSaveWrapper
assert peft.tuners.tuners_utils.BaseTunerLayer is peft.core.layer.AdapterLayer
assert get_peft_model_state_dict is peft.get_peft_model_state_dict is save_and_load.get_peft_model_state_dict
assert layer.HRALayer.__module__ == "peft.tuners.hra"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_an_old_path_loads_nothing_before_a_name_is_asked_for():
    code = "import peft.utils.other, peft.peft_model, sys; print([name for name in sys.modules if name == 'torch'])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


def test_what_an_old_path_does_not_have_is_said_the_usual_way():
    with pytest.raises(ImportError, match=r"cannot import name 'nothing' from 'peft\.utils'"):
        from peft.utils import nothing  # noqa: F401
    with pytest.raises(AttributeError, match=r"module 'peft\.utils' has no attribute 'nothing'"):
        importlib.import_module("peft.utils").nothing  # noqa: B018
    # axolotl takes another way where this exists, as it does not in huggingface/peft.
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("peft.tuners.param_wrapper")


def test_pickles_that_name_an_old_path_are_read():
    config = pickle.loads(b"\x80\x04cpeft.tuners.hra.config\nHRAConfig\n.")
    assert config is peft.HRAConfig
    layer = importlib.import_module("peft.tuners.tuners_utils").BaseTunerLayer
    assert pickle.loads(pickle.dumps(layer)) is AdapterLayer


def test_what_replaces_a_function_under_its_old_path_replaces_it():
    from peft.integrations import training

    before = training.prepare_model_for_kbit_training
    with mock.patch("peft.utils.other.prepare_model_for_kbit_training", print):
        assert training.prepare_model_for_kbit_training is print
    assert training.prepare_model_for_kbit_training is before


def test_installing_twice_leaves_one_finder():
    compat.install()
    assert sum(type(finder).__name__ == "OldPathFinder" for finder in sys.meta_path) == 1


def test_default_targets_are_reachable_and_can_be_extended_under_their_old_name():
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as targets
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_HRA_TARGET_MODULES_MAPPING as others

    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model.config = {"model_type": "sequence"}
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(model, LoraConfig())
    with mock.patch.dict(targets, sequence=["0"]):
        assert "sequence" not in others
        assert get_peft_model(model, LoraConfig()).targeted_module_names == ["0"]
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model.config = {"model_type": "sequence"}
    with mock.patch("peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", {"sequence": ["0"]}):
        assert get_peft_model(model, LoraConfig()).targeted_module_names == ["0"]
    from peft.utils.other import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as again

    assert again is targets
