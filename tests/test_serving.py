"""What engines take of a saved adapter: the table is whole, and adapters saved here are found in it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors import safe_open

from peft import (
    AdaLoraConfig,
    HRAConfig,
    LoraConfig,
    PeftModel,
    PolyConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.integrations.serving import ENGINES, FEATURES, REMEDIES, findings, options
from peft.registry import METHODS
from tiny_models import llama, tokens


def saved(config, folder):
    """(adapter_config.json, names of the tensors) of a new adapter."""
    get_peft_model(llama(), config).save_pretrained(folder)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return json.loads((folder / "adapter_config.json").read_text()), list(file.keys())


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_answers_for_every_feature(engine):
    row = ENGINES[engine]
    assert row.answers.keys() == FEATURES.keys() and row.read
    for answer in [*row.answers.values(), *([row.format] if row.format else [])]:
        assert (answer.verdict == "takes") == (answer.why == "") == (answer.remedy == "")
        assert answer.remedy in ("", *REMEDIES)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_plain_lora_is_taken(engine, tmp_path):
    content, names = saved(LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"), tmp_path)
    found = findings(engine, content, names)
    assert [entry.feature for entry in found] == ([] if engine in ("vllm", "sglang") else ["the files"])


@pytest.mark.parametrize("method", [name for name in METHODS if name != "LORA"])
def test_no_other_method_is_taken_as_it_is(method):
    (found,) = findings("vllm", {"peft_type": method, "r": 8, "use_rslora": True})
    kind = "none" if METHODS[method].prompt or method in ("ADAPTION_PROMPT", "POLY", "XLORA") else "to_lora"
    assert (found.verdict, found.remedy) == ("refuses", kind)


@pytest.mark.parametrize(
    ("fields", "feature", "verdicts"),
    [
        ({"use_dora": True}, "DoRA", ("refuses", "refuses", "refuses", None)),
        ({"use_rslora": True}, "use_rslora", (None, "differs", "differs", None)),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern", ("differs", "refuses", None, "refuses")),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern", ("differs",) * 4),
        ({"modules_to_save": ["lm_head"]}, "in full", ("refuses", "differs", "refuses", "refuses")),
        ({"bias": "all"}, "biases", ("refuses", "differs", "refuses", "refuses")),
        ({"lora_bias": True}, "bias of B", ("refuses", "differs", "refuses", "refuses")),
        ({"trainable_token_indices": [1]}, "tokens", ("refuses", "differs", "refuses", "refuses")),
        ({"target_modules": ["embed_tokens"]}, "embeddings", (None, None, None, None)),
        ({"alora_invocation_tokens": [3]}, "aLoRA", ("differs", "differs", None, "differs")),
        ({"target_modules": ".*q_proj"}, "regular expression", (None, "refuses", None, None)),
        ({"init_lora_weights": "pissa"}, "base weights", ("differs",) * 4),
    ],
)
def test_what_an_adapter_has_is_found(fields, feature, verdicts, tmp_path):
    content, names = saved(LoraConfig(**{"task_type": "CAUSAL_LM", **fields}), tmp_path)
    for engine, verdict in zip(ENGINES, verdicts, strict=True):
        found = [entry for entry in findings(engine, content, names) if feature in entry.feature]
        assert [entry.verdict for entry in found] == ([] if verdict is None else [verdict]), engine
        assert all(REMEDIES[entry.remedy] in str(entry) for entry in found)


def test_what_is_refused_comes_first(tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", alpha_pattern={"q_proj": 3}, use_dora=True)
    assert [entry.verdict for entry in findings("vllm", *saved(config, tmp_path))] == ["refuses", "differs"]


@pytest.mark.parametrize(
    "config", [HRAConfig(), AdaLoraConfig(total_step=9), PolyConfig(), PromptTuningConfig(num_virtual_tokens=2)]
)
def test_of_another_method_only_that_is_said(config, tmp_path):
    config.task_type = "CAUSAL_LM"
    for engine in ENGINES:
        assert len(findings(engine, *saved(config, tmp_path / engine))) == 1


def test_the_remedy_for_the_scale_gives_the_same_outputs(tmp_path):
    model = get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", use_rslora=True, init_lora_weights=False)).eval()
    expected = model(tokens()).logits
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    content = json.loads(path.read_text())
    assert [entry.remedy for entry in findings("sglang", content)] == ["scale"]
    content.update(lora_alpha=content["lora_alpha"] * math.sqrt(content["r"]), use_rslora=False)
    path.write_text(json.dumps(content))
    assert findings("sglang", content) == []
    torch.testing.assert_close(PeftModel.from_pretrained(llama(), tmp_path)(tokens()).logits, expected)


def test_options_make_room_for_the_rank():
    assert options("vllm", {"r": 8}) == ["--enable-lora"]
    assert options("vllm", {"r": 20}) == ["--enable-lora", "--max-lora-rank 32"]
    assert options("sglang", {"r": 4, "rank_pattern": {"q": 24}}) == ["--enable-lora", "--max-lora-rank 24"]
    assert options("mlx", {"r": 8}) == []
    (found,) = findings("vllm", {"peft_type": "LORA", "r": 1024})
    assert "1024" in found.feature and found.verdict == "refuses"


def test_an_unknown_engine_is_an_error():
    with pytest.raises(ValueError, match=r"there are vllm, sglang, llama\.cpp, mlx"):
        findings("triton", {})
