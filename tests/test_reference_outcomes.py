"""Random settings, and what huggingface/peft 0.21.2 makes of each: what it trains, scales and saves, or an error.

`PYTHONPATH=<where it is installed> python tests/test_reference_outcomes.py` records the outcomes anew, of the same
settings. Those whose outcome differs on purpose (docs/differences.md) are not among them.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import peft

transformers = pytest.importorskip("transformers", minversion="5.0")

RECORD = Path(__file__).parent / "data" / "reference_outcomes.json"
SMALL = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, vocab_size=40)
GROUPED = {**SMALL, "num_key_value_heads": 2}
GPT = dict(n_embd=16, n_layer=3, n_head=2, vocab_size=40)
#: name -> class of the model without "For...", of which kind, settings
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "CausalLM", GROUPED),
    "llama_tied": ("Llama", "CausalLM", {**GROUPED, "tie_word_embeddings": True}),
    "gpt2": ("GPT2", "LMHeadModel", GPT),
    "opt": ("OPT", "CausalLM", {**SMALL, "ffn_dim": 32, "word_embed_proj_dim": 16}),
    "bloom": ("Bloom", "CausalLM", {"hidden_size": 16, "n_layer": 3, "n_head": 2, "vocab_size": 40}),
    "neox": ("GPTNeoX", "CausalLM", SMALL),
    "bert_cls": ("Bert", "SequenceClassification", SMALL),
    "roberta_tok": ("Roberta", "TokenClassification", SMALL),
    "t5": ("T5", "ConditionalGeneration", dict(d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2, vocab_size=40)),
    "bart": ("Bart", "ConditionalGeneration", {
        "d_model": 16, "vocab_size": 40,
        **{f"{side}_{name}": value for side in ("encoder", "decoder")
           for name, value in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))},
    }),
    "vit": ("ViT", "ImageClassification", {**SMALL, "image_size": 16, "patch_size": 8}),
    "mixtral": ("Mixtral", "CausalLM", {**GROUPED, "num_local_experts": 2}),
    "qwen2_moe": ("Qwen2Moe", "CausalLM", {
        **GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    }),
    "phi": ("Phi", "CausalLM", SMALL),
    "gemma2": ("Gemma2", "CausalLM", {**GROUPED, "head_dim": 8}),
}  # fmt: skip


def build(name: str) -> torch.nn.Module:
    family, kind, settings = MODELS[name]
    head = kind if kind == "LMHeadModel" else f"For{kind}"
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**settings)
    return getattr(transformers, f"{family}{head}")(config)


def digest(lines: list[str]) -> str:
    """How many they are, and a hash."""
    return f"{len(lines)} {hashlib.sha1(json.dumps(sorted(lines)).encode()).hexdigest()[:12]}"


def outcome(name: str, method: str, settings: dict[str, Any]) -> dict[str, str] | str:
    """What comes of a configuration on a model: digests of names, shapes and scales; or "error"."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = peft.get_peft_model(build(name), getattr(peft, method)(**copy.deepcopy(settings)))
            trained = [f"{key} {tuple(p.shape)}" for key, p in model.named_parameters() if p.requires_grad]
            scales = [(key, getattr(module, "scaling", None)) for key, module in model.named_modules()]
            saved = peft.get_peft_model_state_dict(model)
        except Exception:
            return "error"
    names = [f"{key} {tuple(tensor.shape)}" for key, tensor in saved.items()]
    return {
        "trained": digest(trained),
        "saved": digest(names),
        "scaling": digest([f"{key} {dict(held)}" for key, held in scales if isinstance(held, Mapping)]),
    }


if RECORD.exists():
    CASES = json.loads(RECORD.read_text(encoding="utf-8"))
    FAMILIES = sorted({case[0] for case in CASES})

    @pytest.mark.parametrize("name", FAMILIES)
    def test_what_random_settings_make_is_what_the_reference_makes(name):
        different = [
            (method, settings, expected, found)
            for model, method, settings, expected in CASES
            if model == name and (found := outcome(model, method, settings)) != expected
        ]
        assert not different

    def test_the_record_is_of_all_kinds():
        methods = Counter(case[1] for case in CASES)
        assert len(methods) >= 33 and min(methods.values()) >= 4 and len(FAMILIES) == len(MODELS)
        assert {case[3] == "error" for case in CASES} == {True, False}


if __name__ == "__main__":
    cases = json.loads(RECORD.read_text(encoding="utf-8"))
    lines = [json.dumps([*case[:3], outcome(*case[:3])]) for case in cases]
    RECORD.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    print(f"{len(lines)} settings: {RECORD}", file=sys.stderr)
