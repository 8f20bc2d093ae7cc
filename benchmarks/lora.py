"""Around LoRA: its variants in a training step, starts that decompose the weights, adapters combined."""

from __future__ import annotations

from typing import Any

import torch
from case import DTYPES, LINEAR, Case, Clock, Part, Prepared, Row, Scale, fill, gradients, llama, sample, twin
from step import batch, kept, timed, train

import peft

TITLE = "Around LoRA"
TEXT = """\
A training step with a variant, as above, divided by that of plain LoRA; with plain LoRA on linear layers that
bitsandbytes holds in 4 bits (nf4, computing in float32), divided by that of the frozen 4-bit model. Adding an adapter
that starts with a decomposition of the weights (rank 16, all seven linear projections), and a plain one. Eight adapters
of rank 16 combined with `add_weighted_adapter`; `"linear"` sums their factors. These two are divided by nothing."""

_VARIANTS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "VeLoRA": {"velora_config": {"num_groups": 32}},
}
_STARTS = ("pissa", "pissa_niter_4", "olora")
_COMBINED = ("ties", "dare_ties", "cat", "svd")


def cases(scale: Scale) -> list[Case]:
    steps = [
        Case(f"{name}, {dtype}", lambda n=name, d=dtype: _variant(scale, n, d), [
            Row(f"step, {name}, {dtype}", "variant", "plain", 1.2 if name == "DoRA" else None),
        ], 5)
        for name, dtype in (("DoRA", "fp32"), ("DoRA", "bf16"), ("VeLoRA", "fp32"))
    ]  # fmt: skip
    starts = Case("starts", lambda: _starts(scale), [Row(f"start, {name}", name) for name in ("plain", *_STARTS)], 3)
    rows = [Row(f"combining 8, {name}", name) for name in ("linear", *_COMBINED)]
    quantised = [
        Row("step, QLoRA, nf4", "adapter", "floor"),
        Row("bytes kept, QLoRA, nf4", "adapter kept", "floor kept", unit="B"),
    ]
    steps.append(Case("QLoRA", lambda: _quantised(scale), quantised, 5))
    return [*steps, starts, Case("combining", lambda: _combining(scale), rows, 3)]


def _config(**settings: Any) -> Any:
    return peft.LoraConfig(r=16, target_modules=LINEAR, task_type="CAUSAL_LM", **settings)


def _variant(scale: Scale, name: str, dtype: str) -> Prepared:
    settings = dict(_VARIANTS[name])
    if "velora_config" in settings:
        settings["velora_config"] = peft.VeloraConfig(**settings["velora_config"])
    base, scale = llama(scale, DTYPES[dtype], use_cache=False), scale.for_dtype(dtype)
    models = {}
    for key, extra in (("plain", {}), ("variant", settings)):
        models[key] = peft.get_peft_model(twin(base), _config(**extra))
        fill(models[key])
    inputs = batch(base, scale)
    models["variant"].eval()
    train(models["variant"], inputs)
    outcome = {"logits": sample(models["variant"](**inputs).logits), "gradients": gradients(models["variant"])}
    parts = {key: timed(model.train(), inputs) for key, model in models.items()}
    return Prepared(parts, outcome, tolerance=2e-3 if dtype == "fp32" else 5e-2)


def _quantised(scale: Scale) -> Prepared:
    import bitsandbytes as bnb

    floor = llama(scale, use_cache=False).train()
    for layer in floor.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, module in list(parent.named_children()):
                if name in LINEAR:
                    packed = bnb.nn.Linear4bit(
                        module.in_features, module.out_features, bias=False, compute_dtype=torch.float32,
                        quant_type="nf4",
                    )  # fmt: skip
                    packed.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
                    setattr(parent, name, packed.to("cpu"))  # packs it
    floor.is_loaded_in_4bit = True
    adapted = peft.get_peft_model(twin(floor), _config()).train()
    fill(adapted)
    inputs = batch(floor, scale)
    train(adapted, inputs)
    outcome = {"logits": sample(adapted(**inputs).logits), "gradients": gradients(adapted)}
    parts = {
        "floor": timed(floor, inputs),
        "adapter": timed(adapted, inputs),
        "floor kept": lambda clock: kept(floor, inputs),
        "adapter kept": lambda clock: kept(adapted, inputs),
    }
    return Prepared(parts, outcome)


def _starts(scale: Scale) -> Prepared:
    base = llama(scale)

    def adding(start: Any) -> Part:
        def part(clock: Clock) -> None:
            model, config = llama(scale), _config(init_lora_weights=start)
            with clock:
                peft.get_peft_model(model, config)

        return part

    model = peft.get_peft_model(llama(scale), _config(init_lora_weights="pissa"))
    inputs = batch(base, scale)
    with torch.no_grad():
        outcome = {"logits": sample(model.eval()(**inputs).logits)}
    return Prepared({"plain": adding(True), **{name: adding(name) for name in _STARTS}}, outcome)


def _combining(scale: Scale) -> Prepared:
    torch.manual_seed(0)
    model = peft.get_peft_model(llama(scale), _config(), adapter_name="a0")
    names = [f"a{index}" for index in range(8)]
    for name in names[1:]:
        model.add_adapter(name, _config())
    for name in names:
        model.set_adapter(name)
        fill(model)

    def combine(kind: str) -> None:
        density = {"density": 0.5} if "ties" in kind else {}
        model.add_weighted_adapter(names, [1.0] * len(names), "new", combination_type=kind, **density)

    def part(kind: str) -> Part:
        def run(clock: Clock) -> None:
            with clock:
                combine(kind)
            model.delete_adapter("new")

        return run

    combine("ties")
    model.set_adapter("new")
    with torch.no_grad():
        outcome = {"logits": sample(model(**batch(model, scale)).logits)}
    model.set_adapter(names[0])
    model.delete_adapter("new")
    return Prepared({"linear": part("linear"), **{kind: part(kind) for kind in _COMBINED}}, outcome)
