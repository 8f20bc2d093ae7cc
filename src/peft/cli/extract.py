"""`peft extract`: a LoRA out of a fine-tuned model and the model that it was made from."""

from __future__ import annotations

import os
from argparse import Namespace

from peft.checkpoint.extract import extract_lora
from peft.checkpoint.files import write_adapter
from peft.cli.models import AUTO_CLASSES, device_of, dtype_of, load_base, task_of


def run(args: Namespace) -> int:
    if os.path.isdir(args.output) and os.listdir(args.output):
        raise ValueError(f"--output {args.output}: the folder is not empty")
    task = args.task_type or task_of(args.tuned)
    if task not in AUTO_CLASSES:
        raise ValueError(f"--task-type takes {', '.join(AUTO_CLASSES)}, got {task!r}")
    dtype, device = dtype_of(args.dtype), device_of(args.device)
    base, tuned = (
        load_base(model, AUTO_CLASSES[task], dtype=dtype, device=device) for model in (args.base, args.tuned)
    )
    config, tensors = found = extract_lora(
        base,
        tuned,
        args.rank if args.energy is None else args.energy,
        target_modules=args.target_modules.split(",") if args.target_modules else "all-linear",
        modules_to_save=args.modules_to_save.split(",") if args.modules_to_save else None,
        task_type=task,
        progressbar=True,
    )
    config.base_model_name_or_path = args.base
    config.inference_mode = True
    write_adapter(args.output, config.to_json_dict(), tensors)
    worst = max(found.errors, key=found.errors.__getitem__)
    size = sum(tensor.numel() for tensor in tensors.values())
    print(
        f"LoRA on {len(found.errors)} modules, {size:,} parameters: {args.output}\n"
        f"Lost of the change: {sum(found.errors.values()) / len(found.errors):.1%} on average,"
        f" {found.errors[worst]:.1%} at most ({worst})"
    )
    return 0
