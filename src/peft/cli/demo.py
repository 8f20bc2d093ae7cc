"""`peft demo`: the main job from end to end on the embedded default, and a proof that merging changes nothing."""

from __future__ import annotations

import shutil
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch

from peft import AutoPeftModelForCausalLM, PeftModel
from peft.cli.arguments import add_arguments, read_train
from peft.cli.models import AUTO_CLASSES, load_base, write_text
from peft.cli.train import CURVE, train

STEPS = 400
PROMPT = "class Reader"
#: logits are around 10, float32 holds 7 digits
TOLERANCE = 1e-3


def run(args: Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    start = time.perf_counter()
    adapter, merged_folder = Path(args.output), Path(args.output) / "merged"
    settings = {"base-steps": args.base_steps, "max-steps": args.steps or STEPS, "output": args.output, "device": "cpu"}
    settings |= {
        "method": "lora",
        "r": 16,
        "target_modules": "all-linear",
        "lora_alpha": 32,
        "lr": 1e-2,
        "warmup-steps": 10,
        "eval-split": 0.02,
    }
    argv = [text for name, value in settings.items() if value is not None for text in (f"--{name}", str(value))]

    console.rule("1  Train a LoRA, and save it")
    outcome = train(*read_train([*argv, "--overwrite"], add_arguments("train", ArgumentParser())), console)
    trained, tokenizer = outcome.model, outcome.tokenizer

    console.rule("2  What the model writes")
    with trained.disable_adapter():
        _show(console, "before", trained, tokenizer)
    text = _show(console, "after", trained, tokenizer)

    console.rule("3  Load it again, and merge it")
    loaded = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
    base = load_base(outcome.base, AUTO_CLASSES["CAUSAL_LM"], dtype=None, device=trained.device)
    merged = PeftModel.from_pretrained(base, adapter).eval().merge_and_unload(safe_merge=True)
    shutil.rmtree(merged_folder, ignore_errors=True)
    merged.save_pretrained(merged_folder)
    tokenizer.save_pretrained(merged_folder)
    stored = load_base(str(merged_folder), AUTO_CLASSES["CAUSAL_LM"], dtype=None, device=trained.device).eval()

    expected, tokens = _answers(trained, tokenizer, text)
    proof = Table(
        "compared with the adapter as trained", "largest difference of a logit", "same 60 greedy tokens", box=None
    )
    holds = True
    for name, model in (
        ("adapter, loaded", loaded),
        ("merged into the base", merged),
        ("merged, saved and loaded", stored),
    ):
        logits, found = _answers(model, tokenizer, text)
        difference = (logits - expected).abs().max().item()
        verdict = _compared(trained, tokens, found)
        holds &= difference < TOLERANCE and verdict != "NO"
        proof.add_row(name, f"{difference:.1e}", verdict)
    console.print(proof)

    console.rule("4  Summary")
    trainable, everything = trained.get_nb_trainable_parameters()
    table = Table("", "parameters", "on disk", box=None)
    table.add_row("base model", f"{everything - trainable:,}", _size(Path(outcome.base)))
    table.add_row("adapter", f"{trainable:,}", _size(adapter, "adapter_*"))
    table.add_row("merged model", f"{merged.num_parameters():,}", _size(merged_folder))
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
    console.print(
        f"\nloss on held-out text: {outcome.before:.2f} before, {outcome.after:.2f} after"
        f"\ntime: {outcome.seconds:.0f} s of fine-tuning, {time.perf_counter() - start:.0f} s in all"
        f"\nloss curve: {adapter / CURVE}\ngo on with: peft inspect {adapter}"
        f'\n            peft generate {adapter} --temperature 0.7 --prompt "{PROMPT}"',
        highlight=False,
    )
    if not holds:
        console.print("[red]The loaded or merged model does not give what the trained one gives.[/red]")
    return 0 if holds else 1


def _show(console: Any, when: str, model: Any, tokenizer: Any) -> str:
    from rich.panel import Panel
    from rich.text import Text

    text = write_text(model, tokenizer, PROMPT, max_new_tokens=100, temperature=0.7, top_k=20, seed=1)
    console.print(Panel(Text(text), title=when, title_align="left", border_style="dim"))
    return text


@torch.no_grad()
def _answers(model: Any, tokenizer: Any, text: str) -> tuple[torch.Tensor, list[int]]:
    """(logits over `text`, the tokens of the prompt and those that the model goes on with, always the likeliest)"""
    logits = model(input_ids=tokenizer(text, return_tensors="pt").input_ids).logits
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    mask, pad = torch.ones_like(prompt), tokenizer.pad_token_id
    written = model.generate(
        input_ids=prompt, attention_mask=mask, max_new_tokens=60, do_sample=False, pad_token_id=pad
    )
    return logits, written[0].tolist()


@torch.no_grad()
def _compared(model: Any, expected: list[int], found: list[int]) -> str:
    """Whether two texts are the same, or the same until the model finds two tokens equally likely: "NO" if neither."""
    if found == expected:
        return "yes"
    at = next((i for i, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]), None)
    if at is None:
        return "NO"
    logits = model(input_ids=torch.tensor([expected[:at]])).logits[0, -1]
    gap = (logits[expected[at]] - logits[found[at]]).abs().item()
    return f"yes, to a tie of two ({gap:.0e})" if gap < TOLERANCE else "NO"


def _size(folder: Path, pattern: str = "model*.safetensors") -> str:
    return f"{sum(path.stat().st_size for path in folder.glob(pattern)) / 1000:,.0f} kB"
