"""`peft merge`: a base model with adapters merged into its weights, as a model of its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from peft.cli import models
from peft.cli.parse import OptionError
from peft.core.layer import AdapterLayer
from peft.core.walk import put_back

INDEX = "model.safetensors.index.json"


def run(options: Any, *_: Any) -> None:
    models.check_empty(options.output)
    first, *others = options.adapters
    weights = options.weights or [1.0] * len(options.adapters)
    if len(weights) != len(options.adapters):
        raise OptionError(f"--weights: {len(weights)} of them for {len(options.adapters)} adapters")
    model = models.load_adapted(first, options, empty=options.by_shard, plain=True)
    tokenizer = models.tokenizer_of(first, model)
    for number, path in enumerate(others):
        model.load_adapter(path, f"adapter{number}")
    names = list(model.peft_config)
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        raise ValueError("a soft prompt is not merged: there are no weights that it could be merged into")
    if any(weight != 1 for weight in weights):
        others = sorted({config.peft_type for config in model.peft_config.values()} - {"LORA"})
        if others:
            raise ValueError(f"--weights are for LoRA, not for {', '.join(others)}")
        model.add_weighted_adapter(names, weights, "weighted", combination_type="cat")
        names = ["weighted"]
    if options.by_shard:
        _by_shard(model, names, Path(options.output))
    else:
        model.merge_and_unload(safe_merge=True, adapter_names=names).save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    print(f"{type(model.get_base_model()).__name__} with {', '.join(options.adapters)} merged: {options.output}")


def _by_shard(model: Any, names: list[str], output: Path) -> None:
    """Merges with the weights of one file of the base model in memory at a time.

    Raises:
        ValueError: the base model's files have other names for its weights than the model.
    """
    from huggingface_hub import snapshot_download

    base = model.get_base_model()
    source = Path(base.config._name_or_path)
    if getattr(base.config, "quantization_config", None):
        raise ValueError(f"--by-shard: the weights of {source} are quantised; they are merged in memory")
    if not source.is_dir():
        source = Path(snapshot_download(str(source), allow_patterns=["*.safetensors", INDEX]))
    opened = {file: safe_open(file, "pt") for file in sorted(source.glob("*.safetensors"))}
    places = {name: tensors for tensors in opened.values() for name in tensors.keys()}  # noqa: SIM118
    parts: dict[str, list[tuple[str, Any]]] = {}
    for key, part in reversed(model.base_model.parts()):  # inner ones first
        parts.setdefault(key.replace(".base_layer", ""), []).append((key, part))
    own = {key: [name for name in places if name.rpartition(".")[0] == key] for key in parts}
    missing = [key for key, found in own.items() if not found]
    if missing or not opened:
        raise ValueError(
            f"--by-shard: {source} has no .safetensors file with the weights of {missing[0] if missing else 'a model'}"
            " under that name (tied weights, and experts that are fused on loading, are merged in memory)"
        )
    output.mkdir(parents=True, exist_ok=True)
    done: dict[str, torch.Tensor] = {}  # merged with a module of an earlier file
    for file, read in opened.items():
        tensors = {name: read.get_tensor(name) for name in read.keys()}  # noqa: SIM118
        for key, found in own.items():
            if tensors.keys() & set(found) and not done.keys() & set(found):
                given = {name.rpartition(".")[2]: places[name].get_tensor(name) for name in found}
                done |= {f"{key}.{name}": tensor for name, tensor in _merged(base, parts[key], given, names).items()}
        tensors |= {name: done.pop(name) for name in tensors if name in done}
        save_file(tensors, output / file.name, read.metadata())
    if (source / INDEX).is_file():
        shutil.copy(source / INDEX, output / INDEX)
    base.config.save_pretrained(output)
    if base.can_generate():
        base.generation_config.save_pretrained(output)


def _merged(
    base: torch.nn.Module, parts: list[tuple[str, Any]], given: dict[str, torch.Tensor], names: list[str]
) -> dict[str, torch.Tensor]:
    """The tensors of a module, by name in it, with all adapters on it merged; it goes to the meta device after that."""
    module: Any = parts[0][1]
    while hasattr(type(module), "wrapped"):
        module = module.wrapped
    dtypes = {name: tensor.dtype for name, tensor in module.named_parameters()}
    module.load_state_dict({name: t.to(dtypes.get(name)) for name, t in given.items()}, strict=False, assign=True)
    for key, part in parts:
        if isinstance(part, AdapterLayer):
            part.merge(True, names)
        module = part.unload(True, names)
        put_back(base, key, module)
    found = {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}
    module.to("meta")
    return found
