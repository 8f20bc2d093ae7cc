"""What the laws of test_laws.py are tried on: base models, and adapters of every method and option that go on them."""

from __future__ import annotations

import atexit
import copy
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, partial
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import peft
import tiny_models
from peft.registry import METHODS
from test_conformance import (
    BESIDE,
    EXCLUSIVE,
    FURTHER,
    KINDS,
    LAYER_METHODS,
    PARAMETERS,
    STORAGES,
    SUPPORTED,
    UNMERGEABLE,
    Model,
    build_quantised,
    config_for,
    row_of,
)


@dataclass
class Case:
    """A base model, adapters that go on it, and which laws do not concern them."""

    build: Callable[[], nn.Module]
    inputs: dict[str, Tensor]
    #: the methods of the adapters, and the configuration for one of them; whether for the first adapter
    methods: list[str]
    config: Callable[[str, bool], peft.PeftConfig]
    #: the dimension of the inputs that counts samples
    samples: int = 0
    mixed: bool = False
    mergeable: bool = True
    #: whether several may act together
    several: bool = True
    #: whether those that are merged may not set the same values
    overlaps: bool = False
    #: whether part of what an adapter does (a module in full, biases) is done by the active one, whatever is merged
    apart: bool = False
    #: whether samples in one batch may have different adapters
    routed: bool = True
    combines: bool = False
    #: how many adapters there may be
    most: int = 4
    #: whether weights are held in few bits, so that merging rounds
    rounds: bool = False
    #: where there are tensors of an adapter beside those of its layers
    beside: tuple[str, ...] = ()
    #: whether some of what is trained is not used: docs/differences.md, "SHADOW: state after the last block"
    idle: bool = False
    #: adapters that those are made of
    members: tuple[str, ...] = ()
    #: whether the base model can be pickled
    pickles: bool = True

    def run(self, model: nn.Module, **more: Any) -> Tensor:
        out = model(**{**self.inputs, **more})
        return out if isinstance(out, Tensor) else out.logits

    def run_base(self, model: nn.Module) -> Tensor:
        """The output of a model without adapters."""
        out = model(**{key: value for key, value in self.inputs.items() if key != "task_ids"})
        return out if isinstance(out, Tensor) else out.logits


class Pair(nn.Module):
    """Two targets, so that a call can stop between them, and a head that may be trained in full."""

    def __init__(self, make: Callable[[], nn.Module]):
        super().__init__()
        self.one, self.two, self.head = make(), make(), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        out = self.one(x) + self.two(x)
        return out + self.head(out.reshape(-1, 4)).reshape(out.shape)


def pair(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return Pair(make).eval()


def on_pair(kind: str, methods: list[str], extra: dict[str, Any], **settings: Any) -> Case:
    """Adapters on two modules of a kind."""

    def config(method: str, first: bool) -> peft.PeftConfig:
        return config_for(method, kind, **{**({} if first else FURTHER.get(method, {})), **extra})

    make = partial(Model, kind)
    in_full = bool(extra.get("modules_to_save") or extra.get("bias", "none") != "none")
    several = not in_full and not any(method in EXCLUSIVE for method in methods)
    mergeable = not any(method in BESIDE or (method, kind) in UNMERGEABLE for method in methods)
    given: dict[str, Any] = dict(
        inputs={"x": make().inputs(torch.Generator().manual_seed(7))},
        samples=1 if "sequence first" in kind else 0,
        mergeable=mergeable,
        several=several,
        overlaps=any(method in EXCLUSIVE for method in methods),
        apart=in_full,
        # docs/differences.md: Lily's router averages over the samples of each adapter by themselves, and what several
        # adapters train in full cannot differ from sample to sample.
        routed=not in_full and "LILY" not in methods,
        combines=methods == ["LORA"] and kind not in PARAMETERS and not {"target_parameters", "bias"} & extra.keys(),
        build=partial(pair, make),
    )
    return Case(methods=methods, config=config, **{**given, **settings})


# ---- one method on a kind of module, several, with options


def kinds_of(*methods: str) -> list[str]:
    return [kind for kind in KINDS if all((method, kind) in SUPPORTED for method in methods)]


def plain(method: str, data: st.DataObject) -> Case:
    kind = data.draw(st.sampled_from(kinds_of(method)))
    return on_pair(kind, [method], {"modules_to_save": ["head"]} if data.draw(st.booleans()) else {})


#: methods that go on the same modules of a mixed model
MIXABLE = [method for method in LAYER_METHODS if row_of(method).mixed and " " not in method]


def mixed(data: st.DataObject) -> Case:
    kind = data.draw(st.sampled_from(["Linear", "Linear", "Embedding", "Conv2d", "Parameter", "Parameter stacked"]))
    there = [method for method in MIXABLE if (method, kind) in SUPPORTED]
    methods = data.draw(st.lists(st.sampled_from(there), min_size=2, max_size=2, unique=True))
    head = data.draw(st.integers(0, 3)) == 0
    return on_pair(kind, methods, {"modules_to_save": ["head"]} if head else {}, mixed=True)


def biases(data: st.DataObject) -> Case:
    """Any method that also trains biases of the base model."""
    method = data.draw(st.sampled_from([m for m in LAYER_METHODS if m not in ("BEFT", "TRAINABLE_TOKENS")]))
    kind = data.draw(st.sampled_from(kinds_of(method)))
    only = f"{config_for(method, kind).peft_type.value.lower()}_only"
    bias = data.draw(st.sampled_from(["all", only]))
    # convolutions have a linear layer beside them that is not called
    return on_pair(
        kind, [method], {"bias": bias}, idle=bias == "all" and kind.startswith(("Conv1d", "Conv2d", "Conv3d"))
    )


def around(data: st.DataObject) -> Case:
    """A module and its parameter are targets at once, so there are layers around each other."""
    method = data.draw(
        st.sampled_from([m for m in MIXABLE if (m, "Linear") in SUPPORTED and (m, "Parameter") in SUPPORTED])
    )
    return on_pair("Linear", [method], {"target_parameters": ["target.weight"]})


def quantised(data: st.DataObject) -> Case:
    storage = data.draw(st.sampled_from(list(STORAGES)))
    method = data.draw(
        st.sampled_from([m for m in LAYER_METHODS if (m, "Linear") in SUPPORTED and m not in NOT_PACKED])
    )
    make = partial(build_quantised, storage)
    inputs = {"x": make().inputs(torch.Generator().manual_seed(7))}
    return on_pair(
        "Linear", [method], {}, build=partial(pair, make), inputs=inputs, rounds=True, routed=method != "LILY",
        pickles=storage == "hqq",  # else the base model itself does not come out of a pickle as it was
    )  # fmt: skip


# ---- on a language model


def on_llama(methods: list[str], config: Callable[[str, bool], peft.PeftConfig], base: dict[str, Any], **more) -> Case:
    inputs = {"input_ids": tiny_models.tokens(3, 6), **more.pop("inputs", {})}
    return Case(
        build=partial(tiny_models.llama, use_cache=False, **base), inputs=inputs, methods=methods, config=config, **more
    )


TARGETS = [["q_proj"], ["q_proj", "down_proj"], ["lm_head"], ["q_proj", "lm_head"], ["embed_tokens"]]


def language(data: st.DataObject) -> Case:
    """LoRA on a model whose output layer may share the embedding's weight, with what is trained beside it."""
    tied = data.draw(st.booleans())
    targets = data.draw(st.sampled_from(TARGETS))
    extra: dict[str, Any] = {"ensure_weight_tying": tied and data.draw(st.booleans())}
    beside = data.draw(st.sampled_from(["nothing", "tokens", "tokens", "head", "embeddings"]))
    means_both = extra["ensure_weight_tying"] and targets[-1] in ("lm_head", "embed_tokens")
    if beside == "tokens" and "embed_tokens" not in targets and not means_both:
        extra["trainable_token_indices"] = [5, 3, 11]
    elif beside == "head" and "lm_head" not in targets and not means_both:
        extra["modules_to_save"] = ["lm_head"]
    elif beside == "embeddings" and "embed_tokens" not in targets and not means_both:
        extra["modules_to_save"] = ["embed_tokens"]
    in_full = "modules_to_save" in extra

    def config(method: str, first: bool) -> peft.PeftConfig:
        return peft.LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM", **extra)

    overlaps = "trainable_token_indices" in extra
    return on_llama(
        ["LORA"], config, {"tie_word_embeddings": tied}, several=not in_full and not overlaps, overlaps=overlaps,
        apart=in_full, combines=True,
    )  # fmt: skip


PROMPTS: dict[str, dict[str, Any]] = {
    "PROMPT_TUNING": {},
    "P_TUNING": {"encoder_hidden_size": 8},
    "PREFIX_TUNING": {},
    "MULTITASK_PROMPT_TUNING": {"num_tasks": 2, "num_ranks": 1},
    "CPT": {"cpt_token_ids": [5, 6, 7], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 4]},
    "CARTRIDGE": {"num_frozen_tokens": 1},
}


def prompt(method: str, data: st.DataObject) -> Case:
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3, **PROMPTS[method]}
    if method == "PREFIX_TUNING" and data.draw(st.booleans()):
        settings |= {"prefix_projection": True, "encoder_hidden_size": 8}
    if data.draw(st.booleans()):
        settings["modules_to_save"] = ["lm_head"]
    tasks = {"task_ids": torch.tensor([0, 1, 1])} if "num_tasks" in settings else {}
    make = METHODS[method].config_class
    known = {one.name for one in fields(make)}
    settings = {key: value for key, value in settings.items() if key in known}
    return on_llama(
        [method], lambda method, first: make(**settings), {}, inputs=tasks, mergeable=False, several=False,
        routed=False, beside=("prompt_encoder",),
    )  # fmt: skip


def poly(data: st.DataObject) -> Case:
    kind = data.draw(st.sampled_from(["Linear", "Conv1D"]))
    made = on_pair(kind, ["POLY"], {"r": 2, "n_tasks": 2, "n_skills": 2}, mergeable=False, several=False, routed=False)
    made.inputs["task_ids"] = torch.tensor([0, 1, 1, 0])
    return made


def shadow(data: st.DataObject) -> Case:
    def config(method: str, first: bool) -> peft.PeftConfig:
        return peft.ShadowConfig(task_type="CAUSAL_LM", r=3, shadow_alpha=0.5)

    return on_llama(["SHADOW"], config, {}, mergeable=False, several=False, routed=False, idle=True, beside=SHADOWS)


SHADOWS = ("base_model.shadow_backbone", "base_model.shadow_projection")


def adaption_prompt(data: st.DataObject) -> Case:
    layers = data.draw(st.integers(1, 2))

    def config(method: str, first: bool) -> peft.PeftConfig:
        return peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=layers)

    return on_llama(["ADAPTION_PROMPT"], config, {}, mergeable=False, several=False, routed=False)


@cache
def experts() -> dict[str, str]:
    """Saved LoRA adapters, for X-LoRA: name -> folder."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    places = {}
    for seed, name in enumerate(("math", "law")):
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        places[name] = f"{folder}/{name}"
        model = peft.get_peft_model(tiny_models.llama(), config)
        tiny_models.fill_adapter(model, seed=seed).save_pretrained(places[name])
    return places


def xlora(data: st.DataObject) -> Case:
    def config(method: str, first: bool) -> peft.PeftConfig:
        return peft.XLoraConfig(task_type="CAUSAL_LM", adapters=copy.copy(experts()))

    classifier = ("base_model.internal_xlora_classifier",)
    return on_llama(
        ["XLORA"], config, {}, mergeable=False, several=False, routed=False, most=1, beside=classifier,
        members=tuple(experts()), pickles=False,  # transformers leaves local functions as hooks
    )  # fmt: skip


#: methods that packed weights do not have a place for
NOT_PACKED = ("BEFT", "OSF", "TRAINABLE_TOKENS")
SUBJECTS: dict[str, Callable[[st.DataObject], Case]] = {
    **{method: partial(plain, method) for method in LAYER_METHODS},
    **{method: partial(prompt, method) for method in PROMPTS},
    "SHADOW": shadow,
    "POLY": poly,
    "ADAPTION_PROMPT": adaption_prompt,
    "XLORA": xlora,
    "mixed": mixed,
    "biases": biases,
    "around": around,
    "quantised": quantised,
    "language": language,
}
#: those that stand for many
SHARE = {"mixed": 3, "biases": 2, "around": 2, "quantised": 2, "language": 3}
