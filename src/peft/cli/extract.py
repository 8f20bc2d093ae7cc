"""`peft extract`: a LoRA out of a fine-tuned model and the model that it was made from."""

from __future__ import annotations

import os
from typing import Any

from peft import extract_lora
from peft.checkpoint.files import write_adapter
from peft.cli import models
from peft.cli.merge import check_empty
from peft.cli.options import Extract


def run(options: Extract, *_: Any) -> int:
    check_empty(options.output)
    task = options.task_type or ("SEQ_2_SEQ_LM" if models.config_of(options.tuned).is_encoder_decoder else "CAUSAL_LM")
    if task not in models.AUTO_CLASSES:
        raise ValueError(f"--task-type takes {', '.join(models.AUTO_CLASSES)}, got {task!r}")
    kinds = [models.config_of(name).model_type for name in (options.base, options.tuned)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"{options.base} is a {kinds[0]} model, but {options.tuned} a {kinds[1]} model")
    dtype, device = models.dtype_of(options.dtype), models.device_of(options.device)
    base, tuned = (
        models.load_base(model, models.AUTO_CLASSES[task], dtype=dtype, device=device, plain=True)
        for model in (options.base, options.tuned)
    )
    config, tensors = found = extract_lora(
        base, tuned, options.rank if options.energy is None else options.energy,
        target_modules=options.target_modules or "all-linear", modules_to_save=options.modules_to_save or None,
        task_type=task, progressbar=True,
    )  # fmt: skip
    config.base_model_name_or_path = os.path.abspath(options.base) if os.path.isdir(options.base) else options.base
    config.inference_mode = True
    write_adapter(options.output, config.to_json_dict(), tensors)
    size = sum(tensor.numel() for tensor in tensors.values())
    print(f"LoRA on {len(found.errors)} modules, {size:,} parameters: {options.output}")
    print(models.lost(found.errors))
    return 0
