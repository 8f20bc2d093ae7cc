"""An adapter in a training loop of your own: make it, train it, save it, load it, merge it.

    python examples/plain_loop.py

The base model is a small Llama that reads bytes and learns English from Python's own help texts first, so that nothing
is downloaded; put any model and any data in their place.
"""

from __future__ import annotations

import argparse
import inspect
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peft import LoraConfig, PeftModel, get_peft_model


def train(model: torch.nn.Module, text: str, steps: int, lr: float) -> None:
    data = torch.tensor(list(text.encode()))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    model.train()
    for step in range(steps + 1):
        batch = torch.stack([data[start : start + 64] for start in torch.randint(len(data) - 64, (16,)).tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"  step {step:3}  loss {loss.item():.3f}")
    model.eval()


torch.manual_seed(0)
temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)
small = dict(vocab_size=256, hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4)
base = LlamaForCausalLM(LlamaConfig(**small, bos_token_id=0, eos_token_id=0, initializer_range=0.1))
print("base model, on English:")
train(base, "\n".join(topics.values()), steps=200, lr=5e-3)
base.save_pretrained(folder / "base")

base = LlamaForCausalLM.from_pretrained(folder / "base")
model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"))
model.print_trainable_parameters()
print("adapter, on Python:")
train(model, inspect.getsource(argparse), steps=100, lr=5e-3)
model.save_pretrained(folder / "adapter")
print({path.name: f"{path.stat().st_size:,} bytes" for path in sorted((folder / "adapter").iterdir())})

tokens = torch.tensor([list(b"def main(self, text):")])
loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder / "base"), folder / "adapter").eval()
with torch.no_grad():
    expected = model(input_ids=tokens).logits
    print("loaded: largest difference of a logit", (loaded(input_ids=tokens).logits - expected).abs().max().item())
    merged = loaded.merge_and_unload()
    print("merged: largest difference of a logit", (merged(input_ids=tokens).logits - expected).abs().max().item())
