"""An adapter put on a model, with the starts that have to see the data first (EVA, CorDA, LoRA-GA)."""

from __future__ import annotations

from typing import Any

import torch
from tqdm import tqdm

import peft
from peft.tuners.lora.preprocess import preprocess_corda

#: batches that a start sees
BATCHES = 16


def data_driven(base: Any, plan: Any, collator: Any, out: Any) -> Any:
    """`base` with the adapter of `plan`; a start that needs data is run on the first batches of the training set."""
    config, start = plan.config, getattr(plan.config, "init_lora_weights", None)
    if start not in ("eva", "corda", "lora_ga"):
        return peft.get_peft_model(base, config)
    rows = plan.training.select(range(min(len(plan.training), BATCHES * plan.options.batch_size)))
    batches = torch.utils.data.DataLoader(rows.to_list(), plan.options.batch_size, collate_fn=collator)
    out.print(f"The start {start!r} looks at {len(rows)} examples")
    if start == "eva":
        model = peft.get_peft_model(base, config, low_cpu_mem_usage=True)
        peft.initialize_lora_eva_weights(model, batches)
        return model

    def over() -> None:
        for batch in tqdm(batches, start, leave=False, disable=not out.is_terminal or out.quiet):
            loss = base(**{name: value.to(base.device) for name, value in batch.items()}).loss
            if loss.requires_grad:  # LoRA-GA looks at gradients, CorDA at inputs alone
                loss.backward()

    look = peft.preprocess_loraga if start == "lora_ga" else preprocess_corda
    look(base, config, over)
    return peft.get_peft_model(base, config)
