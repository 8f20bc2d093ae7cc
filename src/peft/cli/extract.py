"""`peft extract`: a LoRA out of a fine-tuned model and the model that it was made from."""

from __future__ import annotations

from typing import Any

from peft import extract_lora
from peft.cli import models
from peft.cli.options import refuse


def run(options: Any, *_: Any) -> None:
    models.check_empty(options.output)
    base, tuned = (models.config_of(name) for name in (options.base, options.tuned))
    words = f"{options.base} is a {base.model_type} model, but {options.tuned} a {tuned.model_type} model"
    refuse(base.model_type != tuned.model_type, words)
    task: Any = options.task_type or models.writer_of(tuned).peft
    refuse(task not in models.AUTO_CLASSES, f"--task-type takes {', '.join(models.AUTO_CLASSES)}, got {task!r}")
    base, tuned = (models.load_base(name, models.AUTO_CLASSES[task], **models.placed(options), plain=True)
                   for name in (options.base, options.tuned))  # fmt: skip
    found = extract_lora(
        base, tuned, options.rank if options.energy is None else options.energy,
        target_modules=options.target_modules or "all-linear", modules_to_save=options.modules_to_save or None,
        task_type=task, progressbar=True,
    )  # fmt: skip
    found[0].base_model_name_or_path = models.locate(options.base)
    models.write_lora(options.output, found)
