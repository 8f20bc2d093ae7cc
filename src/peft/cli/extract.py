"""`peft extract`: a LoRA out of a fine-tuned model and the model that it was made from."""

from __future__ import annotations

import os
from typing import Any

from peft import extract_lora
from peft.cli import models


def run(options: Any, *_: Any) -> None:
    models.check_empty(options.output)
    configs = [models.config_of(name) for name in (options.base, options.tuned)]
    kinds = [config.model_type for config in configs]
    if kinds[0] != kinds[1]:
        raise ValueError(f"{options.base} is a {kinds[0]} model, but {options.tuned} a {kinds[1]} model")
    task = options.task_type or models.writer_of(configs[1]).peft
    if task not in models.AUTO_CLASSES:
        raise ValueError(f"--task-type takes {', '.join(models.AUTO_CLASSES)}, got {task!r}")
    base, tuned = (models.load_base(name, models.AUTO_CLASSES[task], **models.placed(options), plain=True)
                   for name in (options.base, options.tuned))  # fmt: skip
    config, tensors = found = extract_lora(
        base, tuned, options.rank if options.energy is None else options.energy,
        target_modules=options.target_modules or "all-linear", modules_to_save=options.modules_to_save or None,
        task_type=task, progressbar=True,
    )  # fmt: skip
    config.base_model_name_or_path = os.path.abspath(options.base) if os.path.isdir(options.base) else options.base
    models.write(options.output, config, tensors)
    size = sum(tensor.numel() for tensor in tensors.values())
    print(f"LoRA on {len(found.errors)} modules, {size:,} parameters: {options.output}")
    print(models.lost(found.errors))
