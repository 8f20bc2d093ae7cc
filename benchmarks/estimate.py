"""What `peft estimate` says beside the peak of a process that trains: `python benchmarks/estimate.py [NAME ...]`.

Each row is one `peft train` of two steps in a process of its own, on a model with random weights; its peak is the
largest resident size less what the process has after it has trained a tiny model: the libraries' pages come into
memory as they are used, and a forked process begins with none of them (Linux).
"""

from __future__ import annotations

import io
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import datasets  # noqa: F401
import matplotlib.figure  # noqa: F401
import rich.console  # noqa: F401
import sklearn.metrics  # noqa: F401
import torch
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama
import transformers.trainer
import trl  # noqa: F401

from peft import cli
from peft.cli import train  # noqa: F401
from peft.cli.estimate import measure
from peft.cli.parse import read

SIZES = dict(vocab_size=16000, hidden_size=512, num_hidden_layers=8, num_attention_heads=8)
SIZES |= dict(max_position_embeddings=1024, bos_token_id=0, eos_token_id=0)
TINY = dict(vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
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


def _in_a_process(work: Callable[[], float]) -> float:
    """What `work` gives in a process of its own, forked from this one, which has done nothing but import."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        try:
            os.write(writing, str(work()).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading) as answer:
        os.wait()
        return float(answer.read() or "nan")


def _memory(what: str) -> int:
    """Bytes that this process has in memory (VmRSS), or had at most (VmHWM)."""
    return 1024 * int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def _make(folder: Path) -> float:
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(["<end>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    sizes = SIZES | {"intermediate_size": 4 * SIZES["hidden_size"]}
    made = {
        "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)),
        "gpt2": transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES)),
        "tiny": transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | TINY)),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
        plain.save_pretrained(folder / name)
    return 0


def _estimated(line: list[str], length: int) -> float:
    options, fields, _ = read("estimate", [*line, "--length", str(length), "--device", "cpu"])
    return measure(options, fields)[1]["peak"]


def _train(line: list[str], length: int, text: Path) -> None:
    few = ["--max-steps", "2", "--eval-split", "0", "--device", "cpu", "--data", str(text), "--overwrite"]
    few += ["--output", f"{text}.out", "--max-length", str(length)]
    with redirect_stdout(io.StringIO()):
        if cli.main(["train", "--model", *line, *few]):
            raise SystemExit("it did not train")


def _trained(line: list[str], length: int, text: Path) -> float:
    """How much memory two steps of training take at most, beside what the process has before."""
    _train([str(text.parent / "tiny"), "--batch-size", "2"], 32, text)
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    _train(line, length, text)
    return _memory("VmHWM") - before


def main(names: list[str]) -> None:
    unknown: Any = set(names) - set(ROWS)
    if unknown:
        raise SystemExit(f"there is no {', '.join(unknown)}; there are {', '.join(ROWS)}")
    torch.set_num_threads(1)  # a forked process would wait for threads of OpenMP that it does not have
    torch.nn.Linear(256, 256)(torch.ones(256, 256)).sum().backward()
    with tempfile.TemporaryDirectory() as folder:
        _in_a_process(lambda: _make(Path(folder)))
        for number, name in enumerate(names or ROWS):
            model, words, batch, length = ROWS[name]
            line = [f"{folder}/{model}", *words.split(), "--batch-size", str(batch)]
            text = Path(folder) / f"{number}.txt"
            text.write_text("x" * (2 * batch * length + 1))
            said = _in_a_process(lambda line=line, length=length: _estimated(line, length))
            found = _in_a_process(lambda line=line, length=length, text=text: _trained(line, length, text))
            print(f"| {name} | {said / 1e6:,.0f} MB | {found / 1e6:,.0f} MB | {said / found - 1:+.1%} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
