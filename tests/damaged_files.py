"""Valid adapters, and what can be done to their files: damage and malice, drawn from a number."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import shutil
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import peft
import tiny_models
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_config, get_peft_model
from peft.errors import AdapterFileError

CONFIG, WEIGHTS, PICKLE, CARD = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "README.md"
#: the folder beside the adapter's that nothing may touch
CANARY = "canary"


def lora(**fields) -> LoraConfig:
    return LoraConfig(**{"target_modules": ["lin0", "lin1"], "r": 4, "init_lora_weights": False, **fields})


def saved(folder: Path, config: PeftConfig | None = None, model: torch.nn.Module | None = None, **options) -> Path:
    torch.manual_seed(1)
    get_peft_model(model or tiny_models.MLP(), config or lora()).save_pretrained(folder, **options)
    return folder


def change(folder: Path, **fields) -> None:
    """Writes fields into the configuration of a saved adapter."""
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**content, **fields}))


def refused(folder: Path, *words: str, model: torch.nn.Module | None = None, error: type = AdapterFileError) -> str:
    """Loads what has to be refused at once, leaving the model as it was; the error names the folder and `words`."""
    model = model or tiny_models.MLP()
    before, start = tiny_models.state(model), time.process_time()
    with warnings.catch_warnings(), pytest.raises(error) as raised:
        warnings.simplefilter("ignore")
        PeftModel.from_pretrained(model, folder)
    assert time.process_time() - start < 2
    tiny_models.assert_same_state(model, before)
    for word in (str(folder), *words):
        assert word in str(raised.value), (word, str(raised.value))
    return str(raised.value)


# ---- the valid adapters


def seeds() -> list[dict[str, Any]]:
    """Configurations, each with the base model that it is for."""
    lin, text = {"target_modules": ["lin0", "lin1"]}, {"task_type": "CAUSAL_LM"}
    qv = {"target_modules": ["q_proj", "v_proj"], **text}
    return [
        {"peft_type": "LORA", **lin},
        {"peft_type": "LORA", "target_modules": ".*lin.", "rank_pattern": {"lin0": 4}, "alpha_pattern": {"lin1": 3}},
        {"peft_type": "LORA", **lin, "bias": "all"},
        {"peft_type": "LORA", **lin, "use_dora": True, "use_rslora": True},
        {"peft_type": "LORA", "target_modules": ["lin0"], "modules_to_save": ["lin1"]},
        {"peft_type": "LORA", **lin, "r": 2, "init_lora_weights": "pissa_niter_2"},
        {"peft_type": "LORA", **qv, "layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"peft_type": "LORA", **qv, "layer_replication": [[0, 2], [1, 2]]},
        {"peft_type": "LORA", "target_modules": ["embed_tokens"], "trainable_token_indices": None, **text},
        {"peft_type": "LORA", **qv, "trainable_token_indices": [1, 2]},
        {"peft_type": "LOHA", **lin},
        {"peft_type": "LOKR", **lin},
        {"peft_type": "IA3", **lin, "feedforward_modules": ["lin1"]},
        {"peft_type": "VERA", **lin},
        {"peft_type": "OFT", **lin, "oft_block_size": 8, "r": 0},
        {"peft_type": "BOFT", **lin, "boft_block_size": 4},
        {"peft_type": "HRA", **lin},
        {"peft_type": "LN_TUNING", "target_modules": ["norm"], **text},
        {"peft_type": "SHIRA", **lin, "r": 2},
        {"peft_type": "MISS", **lin, "r": 4},
        {"peft_type": "ADALORA", **lin, "total_step": 100},
        {"peft_type": "FOURIERFT", **lin, "n_frequency": 20},
        {"peft_type": "VBLORA", **lin, "num_vectors": 8, "vector_length": 4},
        {"peft_type": "RANDLORA", **lin, "r": 4},
        {"peft_type": "POLY", **lin},
        {"peft_type": "TRAINABLE_TOKENS", "target_modules": ["embed_tokens"], "token_indices": [1, 2], **text},
        {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3, **text},
        {"peft_type": "P_TUNING", "num_virtual_tokens": 3, "encoder_hidden_size": 8, **text},
        {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3, **text},
        {"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 3, "num_tasks": 2, **text},
        {"peft_type": "ADAPTION_PROMPT", "adapter_layers": 1, "adapter_len": 3, **text},
    ]


def base_for(seed: dict[str, Any]) -> torch.nn.Module:
    return tiny_models.llama() if "task_type" in seed else tiny_models.MLP()


def save_seeds(folder: Path) -> list[tuple[dict[str, Any], Path]]:
    """Every valid adapter, saved."""
    places = []
    for number, seed in enumerate(seeds()):
        torch.manual_seed(number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(base_for(seed), get_peft_config(copy.deepcopy(seed)))
            model.save_pretrained(folder / str(number))
        places.append((seed, folder / str(number)))
    return places


# ---- what is done to them

NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**400, 1e308, -1e308, float("nan"), float("inf"), 0.5, -0.5, 1.5,
    "", "x", "lin0", "(a+)+$", "(.*.*)*=", "(.*)(.*)(.*)(.*)(.*)(.*)(.*)x", "(", "[", "\\", "(?P<a>", "(?i",
    "a{99999}", "a" * 300 + "+" * 1, "(" * 5000, "(a?){40}a{40}", r"(\w+)\1",
    "(((((a{99}){99}){99}){99}){99})", "\x00", "a\x00b", "..", "../../x", "/etc/passwd", "\ud800", "x" * 100_000,
    "all-linear", "LORA", "SEQ_CLS", "pissa_niter_1000000000", "gaussian", "eva", "corda", "loftq", "all",
    "lora_only", "evil.module", "megatron.evil", "TEXT",
    [], [None], [[]], [1, "a"], ["lin0", None], [""], ["x"] * 10_000, [2**63], [-1], [0.5], [[0, 10**9]], [[0, 1]] * 9,
    [[1, 0]], [float("nan")], {}, {"a": None}, {"(a+)+$": 8}, {"": 1}, {"lin0": 10**9}, {"lin0": "x"}, {"lin0": -1},
    {"lin0": [None]}, {"lin(": 2}, {"a": {"b": {}}}, {"trust_remote_code": True},
    {"loftq_bits": 4, "loftq_iter": 10**9},
    {"x": "../../x"}, {f"m{i}": 2 for i in range(5000)},
]  # fmt: skip


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


def damage_config(rng: random.Random, folder: Path) -> str:
    path = folder / CONFIG
    content = json.loads(path.read_text())
    kind = rng.randrange(7)
    if kind < 4:
        field = rng.choice(sorted(content))
        value = rng.choice(NASTY)
        if rng.random() < 0.3:
            old = content[field]
            if isinstance(old, (int, float)) and not isinstance(old, bool):
                value = rng.choice([old * 10 ** rng.randrange(1, 20), -old, old + 1, float(old), str(old)])
            elif isinstance(old, list) and old:
                value = [*old, rng.choice(NASTY)]
            elif isinstance(old, dict):
                value = {**old, "extra": rng.choice(NASTY)}
            elif isinstance(old, str):
                value = rng.choice([f"({old}+)+$", old + "x", old.lower(), [old], old[:-1]])
        content[field] = value
        path.write_text(json.dumps(content), errors="surrogatepass")
        return f"config {field}={str(value)[:60]!r}"
    if kind == 4:
        if rng.random() < 0.5:
            field = rng.choice(sorted(content))
            del content[field]
            said = f"config without {field}"
        else:
            content[rng.choice(["new_field", "layers", "__class__", ""])] = rng.choice(NASTY)
            said = "config with an unknown field"
        path.write_text(json.dumps(content))
        return said
    if kind == 5:
        content["peft_type"] = rng.choice([*method_names(), "lora", "BONE", "X" * 50])
        path.write_text(json.dumps(content))
        return f"config of {content['peft_type']}"
    text = path.read_bytes()
    choices: dict[str, Callable[[], bytes]] = {
        "nothing": lambda: b"",
        "list": lambda: b"[]",
        "null": lambda: b"null",
        "number": lambda: b"1e999",
        "long number": lambda: b'{"peft_type": "LORA", "r": ' + b"9" * 10_000 + b"}",
        "deep": lambda: deep(100_000).encode(),
        "deep field": lambda: b'{"peft_type": "LORA", "megatron_config": {"a": ' + deep(900).encode() + b"}}",
        "deep object": lambda: b'{"peft_type": "LORA", "auto_mapping": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}",
        "latin": lambda: text.replace(b"LORA", b"L\xd6RA"),
        "utf16": lambda: text.decode().encode("utf-16"),
        "bom": lambda: b"\xef\xbb\xbf" + text,
        "nul": lambda: text.replace(b'"', b'"\x00', 1),
        "cut": lambda: text[: rng.randrange(len(text))],
        "flipped": lambda: flipped(rng, text),
        "spaces": lambda: text + b" " * 20_000_000,
    }
    name = rng.choice(sorted(choices))
    path.write_bytes(choices[name]())
    return f"config {name}"


def method_names() -> list[str]:
    return sorted(kind.value for kind in peft.PeftType)


def flipped(rng: random.Random, content: bytes, most: int = 8) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.randint(1, most)):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def damage_weights(rng: random.Random, folder: Path) -> str:
    path = folder / WEIGHTS
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    kind = rng.choice(["cut", "flipped", "header", "length", "entry", "tensors", "empty", "folder", "gone"])
    if kind == "cut":
        path.write_bytes(content[: rng.randrange(len(content))])
    elif kind == "flipped":
        path.write_bytes(flipped(rng, content))
    elif kind == "header":
        path.write_bytes(content[:8] + flipped(rng, content[8 : 8 + size], 3) + body)
    elif kind == "length":
        length = rng.choice([0, 1, 2**31, 2**40, 2**63, 2**64 - 1, size - 1, size + 1, 90_000_000])
        path.write_bytes(struct.pack("<Q", length) + content[8:])
    elif kind == "entry":
        name = rng.choice([key for key in header if key != "__metadata__"])
        part, value = rng.choice(
            [
                ("dtype", rng.choice(["I64", "BOOL", "F16", "F64", "C64", "X", "F8_E4M3", None])),
                ("shape", rng.choice([[], [10**12], [2**40, 2**40], [-1, 4], [0], None, ["4"]])),
                ("data_offsets", rng.choice([[0, 10**12], [5, 1], [], None, [-4, 4]])),
            ]
        )
        header[name][part] = value
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + body)
        return f"weights {part}={value}"
    elif kind == "tensors":
        tensors = load_file(path)
        said = change_tensors(rng, tensors)
        save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path)
        return said
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
        if kind == "folder":
            path.mkdir()
    return f"weights {kind}"


def change_tensors(rng: random.Random, tensors: dict[str, torch.Tensor]) -> str:
    kind = rng.choice(["dtype", "nan", "shape", "name", "drop", "all dropped", "base", "raw names", "extra", "scalar"])
    key = rng.choice(sorted(tensors))
    value = tensors[key]
    if kind == "dtype":
        dtype = rng.choice([torch.int64, torch.bool, torch.uint8, torch.float64, torch.bfloat16, torch.complex64])
        tensors[key] = value.to(dtype)
        return f"tensors {dtype}"
    if kind == "nan":
        filled = value.float().flatten().clone()
        filled[rng.randrange(max(filled.numel(), 1)) :] = rng.choice([float("nan"), float("inf"), -1e38])
        tensors[key] = filled.view(value.shape)
    elif kind == "shape":
        value = value if value.dim() else value[None]
        turned = value.transpose(0, -1)
        tensors[key] = rng.choice([turned, value.flatten(), value[:1], value[None], torch.zeros(0)])
    elif kind == "name":
        name = rng.choice([key + "x", key[:-3], "x." + key, key.upper(), "", "." * 50, key.split(".")[-1]])
        tensors[name] = tensors.pop(key)
    elif kind == "drop":
        del tensors[key]
    elif kind == "all dropped":
        tensors.clear()
    elif kind == "base":
        tensors |= {f"base_model.model.{name}": torch.full(shape, 7.0) for name, shape in SHAPES.items()}
    elif kind == "raw names":
        for name in sorted(tensors):
            tensors[name.replace(".weight", ".default.weight")] = tensors.pop(name)
    elif kind == "extra":
        tensors |= {f"{key}.{i}": torch.zeros(1) for i in range(rng.choice([1, 3000]))}
    else:
        tensors[key] = torch.tensor(1.0)
    return f"tensors {kind}"


#: tensors of the base models
SHAPES = {
    "lin0.weight": (24, 16), "lin0.base_layer.weight": (24, 16), "lin1.bias": (4,), "model.norm.weight": (32,),
    "lm_head.weight": (40, 32), "model.layers.0.self_attn.q_proj.weight": (32, 32),
    "model.layers.0.self_attn.o_proj.base_layer.weight": (32, 32),
}  # fmt: skip


class Harm:
    """Leaves a trace where a pickle that holds it is allowed to run code."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def damage_pickle(rng: random.Random, folder: Path) -> str:
    tensors: dict[Any, Any] = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    key = next(iter(tensors))
    legacy = rng.random() < 0.3
    kind = rng.choice(
        ["cut", "flipped", "harm", "plain", "root", "value", "key", "sparse", "wide", "zip", "tensors", "zeros"]
    )
    content: Any = tensors
    if kind == "harm":
        tensors[key] = Harm(folder.parent / CANARY / "harm")
    elif kind == "root":
        content = rng.choice([[1], "text", None, torch.ones(2), {"a": {"b": torch.ones(2)}}, 5])
    elif kind == "value":
        tensors[key] = rng.choice([1, "text", None, [torch.ones(2)], torch.nn.Parameter(torch.ones(2)), {}])
    elif kind == "key":
        tensors[rng.choice([1, None, ("a",), b"x"])] = tensors.pop(key)
    elif kind == "sparse":
        tensors[key] = tensors[key].to_sparse()
    elif kind == "wide":
        tensors[key] = torch.ones(1).expand(2**40)
    elif kind == "tensors":
        change_tensors(rng, tensors)
    path = folder / PICKLE
    if kind == "plain":
        path.write_bytes(pickle.dumps({key: 1}))
        return "pickle plain"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    data = path.read_bytes()
    if kind == "cut":
        path.write_bytes(data[: rng.randrange(len(data))])
    elif kind == "flipped":
        path.write_bytes(flipped(rng, data))
    elif kind == "zip":
        path.write_bytes(b"PK\x03\x04" + data[4 : rng.randrange(5, len(data))] + b"PK\x05\x06" + b"\0" * 18)
    elif kind == "zeros":
        path.write_bytes(b"\0" * rng.randrange(1, 10_000))
    return f"pickle {kind}{' legacy' if legacy else ''}"


def damage_folder(rng: random.Random, folder: Path) -> str:
    canary = folder.parent / CANARY
    kind = rng.choice(["link", "link inside", "file link", "strays", "fifo", "config folder", "note", "committed"])
    saved = folder / ".peft-saved"
    if kind == "link":
        saved.symlink_to(canary)
    elif kind == "link inside":
        saved.mkdir()
        (saved / "x").symlink_to(canary)
    elif kind == "file link":
        (saved / "0123456789ab").mkdir(parents=True)
        (saved / "0123456789ab" / CONFIG).symlink_to(canary / "inside" / CONFIG)
    elif kind == "strays":
        (saved / "0123456789ab" / "sub").mkdir(parents=True)
        (saved / "0123456789ab" / rng.choice(["-..", "evil.py", "tokenizer.json", "-README.md"])).write_text("x")
        (saved / "stray").write_text("x")
    elif kind == "fifo":
        name = rng.choice([CONFIG, WEIGHTS])
        (folder / name).unlink()
        os.mkfifo(folder / name)
    elif kind == "config folder":
        (folder / CONFIG).unlink()
        (folder / CONFIG).mkdir()
    elif kind == "note":
        (saved / "0123456789ab").mkdir(parents=True)
        (saved / "0123456789ab" / f"-{WEIGHTS}").write_text("")
    else:
        (saved / "0123456789ab").mkdir(parents=True)
        shutil.copy(folder / CONFIG, saved / "0123456789ab" / CONFIG)
    return f"folder {kind}"


def damage(number: int, folder: Path) -> str:
    """Does what input `number` stands for to the adapter in `folder`."""
    rng = random.Random(number)
    kind = rng.choices([damage_config, damage_weights, damage_pickle, damage_folder], [10, 6, 4, 1])[0]
    said = [kind(rng, folder)]
    if rng.random() < 0.15 and (folder / CONFIG).is_file() and kind is not damage_config:
        said.append(damage_config(rng, folder))
    return ", ".join(said)
