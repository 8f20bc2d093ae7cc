"""What `peft estimate` says beside the peak of a process that trains: `python benchmarks/estimate.py [NAME ...]`.

Each row is one `peft train` of two steps in a process of its own, on a model with random weights; its peak is the
largest resident size less what the process has after the imports.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SIZES = dict(vocab_size=16000, hidden_size=512, num_hidden_layers=8, num_attention_heads=8)
SIZES |= dict(max_position_embeddings=1024, bos_token_id=0, eos_token_id=0)
#: name -> (model, options of both commands, batch size, length)
ROWS: dict[str, tuple[str, str, int, int]] = {
    "lora, all linear": ("llama", "--r 16 --target-modules all-linear", 4, 256),
    "lora, twice the batch": ("llama", "--r 16 --target-modules all-linear", 8, 256),
    "lora, four times the length": ("llama", "--r 16 --target-modules all-linear", 2, 1024),
    "lora, rank 256": ("llama", "--r 256 --target-modules all-linear", 4, 256),
    "lora, checkpointing": ("llama", "--r 16 --target-modules all-linear --gradient-checkpointing true", 8, 512),
    "lora, bfloat16": ("llama", "--r 16 --target-modules all-linear --dtype bfloat16", 4, 256),
    "dora": ("llama", "--use-dora true --target-modules all-linear", 4, 256),
    "vera": ("llama", "--method vera", 4, 256),
    "prefix tuning": ("llama", "--method prefix-tuning", 4, 256),
    "lora on GPT-2": ("gpt2", "--r 16", 4, 256),
}
CHILD = """
import json, re, resource, sys
import datasets, matplotlib.figure, rich.console, sklearn.metrics, torch, transformers.trainer, trl
from peft.cli import main, train
import peft.cli.watch, transformers.models.llama.modeling_llama, transformers.models.gpt2.modeling_gpt2
torch.nn.Linear(256, 256)(torch.ones(256, 256)).sum().backward()
now = int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])
assert main(sys.argv[1:]) == 0
print(json.dumps((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - now) * 1024))
"""


def _make(folder: Path) -> None:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(["<end>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    sizes = SIZES | {"intermediate_size": 4 * SIZES["hidden_size"]}
    made = {
        "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)),
        "gpt2": transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES)),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
        plain.save_pretrained(folder / name)


def _measure(folder: Path, row: tuple[str, str, int, int]) -> tuple[float, float]:
    """(bytes as estimated, bytes as they were)"""
    model, words, batch, length = row
    line = [*words.split(), "--batch-size", str(batch)]
    estimate = [sys.executable, "-m", "peft", "estimate", str(folder / model), *line, "--length", str(length), "--json"]
    done = subprocess.run(estimate, check=True, capture_output=True, text=True)
    text = folder / "text.txt"
    text.write_text("x" * (2 * batch * length + 1))
    train = ["train", "--model", str(folder / model), "--data", str(text), *line, "--max-length", str(length)]
    with tempfile.TemporaryDirectory() as output:
        train += ["--max-steps", "2", "--eval-split", "0", "--output", output, "--device", "cpu"]
        child = subprocess.run([sys.executable, "-c", CHILD, *train], capture_output=True, text=True)
    if child.returncode:
        raise SystemExit(child.stderr)
    return json.loads(done.stdout)["peak"], json.loads(child.stdout.splitlines()[-1])


def main(names: list[str]) -> None:
    unknown: Any = set(names) - set(ROWS)
    if unknown:
        raise SystemExit(f"there is no {', '.join(unknown)}; there are {', '.join(ROWS)}")
    with tempfile.TemporaryDirectory() as folder:
        _make(Path(folder))
        for name in names or ROWS:
            said, found = _measure(Path(folder), ROWS[name])
            print(f"| {name} | {said / 1e6:,.0f} MB | {found / 1e6:,.0f} MB | {said / found - 1:+.1%} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
