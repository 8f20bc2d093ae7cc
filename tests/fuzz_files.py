"""Damaged and hostile adapter files, loaded in processes of their own: `make fuzz`, and a short part in the tests.

Each input is a valid saved adapter with one or two things done to it, all drawn from the number of the input, and is
loaded in a forked process with limits of time and memory. What is looked for: a hang, memory, an obscure error, a
model or a folder that is changed by a call that raises, base weights that are, code that ran, what is not finite and
was not said.
"""

from __future__ import annotations

import argparse
import collections
import gc
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import peft
import tiny_models
from damaged_files import CANARY, CONFIG, base_for, damage, save_seeds
from peft import PeftModel

#: seconds after which an input counts as a hang, and bytes that its process may take beyond what it starts with
SECONDS, MEMORY = 2.0, 400 << 20


# ---- what may come of it


def state_of(model: torch.nn.Module) -> dict[str, Any]:
    return {key: (p.detach().clone(), p.requires_grad) for key, p in model.named_parameters(remove_duplicate=False)}


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    changed = [key for key in before if key not in after or not before[key][0].equal(after[key][0])]
    return changed + [key for key in after if key not in before or before[key][1] != after[key][1]]


def files_below(folder: Path) -> dict[str, Any]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in sorted(folder.rglob("*"))
    }


def is_clear(error: BaseException) -> bool:
    """Whether an error is one that is raised on purpose."""
    if type(error).__module__.startswith("peft") or type(error).__name__ == "SafetensorError":
        return True
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = os.path.dirname(peft.__file__) in last.filename and (last.line or "").lstrip().startswith("raise")
    return ours and isinstance(error, (ValueError, OSError, RuntimeError, TypeError, ImportError, IndexError))


def one(seed: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Loads what lies in `folder` and says what came of it; `fault` is what should not."""
    model = base_for(seed)
    before, outside = state_of(model), files_below(folder.parent / CANARY)
    inside = files_below(folder)
    faults: list[str] = []
    started = time.monotonic()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            loaded = PeftModel.from_pretrained(model, folder)
            outcome = "loaded"
        except Exception as error:
            outcome = f"{type(error).__name__}: {str(error)[:200]}"
            if not is_clear(error):
                where = traceback.extract_tb(error.__traceback__)[-1]
                faults.append(f"obscure {type(error).__name__} at {os.path.basename(where.filename)}:{where.lineno}")
            if differences(before, state_of(model)):
                faults.append("the model was changed")
        else:
            faults += list(check_loaded(seed, before, loaded, [str(w.message) for w in said], folder))
    if time.monotonic() - started > SECONDS:
        faults.append("slow")
    if files_below(folder.parent / CANARY) != outside:
        faults.append("something outside was changed")
    if any(inside[key] is not None and key not in files_below(folder) for key in inside if ".peft-saved" not in key):
        faults.append("a file is gone")
    return {"outcome": outcome, "faults": faults}


def check_loaded(
    seed: dict[str, Any], before: dict[str, Any], loaded: Any, said: list[str], folder: Path
) -> Iterator[str]:
    base = tiny_models.base_state(loaded)
    allowed = seed.get("modules_to_save") or ()
    trains_bias = getattr(loaded.peft_config["default"], "bias", "none") != "none"
    start = str(getattr(loaded.peft_config["default"], "init_lora_weights", True)).split("_")[0]
    changes_base = start in ("pissa", "olora", "loftq") or getattr(loaded.peft_config["default"], "kasa_config", None)
    targets = seed.get("target_modules", ())
    for key, (value, _) in before.items():
        if changes_base or key not in base or base[key].equal(value):
            continue
        if (key.endswith("bias") and trains_bias) or any(name in key for name in allowed):
            continue
        replaced = "embed_tokens" in targets or any("replaces embeddings" in text for text in said)
        if replaced and ("embed" in key or "head" in key):
            continue  # they are saved along
        yield f"base weight {key} was changed"
    bad = [k for k, p in loaded.named_parameters() if p.is_floating_point() and not p.isfinite().all()]
    if bad and not any("finite" in text or "NaN" in text for text in said):
        yield f"{bad[0]} is not finite, and nothing was said"
    inputs = {"input_ids": tiny_models.tokens()} if "task_type" in seed else {"x": torch.ones(2, 16)}
    try:
        with torch.no_grad():
            loaded(**inputs)
        loaded.save_pretrained(folder.parent / "again")
    except Exception as error:
        if not is_clear(error):
            where = traceback.extract_tb(error.__traceback__)[-1]
            yield f"loaded, then {type(error).__name__} at {os.path.basename(where.filename)}:{where.lineno}"


def in_limits(job: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `job` returns in a process of its own with limits of time and memory."""
    read, write = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
            resource.setrlimit(resource.RLIMIT_FSIZE, (100 << 20, 100 << 20))
            signal.setitimer(signal.ITIMER_REAL, 2 * SECONDS)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            os.write(write, json.dumps(job()).encode("utf-8", "replace")[:60_000])
        except BaseException as error:
            os.write(write, json.dumps({"outcome": repr(error)[:300], "faults": [f"broke: {error!r}"[:200]]}).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not text:
        return {"outcome": f"ended by {status}", "faults": ["hang" if status == -signal.SIGALRM else f"died {status}"]}
    return json.loads(text)


def run(numbers: range, verbose: bool = False) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Every input: its number, what was done, what came of it."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.fsync = lambda descriptor: None  # what a process has written is not lost with it
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        places = save_seeds(root / "seeds")
        work = root / "work"
        for seed, place in places:  # unharmed; and what is imported on first use, once
            shutil.copytree(place, work / "adapter")
            assert one(seed, work / "adapter") == {"outcome": "loaded", "faults": []}, seed
            shutil.rmtree(work)
        gc.collect()
        gc.freeze()
        for number in numbers:
            seed, place = places[number % len(places)]
            shutil.copytree(place, work / "adapter")
            (work / CANARY / "inside").mkdir(parents=True)
            (work / CANARY / "inside" / CONFIG).write_text('{"peft_type": "LORA"}')
            done = f"{seed['peft_type']}: {damage(number, work / 'adapter')}"
            yield number, done, in_limits(lambda: one(seed, work / "adapter"))  # noqa: B023 - runs at once
            shutil.rmtree(work)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=20_000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="every input")
    options = parser.parse_args()
    kinds: collections.Counter[str] = collections.Counter()
    faults: dict[str, list[str]] = collections.defaultdict(list)
    for number, done, result in run(range(options.start, options.start + options.count)):
        kinds[result["outcome"].split(":")[0]] += 1
        for fault in result["faults"]:
            faults[fault].append(f"{number} {done} -> {result['outcome'][:120]}")
        if options.show:
            print(number, done, "->", result["outcome"], *result["faults"], sep=" | ")
    for kind, count in kinds.most_common():
        print(f"{count:6d}  {kind}")
    for fault, cases in sorted(faults.items(), key=lambda item: -len(item[1])):
        print(f"FAULT {len(cases):6d}  {fault}\n           " + "\n           ".join(cases[:3]))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
