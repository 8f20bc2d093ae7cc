"""Start-up and handling: import, adding, switching, loading, saving, merging and deleting adapters."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from case import LINEAR, Case, Clock, Part, Prepared, Row, Scale, fill_cheaply, llama, sample, twin
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peft

TITLE = "Start-up and handling"
TEXT = """\
Import: in a fresh interpreter each time. 7B and 70B: Llamas of {s.meta_layers[0]} and {s.meta_layers[1]} layers on the
meta device, seven linear projections each. Experts: models of {s.modules[0]:,} and {s.modules[1]:,} linear modules of 8
x 8. Adding and switching: on a Llama of four layers of hidden size 64. Loading and saving: an adapter of
{s.megabytes} MB for 32 layers of a Llama of hidden size 1024, on a warm file cache; the bare counterparts are
`safetensors.torch.load_file` with a copy of every tensor, and `save_file`. Merging: LoRA of rank 16 in fp32 into
{s.merged_layers} of the 16 layers of Llama 1B in bf16; the bare counterpart adds the product of the factors to every
weight."""


def cases(scale: Scale) -> list[Case]:
    small, large = scale.modules
    many = scale.many
    return [
        Case("import", _prepare_import, [
            Row("`import peft` / `import torch`", "peft", "torch", 1.10),
            Row("`from peft import LoraConfig, PeftModel, get_peft_model` / `import torch`", "names", "torch", 1.10),
        ], runs=5),
        Case("meta", lambda: _prepare_meta(scale), [
            Row("get_peft_model, 7B", "7B"), Row("get_peft_model, 70B", "70B"), Row("second adapter, 70B", "second"),
        ], runs=3),
        Case("experts", lambda: _prepare_experts(scale), [
            Row(f"get_peft_model, {small:,} experts' modules", "small", target=0.1),
            Row(f"get_peft_model, {large:,} experts' modules", "large", target=0.1),
            Row(f"the same, {large:,} / {small:,} modules", "large", "small", 1.1 * large / small),
            Row(f"second adapter, {small:,} modules", "second", target=0.1),
            Row(f"set_adapter to the second and back, {small:,} modules", "switch"),
            Row(f"delete_adapter, {small:,} modules", "delete"),
        ], runs=1, warm_up=False),
        Case("handling", lambda: _prepare_handling(scale), [
            Row("first adapter", "first"),
            Row(f"adapter {many} / adapter 1", "last", "first", 1.0),
            Row(f"adapter {many} / adapter 2", "last", "second"),
            Row(f"set_adapter among {many} / among 2", "switch many", "switch two", 2.0),
            Row(f"delete_adapter among {many} / among 2", "delete many", "delete two"),
        ], runs=5),
        Case("files", lambda: _prepare_files(scale), [
            Row("from_pretrained / load_file and copy", "load", "bare load", 3.0),
            Row("load_adapter (a second one) / load_file and copy", "load second", "bare load"),
            Row("save_pretrained / save_file, no waiting for the disk", "save", "bare save", 1.3),
            Row("the same, synced to the disk", "save synced", "bare save synced"),
        ], runs=3, warm_up=False),  # preparing loads and saves
        Case("merge", lambda: _prepare_merge(scale), [
            Row("merge_adapter / product and add", "merge", "bare merge"),
            Row("unmerge_adapter / product and subtract", "unmerge", "bare unmerge"),
        ], runs=3, warm_up=False),  # preparing merges
    ]  # fmt: skip


def _prepare_import() -> Prepared:
    statements = {
        "torch": "import torch",
        "peft": "import peft",
        "names": "from peft import LoraConfig, PeftModel, get_peft_model",
    }
    return Prepared({name: _fresh(statement) for name, statement in statements.items()})


def _fresh(statement: str) -> Part:
    program = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"

    # As after an installation: what is compiled once is kept, that of the warm-up run already.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def part(clock: Clock) -> float:
        child = subprocess.run(
            [sys.executable, "-c", program], check=True, capture_output=True, text=True, env=environment
        )
        return float(child.stdout.split()[-1])

    return part


def _prepare_meta(scale: Scale) -> Prepared:
    held: dict[str, Any] = {}
    seven, seventy = scale.meta_layers
    sizes = {
        "7B": dict(num_hidden_layers=seven, hidden_size=4096, intermediate_size=11008),
        "70B": dict(num_hidden_layers=seventy, hidden_size=8192, intermediate_size=28672),
    }

    bases = {name: llama(scale, device="meta", **fields) for name, fields in sizes.items()}

    def add(name: str) -> Part:
        def part(clock: Clock) -> None:
            base = twin(bases[name])
            with clock:
                held["model"] = peft.get_peft_model(base, _lora(16))

        return part

    def second(clock: Clock) -> None:
        with clock:
            held.pop("model").add_adapter("second", _lora(16))

    return Prepared({"7B": add("7B"), "70B": add("70B"), "second": second})


class _Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(8, 8) for _ in range(3))


def _experts(modules: int) -> nn.Module:
    """Layers of 100 experts (or one of fewer) of three linear modules each."""
    each = min(100, modules // 3)
    return nn.ModuleList(
        nn.ModuleDict({"experts": nn.ModuleList(_Expert() for _ in range(each))}) for _ in range(modules // (3 * each))
    )


def _prepare_experts(scale: Scale) -> Prepared:
    small, large = scale.modules
    config = dict(r=4, target_modules=["w1", "w2", "w3"])
    held: dict[str, Any] = {}
    peft.get_peft_model(_experts(3), peft.LoraConfig(**config))  # imports what is imported on first use

    def add(modules: int) -> Part:
        def part(clock: Clock) -> None:
            base = _experts(modules)
            with clock:
                held["model"] = peft.get_peft_model(base, peft.LoraConfig(**config))

        return part

    def on_model(change: Callable[[Any], object]) -> Part:
        def part(clock: Clock) -> None:
            with clock:
                change(held["model"])

        return part

    def switch(model: Any) -> None:
        model.set_adapter("second")
        model.set_adapter("default")

    return Prepared({  # in this order: what is large is measured as seldom as can be
        "small": add(small),
        "second": on_model(lambda model: model.add_adapter("second", peft.LoraConfig(**config))),
        "switch": on_model(switch),
        "delete": on_model(lambda model: model.delete_adapter("second")),
        "large": add(large),
    })  # fmt: skip


def _prepare_handling(scale: Scale) -> Prepared:
    base = llama(Scale(64, 128, 4, 64))

    def adapted(count: int) -> Any:
        model = peft.get_peft_model(twin(base), _lora(8), adapter_name="a0")
        for index in range(1, count):
            model.add_adapter(f"a{index}", _lora(8))
        return model

    two, many = adapted(2), adapted(scale.many)
    last = f"a{scale.many - 1}"

    def first(clock: Clock) -> None:
        fresh = twin(base)
        with clock:
            peft.get_peft_model(fresh, _lora(8))

    def again(model: Any, name: str) -> Part:
        def part(clock: Clock) -> None:
            model.set_adapter("a0")
            model.delete_adapter(name)
            with clock:
                model.add_adapter(name, _lora(8))

        return part

    def switch(model: Any, name: str) -> Part:
        def part(clock: Clock) -> None:
            with clock:
                for wanted in (name, "a0") * 5:
                    model.set_adapter(wanted)

        return part

    def delete(model: Any, name: str) -> Part:
        def part(clock: Clock) -> None:
            with clock:
                model.delete_adapter(name)
            model.add_adapter(name, _lora(8))

        return part

    return Prepared({
        "first": first, "second": again(two, "a1"), "last": again(many, last),
        "switch two": switch(two, "a1"), "switch many": switch(many, last),
        "delete two": delete(two, "a1"), "delete many": delete(many, last),
    })  # fmt: skip


def _prepare_files(scale: Scale) -> Prepared:
    sizes = dict(hidden_size=1024, intermediate_size=2752, num_hidden_layers=32) if scale.hidden > 64 else {}
    base = llama(scale, device="meta", **sizes).to(torch.bfloat16)
    columns = sum(sum(module.weight.shape) for name, module in base.named_modules() if name.split(".")[-1] in LINEAR)
    rank = max(1, round(scale.megabytes * 1e6 / 4 / columns))
    base.to_empty(device="cpu")
    fill_cheaply(base.parameters())
    adapted = peft.get_peft_model(twin(base), _lora(rank))
    fill_cheaply(p for p in adapted.parameters() if p.requires_grad)
    folder = TemporaryDirectory()
    saved, bare = str(Path(folder.name) / "saved"), str(Path(folder.name) / "bare.safetensors")
    adapted.save_pretrained(saved)
    file = str(Path(saved) / "adapter_model.safetensors")
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    held: dict[str, Any] = {}

    def bare_load(clock: Clock) -> None:
        with clock:
            held["tensors"] = {key: tensor.clone() for key, tensor in load_file(file).items()}
        held.clear()

    def load(clock: Clock) -> None:
        fresh = twin(base)
        with clock:
            held["model"] = peft.PeftModel.from_pretrained(fresh, saved)

    def load_second(clock: Clock) -> None:
        with clock:
            held["model"].load_adapter(saved, adapter_name="second")
        held.clear()

    def writing(write: Callable[[], object], path: str, sync: bool) -> Part:
        def part(clock: Clock) -> None:
            with nullcontext() if sync else _no_sync(), clock:
                write()
                if sync:
                    _sync(path)

        # What another part has written may still be on its way to the disk.
        return lambda clock: (os.sync(), part(clock))[1]

    load(Clock())
    loaded = sorted((key, p) for key, p in held.pop("model").named_parameters() if "lora_" in key)
    outcome = {"loaded": torch.cat([sample(p, 16) for _, p in loaded])}
    outcome["saved"] = torch.cat([sample(tensors[key], 16) for key in sorted(tensors)])
    return Prepared({
        "bare load": bare_load, "load": load, "load second": load_second,
        "bare save": writing(lambda: save_file(tensors, bare), bare, False),
        "save": writing(lambda: adapted.save_pretrained(saved), file, False),
        "bare save synced": writing(lambda: save_file(tensors, bare), bare, True),
        "save synced": writing(lambda: adapted.save_pretrained(saved), file, True),
        "folder": lambda clock: float(len(os.listdir(folder.name))),  # lives as long as the parts
    }, outcome)  # fmt: skip


def _no_sync() -> AbstractContextManager[Any]:
    return mock.patch.object(os, "fsync", lambda descriptor: None)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDWR)
    os.fsync(descriptor)
    os.close(descriptor)


def _prepare_merge(scale: Scale) -> Prepared:
    sizes = dict(hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8)
    sizes["num_hidden_layers"] = scale.merged_layers
    base = llama(scale, device="meta", **(sizes if scale.merged_layers else {})).to(torch.bfloat16)
    base.to_empty(device="cpu")
    fill_cheaply(base.parameters())
    model = peft.get_peft_model(base, _lora(16))
    fill_cheaply(p for p in model.parameters() if p.requires_grad)
    layers = [module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")]
    factors = [(layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data) for layer in layers]

    def weights() -> list[Tensor]:  # anew each time: merging may put other tensors in their place
        return [layer.base_layer.weight.data for layer in layers]

    def bare(sign: float) -> Part:
        def part(clock: Clock) -> None:
            with clock:
                for weight, (a, b) in zip(weights(), factors, strict=True):
                    weight += (b @ a * sign).to(weight.dtype)

        return part

    def change(action: Callable[[], object]) -> Part:
        def part(clock: Clock) -> None:
            with clock:
                action()

        return part

    model.merge_adapter()
    outcome = {"merged": torch.cat([sample(weight, 16) for weight in weights()])}
    model.unmerge_adapter()
    return Prepared({
        "bare merge": bare(0.5), "bare unmerge": bare(-0.5),
        "merge": change(model.merge_adapter), "unmerge": change(model.unmerge_adapter),
    }, outcome, tolerance=1e-2)  # fmt: skip


def _lora(rank: int) -> Any:
    return peft.LoraConfig(r=rank, target_modules=LINEAR, task_type="CAUSAL_LM")
