"""LoRA in GGUF, as llama.cpp reads it (`--lora`), through the package `gguf`.

A file holds `blk.0.attn_q.weight.lora_a` [r, in] and `.lora_b` [out, r] for `model.layers.0.self_attn.q_proj`, and
one alpha; a change is scaled by alpha / r, with the r of its own factors. Of an embedding, A is transposed. The query
and key rows of some models stand in another order, for llama.cpp rotates neighbours where transformers rotates halves.
Facts are those of llama.cpp's convert_lora_to_gguf.py and of the conversions of its models.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from peft.folder import replace_files
from peft.lora_tools.formats import config_of_modules, scaled_factors

#: model type -> (architecture in GGUF, whether query and key rows are in llama.cpp's own order)
ARCHITECTURES: dict[str, tuple[str, bool]] = {
    "llama": ("LLAMA", True), "mistral": ("LLAMA", True), "mixtral": ("LLAMA", True), "granite": ("GRANITE", True),
    "smollm3": ("SMOLLM3", True), "olmo": ("OLMO", True), "olmo2": ("OLMO2", False), "qwen2": ("QWEN2", False),
    "qwen2_moe": ("QWEN2MOE", False), "qwen3": ("QWEN3", False), "qwen3_moe": ("QWEN3MOE", False),
    "gemma": ("GEMMA", False), "gemma2": ("GEMMA2", False), "gemma3_text": ("GEMMA3", False), "phi": ("PHI2", False),
    "phi3": ("PHI3", False), "starcoder2": ("STARCODER2", False), "cohere": ("COMMAND_R", False),
}  # fmt: skip
_EMBEDDING = "token_embd"


def write_gguf(path: str | os.PathLike, config: Any, tensors: Mapping[str, Tensor], base: Any) -> None:
    """Writes a LoRA as a GGUF adapter, in float32.

    Args:
        path: the file; replaced whole, if it is there.
        config: of the adapter.
        tensors: by the names that this library's files have for them.
        base: the base model's configuration (transformers).

    Raises:
        ValueError: the model is not one whose conversion is known, or the adapter holds what GGUF has no place for.
    """
    import gguf

    names, architecture, permuted = _names(base)
    alpha, factors = scaled_factors(config, tensors, "llama.cpp")
    out: dict[str, Tensor] = {}
    for name, leaves in factors.items():
        place = names.get_name(name)
        tied = getattr(base, "tie_word_embeddings", False)
        if place is None or (tied and place in (_EMBEDDING, "output")):
            why = "which llama.cpp does not adapt where it is tied" if place else "for which GGUF has no name"
            raise ValueError(f"The adapter changes {name}, {why}.")
        heads = _heads(base, name) if permuted else 0
        out[f"{place}.weight.lora_a"] = leaves["A"].T if place == _EMBEDDING else leaves["A"]
        out[f"{place}.weight.lora_b"] = _rows(leaves["B"], heads, 2) if heads else leaves["B"]

    def write(file: str) -> None:
        writer = gguf.GGUFWriter(file, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        if config.alora_invocation_tokens:
            tokens = gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS
            kinds = gguf.GGUFValueType
            writer.add_key_value(tokens, config.alora_invocation_tokens, kinds.ARRAY, kinds.UINT32)
        for name, tensor in out.items():
            writer.add_tensor(name, tensor.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    folder, file = os.path.split(os.path.abspath(path))
    replace_files(folder, {file: write})


def read_gguf(path: str | os.PathLike, base: Any, modules: Iterable[str]) -> tuple[Any, dict[str, Tensor]]:
    """(configuration, tensors) of a GGUF adapter.

    Args:
        path: the file.
        base: the base model's configuration (transformers).
        modules: names of the base model's modules.

    Raises:
        ValueError: the file is no LoRA, is for another architecture, or names what `modules` does not hold.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        facts = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{os.fspath(path)} is damaged or no GGUF file: {error}") from error
    kind = facts.get("general.type"), facts.get(gguf.Keys.Adapter.TYPE)
    if kind != ("adapter", "lora"):
        raise ValueError(f"{os.fspath(path)} holds {kind[1] or kind[0] or 'a model'}, not an adapter with LoRA.")
    names, architecture, permuted = _names(base)
    if facts["general.architecture"] != architecture:
        raise ValueError(f"The adapter is for {facts['general.architecture']}, the base model is a {architecture}.")
    known = {names.get_name(name): name for name in modules}
    found: dict[str, dict[str, Tensor]] = {}
    alpha = torch.tensor(facts[gguf.Keys.Adapter.LORA_ALPHA])
    for entry in reader.tensors:
        place, _, side = entry.name.rpartition(".weight.lora_")
        if place not in known:
            raise ValueError(f"{entry.name!r}: the base model has no module of that name.")
        tensor = torch.from_numpy(entry.data.copy())
        name = known[place]
        heads = _heads(base, name) if permuted else 0
        if side == "a" and place == _EMBEDDING:
            tensor = tensor.T
        if side == "b" and heads:
            tensor = _rows(tensor, heads, tensor.shape[0] // heads // 2)
        found.setdefault(name, {"alpha": alpha})[f"lora_{side.upper()}.weight"] = tensor
    return config_of_modules(found, path, embeddings={known.get(_EMBEDDING, "")})


def _names(base: Any) -> tuple[Any, str, bool]:
    """(gguf's table of names for a model, its architecture there, whether its query and key rows are permuted)"""
    import gguf

    if base.model_type not in ARCHITECTURES:
        raise ValueError(f"llama.cpp's {base.model_type} is not known here; known are {', '.join(ARCHITECTURES)}.")
    name, permuted = ARCHITECTURES[base.model_type]
    arch = gguf.MODEL_ARCH[name]
    return gguf.get_tensor_name_map(arch, base.num_hidden_layers), gguf.MODEL_ARCH_NAMES[arch], permuted


def _heads(base: Any, name: str) -> int:
    """How many heads the rows of a projection are for, where it is rotated, else 0."""
    if name.endswith("q_proj"):
        return base.num_attention_heads
    return (getattr(base, "num_key_value_heads", None) or base.num_attention_heads) if name.endswith("k_proj") else 0


def _rows(b: Tensor, heads: int, parts: int) -> Tensor:
    """The rows [heads, parts, rest] of `b` as [heads, rest, parts]: halves become neighbours, or back."""
    return b.view(heads, parts, -1, b.shape[1]).transpose(1, 2).reshape(b.shape)
