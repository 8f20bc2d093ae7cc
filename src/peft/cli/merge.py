"""`peft merge`: a base model with adapters merged into its weights, as a model of its own."""

from __future__ import annotations

import os
from typing import Any

from peft.cli.models import load_adapted
from peft.cli.options import Merge


def check_empty(output: str) -> None:
    """Raises ValueError where something would be overwritten."""
    if os.path.isfile(output) or (os.path.isdir(output) and os.listdir(output)):
        raise ValueError(f"--output {output}: there is a file, or a folder that is not empty")


def run(options: Merge, *_: Any) -> int:
    check_empty(options.output)
    first, *others = options.adapters
    weights = options.weights or [1.0] * len(options.adapters)
    if len(weights) != len(options.adapters):
        raise ValueError(f"--weights: {len(weights)} of them for {len(options.adapters)} adapters")
    model, tokenizer = load_adapted(first, model=options.model, dtype=options.dtype, device=options.device)
    names = ["default", *(f"adapter{number}" for number in range(len(others)))]
    for name, path in zip(names[1:], others, strict=True):
        model.load_adapter(path, name)
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        raise ValueError("a soft prompt is not merged: there are no weights that it could be merged into")
    if any(weight != 1 for weight in weights):
        kinds = {str(getattr(config.peft_type, "value", config.peft_type)) for config in model.peft_config.values()}
        if kinds != {"LORA"}:
            raise ValueError(f"--weights are for LoRA, not for {', '.join(sorted(kinds))}")
        model.add_weighted_adapter(names, weights, "weighted", combination_type="cat")
        names = ["weighted"]
    merged = model.merge_and_unload(safe_merge=True, adapter_names=names)
    merged.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    print(f"{type(merged).__name__} with {', '.join(options.adapters)} merged: {options.output}")
    return 0
