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

#: seconds of the processor after which an input counts as a hang; bytes that a process may take beyond what it starts
#: with; inputs that one process goes through, at most
SECONDS, MEMORY, BATCH = 2.0, 400 << 20, 25


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
    started = time.process_time()
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
    if time.process_time() - started > SECONDS:
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


def in_limits(numbers: range, job: Callable[[int], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What `job` returns for each number, in a process with limits of time and memory; in a new one after an end."""
    done = 0
    while done < len(numbers):
        read, write = os.pipe()
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os.close(read)
            _work(write, numbers[done : done + BATCH], job)
        os.close(write)
        count = 0
        with os.fdopen(read) as pipe:
            for line in pipe:
                count += 1
                yield json.loads(line)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        done += count
        if count < min(BATCH, len(numbers) - (done - count)):
            hung = status in (-signal.SIGALRM, -signal.SIGPROF)
            yield {"done": numbers[done], "outcome": "ended", "faults": ["hang" if hung else f"died of {status}"]}
            done += 1


def _work(write: int, numbers: range, job: Callable[[int], dict[str, Any]]) -> None:
    """Writes what `job` returns for each number, a line each, and ends the process."""
    status = 1
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100 << 20, 100 << 20))
        for sign in (signal.SIGALRM, signal.SIGPROF):
            signal.signal(sign, signal.SIG_DFL)
        for number in numbers:
            signal.setitimer(signal.ITIMER_PROF, 2 * SECONDS)  # of the processor's time
            signal.setitimer(signal.ITIMER_REAL, 40 * SECONDS)  # where it waits; the machine may be busy
            os.write(write, json.dumps(job(number)).encode() + b"\n")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def run(numbers: range) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every input: its number, and what was done and what came of it."""
    offline = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    sync, os.fsync = os.fsync, lambda descriptor: None  # what a process has written is not lost with it
    try:
        with tempfile.TemporaryDirectory() as name:
            places = save_seeds(Path(name) / "seeds")
            work = Path(name) / "work"
            for seed, place in places:  # unharmed; and what is imported on first use, once
                shutil.copytree(place, work / "adapter")
                found = one(seed, work / "adapter")
                assert found == {"outcome": "loaded", "faults": []}, (seed, found)
                shutil.rmtree(work)

            def job(number: int) -> dict[str, Any]:
                shutil.rmtree(work, ignore_errors=True)
                seed, place = places[number % len(places)]
                shutil.copytree(place, work / "adapter")
                (work / CANARY / "inside").mkdir(parents=True)
                (work / CANARY / "inside" / CONFIG).write_text('{"peft_type": "LORA"}')
                done = f"{seed['peft_type']}: {damage(number, work / 'adapter')}"
                return {"done": ascii(done), **one(seed, work / "adapter")}

            gc.collect()
            gc.freeze()
            yield from zip(numbers, in_limits(numbers, job), strict=True)
    finally:
        os.environ.pop("HF_HUB_OFFLINE")
        if offline is not None:
            os.environ["HF_HUB_OFFLINE"] = offline
        os.fsync = sync
        gc.unfreeze()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=20_000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="every input")
    options = parser.parse_args()
    kinds: collections.Counter[str] = collections.Counter()
    faults: dict[str, list[str]] = collections.defaultdict(list)
    for number, result in run(range(options.start, options.start + options.count)):
        done = result["done"]
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
