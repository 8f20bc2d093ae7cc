"""A small network of linear layers, and what a LoRA on it does: on whole layers, or on Megatron's in two processes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft import IA3Config, LoraConfig, PeftModel, convert_to_lora, get_peft_model, get_peft_model_state_dict
from peft.lora_tools.hotswap import prepare_model_for_compiled_hotswap

PROCESSES = 2
WIDTH, INNER = 8, 12
SETTINGS = dict(num_layers=1, hidden_size=WIDTH, num_attention_heads=2, use_cpu_initialization=True)
Make = Callable[[], "Mlp"]


class Mlp(nn.Module):
    """x [sequence, batch, 8] to the same; `up` and `down` give an output, or a pair of one and a bias."""

    def __init__(self, up: nn.Module, down: nn.Module):
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x: Tensor) -> Tensor:
        return _plus_bias(self.down(torch.tanh(_plus_bias(self.up(x)))))


def _plus_bias(result: Any) -> Tensor:
    if not isinstance(result, tuple):
        return result
    output, bias = result
    return output if bias is None else output + bias


def tensors() -> dict[str, Tensor]:
    """The whole weights, and an input."""
    torch.manual_seed(0)
    sizes = {"up.weight": (INNER, WIDTH), "up.bias": (INNER,), "down.weight": (WIDTH, INNER), "down.bias": (WIDTH,)}
    return {name: torch.randn(size) / 2 for name, size in {**sizes, "x": (4, 3, WIDTH)}.items()}


def whole() -> Mlp:
    model = Mlp(nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH))
    model.load_state_dict({name: value for name, value in tensors().items() if name != "x"})
    return model


def shared_out(rank: int, gather: bool, **settings: Any) -> Mlp:
    """The same network; between its layers, each process has all of the activations (`gather`) or a part."""
    from megatron.core import tensor_parallel
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(**{**SETTINGS, "tensor_model_parallel_size": PROCESSES, **settings})
    common = dict(config=config, init_method=nn.init.zeros_, bias=True, skip_bias_add=not gather)
    up = tensor_parallel.ColumnParallelLinear(WIDTH, INNER, gather_output=gather, **common)
    down = tensor_parallel.RowParallelLinear(INNER, WIDTH, input_is_parallel=not gather, **common)
    model, values = Mlp(up, down), tensors()
    with torch.no_grad():
        up.weight.copy_(values["up.weight"].chunk(PROCESSES)[rank])
        up.bias.copy_(values["up.bias"].chunk(PROCESSES)[rank])
        down.weight.copy_(values["down.weight"].chunk(PROCESSES, dim=1)[rank])
        down.bias.copy_(values["down.bias"])
    return model


def joined(name: str, parts: list[Tensor]) -> Tensor:
    """A tensor of the network or of a LoRA on it, whole again."""
    if "up.lora_B" in name or "up.base_layer" in name:
        return torch.cat(parts)
    if "down.lora_A" in name or "down.base_layer.weight" in name:
        return torch.cat(parts, dim=1)
    for part in parts[1:]:  # each process has all of it
        torch.testing.assert_close(part, parts[0], rtol=0, atol=0, msg=lambda text: f"{name}: {text}")
    return parts[0]


def config_for(model: Mlp, **settings: Any) -> LoraConfig:
    megatron = None if isinstance(model.up, nn.Linear) else SETTINGS
    common = dict(r=4, target_modules=["up", "down"], init_lora_weights=False, megatron_config=megatron)
    return LoraConfig(**{**common, **settings})


def adapted(make: Make, **settings: Any) -> PeftModel:
    torch.manual_seed(1)
    model = make()
    return get_peft_model(model, config_for(model, **settings))


def trained(model: PeftModel, x: Tensor, steps: int = 3) -> dict[str, Tensor]:
    """The adapter's tensors after some steps."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return _copy(get_peft_model_state_dict(model))


def _copy(values: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in dict(values).items() if isinstance(value, Tensor)}


def observe(make: Make, folder: Path) -> dict[str, Any]:
    """What a LoRA does, step by step."""
    seen: dict[str, Any] = {}
    x = tensors()["x"]
    model = adapted(make, use_rslora=True, lora_alpha=3)
    seen["start"] = _copy(get_peft_model_state_dict(model))
    moving = x.clone().requires_grad_()
    seen["output"] = model(moving)
    seen["output"].square().sum().backward()
    seen["gradient of x"] = moving.grad
    seen["gradients"] = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    seen["trained"] = trained(model, x)

    model.eval()
    model.save_pretrained(folder)
    seen["loaded"] = PeftModel.from_pretrained(make(), folder)(x)
    seen["from meta"] = PeftModel.from_pretrained(make(), folder, low_cpu_mem_usage=True)(x)
    before = _copy((n, p) for n, p in model.named_parameters() if "base_layer" in n)
    model.merge_adapter(safe_merge=True)
    seen["merged"], seen["merged weights"] = model(x), _copy((n, p) for n, p in model.named_parameters() if "base" in n)
    model.unmerge_adapter()
    seen["unmerged"] = all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    with model.disable_adapter():
        seen["disabled"] = model(x)

    torch.manual_seed(2)
    model.add_adapter("other", config_for(make(), r=2, target_modules=["up"]))
    model.base_model.set_adapter(["default", "other"])
    seen["two"] = model(x)
    model.add_weighted_adapter(["default", "other"], [0.5, -1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    seen["sum"] = model(x)
    seen["alone"] = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        seen["alone"][name] = model(x)
    if type(model.base_model.model.up.base_layer) is not nn.Linear:  # that counts samples first
        seen["mixed"] = model(x, adapter_names=["other", "__base__", "default"])
    model.delete_adapter("other")
    seen["merged for good"] = model.merge_and_unload()(x)

    seen["bf16"] = adapted(lambda: make().bfloat16())(x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        seen["autocast"] = adapted(make)(x).bfloat16()  # a bias that is added outside of the layers is in float32
    torch.manual_seed(3)
    seen["with dropout"] = trained(adapted(make, lora_dropout=0.5).train(), x)
    return seen


def observe_sequence(rank: int) -> dict[str, Any]:
    """With sequence parallelism: each process has some of the tokens where no layer needs them all."""
    settings = {**SETTINGS, "sequence_parallel": True, "tensor_model_parallel_size": PROCESSES}
    model = adapted(lambda: shared_out(rank, False, **settings), megatron_config=settings)
    x = tensors()["x"].chunk(PROCESSES)[rank].clone().requires_grad_()
    output = model(x)
    output.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    prepare_model_for_compiled_hotswap(model, target_rank=6)  # new parameters, of the same kind
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {
        "output": output,
        "with room": model(x),
        "gradient of x": x.grad,
        "gradients": gradients,
        "of own tokens": [name for name, p in trained.items() if getattr(p, "sequence_parallel", False)],
        "shared out": [name for name, p in trained.items() if getattr(p, "tensor_model_parallel", False)],
    }


def errors(rank: int) -> dict[str, str]:
    """What is said of what cannot be done."""
    wrong: dict[str, Callable[[], Any]] = {
        "no config": lambda: adapted(make, megatron_config=None),
        "other config": lambda: adapted(make, megatron_config={**SETTINGS, "layers": 3}),
        "object": lambda: adapted(make, megatron_config={**SETTINGS, "params_dtype": torch.bfloat16}),
        "sequence": lambda: adapted(make, megatron_config={**SETTINGS, **sequence}),
        "pissa": lambda: adapted(make, init_lora_weights="pissa"),
        "dora": lambda: adapted(make, use_dora=True),
        "bias": lambda: adapted(make, lora_bias=True),
        "expert": lambda: adapted(expert),
        "engine": lambda: adapted(engine),
        "svd": lambda: adapted(make).add_weighted_adapter(["default"], [1.0], "svd", combination_type="svd"),
        "convert": lambda: convert_to_lora(adapted(make), 2),
        "ia3": lambda: get_peft_model(make(), IA3Config(target_modules=["up"], feedforward_modules=[])),
    }
    sequence = {"sequence_parallel": True, "tensor_model_parallel_size": PROCESSES}

    def make() -> Mlp:
        return shared_out(rank, False)

    def expert() -> Mlp:
        model = make()
        model.up.is_expert = True
        return model

    def engine() -> Mlp:
        """With a layer that Megatron makes of one of Transformer Engine's."""
        place = {"__module__": "megatron.core.extensions.transformer_engine"}
        model = make()
        model.up = type("TEColumnParallelLinear", (nn.Module,), place)()
        model.up.in_features, model.up.out_features = WIDTH, INNER
        model.up.weight = nn.Parameter(torch.zeros(INNER, WIDTH))
        return model

    said = {}
    for what, call in wrong.items():
        try:
            call()
        except (ValueError, TypeError, ImportError) as error:
            said[what] = f"{type(error).__name__}: {error}"
    return said


def run(rank: int, folder: str, path: list[str]) -> None:
    """One of the processes: writes down what it has seen."""
    sys.path[:0] = path
    from megatron.core import parallel_state

    torch.set_num_threads(1)
    if not torch.cuda.is_available():  # Megatron puts what it gathers on the current device, and asks CUDA for it
        torch.cuda.current_device = lambda: torch.device("cpu")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=PROCESSES)
    seen: dict[Any, Any] = {}
    for gather in (False, True):
        seen[gather] = observe(lambda gather=gather: shared_out(rank, gather), Path(folder) / f"{gather}-{rank}")
    seen["sequence"], seen["errors"] = observe_sequence(rank), errors(rank)
    torch.save(seen, f"{folder}/seen-{rank}.pt")
    torch.distributed.destroy_process_group()
