"""An adapter and its base model loaded by one call."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import peft
from peft import AutoPeftModel, AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from tiny_models import byte_tokenizer, fill_adapter, llama, saved_base, tokens


@pytest.fixture
def saved(tmp_path):
    """A base model and two adapters of it: `task` has a task type, `plain` the class of the base model instead."""
    base = saved_base(llama(), tmp_path / "base")
    outputs = {}
    for name, task in (("task", "CAUSAL_LM"), ("plain", None)):
        model = fill_adapter(get_peft_model(type(base).from_pretrained(tmp_path / "base"), LoraConfig(task_type=task)))
        model.save_pretrained(tmp_path / name)
        outputs[name] = model.eval()(tokens()).logits
    return tmp_path, outputs


def edited(folder, new_name, **fields):
    """A copy of a saved adapter with other fields in its configuration."""
    copied = folder.parent / new_name
    shutil.copytree(folder, copied)
    path = copied / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return copied


@pytest.mark.parametrize(
    ("auto", "name", "kind"),
    [
        ("AutoPeftModelForCausalLM", "task", "PeftModelForCausalLM"),
        # It takes the task from the configuration, and without one the class of the base model.
        ("AutoPeftModel", "task", "PeftModelForCausalLM"),
        ("AutoPeftModel", "plain", "PeftModel"),
        ("AutoPeftModelForCausalLM", "plain", "PeftModelForCausalLM"),
    ],
)
def test_the_right_classes_are_found(saved, auto, name, kind):
    folder, outputs = saved
    model = getattr(peft, auto).from_pretrained(folder / name, adapter_name="mine")
    assert type(model).__name__ == kind
    assert type(model.get_base_model()).__name__ == "LlamaForCausalLM"
    assert not model.training
    assert model.active_adapters == ["mine"]
    torch.testing.assert_close(model(tokens()).logits, outputs[name])


def test_keyword_arguments_find_their_way(saved):
    folder, _ = saved
    shutil.copytree(folder / "task", folder / "outer" / "inner")
    model = AutoPeftModelForCausalLM.from_pretrained(
        folder / "outer",
        subfolder="inner",
        is_trainable=True,
        dtype=torch.bfloat16,
        autocast_adapter_dtype=False,
        low_cpu_mem_usage=True,
        trust_remote_code=False,
        local_files_only=True,
    )
    assert model.training
    assert model.get_nb_trainable_parameters()[0] > 0
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    config = peft.PeftConfig.from_pretrained(folder / "task")
    config.lora_alpha = 77
    assert AutoPeftModel.from_pretrained(folder / "task", config=config).active_peft_config.lora_alpha == 77


@pytest.mark.parametrize(("size", "expected"), [(None, 40), (259, 259)])
def test_embeddings_grow_for_a_tokenizer_with_more_tokens(saved, size, expected):
    folder, _ = saved
    if size:
        byte_tokenizer().save_pretrained(folder / "task")
    model = AutoPeftModelForCausalLM.from_pretrained(folder / "task")
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == expected


def test_another_task_is_named(saved):
    folder, _ = saved
    with pytest.raises(ValueError, match=r"CAUSAL_LM.*Use AutoPeftModelForCausalLM"):
        peft.AutoPeftModelForTokenClassification.from_pretrained(folder / "task")


def test_a_downloaded_configuration_does_not_choose_what_is_imported(saved, monkeypatch):
    folder, _ = saved
    (folder / "planted.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(folder)
    evil = edited(folder / "plain", "evil", auto_mapping={"parent_library": "planted", "base_model_class": "Model"})
    with pytest.raises(ValueError, match=r"import_allowlist=\['planted'\]"):
        AutoPeftModel.from_pretrained(evil)
    with pytest.raises(SystemExit, match="imported"):
        AutoPeftModel.from_pretrained(evil, import_allowlist=["planted"])
    with pytest.raises(ValueError, match="transformersx"):
        mapping = {"parent_library": "transformersx", "base_model_class": "Model"}
        AutoPeftModel.from_pretrained(edited(folder / "plain", "near", auto_mapping=mapping))
    with pytest.raises(ValueError, match="none"):
        AutoPeftModel.from_pretrained(folder / "plain", import_allowlist=[])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"auto_mapping": None}, "AutoPeftModelForCausalLM"),
        ({"auto_mapping": {"parent_library": "transformers"}}, "neither a task type"),
        ({"base_model_name_or_path": None}, "names no base model"),
    ],
)
def test_what_a_configuration_lacks_is_said(saved, fields, message):
    folder, _ = saved
    with pytest.raises(ValueError, match=message):
        AutoPeftModel.from_pretrained(edited(folder / "plain", "lacking", **fields))


@pytest.mark.parametrize("auto", [AutoPeftModel, AutoPeftModelForCausalLM])
def test_the_classes_make_no_objects(auto):
    with pytest.raises(OSError, match="from_pretrained"):
        auto(llama(), LoraConfig())
    assert not issubclass(auto, PeftModel)
