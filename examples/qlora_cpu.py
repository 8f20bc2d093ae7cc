"""QLoRA on a CPU: a small Llama, its linear layers in 4 bits (nf4), and LoRA adapters trained on top.

Takes some seconds; nothing is downloaded. Needs `pip install "peft[quant,train]"`.

The model is made on the spot, saved, and loaded in 4 bits, as one would load a large one. It then learns to count.
"""

from __future__ import annotations

import tempfile

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

WORDS = 32


def load_in_4_bits(folder: str):
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, device_map="cpu")


def counting(rows: int, length: int = 12) -> torch.Tensor:
    """Sequences that count upwards from a random start, modulo the vocabulary: [rows, length]."""
    return (torch.randint(0, WORDS, (rows, 1)) + torch.arange(length)) % WORDS


def train(model, steps: int = 60) -> list[float]:
    """Trains the adapters; returns the loss of each step."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(steps):
        batch = counting(16)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> tuple[float, float]:
    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **shape)).save_pretrained(f"{folder}/base")

        model = prepare_model_for_kbit_training(load_in_4_bits(f"{folder}/base"))
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
        model.print_trainable_parameters()
        losses = train(model.train())
        print(f"loss: {losses[0]:.3f} at the start, {losses[-1]:.3f} after {len(losses)} steps")

        model.save_pretrained(f"{folder}/adapter")  # the adapter alone; it fits the base in any precision
        plain = AutoModelForCausalLM.from_pretrained(f"{folder}/base")
        plain = PeftModel.from_pretrained(plain, f"{folder}/adapter").merge_and_unload()
        batch = counting(16)
        print(f"merged into the base in full precision: {plain(input_ids=batch, labels=batch).loss.item():.3f}")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
