"""The code block on the page of a method: trains an adapter of it on a small model, and saves it."""

from __future__ import annotations

from typing import Any

TEMPLATE = """\
```python
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peft import {names}, get_peft_model

shape = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=512)
model = LlamaForCausalLM(LlamaConfig(**shape))  # in earnest: AutoModelForCausalLM.from_pretrained(...)
{before}config = {config}
model = get_peft_model(model, config)
model.print_trainable_parameters()

batch = torch.randint(0, 512, (2, 16))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
for step in range(3):
    model(input_ids=batch, labels=batch{forward}).loss.backward()
    optimizer.step()
{after}    optimizer.zero_grad()
model.save_pretrained("{folder}")
```"""


def example(method: str, name: str, text: dict[str, Any]) -> str:
    """The block of a method.

    Args:
        method: its name.
        name: that of its configuration class.
        text: what methods.yaml says of it.
    """
    more: dict[str, str] = text.get("example", {})
    settings = {field: repr(value) for field, value in text.get("settings", {}).items()} | more.get("settings", {})
    given = "".join(f", {field}={value}" for field, value in settings.items())
    return TEMPLATE.format(
        names=", ".join([name, *more.get("names", "").split()]),
        before=more.get("before", ""),
        config=f'{name}(task_type="CAUSAL_LM"{given})',
        forward=more.get("forward", ""),
        after=f"    {more['after']}\n" if "after" in more else "",
        folder=method.lower(),
    )
