"""Files without what seeds and base weights give again, in which a shared tensor is once."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import peft
from peft.registry import METHODS

#: what a configuration needs beside its targets
SETTINGS = {
    "ADALORA": {"total_step": 10}, "OFT": {"r": 0, "oft_block_size": 4}, "C3A": {"block_size": 4},
    "GRALORA": {"r": 4, "gralora_k": 2}, "WAVEFT": {"n_frequency": 10}, "PSOFT": {"r": 2}, "ROAD": {"group_size": 4},
    "FOURIERFT": {"n_frequency": 10}, "SHIRA": {"r": 2, "random_seed": 3}, "RANDLORA": {"r": 4}, "MISS": {"r": 4},
    "VBLORA": {"num_vectors": 8, "vector_length": 4}, "IA3": {"feedforward_modules": []},
    "FROD": {"progressbar": False}, "SUPERTUNING": {"sparsity": 0.9},
}  # fmt: skip
#: methods that adapt linear layers by names
LAYERED = [
    name for name, method in METHODS.items()
    if hasattr(method.config_class, "target_modules")
    and name not in ("ADAPTION_PROMPT", "POLY", "XLORA", "SHADOW", "TRAINABLE_TOKENS", "LN_TUNING")
]  # fmt: skip
#: those whose default files hold tensors that can be made again
SMALLER = {"ADAMSS", "DELORA", "FROD", "PVERA", "RANDLORA", "SHIRA", "SUPERTUNING", "TINYLORA", "VERA"}
X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))


def adapted(name: str, **settings) -> peft.PeftModel:
    config = METHODS[name].config_class(target_modules=["0", "2"], **{**SETTINGS.get(name, {}), **settings})
    model = peft.get_peft_model(base(), config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def names_in(folder) -> set[str]:
    return set(load_file(folder / "adapter_model.safetensors"))


@pytest.mark.parametrize("name", LAYERED)
def test_a_minimal_file_gives_the_same_adapter(name, tmp_path):
    model = adapted(name)
    want = model(X)
    model.save_pretrained(tmp_path / "full")
    with warnings.catch_warnings():
        warnings.simplefilter("error", peft.errors.PeftWarning)
        model.save_pretrained(tmp_path / "small", minimal=True)
        for low_cpu_mem_usage in (False, True):
            torch.manual_seed(9)
            loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "small", low_cpu_mem_usage=low_cpu_mem_usage)
            torch.testing.assert_close(loaded.eval()(X), want, rtol=1e-6, atol=1e-6)
    full, small = names_in(tmp_path / "full"), names_in(tmp_path / "small")
    assert small < full if name in SMALLER else small == full
    loaded.save_pretrained(tmp_path / "restored")
    assert names_in(tmp_path / "restored") == full
    before, after = (json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("full", "restored"))
    assert after == before
    torch.testing.assert_close(peft.PeftModel.from_pretrained(base(), tmp_path / "restored").eval()(X), want)


@pytest.mark.parametrize("name", ["SHIRA", "VERA"])
def test_what_cannot_be_made_again_stays_in_the_file(name, tmp_path):
    model = adapted(name)
    if name == "VERA":
        model.base_model.vera_A["default"].add_(1.0)
    else:
        places = model.base_model.model[0].shira_indices["default"]
        places.copy_(torch.stack((places[0], (places[1] + 1) % 16)))
    want = model(X)
    with pytest.warns(peft.errors.PeftWarning, match="stay in the file"):
        model.save_pretrained(tmp_path, minimal=True)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(base(), tmp_path).eval()(X), want)


@pytest.mark.parametrize("name", ["DELORA", "FROD", "TINYLORA"])
def test_another_base_model_is_noticed(name, tmp_path):
    adapted(name).save_pretrained(tmp_path, minimal=True)
    other = base()
    nn.init.normal_(other[2].weight)
    with pytest.raises(RuntimeError, match="come out otherwise here"):
        peft.PeftModel.from_pretrained(other, tmp_path)
    assert isinstance(other[0], nn.Linear) and not isinstance(other[0], peft.tuners.tuners_utils.BaseTunerLayer)


@pytest.mark.parametrize(("name", "settings"), [("RANDLORA", {}), ("LILY", {"stride_A": 2})])
def test_what_layers_share_is_once_in_a_minimal_file(name, settings, tmp_path):
    config = METHODS[name].config_class(target_modules=r"[02]", **{**SETTINGS.get(name, {}), **settings})
    model = peft.get_peft_model(base(), config).eval()
    if name == "RANDLORA":  # not as the seed gives it, so that it stays
        model.base_model.randlora_A["default"].add_(0.1)
    slots = peft.checkpoint.state.locations_of(model, "default")
    places = {(id(slot.owner), slot.attribute) for slot in slots.values()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*stay in the file")
        model.save_pretrained(tmp_path, minimal=True)
    assert len(names_in(tmp_path)) == len(places) < len(slots)
    with warnings.catch_warnings():
        warnings.simplefilter("error", peft.errors.PeftWarning)
        loaded = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(loaded(X), model(X))
