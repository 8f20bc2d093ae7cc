"""What engines that serve models take of a saved adapter, as a table, and what to do where they do not.

Read from the engines' own loaders (`Engine.read` says which); nothing of them is imported. An engine may *take* what an
adapter has, *refuse* it with an error, or *differ*: load it without a word and compute something else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from peft.registry import METHODS, RENAMED

Verdict = Literal["takes", "refuses", "differs"]

#: what can be done -> how
REMEDIES: dict[str, str] = {
    "merge": "merge the adapter into the base model (merge_and_unload, `peft merge`) and serve that",
    "to_lora": "make a LoRA of it (convert_to_lora, save_as_lora), or merge it",
    "scale": "write lora_alpha * sqrt(r) as lora_alpha and false as use_rslora into adapter_config.json",
    "original": "save it for the original base model (path_initial_model_for_weight_conversion of save_pretrained)",
    "format": "write it in the engine's own format (`peft convert`)",
    "targets": "start the engine with the names of the modules (--lora-target-modules), or write a list of names",
    "none": "serve it with this library",
}

Content = Mapping[str, Any]
Names = Sequence[str]


@dataclass(frozen=True)
class Feature:
    """Something an adapter may have.

    Attributes:
        title: what it is called.
        has: whether an adapter has it, by its configuration file and the names of its tensors.
    """

    title: str
    has: Callable[[Content, Names], bool]


@dataclass(frozen=True)
class Answer:
    """What an engine does about a feature, the reason, and a key of `REMEDIES`."""

    verdict: Verdict
    why: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Engine:
    """One engine.

    Attributes:
        title: its name.
        read: where its rules were read: version and files.
        answers: feature -> what it does; all of `FEATURES`.
        format: what every adapter needs before it can be loaded at all; None where the saved folder is read as it is.
        ranks: what it can be told to have room for; any rank if empty.
    """

    title: str
    read: str
    answers: dict[str, Answer]
    format: Answer | None = None
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Finding:
    """One thing of an adapter that an engine does not take as it is."""

    feature: str
    verdict: Verdict
    why: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.feature}: {self.verdict}, {self.why}; {REMEDIES[self.remedy]}"


# ---- what an adapter may have


def _set(field: str) -> Callable[[Content, Names], bool]:
    return lambda content, names: bool(content.get(field))


def _any(pattern: str) -> Callable[[Content, Names], bool]:
    found = re.compile(pattern)
    return lambda content, names: any(found.search(name) for name in names)


def _method(content: Content) -> str:
    name = str(content.get("peft_type") or "")
    return RENAMED.get(name, name)


def _changes_base(content: Content, names: Names) -> bool:
    return bool(re.match(r"(pissa|olora|corda|lora_ga|loftq)", str(content.get("init_lora_weights")).lower()))


def _is_pattern(content: Content, names: Names) -> bool:
    targets = content.get("target_modules")
    return isinstance(targets, str) and targets.lower() != "all-linear"


FEATURES: dict[str, Feature] = {
    "prompt": Feature("a soft prompt", lambda content, names: _is(_method(content), "prompt")),
    "structure": Feature("a method that is more than a change of weights", lambda content, names: _is_more(content)),
    "method": Feature("a method other than LoRA", lambda content, names: _is(_method(content), "other")),
    "dora": Feature("DoRA", _set("use_dora")),
    "kasa": Feature("KaSA", _set("kasa_config")),
    "bdlora": Feature("block-diagonal factors (BD-LoRA)", _set("use_bdlora")),
    "qalora": Feature("QA-LoRA", _set("use_qalora")),
    "sampled": Feature("MonteCLoRA", _set("monteclora_config")),
    "velora": Feature("VeLoRA", _set("velora_config")),
    "alora": Feature("activated LoRA (aLoRA)", _set("alora_invocation_tokens")),
    "rslora": Feature("rank-stabilised scale (use_rslora)", _set("use_rslora")),
    "rank_pattern": Feature("other ranks on some modules (rank_pattern)", _set("rank_pattern")),
    "alpha_pattern": Feature("another alpha on some modules (alpha_pattern)", _set("alpha_pattern")),
    "bias": Feature("trained biases (bias)", lambda content, names: content.get("bias", "none") != "none"),
    "lora_bias": Feature("a bias of B (lora_bias)", _set("lora_bias")),
    "modules_to_save": Feature("modules trained in full (modules_to_save)", _set("modules_to_save")),
    "tokens": Feature("trained tokens (trainable_token_indices)", _set("trainable_token_indices")),
    "embedding": Feature("LoRA on embeddings", _any(r"\.lora_embedding_[AB]")),
    "head": Feature("LoRA on the output layer", _any(r"\.lm_head\.lora_[AB]")),
    "experts": Feature("LoRA on the stacked weights of experts (target_parameters)", _set("target_parameters")),
    "replicated": Feature("repeated layers (layer_replication)", _set("layer_replication")),
    "changed_base": Feature("a start that has changed the base weights (init_lora_weights)", _changes_base),
    "pattern": Feature("target_modules as a regular expression", _is_pattern),
}


def _is(method: str, kind: str) -> bool:
    if method not in METHODS or method == "LORA":
        return kind == "other" and method != "LORA"
    return METHODS[method].prompt == (kind == "prompt")


def _is_more(content: Content) -> bool:
    return _method(content) in ("ADAPTION_PROMPT", "POLY", "XLORA") or bool(content.get("arrow_config"))


#: where one of these is found, there is no more to say
_WHOLE = ("prompt", "structure", "method")


# ---- what the engines do

_TAKES = Answer("takes")
_NO_PROMPTS = Answer("refuses", "virtual tokens are not added", "none")
_NO_STRUCTURE = Answer("refuses", "there is no place for it in the model", "none")
_LAYERS = Answer("refuses", "the base model has fewer layers", "merge")
_BASE = Answer("differs", "the adapter is added to weights that it was not trained with", "original")
_ALL_TOKENS = Answer("differs", "the adapter acts on all tokens, not only from the invocation on", "none")
_COLUMNS = Answer("refuses", "A has a column for each group of inputs only", "merge")
_BLOCKS = Answer("refuses", "the factors are not of full width", "merge")

VLLM = Engine(
    "vLLM",
    "vllm/lora: peft_helper.py, lora_model.py, lora_weights.py, utils.py (main branch, autumn 2026)",
    {
        "prompt": _NO_PROMPTS,
        "structure": _NO_STRUCTURE,
        "method": Answer("refuses", "r, lora_alpha and tensors named lora_A and lora_B are required", "to_lora"),
        "dora": Answer("refuses", "use_dora is not supported", "merge"),
        "kasa": Answer("refuses", "lora_diag is no tensor it knows", "merge"),
        "bdlora": _BLOCKS,
        "qalora": _COLUMNS,
        "sampled": Answer("refuses", "the sampler's tensors are none it knows", "merge"),
        "velora": Answer("refuses", "lora_velora_embed is no tensor it knows", "merge"),
        "alora": _ALL_TOKENS,
        "rslora": _TAKES,
        "rank_pattern": Answer("differs", "the scale is lora_alpha / r on all modules", "merge"),
        "alpha_pattern": Answer("differs", "the scale is lora_alpha / r on all modules", "merge"),
        "bias": Answer("refuses", "bias must be none", "merge"),
        "lora_bias": Answer("refuses", "lora_B.bias is no tensor it knows", "merge"),
        "modules_to_save": Answer("refuses", "modules_to_save must be null", "merge"),
        "tokens": Answer("refuses", "unless it has --max-lora-trainable-tokens, and enough of them", "merge"),
        "embedding": _TAKES,
        "head": _TAKES,
        "experts": _TAKES,
        "replicated": _LAYERS,
        "changed_base": _BASE,
        "pattern": _TAKES,
    },
    ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
)

SGLANG = Engine(
    "SGLang",
    "sglang/srt/lora: lora_config.py, lora.py, lora_manager.py, mem_pool.py, utils.py (0.5.10)",
    {
        "prompt": _NO_PROMPTS,
        "structure": _NO_STRUCTURE,
        "method": Answer("refuses", "peft_type must be LORA", "to_lora"),
        "dora": Answer("refuses", "lora_magnitude_vector is taken for a factor of another shape", "merge"),
        "kasa": Answer("refuses", "lora_diag is taken for a factor of another shape", "merge"),
        "bdlora": _BLOCKS,
        "qalora": _COLUMNS,
        "sampled": Answer("refuses", "the sampler's tensors are taken for factors of another shape", "merge"),
        "velora": Answer("refuses", "lora_velora_embed is taken for a factor of another shape", "merge"),
        "alora": _ALL_TOKENS,
        "rslora": Answer("differs", "the scale is lora_alpha / r (sgl-project/sglang issue 40835)", "scale"),
        "rank_pattern": Answer("refuses", "every factor must have rank r", "merge"),
        "alpha_pattern": Answer("differs", "the scale is lora_alpha / r on all modules", "merge"),
        "bias": Answer("differs", "biases are left out", "merge"),
        "lora_bias": Answer("differs", "lora_B.bias is left out", "merge"),
        "modules_to_save": Answer("differs", "they are left out", "merge"),
        "tokens": Answer("differs", "they are left out", "merge"),
        "embedding": _TAKES,
        "head": _TAKES,
        "experts": Answer("refuses", "experts are read one by one, or as stacks of three dimensions", "merge"),
        "replicated": _LAYERS,
        "changed_base": _BASE,
        "pattern": Answer("refuses", "target_modules must be a list", "targets"),
    },
)

LLAMA_CPP = Engine(
    "llama.cpp",
    "convert_lora_to_gguf.py and src/llama-adapter.h (2026)",
    {
        "prompt": _NO_PROMPTS,
        "structure": _NO_STRUCTURE,
        "method": Answer("refuses", "lora_alpha and tensors named lora_A and lora_B are required", "to_lora"),
        "dora": Answer("refuses", "lora_magnitude_vector is no tensor it knows", "merge"),
        "kasa": Answer("refuses", "lora_diag is no tensor it knows", "merge"),
        "bdlora": _BLOCKS,
        "qalora": _COLUMNS,
        "sampled": Answer("refuses", "the sampler's tensors are none it knows", "merge"),
        "velora": Answer("refuses", "lora_velora_embed is no tensor it knows", "merge"),
        "alora": _TAKES,
        "rslora": Answer("differs", "the scale is lora_alpha / r", "scale"),
        "rank_pattern": _TAKES,  # the scale is lora_alpha by the rank of the tensor
        "alpha_pattern": Answer("differs", "one lora_alpha is kept for all modules", "merge"),
        "bias": Answer("refuses", "a bias is no tensor it knows", "merge"),
        "lora_bias": Answer("refuses", "lora_B.bias is no tensor it knows", "merge"),
        "modules_to_save": Answer("refuses", "only norms may be there in full", "merge"),
        "tokens": Answer("refuses", "trainable_tokens_delta is no tensor it knows", "merge"),
        "embedding": _TAKES,
        "head": _TAKES,
        "experts": Answer("refuses", "experts.base_layer is no tensor of the base model", "merge"),
        "replicated": _LAYERS,
        "changed_base": _BASE,
        "pattern": _TAKES,
    },
    format=Answer("refuses", "adapters are read from GGUF files (convert_lora_to_gguf.py makes them)", "format"),
)

MLX = Engine(
    "MLX (mlx-lm)",
    "mlx_lm/tuner: utils.py, lora.py, dora.py (0.32.2)",
    {
        "prompt": _NO_PROMPTS,
        "structure": _NO_STRUCTURE,
        "method": Answer("refuses", "there are LoRA and DoRA only", "to_lora"),
        "dora": _TAKES,
        "kasa": Answer("refuses", "there are lora_a, lora_b and m only", "merge"),
        "bdlora": _BLOCKS,
        "qalora": _COLUMNS,
        "sampled": Answer("refuses", "there are lora_a, lora_b and m only", "merge"),
        "velora": _TAKES,  # what it keeps is for training, and left out of the other format
        "alora": _ALL_TOKENS,
        "rslora": _TAKES,  # the scale itself is written
        "rank_pattern": Answer("refuses", "there is one rank", "merge"),
        "alpha_pattern": Answer("differs", "there is one scale", "merge"),
        "bias": Answer("refuses", "there are lora_a, lora_b and m only", "merge"),
        "lora_bias": Answer("refuses", "there are lora_a, lora_b and m only", "merge"),
        "modules_to_save": Answer("refuses", "there are lora_a, lora_b and m only", "merge"),
        "tokens": Answer("refuses", "there are lora_a, lora_b and m only", "merge"),
        "embedding": _TAKES,
        "head": _TAKES,
        "experts": Answer("refuses", "stacks of experts have factors of three dimensions there", "merge"),
        "replicated": _LAYERS,
        "changed_base": _BASE,
        "pattern": _TAKES,
    },
    format=Answer("refuses", "adapters.safetensors and another adapter_config.json are read", "format"),
)

#: by the name that a command takes
ENGINES: dict[str, Engine] = {"vllm": VLLM, "sglang": SGLANG, "llama.cpp": LLAMA_CPP, "mlx": MLX}


def findings(engine: str, content: Content, names: Iterable[str] = ()) -> list[Finding]:
    """What an engine does not take as it is; empty where the saved folder can be served.

    Args:
        engine: one of `ENGINES`.
        content: `adapter_config.json`, read.
        names: the names of the adapter's tensors in its file; without them, LoRA on embeddings and on the output layer
            is not seen.

    Returns:
        What is refused, then what differs, and last the engine's format. Of a method that is no LoRA, that alone.

    Raises:
        ValueError: there is no such engine.
    """
    if engine not in ENGINES:
        raise ValueError(f"Unknown engine {engine!r}; there are {', '.join(ENGINES)}.")
    row, names = ENGINES[engine], tuple(names)
    has = [key for key, feature in FEATURES.items() if feature.has(content, names)]
    has = next(([key] for key in _WHOLE if key in has), has)
    found = [
        Finding(FEATURES[key].title, answer.verdict, answer.why, answer.remedy)
        for key in has
        if (answer := row.answers[key]).verdict != "takes"
    ]
    rank = _largest_rank(content)
    if row.ranks and rank > row.ranks[-1] and "method" not in has:
        found.append(Finding(f"a rank of {rank}", "refuses", f"the largest is {row.ranks[-1]}", "merge"))
    found.sort(key=lambda entry: entry.verdict == "differs")
    if row.format is not None and not any(key in _WHOLE for key in has):
        found.append(Finding("the files", row.format.verdict, row.format.why, row.format.remedy))
    return found


def _largest_rank(content: Content) -> int:
    return max([int(content.get("r") or 0), *map(int, (content.get("rank_pattern") or {}).values())])


def options(engine: str, content: Content) -> list[str]:
    """Options that an engine has to be started with for an adapter that it takes.

    Args:
        engine: one of `ENGINES`.
        content: `adapter_config.json`, read.
    """
    rank = _largest_rank(content)
    if engine == "vllm":
        room = next((size for size in VLLM.ranks if size >= rank), 0)
        return ["--enable-lora", *([f"--max-lora-rank {room}"] if room > 16 else [])]  # 16 is what it has anyway
    return ["--enable-lora", f"--max-lora-rank {rank}"] if engine == "sglang" else []
