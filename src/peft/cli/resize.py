"""`peft resize`: an adapter as a LoRA of another rank, the nearest there is."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig, convert_to_lora
from peft.cli import models
from peft.cli.options import refuse


def run(options: Any, *_: Any) -> None:
    refuse((options.rank is None) == (options.energy is None), "either --rank or --energy is needed")
    models.check_empty(options.output)
    saved = PeftConfig.from_pretrained(options.adapter)
    factors = saved.peft_type == "LORA" and not getattr(saved, "use_dora", False)  # which tell the change by themselves
    model = models.load_adapted(options.adapter, options, empty=factors)
    found = convert_to_lora(model, options.rank or float(options.energy or 0), progressbar=True)
    models.write_lora(options.output, found)
