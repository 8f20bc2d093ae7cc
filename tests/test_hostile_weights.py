"""Weights in files that are damaged, or written to do harm, and saves among broken files."""

from __future__ import annotations

import math
import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import peft
import tiny_models
from damaged_files import CARD, CONFIG, PICKLE, WEIGHTS, Harm, change, lora, refused, saved
from peft import LoraConfig, PeftModel, get_peft_model, pickles
from peft.checkpoint import load_peft_weights, read_adapter
from peft.errors import AdapterFileError, PeftWarning
from peft.folder import replace_files


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# ---- tensors


def with_tensors(folder: Path, **tensors: torch.Tensor) -> None:
    there = load_file(folder / WEIGHTS)
    save_file({**there, **{name.replace("__", "."): value for name, value in tensors.items()}}, folder / WEIGHTS)


def test_base_weights_in_a_file_are_refused_and_named(tmp_path):
    base = tiny_models.MLP()
    before = tiny_models.base_state(base)
    saved(tmp_path / "a")
    keys = ("lin0.weight", "lin0.base_layer.bias", "lin1.base_layer.weight")
    tensors = {
        f"base_model.model.{key}".replace(".", "__"): torch.full_like(before[key.replace(".base_layer", "")], 7.0)
        for key in keys
    }
    with_tensors(tmp_path / "a", **tensors)
    with pytest.warns(PeftWarning, match=r"Refused.*lin0.weight.*modules_to_save"):
        loaded = PeftModel.from_pretrained(base, tmp_path / "a")
    tiny_models.assert_base_untouched(loaded, before)
    change(tmp_path / "a", bias="all")
    with pytest.warns(PeftWarning, match="Refused"):
        loaded = PeftModel.from_pretrained(tiny_models.MLP(), tmp_path / "a")
    after = tiny_models.base_state(loaded)
    changed = {key for key, value in before.items() if not value.equal(after[key])}
    assert changed == {"lin0.bias"}, "a bias that the configuration says was trained"


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LoraConfig(target_modules=["q_proj"]), "model__model__embed_tokens__weight"),
        (LoraConfig(trainable_token_indices=[1]), "model__model__embed_tokens__token_adapter__base_layer__weight"),
        (peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "model__embed_tokens__weight"),
    ],
    ids=["LoRA", "trained tokens", "soft prompt"],
)
def test_embeddings_that_a_file_replaces_are_said(tmp_path, config, name):
    folder = saved(tmp_path / "a", config, tiny_models.llama(), save_embedding_layers=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        PeftModel.from_pretrained(tiny_models.llama(), folder)  # the same ones
    assert f"base_model__{name}".replace("__", ".") in load_file(folder / WEIGHTS)
    with_tensors(folder, **{f"base_model__{name}": torch.ones(40, 32)})
    with pytest.warns(PeftWarning, match=r"replaces embeddings of the base model, \S*embed_tokens"):
        loaded = PeftModel.from_pretrained(tiny_models.llama(), folder)
    assert tiny_models.base_state(loaded)["model.embed_tokens.weight"].eq(1).all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.complex64])
def test_factors_are_numbers_with_a_fraction(tmp_path, dtype):
    folder = saved(tmp_path / "a")
    key = "base_model.model.lin0.lora_A.weight"
    tensors = load_file(folder / WEIGHTS)
    torch.save({**tensors, key: tensors[key].to(dtype)}, folder / PICKLE)
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=re.escape(f"{key} is {dtype} in the file")):
        PeftModel.from_pretrained(tiny_models.MLP(), folder)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_said(tmp_path, value):
    folder = saved(tmp_path / "a")
    with_tensors(folder, base_model__model__lin1__lora_B__weight=torch.full((4, 4), value))
    with pytest.warns(PeftWarning, match=r"not finite.*lin1\.lora_B\.weight"):
        PeftModel.from_pretrained(tiny_models.MLP(), folder)
    with_tensors(folder, base_model__model__lin1__lora_B__weight=torch.full((4, 4), 3e38))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PeftModel.from_pretrained(tiny_models.MLP(), folder)  # large, and its sum is not finite


def test_positions_outside_of_the_weight(tmp_path):
    folder = saved(tmp_path / "a", peft.ShiraConfig(target_modules=["lin0"], r=2))
    key = "base_model.model.lin0.shira_indices"
    positions = load_file(folder / WEIGHTS)[key]
    positions[1, 3] = 1000
    with_tensors(folder, **{key.replace(".", "__"): positions})
    with pytest.raises(ValueError, match=r"shira_indices names rows .* to 1000 of a weight \[24, 16\]"):
        PeftModel.from_pretrained(tiny_models.MLP(), folder)


PICKLES = {
    "a list": lambda tensors, folder: [1],
    "a number for a tensor": lambda tensors, folder: {**tensors, "x": 1},
    "a number for a name": lambda tensors, folder: {1: torch.ones(1)},
    "sparse": lambda tensors, folder: {"x": torch.ones(2, 2).to_sparse()},
    "wider than its memory": lambda tensors, folder: {"x": torch.ones(1).expand(2**40)},
    "code": lambda tensors, folder: {"x": Harm(folder / "harm")},
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", PICKLES)
def test_pickles_that_hold_something_else_are_named(tmp_path, kind, legacy):
    folder = saved(tmp_path / "a")
    content = PICKLES[kind](load_file(folder / WEIGHTS), tmp_path)
    torch.save(content, folder / PICKLE, _use_new_zipfile_serialization=not legacy)
    (folder / WEIGHTS).unlink()
    refused(folder, PICKLE)
    assert not (tmp_path / "harm").exists()


NO_PICKLES = {
    "empty": b"",
    "zeros": b"\0" * 999,
    "cut short": b"PK\x03\x04",
    "of other things": pickle.dumps({"a": 1}),
    "nothing in it": b"\x80\x02}.",
    "a text of two gigabytes": b"\x80\x02X\xff\xff\xff\x7fabc",
    "one disk of several": b"PK\x06\x07\1" + b"\0" * 11 + b"\5\0\0\0" + b"PK\x05\x06" + b"\0" * 18,
}


@pytest.mark.parametrize("text", NO_PICKLES.values(), ids=NO_PICKLES)
def test_pickles_that_are_none_are_named(tmp_path, text):
    folder = saved(tmp_path / "a")
    (folder / WEIGHTS).unlink()
    (folder / PICKLE).write_bytes(text)
    refused(folder, PICKLE)


def test_a_pickle_that_swells_is_not_unpacked(tmp_path):
    folder = saved(tmp_path / "a", safe_serialization=False)
    with zipfile.ZipFile(folder / PICKLE) as plain:
        entries = {entry.filename: plain.read(entry) for entry in plain.infolist()}
    with zipfile.ZipFile(folder / PICKLE, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in entries.items():
            packed.writestr(name, content + b"\0" * 10_000_000)
    refused(folder, PICKLE, "compressed")


def test_pickles_are_read_as_they_were_asked_for(tmp_path, monkeypatch):
    folder = saved(tmp_path / "a", safe_serialization=False)
    assert len(load_peft_weights(folder, "cpu")) == len(load_peft_weights(folder, "cpu", use_safetensors=False)) == 4
    with pytest.raises(ValueError, match=f"no {WEIGHTS} in that folder"):
        PeftModel.from_pretrained(tiny_models.MLP(), folder, use_safetensors=True)
    monkeypatch.setattr(pickles.torch, "__version__", "2.5.1")
    with pytest.raises(AdapterFileError, match=rf"{PICKLE} is a pickle, and with torch 2\.5\.1 .*use_safetensors="):
        PeftModel.from_pretrained(tiny_models.MLP(), folder)
    PeftModel.from_pretrained(tiny_models.MLP(), folder, use_safetensors=False)


# ---- saving


CALLS = ("mkdir", "chmod", "rename", "replace", "unlink", "rmdir", "fsync", "listdir", "open", "lstat", "close")


def test_a_save_that_has_counted_does_not_raise(tmp_path):
    """Every call to the system fails once: the save raises and the old adapter is there, or it does not and the new."""
    ends = []
    for step in range(500):
        folder = saved(tmp_path / str(step))
        count = 0

        def failing(call):
            def wrapper(*args, **kwargs):
                nonlocal count
                count += 1
                if count == step + 1:  # noqa: B023 - called before the next turn
                    raise OSError(5, "injected")
                return call(*args, **kwargs)

            return wrapper

        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in CALLS:
                patch.setattr(os, name, failing(getattr(os, name)))
            try:
                replace_files(folder, {CONFIG: b'{"peft_type": "LORA", "r": 2}'})
                raised = False
            except OSError:
                raised = True
        assert read_adapter(folder, device="cpu")[0]["r"] == (4 if raised else 2), step
        ends.append(raised)
        saved(folder, lora(r=3))
        assert set(os.listdir(folder)) == {CONFIG, WEIGHTS, CARD}
        if count <= step:
            break
    assert len(ends) > 30 and True in ends and ends[-1] is False
    assert ends[-8:] == [False] * 8, "what comes after the commit raises nothing"


BROKEN_CARDS = [b"\xff\xfe", b"---\ntags: [unclosed\n---\n", b"---\ntags: 5\n---\n", b"---\n- 1\n---\n", None]


@pytest.mark.parametrize("card", BROKEN_CARDS)
def test_a_broken_card_stops_no_save(tmp_path, card):
    folder = saved(tmp_path / "a")
    (folder / CARD).unlink()
    if card is None:
        (folder / CARD).mkdir()
    else:
        (folder / CARD).write_bytes(card)
    with pytest.warns(PeftWarning, match=f"{CARD} is left as it is"):
        saved(folder, lora(r=2))
    assert read_adapter(folder, device="cpu")[0]["r"] == 2
    assert (folder / CARD).is_dir() if card is None else (folder / CARD).read_bytes() == card


@pytest.mark.parametrize("text", [b"\xff", b"[]", b'{"vocab_size": "x"}', b"[" * 100_000])
def test_a_broken_configuration_of_the_base_model_stops_no_save(tmp_path, text):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_bytes(text)
    config = LoraConfig(target_modules=["q_proj"], base_model_name_or_path=str(tmp_path / "base"))
    model = get_peft_model(tiny_models.llama(), config)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "a")
    assert not any("embed" in key for key in load_file(tmp_path / "a" / WEIGHTS))


@pytest.mark.parametrize("method", ["LoraConfig", "AdaLoraConfig", "ShiraConfig", "VBLoRAConfig"])
def test_a_number_in_place_of_a_matrix(tmp_path, method):
    fields = {"AdaLoraConfig": {"total_step": 10}, "ShiraConfig": {"r": 2}}
    fields["VBLoRAConfig"] = {"num_vectors": 8, "vector_length": 4}
    config = getattr(peft, method)(target_modules=["lin0"], **fields.get(method, {}))
    for key in load_file(saved(tmp_path / "a", config) / WEIGHTS):
        folder = saved(tmp_path / key, config)
        with_tensors(folder, **{key.replace(".", "__"): torch.tensor(1.0)})
        with pytest.raises((RuntimeError, ValueError), match=r"size mismatch|shape"):
            PeftModel.from_pretrained(tiny_models.MLP(), folder)
