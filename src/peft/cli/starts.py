"""An adapter put on a model, with the starts that have to see the data first (EVA, CorDA, LoRA-GA)."""

from __future__ import annotations

from typing import Any

import torch

from peft import get_peft_model

#: batches that a start sees
BATCHES = 16


def data_driven(base: Any, plan: Any, collator: Any, out: Any) -> Any:
    """`base` with the adapter of `plan`; a start that needs data is run on the first batches of the training set."""
    config, start = plan.config, getattr(plan.config, "init_lora_weights", None)
    if start not in ("eva", "corda", "lora_ga"):
        return get_peft_model(base, config)
    rows = plan.training.select(range(min(len(plan.training), BATCHES * plan.options.batch_size)))
    batches = torch.utils.data.DataLoader(rows.to_list(), plan.options.batch_size, collate_fn=collator)
    out.print(f"The start {start!r} looks at {len(rows)} examples")
    if start == "eva":
        from peft import initialize_lora_eva_weights

        model = get_peft_model(base, config, low_cpu_mem_usage=True)
        initialize_lora_eva_weights(model, batches)
        return model
    from rich.progress import track

    def over(learn: bool) -> None:
        for batch in track(batches, start, console=out, transient=True):
            with torch.set_grad_enabled(learn):
                loss = base(**{name: value.to(base.device) for name, value in batch.items()}).loss
            if learn:
                loss.backward()

    if start == "corda":
        from peft.tuners.lora.preprocess import preprocess_corda

        preprocess_corda(base, config, lambda: over(False))
    else:
        from peft import LoraGAConfig, preprocess_loraga

        config.lora_ga_config = config.lora_ga_config or LoraGAConfig()
        preprocess_loraga(base, config, lambda: over(True))
    return get_peft_model(base, config)
