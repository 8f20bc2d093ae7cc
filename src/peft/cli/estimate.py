"""`peft estimate`: what training would take, from the model's configuration alone.

Two steps of training are run with tensors that have a shape and a device, and no memory; what they would hold is
counted.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft import get_peft_model, get_peft_model_state_dict
from peft.cli import models
from peft.cli.options import explained
from peft.cli.parse import method_named
from peft.cli.plan import configure
from peft.ops.internals import is_fake

#: bytes of a weight in 4 and 8 bits, with the scales of its blocks (NF4 with doubly quantised scales)
BITS4, BITS8 = 0.5 + 1 / 64 + 4 / (64 * 256), 1 + 4 / 4096
GB = 1e9
Sizes = dict[str, float]


def run(options: Any, fields: Mapping[str, Any], *_: Any) -> None:
    parts, facts = measure(options, fields)
    if options.json:
        return print(json.dumps({**facts, **parts}))
    print(f"{options.method} on {options.model}: {facts['trainable']:,} of {facts['parameters']:,} parameters train;"
          f" the adapter's file has {facts['file'] / 1e6:,.1f} MB")  # fmt: skip
    print(f"For {options.batch_size} x {facts['length']} tokens:")
    for name, size in {**parts, "peak": facts["peak"]}.items():
        print(f"  {name:<28} {size / GB:8.3f} GB")
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if torch.cuda.is_available():
        here = torch.cuda.get_device_properties(0).total_memory
    memory = options.memory or here / GB
    verdict = "fits" if facts["peak"] < 0.95 * memory * GB else "does not fit"
    print(f"That {verdict} into {memory:.1f} GB; torch itself takes some more")


def measure(options: Any, fields: Mapping[str, Any]) -> tuple[Sizes, Sizes]:
    """(bytes by what they are for, which are not all there at one time; the peak, parameters and the file's size)"""
    method, source = method_named(options.method), models.locate(options.model)
    config = models.config_of(source)
    quantised = BITS4 if options.load_in_4bit else BITS8 if options.load_in_8bit else None
    task, length = models.writer_of(config), min(options.length, models.longest(config))  # as in training
    configured = configure(method, fields, task.peft, 100, layers=config.get_text_config())
    dtype = models.placed(options)["dtype"] or (torch.bfloat16 if quantised else config.dtype or torch.float32)
    base = models.skeleton(source, task.auto, dtype)
    with torch.device("meta"):
        everything = sum(p.numel() for p in base.parameters())
        base.config.use_cache = False  # as in training
        head = base.get_output_embeddings()
        inner = sum(m.weight.numel() for m in base.modules() if isinstance(m, nn.Linear) and m is not head)
        model = get_peft_model(base, configured)
    trains = [p for p in model.parameters() if p.requires_grad]
    own, trainable = sum(p.nbytes for p in trains), sum(p.numel() for p in trains)
    with explained(f"--method {options.method} needs values, which an estimate has none of", of=RuntimeError):
        held, peak, file = _trained(model, options, length)
    weights = everything * dtype.itemsize
    kept = (weights + (inner * (quantised - dtype.itemsize) if quantised else 0)) / options.processes
    parts = {"base weights": kept, "adapter": own, "gradients": own, "optimizer (AdamW)": 2 * own}
    parts["activations and loss"] = peak - held
    facts = {"trainable": trainable, "parameters": everything + trainable, "file": file, "length": length}
    return parts, {**facts, "peak": peak - weights + kept}


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, and how many there were at most at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: Any = weakref.WeakKeyDictionary()

    def note(self, *values: Any) -> None:
        for value in values:
            storage = value.untyped_storage() if isinstance(value, torch.Tensor) else None
            if storage is not None and storage not in self.seen:
                size = self.seen[storage] = storage.nbytes()
                self.now += size
                weakref.finalize(storage, self._gone, size)
        self.peak = max(self.peak, self.now)

    def _gone(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and not args[0].is_floating_point() and is_fake(args[0]):
            return False  # whether a mask is of ones only, which transformers 4.57 asks; the largest number of a task
        found = func(*args, **(kwargs or {}))
        self.note(*tree_leaves(found))
        return found


def _trained(model: Any, options: Any, length: int) -> tuple[int, int, int]:
    """(bytes that are there between two steps of training, bytes at the peak, bytes of the adapter when it is saved)"""
    from accelerate.utils import convert_outputs_to_fp32

    live, forward = Live(), model
    numbered = not {"num_tasks", "n_tasks"}.isdisjoint(vars(model.active_peft_config))
    if options.dtype == "bfloat16" or (options.dtype == "float16" and options.device != "cpu"):  # as Trainer does
        forward = convert_outputs_to_fp32(torch.autocast("cpu", getattr(torch, options.dtype))(model))
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.train().modules():  # each once, where several layers share one
            module.to_empty(device="cpu", recurse=False)
        model.get_base_model().tie_weights()
        if options.gradient_checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False)
        live.note(*model.parameters(), *model.buffers())
        with live:
            for _ in range(2):  # the optimizer has its moments in the second
                ids = torch.zeros(options.batch_size, length, dtype=torch.long)
                # With a mask, as padded texts have one; attention repeats keys and values of groups then.
                tasks = {"task_ids": ids[:, 0]} if numbered else {}
                forward(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, **tasks).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return live.now, live.peak, sum(t.nbytes for t in get_peft_model_state_dict(model).values())
