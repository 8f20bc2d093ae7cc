"""`peft estimate`: what training would take, from the model's configuration alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from peft import get_peft_model, get_peft_model_state_dict
from peft.cli import models
from peft.cli.options import Estimate
from peft.cli.parse import OptionError, method_named
from peft.cli.plan import configure
from peft.cli.tasks import TASKS

#: bytes of a weight in 4 and 8 bits, with the scales of its blocks (NF4 with doubly quantised scales)
BITS4, BITS8 = 0.5 + 1 / 64 + 4 / (64 * 256), 1 + 4 / 4096
#: float32 copies of the logits that are alive at the peak beside those that are kept: themselves, the gradients of
#: cross entropy and of softmax, what the matrix product packs (as the peak of a process on a CPU shows)
LOGITS = 4
GB = 1e9
Sizes = dict[str, float]


def run(options: Estimate, fields: Mapping[str, Any], *_: Any) -> int:
    for name in ("batch_size", "length", "processes"):
        if getattr(options, name) < 1:
            raise OptionError(f"--{name.replace('_', '-')} has to be 1 or more, got {getattr(options, name)}")
    parts, facts = measure(options, fields)
    print(f"{options.method} on {options.model}: {facts['trainable']:,} of {facts['parameters']:,} parameters train;"
          f" the adapter's file has {facts['file'] / 1e6:,.1f} MB")  # fmt: skip
    for name, size in parts.items():
        print(f"  {name:<28} {size / GB:8.3f} GB")
    total = sum(parts.values())
    memory = options.memory * GB if options.memory else _memory()
    verdict = "fits" if total < 0.95 * memory else "does not fit"
    print(f"  {'peak':<28} {total / GB:8.3f} GB, beside what torch itself takes; {verdict} into {memory / GB:.1f} GB")
    return 0


def _memory() -> float:
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def measure(options: Estimate, fields: Mapping[str, Any]) -> tuple[Sizes, Sizes]:
    """(bytes by what they are for, parameters and the size of the file).

    Activations are what the backward pass of one forward pass keeps, read off a run with tensors that have no memory.
    """
    method, config = method_named(options.method), models.config_of(models.locate(options.model, print))
    configure(method, fields, "CAUSAL_LM", 100)  # a wrong field is said as it is
    try:
        with FakeTensorMode():  # tensors that have a shape and a device, and no memory
            return _measured(options, fields, method, config)
    except Exception:  # some methods move tensors in ways that these do not know
        with torch.device("meta"):
            return _measured(options, fields, method, config)


def _measured(options: Estimate, fields: Mapping[str, Any], method: str, config: Any) -> tuple[Sizes, Sizes]:
    task = TASKS["seq2seq" if config.is_encoder_decoder else "causal-lm"]
    quantised = BITS4 if options.load_in_4bit else BITS8 if options.load_in_8bit else None
    dtype = models.dtype_of(options.dtype) or (torch.bfloat16 if quantised else config.dtype or torch.float32)
    text = config.get_text_config()
    base = getattr(models.transformers(), task.auto).from_config(config, dtype=dtype)
    everything = sum(p.numel() for p in base.parameters())
    outer = {id(head) for head in (base.get_output_embeddings(),) if head is not None}
    inner = sum(m.weight.numel() for m in base.modules() if isinstance(m, torch.nn.Linear) and id(m) not in outer)
    weights = everything * dtype.itemsize + (inner * (quantised - dtype.itemsize) if quantised else 0)
    model = get_peft_model(base, configure(method, fields, task.peft, 100, layers=text))
    trains = [p for p in model.parameters() if p.requires_grad]
    own = float(sum(p.numel() * p.element_size() for p in trains))
    kept, logits = _activations(model, options)
    if options.gradient_checkpointing:  # the input of each layer, and all of one layer
        rows = options.batch_size * options.length * text.hidden_size * dtype.itemsize
        kept = text.num_hidden_layers * rows + (kept - logits) / text.num_hidden_layers + logits
    parts = {"base weights": weights / options.processes, "adapter": own, "gradients": own}
    parts |= {"optimizer (AdamW)": 2 * own, "activations": kept, "logits and their loss": LOGITS * logits}
    try:
        file = float(sum(t.numel() * t.element_size() for t in get_peft_model_state_dict(model).values()))
    except NotImplementedError:  # a soft prompt is computed when it is saved
        file = own
    trainable = sum(p.numel() for p in trains)
    return parts, {"trainable": trainable, "parameters": everything + trainable, "file": file}


def _activations(model: Any, options: Estimate) -> tuple[float, float]:
    """(bytes that a forward pass keeps for the backward pass, bytes of the logits in float32)"""
    seen: dict[int, tuple[int, Any]] = {}
    held = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    storages = {storage._cdata for storage in held}  # as long as these are held, the numbers are theirs

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in storages:
            seen[storage._cdata] = (storage.nbytes(), storage)
        return tensor

    ids = torch.zeros(options.batch_size, options.length, dtype=torch.long)
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = model(input_ids=ids, labels=ids)
    logits = found.logits
    return float(sum(size for size, _ in seen.values())), float(logits.numel() * 4)
