"""`peft convert`: LoRA of other programs and in other layouts; files made smaller, and whole again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from peft import PeftConfig, load_peft_weights
from peft.cli import models
from peft.cli.options import refuse
from peft.lora_tools import experts, gguf, mlx
from peft.lora_tools.formats import module_names, read_lora_file, scaled_factors, write_lora_file

ENGINES = {"gguf": "llama.cpp", "mlx": "mlx"}
ENDINGS = {"kohya": ".safetensors", "diffusers": ".safetensors", "gguf": ".gguf"}


def run(options: Any, *_: Any) -> None:
    is_file = options.to is None or options.source.endswith((".safetensors", ".gguf"))
    refuse(is_file and not os.path.exists(options.source), f"{options.source} is not there")
    models.check_empty(options.output)
    if os.path.isfile(options.source) or mlx.is_mlx(options.source):
        refuse(options.to, f"--to {options.to}: {options.source} is another program's; make an adapter of it first")
        config, tensors = _read(options)
        config.base_model_name_or_path = options.model or config.base_model_name_or_path
        models.write(options.output, config, tensors)
    elif options.to in ("minimal", "full"):
        adapted = models.load_adapted(options.source, options)
        adapted.save_pretrained(options.output, minimal=options.to == "minimal")
        tensors = load_peft_weights(options.output, "cpu")
    else:
        refuse(not options.to, "--to is needed: the form that the adapter is to have, see --help")
        ending = ENDINGS.get(options.to, "")
        other = not options.output.endswith(ending)
        refuse(other, f"--output {options.output}: a file is written, so its name must end with {ending}")
        config, tensors = PeftConfig.from_pretrained(options.source), load_peft_weights(options.source, "cpu")
        _write(options, config, tensors)
    print(f"{len(tensors)} tensors: {options.output}")


def _read(options: Any) -> tuple[Any, dict[str, Any]]:
    if mlx.is_mlx(options.source):
        base = _skeleton(options.model, "mlx-lm's files do not tell what is an embedding")
        embeddings = [name for name, module in base.named_modules() if isinstance(module, torch.nn.Embedding)]
        return mlx.read_mlx(options.source, embeddings)
    if options.source.endswith(".gguf"):
        base = _skeleton(options.model, "GGUF has names of its own for modules")
        return gguf.read_gguf(options.source, base.config, [name for name, _ in base.named_modules()])
    other = not options.source.endswith(".safetensors")
    refuse(other, f"{options.source}: LoRA files end with .safetensors or .gguf")
    names = module_names(options.model) if options.model else None
    return read_lora_file(options.source, part=options.part, names=names)


def _write(options: Any, config: Any, tensors: Mapping[str, Any]) -> None:
    if options.to in ("kohya", "diffusers"):
        return write_lora_file(options.output, config, tensors, options.to, options.part or "unet")
    base = _skeleton(options.model or config.base_model_name_or_path, "the adapter names no base model")
    if options.to in ENGINES:  # what it has no place for is said first, then what does not fit the base model
        scaled_factors(config, tensors, ENGINES[options.to])
        models.load_adapted(options.source, options, empty=True)
    if options.to == "gguf":
        return gguf.write_gguf(options.output, config, tensors, base.config)
    if options.to == "mlx":
        return mlx.write_mlx(options.output, config, tensors, base.config.num_hidden_layers)
    change = experts.fuse_experts if options.to == "fused" else experts.split_experts
    models.write(options.output, *change(config, tensors, base))


def _skeleton(model: Any, why: str) -> Any:
    """The base model without weights.

    Raises:
        OptionError: none is named.
    """
    refuse(not model, f"--model is needed, for {why}")
    source = models.locate(model)
    return models.skeleton(source, models.writer_of(models.config_of(source)).auto)
