"""A training step of every method with the defaults of its configuration, against the frozen model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import torch
from case import LINEAR, Case, Part, Prepared, Row, Scale, fill, gradients, llama, sample, twin
from step import batch, kept, timed, train

import peft

TITLE = "Training step of every method"
TEXT = """\
As the training step above, in fp32, for every method with the defaults of its configuration, on all seven linear
projections where it has targets to choose; sizes that do not fit the model are smaller ones. Divided by the frozen
model. The bytes are those kept for backward, as above."""

#: what a method cannot do without
_NEEDED: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 1000},
    "LN_TUNING": {"target_modules": ["input_layernorm", "post_attention_layernorm"]},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": list(range(10))},
    "ADAPTION_PROMPT": {"adapter_len": 10, "adapter_layers": 1, "target_modules": None},
    "MULTITASK_PROMPT_TUNING": {"num_tasks": 3},
    "CPT": {"cpt_token_ids": [1] * 6, "cpt_mask": [1] * 6, "cpt_tokens_type_mask": [1, 2, 2, 3, 4, 4]},
    "VBLORA": {"vector_length": 32},  # a width of 1376 is no multiple of the default 256
    "ROAD": {"group_size": 32},
    "SHADOW": {"target_modules": None},
    "C3A": {"block_size": 32},  # 1376 is no multiple of the default 256 either
    "FROD": {"progressbar": False},
}
_VIRTUAL_TOKENS = 20
_SMALLER = {"n_frequency": 64, "theta_d_length": 64, "vector_length": 16}


def cases(scale: Scale) -> list[Case]:
    names = sorted(method.value for method in peft.PEFT_TYPE_TO_CONFIG_MAPPING)
    return [
        Case(
            name,
            lambda n=name: _prepare(scale, n),
            [Row(name, "adapter", "floor", 2.0), Row(f"{name}, bytes kept", "adapter kept", "floor kept", unit="B")],
            runs=3,
            warm_up=False,  # preparing is one
            rounds=5,
        )
        for name in names
    ]


def _prepare(scale: Scale, method: str) -> Prepared:
    floor = llama(scale, use_cache=False).train()
    inputs = batch(floor, scale)
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        config = method_config(method, scale, folder)
        adapted = peft.get_peft_model(twin(floor), config)
    adapted.train()
    fill(adapted)
    own = dict(inputs)
    if method in ("TRAINABLE_TOKENS", "SHADOW"):  # given embeddings pass by what these have
        own = {"input_ids": inputs["labels"], "labels": inputs["labels"]}
    if method in ("POLY", "MULTITASK_PROMPT_TUNING"):
        own["task_ids"] = torch.zeros(scale.batch, dtype=torch.long)
    if method == "CPT":
        own["input_type_mask"] = torch.full_like(inputs["labels"], 4)
    adapted.eval()
    with torch.no_grad():
        outcome = {"logits": sample(adapted(**own).logits)}
    train(adapted, own)
    outcome["gradients"] = gradients(adapted)
    adapted.train()
    train(floor, inputs)
    bytes_kept = {"floor kept": kept(floor, inputs), "adapter kept": kept(adapted, own)}
    parts: dict[str, Part] = {"floor": timed(floor, inputs), "adapter": timed(adapted, own)}
    parts |= {name: lambda clock, value=value: value for name, value in bytes_kept.items()}
    return Prepared(parts, outcome)


def method_config(method: str, scale: Scale, folder: str, more: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """The default settings of a method for a small Llama, with `more` beside what it cannot do without."""
    kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method)]
    known = {field.name for field in dataclasses.fields(kind)}
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if "target_modules" in known:
        settings["target_modules"] = LINEAR
    if "feedforward_modules" in known:
        settings["feedforward_modules"] = ["down_proj"]
    if "num_virtual_tokens" in known and method != "CPT":
        settings["num_virtual_tokens"] = min(_VIRTUAL_TOKENS, scale.length)
    if scale.hidden < 128:
        settings |= {name: value for name, value in _SMALLER.items() if name in known}
    settings |= {**_NEEDED.get(method, {}), **more}
    if method == "XLORA":
        settings |= {"hidden_size": scale.hidden, "adapters": _experts(scale, folder)}
    return kind(**settings)


def _experts(scale: Scale, folder: str) -> dict[str, str]:
    paths = {str(index): str(Path(folder) / f"expert{index}") for index in range(2)}
    for index, path in paths.items():
        expert = peft.get_peft_model(llama(scale), peft.LoraConfig(target_modules=LINEAR, task_type="CAUSAL_LM"))
        fill(expert, 0.02 * (1 + int(index)))  # of equal experts, no weight of the mixture has a gradient
        expert.save_pretrained(path)
    return paths
